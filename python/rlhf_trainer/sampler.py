"""Completions with scores: the policy samples them, models read them, rewards judge them; to train or to evaluate."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rlhf_kernels.generation import KVBudgetError, SamplingParams, SlicedGenerator
from rlhf_kernels.generation import Rollout as GeneratedRollout
from rlhf_kernels.nn import HydraModel
from rlhf_trainer.config import KV_MEMORY, TrainConfig
from rlhf_trainer.data import Prompt
from rlhf_trainer.errors import UserError, one_line
from rlhf_trainer.processes import ALONE, Processes
from rlhf_trainer.rewards import RewardSum
from rlhf_trainer.rollout import Rollout, completions, joined, read, sample, sampling_params
from rlhf_trainer.scoring import EarlyScores, score
from rlhf_trainer.shaping import EXACT

EVAL_SEED = 1_000_003  # added to the seed of evaluations, so that their draws are not those of training


@dataclass
class Completed:
    """Completions of a step's prompts with raw scores, and what sampling them took."""

    rollout: Rollout
    greedy: Rollout | None  # one a prompt, with `greedy_baseline`
    seconds: float  # of sampling, on this process
    tokens_per_second: float  # of all processes together
    kv_peak: float  # bytes, on the process that took most
    rewards: dict[str, float]  # each reward function's mean

    def __len__(self) -> int:
        return len(self.rollout) + (0 if self.greedy is None else len(self.greedy))

    def to(self, device: torch.device | str) -> "Completed":
        """The same on another device."""
        return replace(
            self, rollout=self.rollout.to(device), greedy=None if self.greedy is None else self.greedy.to(device)
        )


@dataclass
class Sampler:
    """A model that samples, by its role "actor" where nothing else is said, and what scores the samples."""

    model: HydraModel
    config: TrainConfig
    rewards: RewardSum | None  # None: the model's reward head
    decode: Callable[[list[int]], str]
    end_tokens: tuple[int, ...] = ()  # besides the model's own end-of-sequence tokens
    progress: Callable[[int, int], None] = lambda done, total: None  # of a rollout: completions done, and of how many
    samples: list[dict[str, Any]] = field(default_factory=list)  # the first completions of the last rollout shown
    processes: Processes = ALONE  # that share the prompts

    def __post_init__(self) -> None:
        config = self.config
        self.generator = SlicedGenerator(
            self.model, config.kv_memory or KV_MEMORY, slice_tokens=config.slice_tokens, max_active=config.max_active
        )

    def params(self, **changes: Any) -> SamplingParams:
        """The configuration's sampling, with `changes`."""
        return sampling_params(self.config, self.end_tokens, **changes)

    def check(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        """Finds a KV budget, a length or a token that cannot work before the run writes anything."""
        longest = max(prompts, key=lambda prompt: len(prompt.tokens))
        try:
            self.generator.stream([longest.tokens], params, role="actor")  # checks now; generates when it is read
        except ValueError as error:
            name = "kv_memory" if isinstance(error, KVBudgetError) else "prompts"
            raise UserError(f"{name}: {one_line(error)}") from error

    def complete(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        streams: list[int],
        roles: Sequence[str],
        estimator: str = "kl",
        role: str = "actor",
    ) -> Completed:
        """Samples by `role`, scores by `roles`: each process its share of the prompts, and all have the whole."""
        if self.processes.count == 1:
            return self._complete(prompts, params, streams, roles, estimator, role)
        share, linked = self.processes.share(len(prompts)), self.model.sharding is not None
        most = -(-len(prompts) // self.processes.count) if linked else 0

        def work() -> Completed | None:
            mine, numbers = prompts[share], streams[share]
            if not mine and not linked:
                return None
            if not mine:  # a sharded model runs everywhere: this process takes part with what another counts
                mine, numbers = prompts[:1], streams[:1]
            done = self._complete(mine, params, numbers, roles, estimator, role, most).to("cpu")
            return done if prompts[share] else None

        whole = _joined(self.processes.each(work, linked), len(prompts), self.processes).to(self.model.device)
        if self.rewards is not None:
            self.rewards.last = whole.rewards
        return whole

    def _complete(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        streams: list[int],
        roles: Sequence[str],
        estimator: str,
        role: str,
        most: int = 0,
    ) -> Completed:
        """`complete` of this process's prompts. most: of the processes that share a sharded model, the most any has."""
        started = time.perf_counter()
        with self._agreed():
            rollout, greedy, early = self.sample(prompts, params, streams, role)
        seconds = time.perf_counter() - started - (early.seconds if early else 0.0)
        self.score(rollout, greedy, prompts, roles, estimator, early, most)
        stats, rewards = self.generator.stats, {} if self.rewards is None else self.rewards.last
        return Completed(
            rollout, greedy, seconds, float(stats.tokens_per_second), float(stats.peak_kv_bytes), dict(rewards)
        )

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, streams: list[int], role: str = "actor"
    ) -> tuple[Rollout, Rollout | None, EarlyScores | None]:
        """`role`'s rollout, with the scores of rewards that are called while it runs; shows how far it is."""
        size, early, total, done = self.config.reward_batch_size, None, len(prompts) * params.rollouts, 0
        if self.rewards is not None and size is not None:
            early = EarlyScores(self.rewards, prompts, self.decode, params.rollouts, size)

        def finished(row: GeneratedRollout) -> None:
            nonlocal done
            done += 1
            self.progress(done, total)
            if early is not None:
                early.add(row)

        tokens = [prompt.tokens for prompt in prompts]
        return *sample(self.generator, tokens, params, streams, self.model.device, finished, role), early

    def score(
        self,
        rollout: Rollout,
        greedy: Rollout | None,
        prompts: Sequence[Prompt],
        roles: Sequence[str],
        estimator: str = "kl",
        early: EarlyScores | None = None,
        most: int = 0,
    ) -> None:
        """Runs models and rewards over the rollout; leaves raw scores in it and in the greedy one.

        roles: those that read the rollout, as far as the model has them. estimator: of the divergence, see `shaping`.
        most: prompts; of the processes that share a sharded model, the most any has.
        """
        roles = tuple(role for role in roles if role in self.model.roles)
        if self.rewards is None:
            roles = (*roles, "reward")
            if greedy is not None:
                read(self.model, greedy, ("reward",), self.config, most=most)
        elif early is not None:
            _fill_scores([rollout] if greedy is None else [rollout, greedy], early, self.model.device)
        else:
            with self._agreed():
                self._call_rewards([rollout] if greedy is None else [rollout, greedy], prompts)
        divergence = EXACT.get(estimator) if "reference" in roles else None
        read(self.model, rollout, roles, self.config, divergence, most * (len(rollout) // len(prompts)))

    def _agreed(self) -> AbstractContextManager[None]:
        """Nobody goes on from here to run a sharded model while another process has failed."""
        sharding = self.model.sharding
        return nullcontext() if sharding is None else self.processes.together(lambda: sharding.broken)

    def evaluate(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Reward, KL and length on held-out prompts, sampled with the same draws every time; {} without any."""
        if not prompts:
            return {}
        params = self.params(n=1, seed=self.config.seed + EVAL_SEED)
        rollout = self.complete(prompts, params, list(range(len(prompts))), ("actor", "reference")).rollout
        self.show(rollout, rollout.scores, prompts)
        metrics = {
            "eval/reward": float(rollout.scores.mean()),
            "eval/reward_std": float(rollout.scores.std(correction=0)),
            "eval/mean_length": float(rollout.completion_lengths.float().mean()),
        }
        if rollout.ref_logprobs.numel():
            metrics["eval/kl"] = float(rollout.per_sequence(rollout.logprobs - rollout.ref_logprobs).mean())
        return metrics

    def show(self, rollout: Rollout, raw: torch.Tensor, prompts: Sequence[Prompt]) -> None:
        """Keeps the first completions as `samples`, with their raw scores."""
        shown = rollout.select(torch.arange(min(self.config.num_sample_completions, len(rollout)), device=raw.device))
        self.samples = [
            {"prompt": prompts[i].text, "completion": text, "reward": score, "length": length}
            for i, text, score, length in zip(
                shown.prompt_index.tolist(),
                completions(shown, self.decode),
                raw.tolist(),
                shown.completion_lengths.tolist(),
            )
        ]

    def _call_rewards(self, rollouts: Sequence[Rollout], prompts: Sequence[Prompt]) -> None:
        """One call of the reward functions for all completions; fills the rollouts' scores."""
        assert self.rewards is not None
        rows = [prompts[i] for rollout in rollouts for i in rollout.prompt_index.tolist()]
        texts = [text for rollout in rollouts for text in completions(rollout, self.decode)]
        scores = torch.tensor(score(self.rewards, rows, texts), device=self.model.device)
        for rollout, part in zip(rollouts, scores.float().split([len(rollout) for rollout in rollouts])):
            rollout.scores = part


def _joined(parts: Sequence[Completed | None], prompts: int, processes: Processes) -> Completed:
    """What all processes completed, in the order of the step's `prompts`; None: a share without prompts."""
    shares = [replace(processes, rank=rank).share(prompts).start for rank in range(processes.count)]
    found = [(first, part) for first, part in zip(shares, parts) if part is not None]
    mine = parts[processes.rank]
    completions = sum(len(part) for _, part in found)
    greedy = [(first, part.greedy) for first, part in found if part.greedy is not None]
    return Completed(
        joined([(first, part.rollout) for first, part in found]),
        joined(greedy) if greedy else None,
        0.0 if mine is None else mine.seconds,
        sum(part.tokens_per_second for _, part in found),
        max(part.kv_peak for _, part in found),
        {name: sum(part.rewards[name] * len(part) for _, part in found) / completions for name in found[0][1].rewards},
    )


def _fill_scores(rollouts: Sequence[Rollout], early: EarlyScores, device: torch.device) -> None:
    """The scores that are there already; a prompt's samples come first, its greedy completion after them."""
    first = 0
    for rollout in rollouts:
        seen: dict[int, int] = {}
        values = []
        for prompt in rollout.prompt_index.tolist():
            values.append(early.scores[prompt, first + seen.setdefault(prompt, 0)])
            seen[prompt] += 1
        first += max(seen.values(), default=0)
        rollout.scores = torch.tensor(values, dtype=torch.float32, device=device)
