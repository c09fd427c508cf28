"""What the generation tests share: models, prompts, and the logits behind every draw."""

import random

import torch
import transformers
from architectures import CONFIGS, GATED, SIZES, build

from rlhf_kernels.generation import SamplingParams, SlicedGenerator, engine, graphs
from rlhf_kernels.ops.sampling import sample

WINDOWED = "qwen2-windows"
NAMES = [*CONFIGS, WINDOWED]
SLICE = 4  # tokens


def model(name: str = "llama") -> transformers.PreTrainedModel:
    if name != WINDOWED:
        return build(name)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SIZES, **GATED, use_sliding_window=True, sliding_window=9, max_window_layers=1)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def prompts(lengths, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(131) for _ in range(length)] for length in lengths]


def generator(lm, slices: int = 400, **options) -> SlicedGenerator:
    """A generator whose budget is a number of slices of SLICE tokens."""
    return SlicedGenerator(lm, slices * slice_bytes(lm), slice_tokens=SLICE, **options)


def slice_bytes(lm) -> int:
    return SlicedGenerator(lm, "64MiB", slice_tokens=SLICE)._arena.slice_bytes


def greedy(**options) -> SamplingParams:
    return SamplingParams(temperature=0.0, **options)


def record_logits(monkeypatch) -> dict[tuple[int, int], torch.Tensor]:
    """Fills (stream, position) -> the logits that token was drawn from, as a generator runs."""
    found: dict[tuple[int, int], torch.Tensor] = {}

    def recording(logits, *, stream, position, **parameters):
        streams = torch.as_tensor(stream).expand(len(logits)).tolist()
        for row, number, place in zip(logits, streams, position.tolist()):
            found[number, place] = row.clone()
        return sample(logits, stream=stream, position=position, **parameters)

    for module in (engine, graphs):
        monkeypatch.setattr(module, "sample", recording)
    return found
