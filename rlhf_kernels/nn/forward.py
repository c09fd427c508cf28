"""One forward of a HydraModel: each base runs once over the packed rows of all its adapters, then every role reads its
rows through its head.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rlhf_kernels.integrations.transformers import head_shape
from rlhf_kernels.nn.gated import frugal_mlps
from rlhf_kernels.nn.packing import Batch, Part, pack
from rlhf_kernels.nn.roles import HydraOutput, RoleOutput
from rlhf_kernels.ops.logprob import linear_logprob
from rlhf_kernels.ops.registry import checks_values, no_autocast

if TYPE_CHECKING:
    from rlhf_kernels.nn.hydra import HydraModel

REFERENCE = "reference"  # the role whose rows `divergence` compares with


def run_roles(
    model: "HydraModel",
    tokens: Tensor,
    lengths: Tensor | Sequence[int],
    roles: Sequence[str],
    prompt_lengths: Tensor | Sequence[int] | None,
    row_roles: Sequence[str] | None,
    temperature: float | Tensor,
    entropy: bool,
    divergence: Sequence[str],
    grad_fields: Sequence[str] | None,
) -> HydraOutput:
    """HydraModel.forward, whose docstring says what the arguments are."""
    batch = checked_batch(tokens, lengths, prompt_lengths, model.device)
    rows_of = _sequences(roles, row_roles, len(batch.lengths))
    if divergence and (REFERENCE not in rows_of or row_roles is not None):
        raise ValueError(f"divergence compares with role {REFERENCE!r}; name it in roles (row_roles cannot)")
    if isinstance(temperature, Tensor) and temperature.ndim and temperature.shape != batch.lengths.shape:
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)}; it must be a number, or one for each sequence, "
            f"[{len(batch.lengths)}]"
        )
    known = {"logprob", "lse"} | ({"entropy"} if entropy else set())
    known |= {"ref_logprob", *divergence} if divergence else set()
    if grad_fields is not None and (isinstance(grad_fields, str) or set(grad_fields) - known):
        raise ValueError(
            f"grad_fields is {grad_fields!r}; it must be a collection of fields asked for: {sorted(known)}"
        )
    hidden = hidden_states(model, batch, rows_of)
    options = {"entropy": entropy, "divergence": tuple(divergence), "grad_fields": grad_fields}
    out: dict[str, RoleOutput] = {}
    for name in sorted(rows_of, key=lambda n: n == REFERENCE):
        compared = next((o.ref_logprob for o in out.values() if o.ref_logprob is not None), None)
        if name == REFERENCE and compared is not None and not entropy:
            out[name] = RoleOutput(logprob=compared.detach())  # the comparison has made them already
            continue
        mine, rows = hidden[name]
        heat, sequences = temperature, rows_of[name]
        if isinstance(heat, Tensor) and heat.ndim and sequences is not None:
            heat = heat[torch.tensor(sequences, device=heat.device)]
        reference = hidden[REFERENCE][1] if divergence and name != REFERENCE else None
        out[name] = _apply_head(model, name, mine, rows, reference, heat, options)
    out = {name: out[name] for name in rows_of}
    return HydraOutput(out, batch.lengths - batch.prompt_lengths)


def checked_batch(
    tokens: Tensor, lengths: Tensor | Sequence[int], prompt_lengths: Tensor | Sequence[int] | None, device: torch.device
) -> Batch:
    """The arguments of a forward as a Batch on `device`. TypeError, ValueError by the name of what is wrong."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 1 or not _is_int(tokens):
        raise TypeError("tokens must be a flat int tensor of all sequences end to end")
    for name, value in (("lengths", lengths), ("prompt_lengths", prompt_lengths)):
        if value is not None and torch.as_tensor(value).numel() and not _is_int(torch.as_tensor(value)):
            raise TypeError(f"{name} must be ints, got {torch.as_tensor(value).dtype}")
    sizes = torch.as_tensor(lengths).long()
    if sizes.ndim != 1 or sizes.numel() == 0:
        raise ValueError(f"lengths is {list(sizes.shape)}; it must be [B] with B >= 1")
    prompts = torch.ones_like(sizes) if prompt_lengths is None else torch.as_tensor(prompt_lengths).long()
    if prompts.shape != sizes.shape:
        raise ValueError(f"prompt_lengths is {list(prompts.shape)}; it must be {list(sizes.shape)}, as lengths")
    prompts = prompts.to(sizes.device)
    if checks_values(sizes):
        if int(sizes.min()) < 1 or int(sizes.sum()) != tokens.numel():
            raise ValueError(
                f"lengths sum to {int(sizes.sum())}, least {int(sizes.min())}; "
                f"they must be >= 1 and sum to {tokens.numel()}, the number of tokens"
            )
        if int(prompts.min()) < 1 or bool((prompts > sizes).any()):
            raise ValueError("prompt_lengths must lie in [1, length] for every sequence")
    return Batch(tokens.to(device).long(), sizes, prompts)


def _sequences(roles: Sequence[str], row_roles: Sequence[str] | None, count: int) -> dict[str, list[int] | None]:
    """role -> the sequences it runs on (None: all)."""
    if row_roles is not None:
        if len(row_roles) != count:
            raise ValueError(f"row_roles has {len(row_roles)} names; it must have one for each of {count} sequences")
        return {name: [i for i, r in enumerate(row_roles) if r == name] for name in dict.fromkeys(row_roles)}
    if isinstance(roles, str) or not roles:
        raise TypeError(f"roles is {roles!r}; it must be a sequence of role names")
    return dict.fromkeys(roles)


def hidden_states(
    model: "HydraModel", batch: Batch, rows_of: Mapping[str, list[int] | None]
) -> dict[str, tuple[Batch, Tensor]]:
    """role -> its sequences and their final hidden states [tokens, H]; one forward a base."""
    by_base: dict[str, dict[str | None, list[str]]] = {}
    for name in rows_of:
        role = model.role(name)
        by_base.setdefault(role.base, {}).setdefault(role.adapter, []).append(name)
    found: dict[str, tuple[Batch, Tensor]] = {}
    for base, by_adapter in by_base.items():
        routes, parts, members = model.routes[base], [], []
        for adapter in sorted(by_adapter, key=lambda a: a is None):  # the bypass last: see pack
            names = by_adapter[adapter]
            wanted = sorted({i for n in names for i in rows_of[n] or ()}) if rows_of[names[0]] is not None else None
            part = Part(routes.slot(adapter), batch if wanted is None else batch.select(wanted))
            parts.append(part)
            members.append((part, wanted))
        hidden = _run(model, base, parts)
        for (part, wanted), adapter in zip(members, sorted(by_adapter, key=lambda a: a is None)):
            rows = part.rows(hidden)
            if adapter is None and base not in model.trainable_bases:
                rows = rows.detach()
            for name in by_adapter[adapter]:
                found[name] = _restrict(part.batch, rows, wanted, rows_of[name], batch)
    return found


def _run(model: "HydraModel", base: str, parts: list[Part]) -> Tensor:
    """The final hidden states [rows, H] of one packed forward through `base`'s decoder."""
    base_model, routes = model.decoder(base), model.routes[base]
    packed = pack(parts, len(routes.specs), frozen=base not in model.trainable_bases)
    if checks_values(packed.input_ids):
        _check_tokens(packed.input_ids, cast(nn.Embedding, base_model.get_input_embeddings()).num_embeddings)
    decoder = getattr(base_model, base_model.base_model_prefix)
    with routes.use(packed.routing), frugal_mlps(base_model):
        return decoder(
            input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, packed=packed.rows
        ).last_hidden_state[0]


def _apply_head(
    model: "HydraModel",
    name: str,
    batch: Batch,
    hidden: Tensor,
    reference: Tensor | None,
    temperature: float | Tensor,
    options: dict[str, Any],
) -> RoleOutput:
    role, head = model.role(name), model.head(name)
    if role.head == "reward":
        return RoleOutput(reward=_scalars(head, hidden[batch.last()]))
    places = batch.completions()
    before = hidden[places - 1]
    if role.head == "value":
        return RoleOutput(value=_scalars(head, before))
    if isinstance(temperature, Tensor) and temperature.ndim:
        counts = (batch.lengths - batch.prompt_lengths).to(temperature.device)
        temperature = temperature.repeat_interleave(counts, output_size=places.numel())
    base = model.decoder(role.base)
    compare: dict[str, Any] = {}
    if reference is not None:
        other = model.decoder(model.role(REFERENCE).base)
        compare["ref_hidden"] = reference[places - 1].detach()
        compare["divergence"] = options["divergence"]
        if other is not base:
            compare["ref_weight"] = cast(nn.Linear, other.get_output_embeddings()).weight.detach()
    fields = options["grad_fields"]
    if fields is not None and reference is None:
        fields = tuple(f for f in fields if f in ("logprob", "lse", "entropy"))
    result = linear_logprob(
        before, head.weight, batch.tokens[places], bias=head.bias, temperature=temperature,
        entropy=options["entropy"], grad_fields=fields, valid_rows=places.numel(), **head_shape(base), **compare,
    )  # fmt: skip
    names = [f for f in RoleOutput.__dataclass_fields__ if hasattr(result, f)]
    return RoleOutput(**{f: getattr(result, f) for f in names})


def _scalars(head: nn.Module, hidden: Tensor) -> Tensor:
    """One fp32 number a row, in fp32 under autocast too."""
    with no_autocast(hidden):
        return head(hidden.to(cast(nn.Linear, head).weight.dtype)).squeeze(-1).float()


def _check_tokens(tokens: Tensor, vocabulary: int) -> None:
    low, high = (int(t) for t in tokens.aminmax())
    if low < 0 or high >= vocabulary:
        raise IndexError(f"tokens holds {low if low < 0 else high}; the vocabulary is 0 to {vocabulary - 1}")


def _is_int(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _restrict(
    batch: Batch, rows: Tensor, present: list[int] | None, wanted: list[int] | None, whole: Batch
) -> tuple[Batch, Tensor]:
    """The sequences `wanted` out of the rows of the sequences `present`."""
    if wanted == present or wanted is None or present is None:
        return batch, rows
    pieces = rows.split(batch.lengths.tolist())
    return whole.select(wanted), torch.cat([pieces[present.index(i)] for i in wanted])
