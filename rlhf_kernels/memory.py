"""plan(): the bytes an algorithm needs before anything is allocated, and in which phase of a step they peak.

Everything is read off the model itself on torch's meta device, from its config alone: weights, gradients, optimiser
state and the KV arena are counted, exact to the byte; what forwards and backwards hold is found by running them there,
our ops among them (`memory_step`), with what those hold inside (`memory_scratch`). Lines with "~" are such.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_kernels.memory_layouts import ALIASES, LAYOUTS, Layout, layout_of, without_reward_copy
from rlhf_kernels.memory_size import format_bytes, parse_bytes
from rlhf_kernels.memory_static import MOMENTS, PlanRow, adapter_parameters, optimizer_temporaries, static_rows
from rlhf_kernels.memory_table import columns, table

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rlhf_kernels.memory_step import Steps

__all__ = ["ALIASES", "LAYOUTS", "Plan", "PlanRow", "adapter_parameters", "comparison", "meta_model", "plan"]

PREFILL_TOKENS = 512  # of prompts in a step of generation (SlicedGenerator's step_tokens)


@dataclass(frozen=True)
class Plan:
    """Where the bytes go. `static`: exact bytes of weights, gradients and optimiser; `total`: the expected peak.

    peaks: the most bytes in each phase of a step: "rollout" and "scoring" (no gradients are there then), "update"
    (forward and backward; gradients are there with more than one micro-batch) and "optimiser".
    """

    title: str
    fixed: tuple[PlanRow, ...]  # of phase "static"
    growing: Callable[[int], tuple[PlanRow, ...]]  # the others, at a batch: found when they are first asked for
    parameters: int
    batch: int
    budget: int | None
    micro_batches: int

    @property
    def rows(self) -> tuple[PlanRow, ...]:
        return (*self.fixed, *self.growing(self.batch))

    @property
    def static(self) -> int:
        return sum(row.bytes for row in self.fixed)

    @property
    def peaks(self) -> dict[str, int]:
        return self.peaks_at(self.batch)

    def at_batch(self, batch: int) -> int:
        """The peak at another batch."""
        return max(self.peaks_at(batch).values())

    def peaks_at(self, batch: int) -> dict[str, int]:
        """`peaks` at another batch."""
        gradients = sum(row.gradients for row in self.fixed)
        found: dict[str, int] = {}
        for row in self.growing(batch):
            without = row.phase in ("rollout", "scoring") or (row.phase == "update" and self.micro_batches == 1)
            found[row.phase] = found.get(row.phase, self.static - gradients * without) + row.bytes
        return found

    @property
    def total(self) -> int:
        return max(self.peaks.values())

    @property
    def phase(self) -> str:
        """The phase whose peak is the highest."""
        return max(self.peaks, key=self.peaks.__getitem__)

    @property
    def largest_batch(self) -> int | None:
        """The largest batch whose peak is within the budget; 0 when none is, None without a budget."""
        if self.budget is None:
            return None
        return largest(self.at_batch, self.budget)

    def table(self) -> str:
        """Text: a line a part, with weights, gradients, optimiser state and their sum; a block a phase."""
        return table(self)


def plan(
    config_or_path: Any,
    algorithm: str = "hydra-ppo",
    batch: int = 32,
    prompt: int = 256,
    response: int = 256,
    lora_rank: int = 16,
    dtype: "str | torch.dtype" = "bfloat16",
    optimizer: str = "adamw",
    budget: int | str | None = None,
    *,
    target_modules: str | list[str] = "all-linear",
    kv_memory: int | str | None = None,
    gradient_checkpointing: bool = False,
    reward_model: bool = True,
    adapters: bool | None = None,
    rollout: int | None = None,
    micro_batches: int = 2,
    layout: Layout | None = None,
    divergence: tuple[str, ...] = (),
) -> Plan:
    """The bytes `algorithm` needs on a model, given as a transformers config, a directory or a hub id.

    batch: sequences (rows that learn from preferences: pairs) of a micro-batch, which scoring reads at once too
    prompt, response: tokens each;  rollout: sequences sampled in a step, default: `batch`
    lora_rank: of fp32 adapters on `target_modules` (layouts without adapters ignore it)
    dtype: "float32", or "bfloat16": weights and gradients in bf16, with an fp32 master of what is trained
    optimizer: "adamw" (two fp32 moments) or "sgd" (none)
    budget: bytes or "80GiB", for `.largest_batch`;  kv_memory: the arena; default: what the whole rollout needs
    reward_model: False when the reward is a function: there is then no copy of a reward model
    adapters: whether rows that can do both (sft, reward, remax, dpo, ...) train adapters; None: what they do by default
    micro_batches: of a minibatch: from the second on gradients are there while activations are
    layout: instead of the algorithm's own;  divergence: exact ones ("kl", "js") that scoring takes over the vocabulary

    The estimates are for the CPU's kernels. Bytes a parameter, AdamW: PPO 36 and ReMax 20 in bfloat16, 40 and 24 in
    float32. Raises ValueError naming the argument that is wrong.
    """
    if optimizer not in MOMENTS:
        raise ValueError(f"optimizer: {optimizer!r} is not one of {', '.join(MOMENTS)}")
    counts = {"batch": batch, "prompt": prompt, "response": response, "lora_rank": lora_rank}
    counts |= {"micro_batches": micro_batches} | ({} if rollout is None else {"rollout": rollout})
    for key, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}: must be a whole number of at least 1, got {value!r}")
    name = ALIASES.get(algorithm, algorithm)
    if layout is None:
        layout = layout_of(name, adapters)
        layout = layout if reward_model else without_reward_copy(layout)
    kv_bytes = None if kv_memory is None else parse_bytes(kv_memory, "kv_memory")
    budget_bytes = None if budget is None else parse_bytes(budget, "budget")
    model = meta_model(config_or_path, dtype)
    static = tuple(static_rows(model, layout, lora_rank, target_modules, MOMENTS[optimizer]))
    temporaries = optimizer_temporaries(static)
    shape = _Shape(
        model, layout, prompt, response, kv_bytes, rollout, lora_rank, target_modules, gradient_checkpointing,
        micro_batches > 1, temporaries, divergence,
    )  # fmt: skip

    parameters = sum(p.numel() for p in model.parameters())
    title = f"{name}: {parameters:,} parameters, {_dtype_name(model)}, batch {batch} x ({prompt} + {response}) tokens"
    return Plan(title, static, shape.rows, parameters, batch, budget_bytes, micro_batches)


def largest(at_batch: Callable[[int], int], budget: int) -> int:
    """The largest batch whose peak is within the budget; 0 when none is. Peaks rise with the batch, nearly evenly."""
    peak = lru_cache(maxsize=None)(at_batch)
    if peak(1) > budget:
        return 0
    low, high = 1, 2
    while peak(high) <= budget:
        slope = max(1, (peak(high) - peak(low)) // (high - low))
        low, high = high, max(high + 1, min(64 * high, low + (budget - peak(low)) // slope + 1))
    while high - low > 1:
        slope = max(1, (peak(high) - peak(low)) // (high - low))
        guess = low + (budget - peak(low)) // slope
        middle = min(max(guess, low + 1), high - 1)
        low, high = (middle, high) if peak(middle) <= budget else (low, middle)
    return low


def comparison(config_or_path: Any, algorithms: Iterable[str] = tuple(LAYOUTS), **kwargs: Any) -> str:
    """A table with a line an algorithm; `kwargs` as for `plan`. Factors are static bytes over those of hydra-ppo."""
    plans = {name: plan(config_or_path, name, **kwargs) for name in algorithms}
    unit = plans["hydra-ppo"].static if "hydra-ppo" in plans else None
    lines = []
    for name, one in plans.items():
        layout = LAYOUTS[name]
        copies = f"{len(layout.bases)} x {len(layout.adapters)}"
        line = [name, copies, format_bytes(one.static), f"{one.static / one.parameters:.2f}"]
        line += [f"{one.static / unit:.2f}x"] if unit else []
        line += ["~" + format_bytes(one.total), one.phase]
        line += [str(one.largest_batch)] if one.budget is not None else []
        lines.append(tuple(line))
    header = ["", "bases x adapters", "static", "bytes/param"]
    header += ["of hydra-ppo"] if unit else []
    header += ["peak", "in the"] + (["largest batch"] if kwargs.get("budget") is not None else [])
    first = next(iter(plans.values()))
    return first.title.partition(": ")[2] + "\n" + columns(tuple(header), lines)


def meta_model(config_or_path: Any, dtype: "str | torch.dtype") -> "nn.Module":
    """The causal LM of a config on the meta device: every shape, no storage. ValueError for what is not a model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if wanted not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: {dtype!r} is not float32 or bfloat16")
    config = config_or_path
    if isinstance(config, str) and config.startswith(("/", ".", "~")) and not Path(config).exists():
        raise ValueError(f"config_or_path: {config!r} does not exist")
    try:
        if not isinstance(config, PretrainedConfig):
            config = AutoConfig.from_pretrained(str(config))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=wanted)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"config_or_path: {config_or_path!r} is no causal language model: {reason}") from error


@dataclass
class _Shape:
    """What grows with the batch: the KV arena, generation's steps, scoring, activations."""

    model: Any
    layout: Layout
    prompt: int
    response: int
    kv_bytes: int | None
    rollout: int | None
    rank: int
    targets: str | list[str]
    checkpointing: bool
    accumulate: bool
    temporaries: int
    divergence: tuple[str, ...]

    def __post_init__(self) -> None:
        from rlhf_kernels.generation.arena import layer_shapes

        config = self.model.config.get_text_config()
        self.item = next(self.model.parameters()).element_size()
        self.vocabulary = config.vocab_size
        self.kv_token = self.item * sum(s.kv_heads * (s.k_dim + s.v_dim) for s in layer_shapes(config))
        self.rows = lru_cache(maxsize=None)(self._rows)
        self._steps: Steps | None = None

    @property
    def steps(self) -> "Steps":
        """The models to run; made when they are first needed."""
        from rlhf_kernels.memory_step import Steps

        if self._steps is None:
            dtype = next(self.model.parameters()).dtype

            def make(config: Any) -> Any:
                return meta_model(config, dtype)

            self._steps = Steps(make, self.model.config, self.layout, self.rank, self.targets, self.checkpointing)
        return self._steps

    def _rows(self, batch: int) -> tuple[PlanRow, ...]:
        rows = []
        if self.layout.rollout:
            rows += self._rollout(batch if self.rollout is None else self.rollout)
            roles = self.layout.scored
            roles += ("reward",) if "reward" in self.layout.roles and "reward" not in roles else ()
            scoring = self.steps.score(batch, self.prompt, self.response, roles, self.divergence)
            rows.append(PlanRow("reading the rollout", other=scoring, phase="scoring", exact=False))
        peak = self.steps.update(batch, self.prompt, self.response, self.accumulate)
        rows.append(PlanRow("activations", other=peak.kept, phase="update", exact=False))
        working = max(0, peak.peak - peak.kept)
        rows.append(PlanRow("working memory", other=working, phase="update", exact=False))
        rows.append(PlanRow("wider gradients", other=self.temporaries, phase="optimiser"))
        phases = dict.fromkeys(row.phase for row in rows)
        rows += [PlanRow("libraries, objects", other=peak.libraries, phase=phase, exact=False) for phase in phases]
        return tuple(rows)

    def _rollout(self, sequences: int) -> list[PlanRow]:
        """The arena, and a step that reads as many prompt tokens as a step may and draws for every sequence."""
        whole = sequences * (self.prompt + self.response) * self.kv_token
        arena = whole if self.kv_bytes is None else self.kv_bytes
        active = max(1, min(sequences, PREFILL_TOKENS, arena // max(1, (self.prompt + self.response) * self.kv_token)))
        piece = min(self.prompt, PREFILL_TOKENS)
        prompts = max(1, min(sequences, PREFILL_TOKENS // piece))
        step = self.steps.score(prompts, max(1, piece - 1), 1, ("actor",))
        logits = self.item * active * self.vocabulary
        return [
            PlanRow("KV arena", other=arena, phase="rollout"),
            PlanRow("a generation step", other=max(step, logits), phase="rollout", exact=False),
        ]


def _dtype_name(model: Any) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")
