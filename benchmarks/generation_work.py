"""What is generated: a model with random weights, prompts and how many tokens each wants, all from fixed seeds.

Every contestant gets the same model and prompts, and nothing ends a completion before its length, so that all make
the same number of tokens. The first prompts of a long list are those of a short one: a slow contestant takes fewer.
"""

import copy
import random
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from benchmarks.peers import attribute

Lengths = Literal["uniform", "equal", "long tail"]
SLICE_TOKENS = 16  # the generator's default
TAIL = 6  # in a long tail the mean length is the longest over this


@dataclass(frozen=True)
class Llama:
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int = 4096

    def tiny(self) -> "Llama":
        return replace(self, layers=2, width=32, inner=48, heads=2, kv_heads=1, vocabulary=97)

    def build(self, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
        """A LlamaForCausalLM with random weights and no end-of-sequence token."""
        config = attribute("transformers", "LlamaConfig")(
            hidden_size=self.width, intermediate_size=self.inner, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, vocab_size=self.vocabulary,
            max_position_embeddings=self.positions, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device):
            model = attribute("transformers", "AutoModelForCausalLM").from_config(config, dtype=dtype)
        return model.requires_grad_(False).eval()

    def token_bytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Of one token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * (self.width // self.heads) * dtype.itemsize


def own_copy(model: Any) -> Any:
    """A model that shares the weights and nothing else, for who changes its modules or its configuration."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@dataclass(frozen=True)
class Draws:
    """Prompts, and how many new tokens each gets."""

    prompts: list[list[int]]
    new: list[int]

    def first(self, count: int) -> "Draws":
        return Draws(self.prompts[:count], self.new[:count])

    def ordered(self, order: list[int]) -> "Draws":
        return Draws([self.prompts[i] for i in order], [self.new[i] for i in order])

    @property
    def tokens(self) -> int:
        return sum(self.new)

    def slices(self, number: int) -> int:
        """That one sequence fills when it is whole; its last token is never read."""
        return -(-(len(self.prompts[number]) + self.new[number] - 1) // SLICE_TOKENS)


@dataclass(frozen=True)
class Work:
    """`prompt` and `new`: the fewest and the most tokens of a prompt and of a completion."""

    prompts: int
    prompt: tuple[int, int]
    new: tuple[int, int]
    lengths: Lengths = "uniform"
    vocabulary: int = 8192

    def tiny(self) -> "Work":
        new = (min(self.new[0], 5), min(self.new[1], 5))
        return replace(self, prompts=min(self.prompts, 6), prompt=(min(self.prompt[0], 9), 9), new=new, vocabulary=97)

    def text(self) -> str:
        prompt, new = (f"{low}" if low == high else f"{low}-{high}" for low, high in (self.prompt, self.new))
        if self.lengths == "equal":
            new = str(sum(self.new) // 2)
        tail = " in a long tail" if self.lengths == "long tail" else ""
        return f"{self.prompts} prompts of {prompt} tokens, {new} new each{tail}"

    def draw(self) -> Draws:
        tokens, lengths = random.Random(0), random.Random(1)
        prompts = [
            [tokens.randrange(1, self.vocabulary) for _ in range(tokens.randint(*self.prompt))]
            for _ in range(self.prompts)
        ]
        return Draws(prompts, [self._length(lengths) for _ in range(self.prompts)])

    def _length(self, numbers: random.Random) -> int:
        low, high = self.new
        if self.lengths == "equal":
            return (low + high) // 2
        if self.lengths == "uniform":
            return numbers.randint(low, high)
        return min(high, low + int(numbers.expovariate(TAIL / high)))


def whole_bytes(model: Llama, work: Work, sequences: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Keys and values of so many of the longest sequences the work may hold, in whole slices."""
    slices = -(-(work.prompt[1] + work.new[1] - 1) // SLICE_TOKENS)
    return sequences * slices * SLICE_TOKENS * model.token_bytes(dtype)
