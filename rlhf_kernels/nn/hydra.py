"""HydraModel: one base (or several), named roles on it, and every sequence through several roles in one packed forward.

A role is a base, an adapter (None: the base itself) and a head. Roles with one base run in one pass over the rows of
all their adapters; roles with the same base and adapter share their rows.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rlhf_kernels.integrations.peft import CONFIG, load_adapter, read_spec, save_adapter
from rlhf_kernels.integrations.transformers import PackedRows, SlicedRows, head_shape
from rlhf_kernels.nn.loading import HEADS_FILE, load_decoder, load_heads, save_heads, saved_base
from rlhf_kernels.nn.lora import (
    ALL_LINEAR,
    AdapterRoutes,
    LoRALinear,
    LoraSpec,
    attach_adapters,
    checkpoint_layers,
    detach_adapter,
    lora_layers,
)
from rlhf_kernels.nn.packing import Batch, Part, pack
from rlhf_kernels.nn.roles import HydraOutput, Role, RoleOutput, default_roles
from rlhf_kernels.ops.logprob import linear_logprob
from rlhf_kernels.ops.lora import Routing
from rlhf_kernels.ops.registry import no_autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFERENCE = "reference"  # the role whose rows `divergence` compares with


class HydraModel(nn.Module):
    """Decoders, adapters and heads under named roles. Dropout is off in every pass, training or not.

    Attributes: bases (name -> transformers model), heads (key -> Linear(hidden, 1), fp32; the key is the head's name,
    with "base name:" before it on any other base than "base"), roles (name -> Role; may be extended), specs.
    """

    def __init__(
        self,
        bases: "Mapping[str, PreTrainedModel]",
        adapters: Mapping[str, LoraSpec] | None = None,
        roles: Mapping[str, Role] | None = None,
        train_base: bool | Collection[str] = False,
        target_modules: str | Sequence[str] = ALL_LINEAR,
    ) -> None:
        """`bases` are taken over: made to run on packed rows, frozen unless `train_base` (True, or names) says else."""
        super().__init__()
        if not bases:
            raise ValueError("bases is empty; a HydraModel needs at least one base")
        if len({id(base) for base in bases.values()}) < len(bases):
            raise ValueError("bases holds one model under two names; give each base a copy of its own")
        adapters = dict(adapters or {})
        self.bases = nn.ModuleDict({name: load_decoder(base, None, None) for name, base in bases.items()})
        self.roles: dict[str, Role] = default_roles(adapters, bases) if roles is None else dict(roles)
        self.target_modules = target_modules
        self.trainable_bases = _trainable(train_base, list(bases))
        for name, base in self._decoders():
            base.requires_grad_(name in self.trainable_bases)
        self.routes: dict[str, AdapterRoutes] = {name: attach_adapters(m, {}) for name, m in self._decoders()}
        self.heads = nn.ModuleDict()
        for name, role in self.roles.items():
            if not isinstance(role, Role):
                raise TypeError(f"roles[{name!r}] is a {type(role).__name__}; it must be a Role")
            if role.base not in self.bases:
                raise ValueError(f"roles[{name!r}] names base {role.base!r}; there are {', '.join(bases)}")
            if role.adapter is not None and role.adapter not in adapters:
                known = ", ".join(adapters) or "none"
                raise ValueError(f"roles[{name!r}] names adapter {role.adapter!r}; there are {known}")
        for name, spec in adapters.items():
            self.add_adapter(name, spec)
        for name in self.roles:
            self._head(name)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: "str | os.PathLike[str] | PreTrainedModel | None",
        adapters: Mapping[str, LoraSpec] | None = None,
        roles: Mapping[str, Role] | None = None,
        bases: "Mapping[str, str | os.PathLike[str] | PreTrainedModel] | None" = None,
        train_base: bool | Collection[str] = False,
        target_modules: str | Sequence[str] = ALL_LINEAR,
        dtype: torch.dtype | None = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> "HydraModel":
        """A model from a transformers checkpoint: a directory, a hub id, or a module (taken over as it is).

        Args:
            path_or_id: base "base"; None where `bases` names them all.
            bases: further bases by name, each a copy of its own.
            train_base: whether the bases' own parameters train: all (True), none, or the named ones.
            target_modules: what adapters sit on: "all-linear" (every Linear of the decoder layers) or names as PEFT's.
            dtype: of the bases' weights; None: as stored. Adapters follow their LoraSpec, heads are fp32.

        Heads are read from heads.safetensors beside the checkpoint where there is one.
        Raises ValueError for a path that is not there, an unsupported model, an unknown base, adapter or head.
        """
        sources: dict[str, Any] = {} if path_or_id is None else {"base": path_or_id}
        sources |= dict(bases or {})
        loaded, head_files = {}, {}
        for name, source in sources.items():
            if isinstance(source, (str, os.PathLike)):
                resolved = saved_base(source)
                head_files[name] = [Path(p) / HEADS_FILE for p in (resolved, source)]
                source = resolved
            loaded[name] = load_decoder(source, dtype, device)
        model = cls(loaded, adapters, roles, train_base, target_modules)
        for name, files in head_files.items():
            file = next((f for f in files if f.is_file()), None)
            if file is not None:
                model._load_heads(file, name)
        return model

    # ---- what there is -----------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self._decoders())[1].device

    @property
    def dtype(self) -> torch.dtype:
        return next(self._decoders())[1].dtype

    @property
    def adapters(self) -> dict[str, str]:
        """adapter -> the base it is on."""
        return {name: base for base, routes in self.routes.items() for name in routes.specs}

    def _decoder(self, base: str) -> "PreTrainedModel":
        return cast("PreTrainedModel", self.bases[base])

    def _decoders(self) -> "Iterator[tuple[str, PreTrainedModel]]":
        return ((name, self._decoder(name)) for name in self.bases)

    def _linear_heads(self) -> dict[str, nn.Linear]:
        return {key: cast(nn.Linear, head) for key, head in self.heads.items()}

    def role(self, name: str) -> Role:
        if name not in self.roles:
            raise ValueError(f"role {name!r} is not one of {', '.join(self.roles)}")
        role = self.roles[name]
        if role.adapter is not None and role.adapter not in self.routes[role.base].specs:
            known = ", ".join(self.routes[role.base].specs) or "none"
            raise ValueError(f"role {name!r} uses adapter {role.adapter!r}; base {role.base!r} has {known}")
        return role

    def base_model(self, role: str) -> "PreTrainedModel":
        """The transformers model a role runs on."""
        return self._decoder(self.role(role).base)

    def trainable_parameters(self, role: str) -> list[nn.Parameter]:
        """The role's adapter, or without one its base's parameters where that base trains; and the role's own head."""
        which = self.role(role)
        found: list[nn.Parameter] = []
        if which.adapter is not None:
            for a, b in self._matrices(which.adapter):
                found += [a, b]
        elif which.base in self.trainable_bases:
            found += self._decoder(which.base).parameters()
            own = {
                id(p) for layer in lora_layers(self._decoder(which.base)).values() for p in _adapter_parameters(layer)
            }
            found = [p for p in found if id(p) not in own]
        if which.head != "lm":
            found += self._head(role).parameters()
        return found

    def train(self, mode: bool = True) -> "HydraModel":
        """Only a flag: the bases stay in eval mode, because dropout is off in every pass."""
        self.training = mode
        return self

    # ---- adapters and heads ------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, spec: LoraSpec, base: str | None = None) -> None:
        """A new adapter (B zero: it changes nothing yet), on `base`, by default that of the roles which name it."""
        wanted = {role.base for role in self.roles.values() if role.adapter == name} if base is None else {base}
        if len(wanted) > 1:
            raise ValueError(
                f"adapter {name!r} is named by roles on bases {', '.join(sorted(wanted))}; it lives on one"
            )
        where = next(iter(wanted), next(iter(self.bases)))
        if where not in self.bases:
            raise ValueError(f"base is {where!r}; there are {', '.join(self.bases)}")
        if name in self.adapters:
            raise ValueError(f"adapters: {name!r} is there already; delete it first or choose another name")
        attach_adapters(self._decoder(where), {name: spec}, self.target_modules)

    def delete_adapter(self, name: str) -> None:
        detach_adapter(self._decoder(self._base_of(name)), name)

    @torch.no_grad()
    def copy_adapter(self, src: str, dst: str) -> None:
        """Overwrites adapter `dst` with `src`'s values; both need the same layers and ranks."""
        pairs = list(self._matrices(src)), list(self._matrices(dst))
        shapes = [[p.shape for ab in pair for p in ab] for pair in pairs]
        scaling = [self.routes[self._base_of(name)].specs[name].scaling for name in (src, dst)]
        if shapes[0] != shapes[1] or scaling[0] != scaling[1]:
            raise ValueError(f"adapters {src!r} and {dst!r} differ in layers, rank or scaling; they must be alike")
        for (a, b), (to_a, to_b) in zip(*pairs):
            to_a.copy_(a)
            to_b.copy_(b)

    @torch.no_grad()
    def copy_head(self, src: str, dst: str) -> None:
        """Overwrites head `dst` with `src`'s values. Each is a key of `heads`, or a role, whose head is meant."""
        source, target = self._head(src), self._head(dst)
        if source.weight.shape != target.weight.shape:
            raise ValueError(f"heads {src!r} and {dst!r} have {source.in_features} and {target.in_features} features")
        target.weight.copy_(source.weight)

    def _base_of(self, adapter: str) -> str:
        if adapter not in self.adapters:
            raise ValueError(f"adapter {adapter!r} is not one of {', '.join(self.adapters) or 'none'}")
        return self.adapters[adapter]

    def _matrices(self, adapter: str) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        for layer in lora_layers(self._decoder(self._base_of(adapter))).values():
            if adapter in layer.lora_A:
                yield layer.lora_A[adapter], layer.lora_B[adapter]

    def _head(self, name: str) -> nn.Linear:
        """A head by key, or a role's, which is made where it is not there yet (N(0, 1/(hidden + 1)))."""
        if name in self.heads:
            return cast(nn.Linear, self.heads[name])
        role = self.role(name)
        if role.head == "lm":
            return cast(nn.Linear, self._decoder(role.base).get_output_embeddings())
        if role.head_key not in self.heads:
            weight = cast(nn.Linear, self._decoder(role.base).get_output_embeddings()).weight
            head = nn.Linear(weight.shape[1], 1, bias=False, dtype=torch.float32, device=weight.device)
            nn.init.normal_(head.weight, std=(weight.shape[1] + 1) ** -0.5)
            self.heads[role.head_key] = head
        return cast(nn.Linear, self.heads[role.head_key])

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | Sequence[int],
        roles: Sequence[str] = ("actor", "critic"),
        prompt_lengths: Tensor | Sequence[int] | None = None,
        row_roles: Sequence[str] | None = None,
        temperature: float | Tensor = 1.0,
        entropy: bool = False,
        divergence: Sequence[str] = (),
        grad_fields: Sequence[str] | None = ("logprob",),
    ) -> HydraOutput:
        """Every sequence through every role (or, with row_roles, through its own), one packed pass a base.

        Args:
            tokens: int [sum of lengths], all sequences end to end.
            lengths: int [B]. On the CPU (or a list), nothing synchronises with the device.
            prompt_lengths: int [B], 1 <= prompt <= length: results lie over the tokens after each prompt. None: all but
                the first.
            row_roles: one role name a sequence, instead of `roles`; out[role] then has that role's sequences, in order.
            temperature: float, or [B], > 0.
            entropy, divergence, grad_fields: as `linear_logprob`; divergence compares every other lm role with the rows
                of role "reference", which must run too.

        Returns: HydraOutput; each role's fields are flat over its sequences' tokens after the prompt, see RoleOutput.
        """
        batch = self._batch(tokens, lengths, prompt_lengths)
        rows_of = self._sequences(roles, row_roles, len(batch.lengths))
        if divergence and (REFERENCE not in rows_of or row_roles is not None):
            raise ValueError(f"divergence compares with role {REFERENCE!r}; name it in roles (row_roles cannot)")
        if isinstance(temperature, Tensor) and temperature.ndim and temperature.shape != batch.lengths.shape:
            raise ValueError(
                f"temperature has shape {tuple(temperature.shape)}; it must be a number, or "
                f"[{len(batch.lengths)}], one for each sequence"
            )
        known = {"logprob", "lse"} | ({"entropy"} if entropy else set())
        known |= {"ref_logprob", *divergence} if divergence else set()
        if grad_fields is not None and (isinstance(grad_fields, str) or set(grad_fields) - known):
            raise ValueError(
                f"grad_fields is {grad_fields!r}; it must be a collection of fields asked for: {sorted(known)}"
            )
        hidden = self._hidden(batch, rows_of)
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
            out[name] = self._apply_head(name, mine, rows, reference, heat, options)
        out = {name: out[name] for name in rows_of}
        return HydraOutput(out, batch.lengths - batch.prompt_lengths)

    @torch.no_grad()
    def score(self, *args: Any, **kwargs: Any) -> HydraOutput:
        """`model(...)` without gradients."""
        return self(*args, **kwargs)

    @torch.no_grad()
    def decode(
        self,
        role: str,
        input_ids: Tensor,
        position_ids: Tensor,
        packed: PackedRows | SlicedRows,
        logits_to_keep: Tensor,
    ) -> Tensor:
        """Logits [R, V] of a packed row: input_ids and position_ids int [T], logits_to_keep int64 [R] rows of it."""
        which = self.role(role)
        routes = self.routes[which.base]
        run = (0, input_ids.numel(), routes.slot(which.adapter))
        with routes.use(Routing.from_runs([run], len(routes.specs))):
            return self._decoder(which.base)(
                input_ids=input_ids.unsqueeze(0),
                position_ids=position_ids.unsqueeze(0),
                use_cache=False,
                logits_to_keep=logits_to_keep,
                packed=packed,
            ).logits[0]

    def gradient_checkpointing_enable(self, use_reentrant: bool = False) -> None:
        """Recomputes decoder layers in the backward, each with the routing its forward had."""
        for name, base in self._decoders():
            checkpoint_layers(base, self.routes[name], use_reentrant)

    def _batch(
        self, tokens: Tensor, lengths: Tensor | Sequence[int], prompt_lengths: Tensor | Sequence[int] | None
    ) -> Batch:
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
        if sizes.device.type == "cpu":
            if int(sizes.min()) < 1 or int(sizes.sum()) != tokens.numel():
                raise ValueError(
                    f"lengths sum to {int(sizes.sum())}, least {int(sizes.min())}; "
                    f"they must be >= 1 and sum to {tokens.numel()}, the number of tokens"
                )
            if int(prompts.min()) < 1 or bool((prompts > sizes).any()):
                raise ValueError("prompt_lengths must lie in [1, length] for every sequence")
        return Batch(tokens.to(self.device).long(), sizes, prompts)

    def _sequences(
        self, roles: Sequence[str], row_roles: Sequence[str] | None, count: int
    ) -> dict[str, list[int] | None]:
        """role -> the sequences it runs on (None: all)."""
        if row_roles is not None:
            if len(row_roles) != count:
                raise ValueError(
                    f"row_roles has {len(row_roles)} names; it must have one for each of {count} sequences"
                )
            return {name: [i for i, r in enumerate(row_roles) if r == name] for name in dict.fromkeys(row_roles)}
        if isinstance(roles, str) or not roles:
            raise TypeError(f"roles is {roles!r}; it must be a sequence of role names")
        return dict.fromkeys(roles)

    def _hidden(self, batch: Batch, rows_of: Mapping[str, list[int] | None]) -> dict[str, tuple[Batch, Tensor]]:
        """role -> its sequences and their final hidden states [tokens, H]; one forward a base."""
        by_base: dict[str, dict[str | None, list[str]]] = {}
        for name in rows_of:
            role = self.role(name)
            by_base.setdefault(role.base, {}).setdefault(role.adapter, []).append(name)
        found: dict[str, tuple[Batch, Tensor]] = {}
        for base, by_adapter in by_base.items():
            routes, parts, members = self.routes[base], [], []
            for adapter in sorted(by_adapter, key=lambda a: a is None):  # the bypass last: see pack
                names = by_adapter[adapter]
                wanted = sorted({i for n in names for i in rows_of[n] or ()}) if rows_of[names[0]] is not None else None
                part = Part(routes.slot(adapter), batch if wanted is None else batch.select(wanted))
                parts.append(part)
                members.append((part, wanted))
            hidden = self._run(base, parts)
            for (part, wanted), adapter in zip(members, sorted(by_adapter, key=lambda a: a is None)):
                rows = part.rows(hidden)
                if adapter is None and base not in self.trainable_bases:
                    rows = rows.detach()
                for name in by_adapter[adapter]:
                    found[name] = _restrict(part.batch, rows, wanted, rows_of[name], batch)
        return found

    def _run(self, base: str, parts: list[Part]) -> Tensor:
        """The final hidden states [rows, H] of one packed forward through `base`'s decoder."""
        model, routes = self._decoder(base), self.routes[base]
        packed = pack(parts, len(routes.specs), frozen=base not in self.trainable_bases)
        if packed.input_ids.device.type == "cpu":
            _check_tokens(packed.input_ids, cast(nn.Embedding, model.get_input_embeddings()).num_embeddings)
        decoder = getattr(model, model.base_model_prefix)
        with routes.use(packed.routing):
            return decoder(
                input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, packed=packed.rows
            ).last_hidden_state[0]

    def _apply_head(
        self,
        name: str,
        batch: Batch,
        hidden: Tensor,
        reference: Tensor | None,
        temperature: float | Tensor,
        options: dict[str, Any],
    ) -> RoleOutput:
        role, head = self.role(name), self._head(name)
        if role.head == "reward":
            return RoleOutput(reward=_scalars(head, hidden[batch.last()]))
        places = batch.completions()
        before = hidden[places - 1]
        if role.head == "value":
            return RoleOutput(value=_scalars(head, before))
        if isinstance(temperature, Tensor) and temperature.ndim:
            counts = (batch.lengths - batch.prompt_lengths).to(temperature.device)
            temperature = temperature.repeat_interleave(counts, output_size=places.numel())
        model = self._decoder(role.base)
        compare: dict[str, Any] = {}
        if reference is not None:
            other = self._decoder(self.role(REFERENCE).base)
            compare["ref_hidden"] = reference[places - 1].detach()
            compare["divergence"] = options["divergence"]
            if other is not model:
                compare["ref_weight"] = cast(nn.Linear, other.get_output_embeddings()).weight.detach()
        fields = options["grad_fields"]
        if fields is not None and reference is None:
            fields = tuple(f for f in fields if f in ("logprob", "lse", "entropy"))  # a role beside those compared
        result = linear_logprob(
            before, head.weight, batch.tokens[places], bias=head.bias, temperature=temperature,
            entropy=options["entropy"], grad_fields=fields, valid_rows=places.numel(), **head_shape(model), **compare,
        )  # fmt: skip
        names = [f for f in RoleOutput.__dataclass_fields__ if hasattr(result, f)]
        return RoleOutput(**{f: getattr(result, f) for f in names})

    # ---- disk --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """directory/<adapter>/ in PEFT's layout, heads.safetensors, and each base that trains in directory/<base>/."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        for adapter, where in self.adapters.items():
            save_adapter(self._decoder(where), adapter, target / adapter)
        if self.heads:
            save_heads(self._linear_heads(), target)
        for name in self.trainable_bases:
            base = self._decoder(name)
            weights = {k: v for k, v in base.state_dict().items() if ".lora_A." not in k and ".lora_B." not in k}
            base.save_pretrained(target / name, state_dict=weights)

    def load_adapters(self, directory: str | os.PathLike[str]) -> list[str]:
        """Reads every adapter in `directory` (what save_pretrained wrote), adding those that are new; heads as well."""
        source = Path(directory)
        found = sorted(p.parent for p in source.glob(f"*/{CONFIG}"))
        if not found and not (source / HEADS_FILE).is_file():
            raise ValueError(f"{source}: no adapter in this directory; it must hold <adapter>/{CONFIG}")
        for path in found:
            if path.name not in self.adapters:
                self.add_adapter(path.name, read_spec(path))
            load_adapter(self._decoder(self._base_of(path.name)), path.name, path)
        if (source / HEADS_FILE).is_file():
            load_heads(self._linear_heads(), source / HEADS_FILE)
        return [path.name for path in found]

    def _load_heads(self, file: Path, base: str) -> None:
        """The heads of a checkpoint's own file belong to that base, whatever it is called here."""
        own = {role.head_key: role.head for role in self.roles.values() if role.base == base and role.head != "lm"}
        mine = {name: head for key, name in own.items() if (head := self._linear_heads().get(key)) is not None}
        load_heads(mine, file)


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


def _scalars(head: nn.Linear, hidden: Tensor) -> Tensor:
    """One fp32 number a row, in fp32 under autocast too."""
    with no_autocast(hidden):
        return head(hidden.to(head.weight.dtype)).squeeze(-1).float()


def _adapter_parameters(layer: LoRALinear) -> Iterator[nn.Parameter]:
    for parameters in (layer.lora_A, layer.lora_B):
        yield from parameters.values()


def _trainable(train_base: bool | Collection[str], bases: list[str]) -> tuple[str, ...]:
    if isinstance(train_base, bool):
        return tuple(bases) if train_base else ()
    names = (train_base,) if isinstance(train_base, str) else tuple(train_base)
    for name in names:
        if name not in bases:
            raise ValueError(f"train_base names {name!r}; the bases are {', '.join(bases)}")
    return names
