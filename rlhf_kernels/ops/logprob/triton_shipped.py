"""What of the head's GEMM kernels is compiled ahead of time: every kernel on every chip, with the leanest and the
fattest epilogue that each tile serves."""

from typing import Any

from rlhf_kernels.ops.logprob import triton_gemm as gemm
from rlhf_kernels.ops.logprob import triton_states as states
from rlhf_kernels.ops.logprob import triton_tiles as tiles
from rlhf_kernels.ops.logprob.triton_tiles import Tile
from rlhf_kernels.ops.shipped import Shipped

STRIDES = ("stride_x", "stride_ref", "stride_w", "stride_ref_w", "stride_out")


def shipped(arch: str) -> list[Shipped]:
    lean, fat = tiles.EXPONENTIALS[arch], tiles.FAT_EXPONENTIALS[arch]
    plain, pairs = tiles.SCORES[arch], tiles.PAIRS[arch]
    made = [
        *_rows(lean.bm),
        _exponentials("head_exponentials", lean),
        _exponentials("head_exponentials (bias)", fat, bias=True),
        _exponentials("head_exponentials (redo)", lean, redo=True),
        _exponentials("head_exponentials (softcap)", fat, capped=True),
        _exponentials("head_exponentials (softcap, bias, redo)", fat, capped=True, bias=True, redo=True),
        _exponentials("head_exponentials (fp16)", fat, kind="fp16", result="fp32"),
        _scores("head_scores", plain),
        _scores("head_scores (softcap, bias)", plain, capped=True, bias=True),
        _scores("head_scores (reference)", pairs, reference=True),
        _scores("head_scores (KL)", pairs, reference=True, kl=True),
        _scores("head_scores (KL, own weight, softcap)", pairs, reference=True, own=True, kl=True, capped=True),
        _scores("head_scores (KL, own weight, bias)", pairs, reference=True, own=True, kl=True, bias=True),
        _merge("head_merge", False),
        _merge("head_merge (KL)", True),
    ]  # fmt: skip
    if lean.tma:
        one, two = tiles.POINTERS[arch], tiles.POINTER_PAIRS[arch]
        made += [
            _exponentials("head_exponentials (any stride, softcap, bias)", one, capped=True, bias=True, even=False),
            _scores("head_scores (any stride, softcap, bias)", one, capped=True, bias=True, even=False),
            _scores("head_scores (any stride, KL, own weight, softcap)", two, reference=True, own=True, kl=True,
                    capped=True, even=False),
        ]  # fmt: skip
    return made


def _split(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> dict[str, Any]:
    """Signature and constants of a kernel: arguments that are in neither are pointers left out."""
    named = set(kernel.arg_names)
    return {
        "kernel": kernel,
        "signature": {n: t for n, t in types.items() if n in named},
        "constexprs": {**{n: None for n in named - set(types)}, **{n: c for n, c in constants.items() if n in named}},
    }


def _common(tile: Tile, bias: bool, capped: bool, even: bool) -> tuple[dict[str, str], dict[str, Any]]:
    counts = ("rows", "columns", "start", "stop", "width", *STRIDES)
    types = {n: "i32" for n in counts} | {"scale": "fp32", "softcap": "fp32", "target": "*i64", "temperature": "*fp32"}
    if bias:
        types["bias"] = "*bf16"
    constants = {
        "HAS_BIAS": bias, "CAPPED": capped, "TMA": tile.tma, "EVEN": even, "UNROLL": tile.unroll, "PARTS": tile.parts,
        "PRECISION": "ieee", "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "GROUP": tile.group,
    }  # fmt: skip
    return types, constants


def _gemm(name: str, tile: Tile, even: bool, parts: dict[str, Any]) -> Shipped:
    known = [n for n, t in parts["signature"].items() if t.startswith("*") or (even and n in ("width", *STRIDES))]
    return Shipped(name, num_warps=tile.warps, num_stages=tile.stages, divisible=tuple(known), gemm=True, **parts)


def _matrix(tile: Tile, kind: str, rows: int, columns: int) -> str:
    return f"tensordesc<{kind}[{rows}, {columns}]>" if tile.tma else f"*{kind}"


def _exponentials(
    name: str, tile: Tile, *, bias: bool = False, capped: bool = False, redo: bool = False, even: bool = True,
    kind: str = "bf16", result: str = "bf16",
) -> Shipped:  # fmt: skip
    types, constants = _common(tile, bias, capped, even)
    types |= {"x": _matrix(tile, kind, tile.bm, tile.bk), "w": _matrix(tile, kind, tile.bn, tile.bk)}
    types["out"] = _matrix(tile, result, tile.bm, tile.bn // tile.parts)
    types |= {"shift": "*fp32", "flags": "*i32", "tops": "*fp32", "sums": "*fp32"}
    constants |= {"REDO": redo, "FLATTEN": tile.flatten and not redo}
    return _gemm(name, tile, even, _split(gemm.exponentials, types, constants))


def _scores(
    name: str, tile: Tile, *, reference: bool = False, own: bool = False, kl: bool = False, bias: bool = False,
    capped: bool = False, even: bool = True,
) -> Shipped:  # fmt: skip
    types, constants = _common(tile, bias, capped, even)
    types |= {"x": _matrix(tile, "bf16", tile.bm, tile.bk), "w": _matrix(tile, "bf16", tile.bn, tile.bk)}
    types |= {"out": "*fp32", "at": "*fp32", "ref_at": "*fp32"}
    if reference:
        types["ref"] = types["x"]
    if own:
        types["ref_w"] = types["w"]
    constants |= {"REFERENCE": reference, "OWN": own, "WITH_KL": kl, "FLATTEN": tile.flatten}
    return _gemm(name, tile, even, _split(states.statistics, types, constants))


def _merge(name: str, kl: bool) -> Shipped:
    types = {n: "*fp32" for n in ("records", "at", "ref_at")}
    types |= {"target": "*i64", "state": "*fp64", "rows": "i32", "tiles": "i32"}
    constants = {"REFERENCE": kl, "WITH_KL": kl, "SWAPPED": kl, "COLUMNS": 128, "ROWS": 1, "TILES": 1024}
    return Shipped(name, num_warps=8, divisible=("records", "state"), **_split(states.merge, types, constants))


def _rows(bm: int) -> list[Shipped]:
    """The small kernels around the exponentials."""
    types = {n: "i32" for n in ("rows", "columns", "tiles_n", "width", "stride_x", "stride_w")}
    types |= {n: "*fp32" for n in ("tops", "sums", "shift", "factor", "pulled", "temperature", "z")}
    types |= {"flags": "*i32", "mass": "*fp64", "target_z": "*fp64", "target": "*i64", "x": "*bf16", "w": "*bf16"}
    types |= {"bias": "*bf16", "scale": "fp32", "softcap": "fp32"}
    constants = {"HAS_BIAS": True, "CAPPED": True, "BLOCK": 1024, "BM": bm, "BN": 512}
    named = {"head_anchors": gemm.anchors, "head_settle": gemm.settle, "head_add_mass": gemm.add_mass,
             "head_rescale": gemm.rescale}  # fmt: skip
    return [Shipped(name, **_split(kernel, types, constants)) for name, kernel in named.items()]
