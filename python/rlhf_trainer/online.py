"""One step of the algorithms that sample: rollout, scoring, rewards, advantages, then epochs of clipped updates."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf_kernels.generation import KVBudgetError, SamplingParams, SlicedGenerator
from rlhf_kernels.generation import Rollout as GeneratedRollout
from rlhf_kernels.nn import HydraModel
from rlhf_trainer.algorithms import Algorithm, Counts
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.data import BatchOrder, Prompt
from rlhf_trainer.errors import UserError, one_line
from rlhf_trainer.optim import Optimizer
from rlhf_trainer.rewards import RewardSum
from rlhf_trainer.rollout import Rollout, completions, read, sample, sampling_params
from rlhf_trainer.scoring import EarlyScores, score
from rlhf_trainer.shaping import EXACT, KLController, shape_rewards, shape_scores

EVAL_SEED = 1_000_003  # added to the seed of evaluations, so that their draws are not those of training


@dataclass
class Online:
    """The state and the parts of an online run; `step` is everything that happens to one rollout."""

    model: HydraModel
    row: Algorithm
    config: TrainConfig
    optimizer: Optimizer
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    rewards: RewardSum | None  # None: the model's reward head
    decode: Callable[[list[int]], str]
    end_tokens: tuple[int, ...] = ()  # besides the model's own end-of-sequence tokens
    samples: list[dict[str, Any]] = field(default_factory=list)  # the last rollout's first completions
    progress: Callable[[int, int], None] = lambda done, total: None  # of the rollout: completions done, and of how many

    def __post_init__(self) -> None:
        config = self.config
        self.generator = SlicedGenerator(
            self.model, config.kv_memory, slice_tokens=config.slice_tokens, max_active=config.max_active
        )
        self.order = BatchOrder(len(self.prompts), config.rollout_batch_size, config.seed)
        self.kl = KLController(config)
        self._check_budget()

    def _check_budget(self) -> None:
        """Finds a KV budget, a length or a token that cannot work before the run writes anything."""
        longest = max((*self.prompts, *self.eval_prompts), key=lambda prompt: len(prompt.tokens))
        params = sampling_params(self.config, self.end_tokens, greedy_baseline=self.row.greedy_baseline)
        try:
            self.generator.stream([longest.tokens], params, role="actor")  # checks now; generates when it is read
        except ValueError as error:
            name = "kv_memory" if isinstance(error, KVBudgetError) else "prompts"
            raise UserError(f"{name}: {one_line(error)}") from error

    def step(self, step: int) -> dict[str, float]:
        """Step number `step` (from 0); returns its metrics. Raises RewardError before anything is updated."""
        config, started = self.config, time.perf_counter()
        prompts = [self.prompts[i] for i in self.order.at(step)]
        streams = [step * config.rollout_batch_size + i for i in range(len(prompts))]
        params = sampling_params(config, self.end_tokens, greedy_baseline=self.row.greedy_baseline)
        rollout, greedy, early = self._sample(prompts, params, streams)
        generated = time.perf_counter() - (early.seconds if early else 0.0)
        raw = self._score(rollout, greedy, prompts, early=early)
        shape_rewards(rollout, self.kl.value, config)
        assert self.row.advantages is not None
        self.row.advantages(rollout, config)
        scored = time.perf_counter()
        metrics = self._objective(rollout, raw) | self._update(rollout, step)
        self.kl.update(metrics["objective/kl"], len(rollout))
        self.samples = self._sample_rows(rollout, raw, prompts)
        stats = self.generator.stats
        return metrics | {
            "episode": float((step + 1) * len(rollout)),
            "timing/generate": generated - started,
            "timing/score": scored - generated,
            "timing/update": time.perf_counter() - scored,
            "sampling/tokens_per_second": float(stats.tokens_per_second),
            "memory/kv_peak": float(stats.peak_kv_bytes),
        }

    def evaluate(self) -> dict[str, float]:
        """Reward, KL and length on the held-out prompts, sampled with the same draws every time; {} without them."""
        if not self.eval_prompts:
            return {}
        seed = self.config.seed + EVAL_SEED
        params = sampling_params(self.config, self.end_tokens, n=1, seed=seed)
        streams = list(range(len(self.eval_prompts)))
        rollout, _, early = self._sample(self.eval_prompts, params, streams)
        raw = self._score(rollout, None, self.eval_prompts, roles=("actor", "reference"), estimator="kl", early=early)
        lengths = rollout.completion_lengths.float()
        self.samples = self._sample_rows(rollout, raw, self.eval_prompts)
        return {
            "eval/reward": float(raw.mean()),
            "eval/reward_std": float(raw.std(correction=0)),
            "eval/kl": float(rollout.per_sequence(rollout.logprobs - rollout.ref_logprobs).mean()),
            "eval/mean_length": float(lengths.mean()),
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the tensors."""
        return {"kl_coef": self.kl.value}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.kl.value = float(state["kl_coef"])

    def _sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, streams: list[int]
    ) -> tuple[Rollout, Rollout | None, EarlyScores | None]:
        """The rollout, with the scores of rewards that are called while it runs; shows how far it is."""
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
        return *sample(self.generator, tokens, params, streams, self.model.device, finished), early

    def _score(
        self,
        rollout: Rollout,
        greedy: Rollout | None,
        prompts: Sequence[Prompt],
        roles: tuple[str, ...] | None = None,
        estimator: str | None = None,
        early: EarlyScores | None = None,
    ) -> torch.Tensor:
        """Runs models and rewards over the rollout; leaves shaped scores and baselines in it, returns raw scores."""
        roles = self.row.scored if roles is None else roles
        if self.rewards is None:
            roles = (*roles, "reward")
            if greedy is not None:
                read(self.model, greedy, ("reward",), self.config)
        elif early is not None:
            _fill_scores([rollout] if greedy is None else [rollout, greedy], early, self.model.device)
        else:
            self._call_rewards([rollout] if greedy is None else [rollout, greedy], prompts)
        read(self.model, rollout, roles, self.config, EXACT.get(estimator or self.config.kl_estimator))
        raw = rollout.scores
        rollout.scores = shape_scores(raw, rollout.finished, self.config)
        if greedy is not None:
            baseline = shape_scores(greedy.scores, greedy.finished, self.config)
            by_prompt = torch.zeros(len(prompts), device=baseline.device).index_copy_(0, greedy.prompt_index, baseline)
            rollout.baselines = by_prompt[rollout.prompt_index]
        return raw

    def _call_rewards(self, rollouts: Sequence[Rollout], prompts: Sequence[Prompt]) -> None:
        """One call of the reward functions for all completions; fills the rollouts' scores."""
        assert self.rewards is not None
        rows = [prompts[i] for rollout in rollouts for i in rollout.prompt_index.tolist()]
        texts = [text for rollout in rollouts for text in completions(rollout, self.decode)]
        scores = torch.tensor(score(self.rewards, rows, texts), device=self.model.device)
        for rollout, part in zip(rollouts, scores.float().split([len(rollout) for rollout in rollouts])):
            rollout.scores = part

    def _update(self, rollout: Rollout, step: int) -> dict[str, float]:
        """Epochs over the rollout in shuffled minibatches; returns the mean of each update's metrics."""
        config = self.config
        history: list[dict[str, float]] = []
        difference = 0.0
        for epoch in range(config.num_ppo_epochs or 1):
            draw = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 1_009 + epoch)
            shuffled = torch.randperm(len(rollout), generator=draw).to(rollout.lengths.device)
            for minibatch in shuffled.tensor_split(config.num_mini_batches):
                counts = Counts(float(rollout.completion_lengths[minibatch].sum()), float(len(minibatch)))
                totals: dict[str, float] = {}
                for index in minibatch.split(config.per_device_train_batch_size):
                    batch = rollout.select(index)
                    share = self.row.loss(self.model, batch, counts, config)
                    share.value.backward()
                    for name, value in share.metrics.items():
                        totals[name] = totals.get(name, 0.0) + float(value)
                    if not history and share.logprobs is not None:
                        difference = max(difference, float((share.logprobs - batch.captured).abs().max()))
                history.append(totals | self.optimizer.step())
        means = {name: sum(update[name] for update in history) / len(history) for name in history[0]}
        means["lr"] = history[-1]["lr"]
        means["sampling/logp_difference_max"] = difference
        if "val/ratio" in means:
            ratios = torch.tensor([update["val/ratio"] for update in history])
            means["val/ratio_var"] = float(ratios.var(correction=0))
        return means

    def _objective(self, rollout: Rollout, raw: torch.Tensor) -> dict[str, float]:
        lengths = rollout.completion_lengths.float()
        penalty = rollout.per_sequence(rollout.penalties)
        metrics = {
            "objective/kl": rollout.per_sequence(rollout.logprobs - rollout.ref_logprobs).mean(),
            "objective/entropy": rollout.per_sequence(-rollout.logprobs).mean(),
            "objective/non_score_reward": penalty.mean(),
            "objective/rlhf_reward": (penalty + rollout.scores).mean(),
            "objective/scores": rollout.scores.mean(),
            "objective/kl_coef": torch.tensor(self.kl.value),
            "policy/entropy_avg": rollout.entropies.mean(),
            "reward": raw.mean(),
            "reward_std": raw.std(correction=0),
            "completions/mean_length": lengths.mean(),
            "completions/clipped_ratio": (~rollout.finished).float().mean(),
            "val/num_eos_tokens": rollout.finished.float().sum(),
        }
        if self.row.greedy_baseline:
            metrics["objective/baseline"] = rollout.baselines.mean()
        named = {name: float(value) for name, value in metrics.items()}
        if self.rewards is not None and len(self.rewards.last) > 1:
            named |= {f"rewards/{name}": value for name, value in self.rewards.last.items()}
        return named

    def _sample_rows(self, rollout: Rollout, raw: torch.Tensor, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        shown = rollout.select(torch.arange(min(self.config.num_sample_completions, len(rollout)), device=raw.device))
        return [
            {"prompt": prompts[i].text, "completion": text, "reward": score, "length": length}
            for i, text, score, length in zip(
                shown.prompt_index.tolist(),
                completions(shown, self.decode),
                raw.tolist(),
                shown.completion_lengths.tolist(),
            )
        ]


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
