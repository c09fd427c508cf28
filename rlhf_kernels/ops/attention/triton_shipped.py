"""What of attention's Triton kernels is compiled ahead of time: common dims, and the largest with every option."""

from typing import Any

import torch

from rlhf_kernels.ops.attention import triton_append, triton_backward, triton_decode, triton_forward
from rlhf_kernels.ops.attention import triton_launch as launch
from rlhf_kernels.ops.attention.triton_launch import Shape
from rlhf_kernels.ops.shipped import Shipped

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTEGERS = ("cu", "table", "context")  # int32 tensors
FLOATS = ("factor", "cap", "scale")
SLICE = 16  # tokens


def shipped(arch: str) -> list[Shipped]:
    return [
        forward("attention (d 128)", arch),
        forward("attention (d 80, dv 64, heads of 3)", arch, d=80, dv=64, group=3),
        forward("attention (d 256, window, softcap)", arch, d=256, special=True),
        forward("attention (fp32, d 256, window, softcap)", arch, d=256, kind="fp32", special=True),
        forward("attention (slices, d 128)", arch, slices=True),
        forward("attention (slices, d 256, window, softcap)", arch, d=256, slices=True, special=True),
        decode("attention_decode (d 128)", arch),
        decode("attention_decode (d 256, window, softcap, one split)", arch, d=256, special=True, whole=True),
        decode("attention_decode (fp32, d 256, softcap)", arch, d=256, kind="fp32", special=True),
        _made("attention_merge", triton_decode.attention_merge, {"parts": "*fp32", "sums": "*fp32", "out": "*bf16"},
              {"DV": 128, "BDV": 128, "WINDOWED": True}, 1),
        _made("attention_delta", triton_backward.attention_delta, {"grad": "*bf16", "out": "*bf16"},
              {"DV": 256, "BDV": 256, "BM": triton_backward.DELTA_ROWS}, 4),
        *(
            backward(name, grad, arch, **more)
            for grad in (triton_backward.attention_keys_grad, triton_backward.attention_queries_grad)
            for name, more in GRADIENTS.items()
        ),
        _made("arena_append (8 heads, d 128)", triton_append.arena_append,
              {"slots": "*i64", **dict.fromkeys(("keys", "values", "k", "v"), "*bf16")},
              {"SLICE": SLICE, "D": 128, "DV": 128, "BD": 128, "BDV": 128, "BH": 8}, 4),
    ]  # fmt: skip


GRADIENTS: dict[str, dict[str, Any]] = {
    "d 128": {},
    "d 80, dv 64, heads of 3": {"d": 80, "dv": 64, "group": 3},
    "d 256, window, softcap": {"d": 256, "special": True},
    "fp32, d 256, window, softcap": {"d": 256, "kind": "fp32", "special": True},
}


def forward(
    name: str, arch: str, *, d: int = 128, dv: int | None = None, group: int = 4, kind: str = "bf16",
    special: bool = False, slices: bool = False,
) -> Shipped:  # fmt: skip
    shape = Shape(group, d, dv or d, KINDS[kind])
    tile = launch.row_tile(launch.forward_tile_on(arch, shape), group)
    types = dict.fromkeys(("q", "k", "v", "out"), f"*{kind}") | {"lse": "*fp32"}
    left_out = ("lse",) if slices else ("table", "context")
    constants = _constants(shape, tile, special) | {"SLICE": SLICE if slices else 0} | dict.fromkeys(left_out)
    return _made(name, triton_forward.attention_forward, types, constants, tile.warps, tile.stages, gemm=kind != "fp32")


def decode(
    name: str, arch: str, *, d: int = 128, dv: int | None = None, group: int = 4, kind: str = "bf16",
    special: bool = False, whole: bool = False,
) -> Shipped:  # fmt: skip
    shape = Shape(group, d, dv or d, KINDS[kind])
    tile = launch.row_tile(launch.decode_tile_on(arch, shape), group)
    types = dict.fromkeys(("q", "k", "v"), f"*{kind}") | {"out": f"*{kind}" if whole else "*fp32", "sums": "*fp32"}
    constants = _constants(shape, tile, special) | {"SLICE": SLICE, "WHOLE": whole}
    constants |= {"sums": None} if whole else {}
    return _made(name, triton_decode.attention_decode, types, constants, tile.warps, tile.stages, few=kind != "fp32")


def backward(
    name: str, kernel: Any, arch: str, *, d: int = 128, dv: int | None = None, group: int = 4, kind: str = "bf16",
    special: bool = False,
) -> Shipped:  # fmt: skip
    shape = Shape(group, d, dv or d, KINDS[kind])
    of_keys = kernel is triton_backward.attention_keys_grad
    choose = launch.keys_grad_tile_on if of_keys else launch.queries_grad_tile_on
    tile = launch.row_tile(choose(arch, shape), group)
    types = dict.fromkeys(("q", "k", "v", "grad", "dq", "dk", "dv"), f"*{kind}")
    name = f"attention_{'keys' if of_keys else 'queries'}_grad ({name})"
    constants = _constants(shape, tile, special) | ({} if of_keys else {"DELTA": False})
    many = (tile.bn if of_keys else tile.bm) >= 64
    return _made(
        name, kernel, types, constants, tile.warps, tile.stages, gemm=kind != "fp32" and many,
        few=kind != "fp32" and not many,
    )  # fmt: skip


def _constants(shape: Shape, tile: launch.Tile, special: bool) -> dict[str, Any]:
    options = {"WINDOWED": special, "CAPPED": special, "PRECISE": shape.precise}
    return {**shape.constants(), **options, "BM": tile.bm, "BN": tile.bn}


def _made(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int = 3,
    gemm: bool = False, few: bool = False,
) -> Shipped:  # fmt: skip
    """types: of what is no stride, count or option."""
    known = dict.fromkeys(INTEGERS, "*i32") | dict.fromkeys(FLOATS, "fp32") | dict.fromkeys(("lse", "delta"), "*fp32")
    known |= types
    signature = {n: known.get(n, "i32") for n in kernel.arg_names if n not in constants}
    strides = [n for n in signature if n.endswith(("_token", "_head", "_slice"))]
    pointers = [n for n, kind in signature.items() if kind.startswith("*")]
    return Shipped(
        name, kernel, signature, constants, num_warps=warps, num_stages=stages, divisible=(*pointers, *strides),
        gemm=gemm, few_rows=few,
    )  # fmt: skip
