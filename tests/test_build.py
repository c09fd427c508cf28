"""The compiled extensions: in step with the Python code, and vectorised."""

import hashlib
import platform
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import rlhf_kernels
from rlhf_kernels.ops import registry

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = {
    1: "fdf2547aae7535c1",
    2: "140d33c51ab2bcdc",
    3: "a986c17da8ffd9e3",
    4: "5b0130a77f9eadd8",
    5: "62d31b156a0bb5b1",
}  # ABI -> digest of the schemas that have it
ROW_KERNELS = ("mass_chunk", "ratio_chunk", "exp_chunk", "js_chunk", "grad_plain", "grad_ratio", "block_weights")
ROW_KERNELS += ("load_bf16", "load_half", "store_bf16", "store_half")

PAIRED = r"avx512_bf16::attend_tile<[^>]*Pairs, \d>"
UNITS = [("avx512_multiply", "vdpbf16ps"), ("float_multiply", "vfmadd"), ("amx_multiply", "tdpbf16ps")]

built = pytest.mark.skipif(not registry.native_available(), reason="the compiled ops are not built")


def test_an_extension_built_from_other_sources_is_refused(monkeypatch):
    stale = types.ModuleType("rlhf_kernels._C")
    monkeypatch.setitem(sys.modules, "rlhf_kernels._C", stale)
    monkeypatch.setattr(rlhf_kernels, "_C", stale, raising=False)
    with pytest.raises(ImportError, match=r"ABI None.*needs \d+; rebuild"):
        registry.native_available()
    stale.ABI = registry.ABI
    assert registry.native_available()


def test_without_an_extension_the_ops_are_served_by_the_definitions(monkeypatch):
    monkeypatch.setitem(sys.modules, "rlhf_kernels._C", None)
    monkeypatch.delattr(rlhf_kernels, "_C", raising=False)
    assert not registry.native_available()


def test_a_change_of_the_schemas_raises_the_abi_number():
    source = (ROOT / "csrc" / "schema.cpp").read_text()
    schemas = re.findall(r"m\.def\((.*?)\);", source, flags=re.DOTALL)
    text = "\n".join("".join(re.findall(r'"(.*?)"', schema)) for schema in schemas)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    number = re.search(r"kAbi = (\d+);", source)
    assert number is not None
    assert int(number[1]) == registry.ABI
    assert SCHEMAS.get(registry.ABI) == digest, (
        f"the schemas have changed: raise ABI in csrc/schema.cpp and ops/registry.py, and note its digest {digest} here"
    )


@built
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="512-bit registers are x86-64's")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_the_row_kernels_use_512_bit_registers_where_there_are_some(kernel):
    code = wide_clones()
    assert kernel in code, f"no AVX-512 version of {kernel}; there are {sorted(code)}"
    assert "%zmm" in code[kernel]


@built
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the tile units are x86-64's")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
@pytest.mark.parametrize(("kernel", "instruction"), UNITS)
def test_the_tile_kernels_use_their_units_and_keep_their_sums_in_registers(kernel, instruction):
    code = re.search(rf"<[^>]*{kernel}\([^>]*\)>:\n(.*?)\n\n", disassembly(), flags=re.DOTALL)
    assert code is not None
    assert instruction in code[1]
    spilled = [line for line in code[1].splitlines() if "%zmm" in line and re.search(r"\(%r[sb]p", line)]
    assert not spilled


@built
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX512-BF16 is x86-64's")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
def test_attention_multiplies_bf16_by_pairs():
    tiles = re.findall(rf"<[^\n]*{PAIRED}\([^\n]*\)>:\n(.*?)\n\n", disassembly(), flags=re.DOTALL)
    assert len(tiles) == 4
    assert all(tile.count("vdpbf16ps") >= 8 for tile in tiles)


def disassembly() -> str:
    if not _WHOLE:
        done = subprocess.run(
            ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", rlhf_kernels._C.__file__],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        _WHOLE.append(done.stdout)
    return _WHOLE[0]


def wide_clones() -> dict[str, str]:
    """Function name -> disassembly of its x86-64-v4 version in the built ops."""
    if not _DISASSEMBLED:
        for block in disassembly().split("\n\n"):
            title = re.match(r"[0-9a-f]+ <.*?(\w+)\(.*arch_x86_64_v4\]>:", block)
            if title:
                _DISASSEMBLED[title[1]] = block
    return _DISASSEMBLED


_WHOLE: list[str] = []
_DISASSEMBLED: dict[str, str] = {}
