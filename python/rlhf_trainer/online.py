"""One step of the algorithms that sample: rollout, scoring, rewards, advantages, then epochs of updates.

`rlhf_trainer.algorithms.base` says in which order a row's functions are called.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf_kernels.nn import HydraModel
from rlhf_trainer.algorithms import Algorithm, Counts, sft
from rlhf_trainer.algorithms.base import State
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.data import BatchOrder, Demonstration, Prompt
from rlhf_trainer.offline import check_rows, completion_tokens
from rlhf_trainer.optim import Optimizer
from rlhf_trainer.processes import ALONE, Processes, summed
from rlhf_trainer.rollout import Rollout
from rlhf_trainer.sampler import Sampler
from rlhf_trainer.shaping import KLController, shape_rewards, shape_scores


@dataclass
class Online:
    """The state and the parts of an online run; `step` is everything that happens to one rollout."""

    model: HydraModel
    row: Algorithm
    config: TrainConfig
    optimizer: Optimizer
    sampler: Sampler
    prompts: list[Prompt]
    eval_prompts: list[Prompt] = field(default_factory=list)
    demonstrations: list[Demonstration] = field(default_factory=list)  # their cross-entropy joins every update
    processes: Processes = ALONE

    def __post_init__(self) -> None:
        config = self.config
        self._check_shares()
        self.order = BatchOrder(len(self.prompts), config.rollout_batch_size, config.seed)
        self.kl = KLController(config)
        self.row_state: State = {}
        self.params = self.sampler.params(greedy_baseline=self.row.greedy_baseline)
        self.sampler.check((*self.prompts, *self.eval_prompts), self.params)
        if self.demonstrations:
            check_rows(self.demonstrations, self.model.base_model("actor"))
            rows = config.micro_batch
            self.mixed = BatchOrder(len(self.demonstrations), rows, config.seed)

    def _check_shares(self) -> None:
        """Every process has a part in every rollout and every minibatch."""
        config, row = self.config, self.row
        self.processes.check("rollout_batch_size", config.rollout_batch_size, "prompts")
        groups = config.rollout_batch_size * (1 if row.select is not None else config.num_generations or 1)
        if row.select is None:
            groups //= row.group
        smallest = groups // config.num_mini_batches
        self.processes.check("num_mini_batches", smallest, "of a rollout's sequences in each minibatch")

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The first completions of the last rollout or evaluation."""
        return self.sampler.samples

    def step(self, step: int) -> dict[str, float]:
        """Step number `step` (from 0); returns its metrics. Raises RewardError before anything is updated."""
        config, started = self.config, time.perf_counter()
        if self.row.begin is not None:
            self.row.begin(self.model, step, config)
        prompts = [self.prompts[i] for i in self.order.at(step)]
        streams = [step * config.rollout_batch_size + i for i in range(len(prompts))]
        done = self.sampler.complete(
            prompts, self.params, streams, self.row.scored, config.kl_estimator, self.row.sampled
        )
        rollout, raw = done.rollout, done.rollout.scores
        self._shape(rollout, done.greedy, len(prompts))
        chosen = rollout if self.row.select is None else rollout.select(self.row.select(rollout, config))
        scored = time.perf_counter()
        metrics = self._objective(rollout, raw) | self._update(chosen, step)
        if self.row.select is not None:
            metrics["objective/selected_scores"] = float(chosen.scores.mean())
        if "objective/kl" in metrics:
            self.kl.update(metrics["objective/kl"], len(rollout))
        self.sampler.show(rollout, raw, prompts)
        return metrics | {
            "episode": float((step + 1) * len(rollout)),
            "timing/generate": done.seconds,
            "timing/score": scored - started - done.seconds,
            "timing/update": time.perf_counter() - scored,
            "sampling/tokens_per_second": done.tokens_per_second,
            "memory/kv_peak": done.kv_peak,
        }

    def evaluate(self) -> dict[str, float]:
        """Reward, KL and length on the held-out prompts; {} without them."""
        return self.sampler.evaluate(self.eval_prompts)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the tensors."""
        return {"kl_coef": self.kl.value, "row": dict(self.row_state)}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.kl.value = float(state["kl_coef"])
        self.row_state = dict(state["row"])

    def _shape(self, rollout: Rollout, greedy: Rollout | None, prompts: int) -> None:
        """From raw scores to rewards and advantages, all left in the rollout."""
        rollouts = [rollout] if greedy is None else [rollout, greedy]
        if self.row.normalize is not None:
            scores = self.row.normalize(torch.cat([r.scores for r in rollouts]), self.row_state, self.config)
            for r, part in zip(rollouts, scores.split([len(r) for r in rollouts])):
                r.scores = part
        for r in rollouts:
            r.scores = shape_scores(r.scores, r.finished, self.config)
        if greedy is not None:
            of_prompt = torch.zeros(prompts, device=greedy.scores.device)
            rollout.baselines = of_prompt.index_copy_(0, greedy.prompt_index, greedy.scores)[rollout.prompt_index]
        shape_rewards(rollout, self.kl.value, self.config)
        if self.row.advantages is not None:
            self.row.advantages(rollout, self.config, self.row_state)

    def _update(self, rollout: Rollout, step: int) -> dict[str, float]:
        """Epochs over the rollout in shuffled minibatches; returns the mean of each update's metrics."""
        config = self.config
        history: list[dict[str, float]] = []
        difference = 0.0
        only = "critic" if step < (config.critic_warmup_steps or 0) else None
        for epoch in range(config.num_ppo_epochs or 1):
            draw = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 1_009 + epoch)
            shuffled = torch.randperm(len(rollout) // self.row.group, generator=draw).to(rollout.lengths.device)
            for groups in shuffled.tensor_split(config.num_mini_batches):
                totals, off = self._accumulate(rollout, groups)
                if not history:
                    difference = off
                if self.demonstrations:
                    totals["loss/ptx"] = self._accumulate_demonstrations()
                history.append(totals | self.optimizer.step(only))
        means = {name: sum(update[name] for update in history) / len(history) for name in history[0]}
        means["lr"] = history[-1]["lr"]
        means["sampling/logp_difference_max"] = difference
        if "val/ratio" in means:
            ratios = torch.tensor([update["val/ratio"] for update in history])
            means["val/ratio_var"] = float(ratios.var(correction=0))
        return means

    def _accumulate(self, rollout: Rollout, groups: torch.Tensor) -> tuple[dict[str, float], float]:
        """Gradients of one minibatch, in micro-batches: its metrics, and the largest |new - captured| logprob.

        groups: int64, numbers of groups of `row.group` completions, which are not cut.
        """
        counts = Counts(float(rollout.completion_lengths[self._members(groups)].sum()), float(len(groups)))
        linked = self.model.sharding is not None
        parts = self.processes.each(lambda: self._differentiate(rollout, groups, counts), linked)
        return summed([totals for totals, _ in parts]), max(difference for _, difference in parts)

    def _members(self, groups: torch.Tensor) -> torch.Tensor:
        """int64: the numbers of the groups' completions."""
        size = self.row.group
        return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()

    def _differentiate(self, rollout: Rollout, groups: torch.Tensor, counts: Counts) -> tuple[dict[str, float], float]:
        """`_accumulate` on this process's share of the groups."""
        totals: dict[str, float] = {}
        difference = 0.0
        mine, size = groups[self.processes.share(len(groups))], max(self.config.micro_batch // self.row.group, 1)
        for part, counted in self.processes.pieces(mine, size, len(groups), self.model.sharding is not None):
            batch = rollout.select(self._members(part))
            share = self.row.loss(self.model, batch, counts, self.config)
            (share.value if counted else 0.0 * share.value).backward()
            for name, value in share.metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value) * counted
            if share.logprobs is not None:
                difference = max(difference, float((share.logprobs - batch.captured).abs().max()))
        return totals, difference

    def _accumulate_demonstrations(self) -> float:
        """Adds the gradients of ptx_coef times the next demonstrations' cross-entropy, which is returned."""
        rows = [self.demonstrations[i] for i in self.mixed.at(self.optimizer.updates)]
        counts = Counts(float(sum(completion_tokens(row) for row in rows)), float(len(rows)))
        mine = rows[self.processes.share(len(rows))]

        def work() -> float:
            if not mine and self.model.sharding is None:
                return 0.0
            share = sft.loss(self.model, mine or rows[:1], counts, self.config)  # a sharded model runs everywhere
            (self.config.ptx_coef * bool(mine) * share.value).backward()
            return float(share.metrics["loss/sft"]) * bool(mine)

        return sum(self.processes.each(work, linked=self.model.sharding is not None))

    def _objective(self, rollout: Rollout, raw: torch.Tensor) -> dict[str, float]:
        lengths = rollout.completion_lengths.float()
        penalty = rollout.per_sequence(rollout.penalties)
        metrics = {
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
        if rollout.ref_logprobs.numel():
            kl = rollout.per_sequence(rollout.logprobs - rollout.ref_logprobs).mean()
            metrics = {"objective/kl": kl} | metrics
        if self.row.greedy_baseline:
            metrics["objective/baseline"] = rollout.baselines.mean()
        named = {name: float(value) for name, value in metrics.items()}
        rewards = self.sampler.rewards
        if rewards is not None and len(rewards.last) > 1:
            named |= {f"rewards/{name}": value for name, value in rewards.last.items()}
        return named
