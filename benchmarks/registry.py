"""The benchmarks by name; each gives its cases for a device."""

from collections.abc import Callable, Iterable

from benchmarks import attention, gae, generation, head, loops, lora, rl, sampling, trl
from benchmarks.case import Case

BENCHMARKS: dict[str, Callable[[str], Iterable[Case]]] = {
    "attention": attention.cases,
    "gae": gae.cases,
    "generation": generation.cases,
    "head": head.cases,
    "loops": loops.cases,
    "lora": lora.cases,
    "rl": rl.cases,
    "sampling": sampling.cases,
    "trl": trl.cases,
}
