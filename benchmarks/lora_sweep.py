"""Our own backends apart, beside what the op would choose: from how many rows on each is the fastest."""

from benchmarks.lora_peers import Loader

TIERS: dict[str, Loader] = {}
