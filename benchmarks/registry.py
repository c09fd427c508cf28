"""The benchmarks by name; each gives its cases for a device."""

from collections.abc import Callable, Iterable

from benchmarks import gae, generation, head, lora
from benchmarks.case import Case

BENCHMARKS: dict[str, Callable[[str], Iterable[Case]]] = {
    "gae": gae.cases,
    "head": head.cases,
    "lora": lora.cases,
    "generation": generation.cases,
}
