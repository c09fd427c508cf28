"""The benchmarks by name."""

from collections.abc import Callable

from benchmarks import gae, head, lora
from benchmarks.runner import Case

BENCHMARKS: dict[str, Callable[[], list[Case]]] = {"gae": gae.cases, "head": head.cases, "lora": lora.cases}
