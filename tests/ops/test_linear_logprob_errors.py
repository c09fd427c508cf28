"""linear_logprob names what is wrong with its arguments before any work."""

import math

import pytest
import torch

from rlhf_kernels.ops.logprob import linear_logprob

GOOD = {"hidden": torch.randn(4, 8), "weight": torch.randn(10, 8), "target": torch.arange(4)}
BAD = {
    "target too large": ({"target": torch.tensor([0, 1, 2, 10])}, IndexError, "target holds 10"),
    "target negative": ({"target": torch.tensor([0, 1, 2, -1])}, IndexError, "target holds -1"),
    "target dtype": ({"target": torch.zeros(4)}, TypeError, "target has dtype"),
    "target shape": ({"target": torch.arange(3)}, ValueError, "target has shape"),
    "weight shape": ({"weight": torch.randn(10, 9)}, ValueError, "weight has shape"),
    "weight dtype": ({"weight": torch.randn(10, 8).double()}, TypeError, "weight has dtype"),
    "bias shape": ({"bias": torch.randn(9)}, ValueError, "bias has shape"),
    "temperature zero": ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
    "temperature in a row": ({"temperature": torch.tensor([1.0, 1, 0, 1])}, ValueError, "temperature holds 0.0"),
    "temperature shape": ({"temperature": torch.ones(3)}, ValueError, "temperature has shape"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    "logit_scale": ({"logit_scale": 0}, ValueError, "logit_scale is 0"),
    "divergence": ({"divergence": ("tv",), "ref_hidden": torch.randn(4, 8)}, ValueError, "divergence holds"),
    "no reference": ({"divergence": ("kl",)}, ValueError, "ref_hidden is None"),
    "reference shape": ({"ref_hidden": torch.randn(3, 8)}, ValueError, "ref_hidden has shape"),
    "grad_fields": ({"grad_fields": ("entropy",)}, ValueError, "grad_fields holds"),
    "save": ({"save": "all"}, ValueError, "save is 'all'"),
    "valid_rows": ({"valid_rows": 5}, ValueError, "valid_rows is 5"),
    "valid_rows wrong": ({"valid_rows": 3}, ValueError, "valid_rows is 3"),
    "grad_vector": ({"save": "grad_vector", "weight": torch.randn(10, 8, requires_grad=True)}, ValueError, "save="),
    "lora shape": ({"lora": (torch.randn(2, 8), torch.randn(9, 2), None, 1.0)}, ValueError, "lora B has shape"),
    "lora index": ({"lora": (torch.randn(2, 8), torch.randn(10, 2), 1, 1.0)}, IndexError, "adapter_index is 1"),
    "lora indices": (
        {"lora": (torch.randn(2, 8), torch.randn(10, 2), torch.tensor([0, 0, 3, 0]), 1.0)}, IndexError, "adapter_index",
    ),
}  # fmt: skip


BAD_ANYWHERE = {
    "hidden is a list": ({"hidden": [1.0]}, TypeError, "hidden is a list"),
    "weight is None": ({"weight": None}, TypeError, "weight is a NoneType"),
    "temperature of text": ({"temperature": "1"}, TypeError, "temperature is '1'"),
    "softcap of text": ({"softcap": "1"}, TypeError, "softcap is '1'"),
    "logit_scale nan": ({"logit_scale": math.nan}, ValueError, "logit_scale is nan"),
}


@pytest.mark.parametrize(
    ("options", "error", "message"), (BAD | BAD_ANYWHERE).values(), ids=(BAD | BAD_ANYWHERE).keys()
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        linear_logprob(**{**GOOD, **options})


VALUES = {name: case for name, case in BAD.items() if name != "weight dtype"}


@pytest.mark.parametrize(("options", "error", "message"), VALUES.values(), ids=VALUES.keys())
def test_bad_input_is_named_in_float64_too(options, error, message):
    def wide(x):
        if isinstance(x, tuple):
            return tuple(wide(y) for y in x)
        floating = isinstance(x, torch.Tensor) and x.dtype == torch.float32
        return x.detach().double().requires_grad_(x.requires_grad) if floating else x

    with pytest.raises(error, match=message):
        linear_logprob(**{k: wide(v) for k, v in {**GOOD, **options}.items()})
