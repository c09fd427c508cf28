"""What of lora_linear's Triton kernels is compiled ahead of time: each with the smallest and the largest tiles that its
launcher chooses, one projection and three, aligned operands and any."""

from typing import Any

import torch

from rlhf_kernels.ops.lora import triton_expand, triton_gemm, triton_outer, triton_shrink
from rlhf_kernels.ops.lora import triton_launch as launch
from rlhf_kernels.ops.shipped import Shipped

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def shipped(arch: str) -> list[Shipped]:
    made = [
        _shrink("lora_shrink (S, r 16)", arch, rank=16),
        _shrink("lora_shrink (dS of three, r 128, order)", arch, rank=128, sources=3, rank_first=False, ordered=True),
        _shrink("lora_shrink (fp32, any width)", arch, rank=32, kind="fp32", even=False),
        _made("lora_joined", triton_shrink.joined, {"parts": "*fp32", "out": "*bf16", "count": "i32", "splits": "i32"},
              {"BLOCK": triton_shrink.JOINED_BLOCK}),
        _expand("lora_expand (y of three, r 64, bias)", arch, rank=64, sources=3, bias=True),
        _gemm("lora_gemm (y, r 16)", arch, rank=16),
        _gemm("lora_gemm (dX of three, r 64)", arch, rank=64, sources=3, turned=True, rank_first=True),
        _gemm("lora_gemm (y, r 64, bias, order)", arch, rank=64, bias=True, ordered=True),
        _outer("lora_outer (dA, r 128)", arch, rank=128, rank_first=True),
        _outer("lora_outer (dB of three, r 16, order)", arch, rank=16, sources=3, ordered=True),
        _outer("lora_outer (dB of three, r 64, order, any width)", arch, rank=64, sources=3, ordered=True, even=False),
        _outer("lora_outer (dB, fp32)", arch, rank=32, kind="fp32"),
        _made("lora_spans", triton_outer.find_spans, {"spans": "*i32"},
              {"ORDERED": True, "BLOCK": triton_outer.SPAN_BLOCK}, ordered=True),
    ]  # fmt: skip
    return made


def _made(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], tile: Any = None, *, sources: int = 1,
    ordered: bool = False, gemm: bool = False, even: bool = True,
) -> Shipped:  # fmt: skip
    """types: of what is no int32 and no row, for every source what the first has; a name not there is left out."""
    names = kernel.arg_names
    known = {"index": "*i64", "scaling": "*fp32"} | ({"order": "*i64"} if ordered else {})
    known |= {n: "i32" for n in names if n.islower() and n.rstrip("012") not in POINTERS} | types
    signature = {}
    for argument in names:
        root = argument.rstrip("012")
        at = int(argument[-1]) if root != argument else 0
        kind = known.get(argument, known.get(root))
        if kind is not None and argument not in constants and at < sources:
            signature[argument] = kind
    pointers = [n for n, t in signature.items() if t.startswith("*")]
    padded = ("rank", "columns", "first")  # to a multiple of 16, see triton_steps
    aligned = (*padded, *(("width", "depth", "stride", "stride_u", "stride_w", "size") if even else ()))
    return Shipped(
        name, kernel, signature, {n: None for n in names if n not in signature} | constants,
        num_warps=tile.warps if tile else 4, num_stages=tile.stages if tile else 3,
        divisible=(*pointers, *(n for n in signature if n.rstrip("012") in aligned)), gemm=gemm,
    )  # fmt: skip


POINTERS = ("u", "v", "w", "t", "out", "bias", "index", "order", "scaling", "spans", "parts")


def _common(sources: int, ordered: bool, rank_first: bool) -> dict[str, Any]:
    return {"SOURCES": sources, "ORDERED": ordered, "RANK_FIRST": rank_first, "PRECISION": "ieee"}


def _shrink(
    name: str, arch: str, *, rank: int, kind: str = "bf16", sources: int = 1, rank_first: bool = True,
    ordered: bool = False, even: bool = True,
) -> Shipped:  # fmt: skip
    tile = launch.shrink_tile_on(arch, KINDS[kind], rank, even)
    constants = _common(sources, ordered, rank_first)
    constants |= {"EVEN": even, "BM": tile.bm, "BR": tile.br, "BK": tile.bk}
    types = {"u": f"*{kind}", "v": f"*{kind}", "out": f"*{kind}"}
    return _made(name, triton_shrink.shrink, types, constants, tile, sources=sources, ordered=ordered,
                 gemm=kind != "fp32", even=even)  # fmt: skip


def _expand(
    name: str, arch: str, *, rank: int, kind: str = "bf16", sources: int = 1, rank_first: bool = False,
    bias: bool = False,
) -> Shipped:  # fmt: skip
    tile = launch.expand_tile_on(arch, KINDS[kind])
    constants = _common(sources, False, rank_first)
    constants |= {"HAS_BIAS": bias, "BM": tile.bm, "BN": tile.bn, "BR": launch.rank_block(rank)}
    types = {n: f"*{kind}" for n in ("t", "v", "out", *(["bias"] if bias else []))}
    return _made(name, triton_expand.expand, types, constants, tile, sources=sources, gemm=kind != "fp32")


def _gemm(
    name: str, arch: str, *, rank: int, sources: int = 1, turned: bool = False, rank_first: bool = False,
    bias: bool = False, ordered: bool = False,
) -> Shipped:  # fmt: skip
    tile = launch.gemm_tile_on(arch, ordered, sources > 1, turned)
    assert tile is not None
    constants = _common(sources, ordered, rank_first)
    constants |= {
        "TURNED": turned, "HAS_BIAS": bias, "TMA": tile.tma, "PARTS": tile.parts, "BM": tile.bm,
        "BN": tile.bn, "BK": tile.bk, "BR": launch.gemm_ranks_on(arch, rank), "GROUP": tile.group,
    }  # fmt: skip
    shape = (tile.bk, tile.bn) if turned else (tile.bn, tile.bk)
    types = {n: "*bf16" for n in ("u", "w", "t", "v", "out", *(["bias"] if bias else []))}
    if tile.tma:
        types["u"] = f"tensordesc<bf16[{tile.bm}, {tile.bk}]>"
        types["w"] = f"tensordesc<bf16[{shape[0]}, {shape[1]}]>"
        types["out"] = f"tensordesc<bf16[{tile.bm}, {tile.bn // min(tile.parts, 2)}]>"
    return _made(name, triton_gemm.gemm, types, constants, tile, sources=sources, ordered=ordered, gemm=True)


def _outer(
    name: str, arch: str, *, rank: int, kind: str = "bf16", sources: int = 1, rank_first: bool = False,
    ordered: bool = False, even: bool = True,
) -> Shipped:  # fmt: skip
    tile = launch.outer_tile_on(arch, KINDS[kind], rank, even)
    constants = _common(sources, ordered, rank_first) | {"BC": tile.bc, "BR": tile.br, "BM": tile.bm}
    types = {"t": f"*{kind}", "u": f"*{kind}", "out": "*fp32", "spans": "*i32"}
    return _made(name, triton_outer.outer, types, constants, tile, sources=sources, ordered=ordered,
                 gemm=kind != "fp32", even=even)  # fmt: skip
