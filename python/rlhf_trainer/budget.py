"""`memory_budget`: the micro-batch and the KV arena that the memory plan finds room for.

A micro-batch changes no result beyond rounding: losses are sums over counts of the whole minibatch. Nor does the arena.
So what the user leaves open is chosen here, before any model is loaded: first the largest micro-batch whose scoring,
forward and backward fit, then the arena, as much of the rollout as the rest holds.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_kernels.memory import Plan, largest, plan
from rlhf_kernels.memory_layouts import LAYOUTS, Base, Layout, Part
from rlhf_kernels.memory_size import format_bytes, parse_bytes
from rlhf_trainer.algorithms import Algorithm
from rlhf_trainer.config import KV_MEMORY, MICRO_BATCH, TrainConfig
from rlhf_trainer.data import Demonstration, Prompt
from rlhf_trainer.errors import UserError
from rlhf_trainer.models import resolve
from rlhf_trainer.processes import speaks
from rlhf_trainer.shaping import EXACT

NAMED = 3  # of the plan's largest lines in an error


@dataclass(frozen=True)
class Lengths:
    """The longest prompt and the longest completion of a run, in tokens."""

    prompt: int
    response: int

    @classmethod
    def of(cls, rows: Sequence[Any], config: TrainConfig) -> "Lengths":
        """rows: prompts, demonstrations or preferences."""
        prompts, responses = [1], [1]
        for row in rows:
            if isinstance(row, Prompt):
                prompts.append(len(row.tokens))
                responses.append(config.max_completion_length)
            else:
                ends = [row.completion] if isinstance(row, Demonstration) else [row.chosen, row.rejected]
                prompts.append(len(row.prompt))
                responses += map(len, ends)
        return cls(max(prompts), max(responses))


def memory_layout(row: Algorithm, config: TrainConfig) -> Layout:
    """The models of a run as the memory plan counts them."""
    layout = row.layout(config)
    names = dict.fromkeys(["base", *layout.bases])
    alone = "policy" if layout.trained_bases else "shared base"
    bases = tuple(Base(alone if len(names) == 1 else n, n in layout.trained_bases) for n in names)
    roles = {name: Part(role.adapter, role.head, role.base) for name, role in layout.roles.items()}
    update = LAYOUTS[row.name].update
    if config.precompute_ref_logprobs:
        update = tuple(call._replace(roles=tuple(r for r in call.roles if r != "reference")) for call in update)
    scored = tuple(role for role in row.scored if role in roles)
    if "reward" in roles and not config.reward and row.data is None:
        scored += ("reward",)
    return Layout(bases, roles, row.trained, update, scored, rollout=row.data is None)


def sequences(row: Algorithm, config: TrainConfig) -> tuple[int, int]:
    """Completions of a rollout, and sequences of one minibatch (of pairs: pairs, for rows that learn from a file)."""
    if row.data is not None:
        return 0, config.micro_batch * config.gradient_accumulation_steps
    samples = config.num_generations or 1
    trained = config.rollout_batch_size * (row.group if row.select is not None else samples)
    rollout = config.rollout_batch_size * (samples + row.greedy_baseline)
    return rollout, max(1, -(-trained // config.num_mini_batches))


def plan_of(config: TrainConfig, row: Algorithm, lengths: Lengths, batch: int | None = None, **changes: Any) -> Plan:
    """The memory plan of a run, at its own micro-batch or another."""
    rollout, minibatch = sequences(row, config)
    batch = min(config.micro_batch if batch is None else batch, minibatch)
    targets: Any = config.lora_target_modules
    settings: dict[str, Any] = {
        "batch": batch,
        "prompt": lengths.prompt,
        "response": lengths.response,
        "lora_rank": config.lora_r or 1,
        "dtype": config.dtype,
        "target_modules": targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
        "kv_memory": config.kv_memory,
        "gradient_checkpointing": config.gradient_checkpointing,
        "layout": memory_layout(row, config),
        "rollout": rollout or None,
        "micro_batches": -(-minibatch // batch),
        "divergence": (EXACT[config.kl_estimator],) if config.kl_estimator in EXACT else (),
    }
    return plan(resolve(config.model), config.algorithm, **(settings | changes))


def fitted(config: TrainConfig, row: Algorithm, rows: Sequence[Any]) -> TrainConfig:
    """Under a budget, the configuration with a micro-batch and an arena: those given, else the largest that fit.

    Says what was chosen on stderr. UserError where the budget holds not even the smallest.
    """
    if config.memory_budget is None:
        return config
    budget, lengths = parse_bytes(config.memory_budget, "memory_budget"), Lengths.of(rows, config)
    chosen = config
    if config.per_device_train_batch_size is None and config.demonstrations:
        chosen = replace(config, per_device_train_batch_size=MICRO_BATCH)  # it says how many join each minibatch
    elif config.per_device_train_batch_size is None:
        chosen = _with_micro_batch(config, row, lengths, budget)
    if row.data is None and config.kv_memory is None:
        chosen = replace(chosen, kv_memory=_arena(chosen, row, lengths, budget))
    found = plan_of(chosen, row, lengths)
    if found.total > budget:
        raise _too_small(found, budget)
    line = (
        f"memory_budget {format_bytes(budget)}: micro-batches of {chosen.per_device_train_batch_size}"
        + (f", {format_bytes(parse_bytes(chosen.kv_memory or 0))} of keys and values" if row.data is None else "")
        + f"; the plan's peak is {format_bytes(found.total)}, in the {found.phase}"
    )
    if speaks():
        print(line, file=sys.stderr)
    return chosen if chosen.kv_memory is not None else replace(chosen, kv_memory=KV_MEMORY)


def _with_micro_batch(config: TrainConfig, row: Algorithm, lengths: Lengths, budget: int) -> TrainConfig:
    """The largest micro-batch that fits; rows that learn from a file keep the sequences of an optimiser step."""
    _, minibatch = sequences(row, config)
    least = replace(config, kv_memory=config.kv_memory or 0)

    def others(peaks: dict[str, int]) -> int:
        return max(value for phase, value in peaks.items() if phase != "rollout")

    groups = minibatch // row.group
    found = groups
    if others(plan_of(least, row, lengths, groups * row.group).peaks) > budget:  # several, then
        several = plan_of(least, row, lengths, row.group, micro_batches=2)
        found = min(largest(lambda n: others(several.peaks_at(n * row.group)), budget), groups - 1)
        if found <= 0:
            raise _too_small(several, budget)
    size = found * row.group
    if row.data is None:
        return replace(config, per_device_train_batch_size=size)
    size = next(n for n in range(size, 0, -1) if minibatch % n == 0)
    return replace(config, per_device_train_batch_size=size, gradient_accumulation_steps=minibatch // size)


def _arena(config: TrainConfig, row: Algorithm, lengths: Lengths, budget: int) -> int:
    """Bytes for the keys and values of the whole rollout, or of as much of it as there is room for."""
    whole = plan_of(config, row, lengths, kv_memory=None)
    wanted = next(r.bytes for r in whole.rows if r.name == "KV arena")
    slack = 2 * wanted // max(1, sequences(row, config)[0])  # slices are whole: a sequence more, and a half-used one
    return max(min(wanted + slack, wanted + budget - whole.peaks["rollout"]), 0)


def _too_small(found: Plan, budget: int) -> UserError:
    rows = sorted((r for r in found.rows if r.phase in ("static", found.phase)), key=lambda r: -r.bytes)
    lines = ", ".join(f"{r.name} {format_bytes(r.bytes)}" for r in rows[:NAMED])
    return UserError(
        f"memory_budget: {format_bytes(budget)} does not hold it: the plan's peak is {format_bytes(found.total)}, in "
        f"the {found.phase}, with {format_bytes(found.static)} of weights, gradients and optimiser state; the largest "
        f"parts: {lines}"
    )
