"""The public names, and what importing the package costs."""

import subprocess
import sys

import pytest

import rlhf_kernels


@pytest.mark.parametrize("name", rlhf_kernels.__all__)
def test_every_public_name_is_importable_and_documented(name):
    assert getattr(rlhf_kernels, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_op"):
        rlhf_kernels.no_such_op  # noqa: B018


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import sys, rlhf_kernels, rlhf_trainer; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
