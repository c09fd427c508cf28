"""What a user may ask of one prompt's rollouts."""

import math
from dataclasses import dataclass
from typing import Any

LARGEST_INT64 = 2**63 - 1
LARGEST_TOKEN = 2**31 - 1  # the engine's tokens are int32
TEMPERATURES = 2.0**-126, 2.0**128 - 2.0**104  # fp32's smallest and largest normal numbers


@dataclass(frozen=True)
class SamplingParams:
    """How a prompt's completions are drawn.

    max_new_tokens: at most so many tokens, >= 1.
    temperature: 0, or a normal fp32 number > 0; 0 is greedy decoding, with logprobs at temperature 1.
    top_k: keep the k likeliest tokens (0: all), then top_p: the smallest set with that much mass (1: all), then
        min_p: tokens with at least that share of the likeliest one's probability (0: all).
    n: rollouts a prompt, each with its own random numbers.
    greedy_baseline: one greedy rollout more, as ReMax wants it; `sample_index` n, logprobs at `temperature`.
    stop_token_ids: tokens that end a rollout (kept as its last token), besides the model's end-of-sequence tokens.
    ignore_eos: those do not end it.
    seed: any int64; see `SlicedGenerator.generate` for what a draw depends on.
    Raises ValueError or TypeError, by the field's name.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    n: int = 1
    greedy_baseline: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("n", 1), ("seed", -LARGEST_INT64 - 1)):
            _check_int(name, getattr(self, name), least)
        for name, most in (("temperature", math.inf), ("top_p", 1.0), ("min_p", 1.0)):
            _check_float(name, getattr(self, name), most)
        if self.temperature and not TEMPERATURES[0] <= self.temperature <= TEMPERATURES[1]:
            bounds = "{:.2g} and {:.2g}".format(*TEMPERATURES)
            raise ValueError(f"temperature is {self.temperature}; it must be 0, or between {bounds}")
        for name in ("greedy_baseline", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        try:
            stop = tuple(self.stop_token_ids)
        except TypeError:
            raise TypeError(f"stop_token_ids is {self.stop_token_ids!r}; it must be a sequence of ints") from None
        for token in stop:
            _check_int("stop_token_ids", token, 0)
            if token > LARGEST_TOKEN:
                raise ValueError(f"stop_token_ids is {self.stop_token_ids!r}; a token id is at most {LARGEST_TOKEN}")
        object.__setattr__(self, "stop_token_ids", stop)

    @property
    def rollouts(self) -> int:
        """Rollouts a prompt: n, and the greedy baseline if there is one."""
        return self.n + self.greedy_baseline


def _check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be an int")
    if not least <= value <= LARGEST_INT64:
        raise ValueError(f"{name} is {value}; it must be >= {least}")


def _check_float(name: str, value: Any, most: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    if not (0 <= value <= most and math.isfinite(value)):
        bound = "finite and >= 0" if math.isinf(most) else f"in [0, {most:g}]"
        raise ValueError(f"{name} is {value}; it must be {bound}")
