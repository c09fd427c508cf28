"""What a generate call gives back."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["eos", "stop", "length"]


@dataclass(slots=True)
class Rollout:
    """One completion: its tokens (the stop token included), and each one's logprob under the distribution at the
    prompt's temperature over the whole vocabulary, in fp32, taken from the logits it was sampled from."""

    prompt_index: int
    sample_index: int
    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    greedy: bool


@dataclass
class GenerationStats:
    """What the last generate call did (up to now, while it streams). Tokens are of all rollouts together."""

    generated_tokens: int = 0
    seconds: float = 0.0  # of the call itself, checking the prompts included, without its stream's reader
    host_seconds: float = 0.0  # all of that but the model and the sampling: what the engine itself costs
    steps: int = 0
    replayed_steps: int = 0  # of those, from CUDA graphs
    mean_active: float = 0.0  # sequences a step
    preemptions: int = 0
    prefix_tokens_shared: int = 0  # prompt tokens that read keys and values another sequence had computed
    prompt_tokens_computed: int = 0  # prompt tokens that went through the model
    recomputed_tokens: int = 0  # tokens that went through it once more after a preemption
    peak_kv_bytes: int = 0  # the most bytes of leased slices, shared ones counted once

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second of the call's own time."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    @property
    def host_share(self) -> float:
        """The engine's own part of the call's time, 0 to 1."""
        return self.host_seconds / self.seconds if self.seconds else 0.0
