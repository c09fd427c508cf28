"""Which Triton kernels the project ships, and in which configurations: what is compiled ahead of time and checked.

Every file with Triton kernels has `shipped(arch) -> list[Shipped]`, every kernel of it in the configurations that stand
for all that its launchers choose on `arch` (one of ARCHES), and stands in FILES. `benchmarks/kernels` compiles them
without a GPU.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FILES = (
    "rlhf_kernels.ops.logprob.triton_rows",
    "rlhf_kernels.ops.logprob.triton_logits",
    "rlhf_kernels.ops.logprob.triton_shipped",
    "rlhf_kernels.ops.lora.triton_shipped",
    "rlhf_kernels.ops.advantage.triton_scan",
    "rlhf_kernels.ops.advantage.triton_whiten",
    "rlhf_kernels.ops.attention.triton_shipped",
)
ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Shipped:
    """One kernel in one configuration.

    name: "kernel" or "kernel (what is special)", unique among those of an arch; the tables call it so.
    kernel: the function that `triton.jit` made.
    signature: the type of every argument that is no constant, as Triton writes it: "*bf16", "*fp32", "i32", "fp32",
        "tensordesc<bf16[128, 64]>".
    constexprs: the values of the others (None for a pointer that is left out).
    num_warps, num_stages: as in a launch.
    divisible: arguments known to be multiples of 16 (pointers: of 16 bytes), as a launch finds out by itself.
    gemm: it multiplies matrices, so on a chip that has them it must use the warp-group or matrix-core instructions.
    few_rows: it multiplies matrices of fewer rows than a warp group's instruction takes: a warp's must be there.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    gemm: bool = False
    few_rows: bool = False

    def __post_init__(self) -> None:
        known = set(self.kernel.arg_names)
        named = {*self.signature, *self.constexprs}
        if named != known:
            raise ValueError(f"{self.name}: arguments {sorted(named ^ known)} are missing or unknown")
        if unknown := set(self.divisible) - set(self.signature):
            raise ValueError(f"{self.name}: divisible names {sorted(unknown)}, which are no arguments")


def everything(arch: str) -> list[Shipped]:
    """All shipped kernels for `arch`; imports Triton."""
    if arch not in ARCHES:
        raise ValueError(f"arch is {arch!r}; it must be one of {', '.join(ARCHES)}")
    found = [kernel for file in FILES for kernel in importlib.import_module(file).shipped(arch)]
    names = [kernel.name for kernel in found]
    if len(set(names)) != len(names):
        raise ValueError(f"two shipped kernels have one name: {sorted({n for n in names if names.count(n) > 1})}")
    return found
