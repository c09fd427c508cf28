"""plan(): the bytes of every role before anything is allocated.

Parameters are counted on the model itself, built on torch's meta device (no weights are loaded), adapters on the
Linears they would replace. Weights, gradients and optimiser state are exact; activations and scratch are estimates
(marked "~").
The KV arena sleeps while the update runs, so the peak is the static bytes plus the larger of the two phases.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_kernels.memory_layouts import ALIASES, LAYOUTS, Layout, without_reward_copy
from rlhf_kernels.memory_size import format_bytes, parse_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

VOCABULARY_BLOCK = 8192  # columns of logits the fused head holds at once; a larger vocabulary is walked in blocks
MOMENTS = {"adamw": 2, "sgd": 0}  # fp32 numbers an optimiser keeps for each trained parameter


@dataclass(frozen=True)
class PlanRow:
    """Bytes of one part. `phase`: "static" is there all the time, "rollout" and "update" take turns."""

    name: str
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    other: int = 0
    phase: str = "static"
    exact: bool = True
    note: str = ""

    @property
    def bytes(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.other


@dataclass(frozen=True)
class Plan:
    """Where the bytes go. `static`: exact bytes of weights, gradients and optimiser; `total`: the expected peak."""

    title: str
    rows: tuple[PlanRow, ...]
    parameters: int
    budget: int | None
    at_batch: Callable[[int], int]  # the peak at another batch

    @property
    def static(self) -> int:
        return self.phase("static")

    @property
    def total(self) -> int:
        return self.static + max(self.phase("rollout"), self.phase("update"))

    def phase(self, name: str) -> int:
        """Bytes of one phase: "static", "rollout" or "update"."""
        return sum(row.bytes for row in self.rows if row.phase == name)

    @property
    def largest_batch(self) -> int | None:
        """The largest batch whose peak is within the budget; 0 when none is, None without a budget."""
        if self.budget is None:
            return None
        if self.at_batch(1) > self.budget:
            return 0
        low, high = 1, 2
        while self.at_batch(high) <= self.budget:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.at_batch(middle) <= self.budget else (low, middle)
        return low

    def table(self) -> str:
        """Text: a line a part, with weights, gradients, optimiser state and their sum."""
        lines = [
            (r.name, *(format_bytes(v) for v in (r.weights, r.gradients, r.optimizer)), _estimate(r)) for r in self.rows
        ]
        sums = [sum(getattr(r, k) for r in self.rows) for k in ("weights", "gradients", "optimizer")]
        lines.append(("static", *map(format_bytes, sums), format_bytes(self.static)))
        lines.append(("peak", "", "", "", "~" + format_bytes(self.total)))
        text = self.title + "\n" + columns(("", "weights", "gradients", "optimiser", "bytes"), lines, rules=(-2,))
        if self.budget is not None:
            text += f"\nbudget {format_bytes(self.budget)}: largest batch {self.largest_batch}"
        return text


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
) -> Plan:
    """The bytes `algorithm` needs on a model, given as a transformers config, a directory or a hub id.

    batch: sequences at once, in the rollout and in a micro-batch;  prompt, response: tokens each
    lora_rank: of fp32 adapters on `target_modules` (layouts without adapters ignore it)
    dtype: "float32", or "bfloat16": weights and gradients in bf16, with an fp32 master of what is trained
    optimizer: "adamw" (two fp32 moments) or "sgd" (none)
    budget: bytes or "80GiB", for `.largest_batch`;  kv_memory: the arena; default: what the whole batch needs
    reward_model: False when the reward is a function: `ppo`, `lora-ppo` and `remax` then hold one copy less

    Bytes a parameter, AdamW: PPO 36 and ReMax 20 in bfloat16, 40 and 24 in float32. Raises ValueError naming the
    argument that is wrong.
    """
    name = ALIASES.get(algorithm, algorithm)
    if name not in LAYOUTS:
        raise ValueError(f"algorithm: {algorithm!r} is not one of {', '.join([*LAYOUTS, *ALIASES])}")
    if optimizer not in MOMENTS:
        raise ValueError(f"optimizer: {optimizer!r} is not one of {', '.join(MOMENTS)}")
    for key, value in (("batch", batch), ("prompt", prompt), ("response", response), ("lora_rank", lora_rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}: must be a whole number of at least 1, got {value!r}")
    kv_bytes = None if kv_memory is None else parse_bytes(kv_memory, "kv_memory")
    budget_bytes = None if budget is None else parse_bytes(budget, "budget")
    model = meta_model(config_or_path, dtype)
    layout = LAYOUTS[name] if reward_model else without_reward_copy(LAYOUTS[name])
    static = tuple(_static_rows(model, layout, lora_rank, target_modules, MOMENTS[optimizer]))
    shape = _Shape(model, layout, prompt, response, kv_bytes, gradient_checkpointing)

    def at_batch(sequences: int) -> int:
        rows = [*static, *shape.rows(sequences)]
        phases = {p: sum(r.bytes for r in rows if r.phase == p) for p in ("static", "rollout", "update")}
        return phases["static"] + max(phases["rollout"], phases["update"])

    parameters = sum(p.numel() for p in model.parameters())
    title = f"{name}: {parameters:,} parameters, {_dtype_name(model)}, batch {batch} x ({prompt} + {response}) tokens"
    return Plan(title, (*static, *shape.rows(batch)), parameters, budget_bytes, at_batch)


def comparison(config_or_path: Any, algorithms: Iterable[str] = tuple(LAYOUTS), **kwargs: Any) -> str:
    """A table with a line an algorithm; `kwargs` as for `plan`. Factors are static bytes over those of hydra-ppo."""
    plans = {name: plan(config_or_path, name, **kwargs) for name in algorithms}
    unit = plans["hydra-ppo"].static if "hydra-ppo" in plans else None
    lines = []
    for name, one in plans.items():
        layout = LAYOUTS[name]
        copies, adapters = len(layout.bases), len(layout.adapters + layout.frozen)
        line = [name, f"{copies} x {adapters}", format_bytes(one.static), f"{one.static / one.parameters:.2f}"]
        line += [f"{one.static / unit:.2f}x"] if unit else []
        line += ["~" + format_bytes(one.total)]
        line += [str(one.largest_batch)] if one.budget is not None else []
        lines.append(tuple(line))
    header = ["", "bases x adapters", "static", "bytes/param"]
    header += ["of hydra-ppo"] if unit else []
    header += ["peak"] + (["largest batch"] if kwargs.get("budget") is not None else [])
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


def _static_rows(
    model: Any, layout: Layout, rank: int, target_modules: str | list[str], moments: int
) -> Iterable[PlanRow]:
    parameters = list(model.parameters())
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    unread = [] if head is None or head.weight is embeddings.weight else [head.weight]
    for base in layout.bases:
        if base.trained:
            idle = unread if base.scalar else []
            yield _trained(base.role + " model", parameters, moments, idle)
        else:
            yield PlanRow(base.role + (" model" if base.role != "shared base" else ""), weights=_nbytes(parameters))
    if layout.adapters or layout.frozen:
        shapes = adapter_parameters(model, rank, target_modules)
        for adapter in layout.adapters:
            yield _trained(adapter + " adapter", shapes, moments, [])
        for adapter in layout.frozen:
            yield PlanRow(adapter + " adapter", weights=_nbytes(shapes))
    if layout.heads:
        yield _heads(layout, embeddings.weight.shape[1], moments)


def adapter_parameters(model: Any, rank: int, target_modules: str | list[str] = "all-linear") -> list[Any]:
    """The A [r, K] and B [N, r] of one fp32 adapter, on the meta device, for every Linear it would replace."""
    import torch

    from rlhf_kernels.nn.lora import targeted

    tensors = []
    for path in targeted(model, target_modules):
        module = model.get_submodule(path)
        rows, cols = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
        for shape in ((rank, cols), (rows, rank)):
            tensors.append(torch.empty(shape, dtype=torch.float32, device="meta"))
    return tensors


def _nbytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _trained(name: str, tensors: list[Any], moments: int, idle: list[Any]) -> PlanRow:
    """Weights and gradients in their dtype; fp32 masters of lower precisions; moments; AdamW's step (4 bytes)."""
    active = [t for t in tensors if not any(t is other for other in idle)]
    masters = sum(4 * t.numel() for t in tensors if t.element_size() < 4)
    state = sum(4 * moments * t.numel() + (4 if moments else 0) for t in active)
    return PlanRow(name, _nbytes(tensors), _nbytes(active), masters + state)


def _heads(layout: Layout, hidden: int, moments: int) -> PlanRow:
    """Scalar heads [1, hidden] in fp32."""
    trained = sum(1 for _, trains in layout.heads if trains)
    one = 4 * hidden
    step = 4 if moments else 0
    return PlanRow(
        "scalar heads", len(layout.heads) * one, trained * one, trained * (moments * one + step), note="fp32"
    )


class _Shape:
    """What grows with the batch: KV slices, decode logits, activations, head scratch."""

    def __init__(
        self, model: Any, layout: Layout, prompt: int, response: int, kv_bytes: int | None, checkpointing: bool
    ) -> None:
        from rlhf_kernels.generation.arena import layer_shapes
        from rlhf_kernels.nn.lora import decoder_linears

        config = model.config.get_text_config()
        self.layout, self.kv_bytes = layout, kv_bytes
        self.tokens, self.response = prompt + response, response
        self.item = next(model.parameters()).element_size()
        self.vocabulary, self.hidden = config.vocab_size, config.hidden_size
        self.kv_token = self.item * sum(s.kv_heads * (s.k_dim + s.v_dim) for s in layer_shapes(config))
        linears = sum(sum(model.get_submodule(p).weight.shape) for p in decoder_linears(model))
        layers = config.num_hidden_layers
        # kept for the backward pass, a token: in and out of every Linear, and per layer the norms' inputs and outputs
        whole = self.item * (linears + 8 * layers * self.hidden)
        self.activation_token = whole
        if checkpointing:  # each layer's input, and one layer in full while it is recomputed
            self.activation_token = self.item * layers * self.hidden + whole // layers

    def rows(self, batch: int) -> list[PlanRow]:
        rows = []
        if self.layout.rollout:
            arena = self.kv_bytes if self.kv_bytes is not None else batch * self.tokens * self.kv_token
            rows.append(PlanRow("KV arena", other=arena, phase="rollout"))
            logits = 2 * 4 * batch * self.vocabulary  # fp32, and the model's own
            rows.append(PlanRow("decode logits", other=logits, phase="rollout", exact=False))
        tokens = batch * self.tokens * self.layout.passes
        activations = tokens * (self.activation_token + 8 * self.hidden)
        rows.append(PlanRow("activations", other=activations, phase="update", exact=False))
        if self.layout.heads_lm:
            block = min(self.vocabulary, VOCABULARY_BLOCK)
            scratch = batch * self.response * (4 * block + 8 * self.hidden)
            rows.append(PlanRow("head scratch", other=scratch, phase="update", exact=False))
        return rows


def columns(header: tuple[str, ...], lines: list[tuple[str, ...]], rules: tuple[int, ...] = ()) -> str:
    """Aligned text columns, the first to the left; a rule under the header and before the lines numbered in `rules`."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def text(line: tuple[str, ...]) -> str:
        return "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    result = [text(header), rule]
    marked = {r % len(lines) for r in rules}
    for number, line in enumerate(lines):
        result += [rule] if number in marked else []
        result.append(text(line))
    return "\n".join(result)


def _estimate(row: PlanRow) -> str:
    return ("" if row.exact else "~") + format_bytes(row.bytes)


def _dtype_name(model: Any) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")
