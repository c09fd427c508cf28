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

from rlhf_kernels.integrations.transformers import PackedRows, SlicedRows
from rlhf_kernels.nn import disk
from rlhf_kernels.nn.forward import run_roles
from rlhf_kernels.nn.loading import load_decoder, saved_base
from rlhf_kernels.nn.lora import (
    ALL_LINEAR,
    LoRALinear,
    LoraSpec,
    attach_adapters,
    checkpoint_layers,
    detach_adapter,
    lora_layers,
    match_layers,
)
from rlhf_kernels.nn.roles import HydraOutput, Role, default_roles
from rlhf_kernels.nn.routes import AdapterRoutes
from rlhf_kernels.ops.lora import Routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf_kernels.nn.sharding import Sharding


class HydraModel(nn.Module):
    """Decoders, adapters and heads under named roles. Dropout is off in every pass, training or not.

    Attributes: bases (name -> transformers model), heads (key -> Linear(hidden, 1), fp32; the key is the head's name,
    with "base name:" before it on any other base than "base"), roles (name -> Role; may be extended), routes
    (base -> what adapters it has).
    """

    def __init__(
        self,
        bases: "Mapping[str, PreTrainedModel]",
        adapters: Mapping[str, LoraSpec] | None = None,
        roles: Mapping[str, Role] | None = None,
        train_base: bool | Collection[str] = False,
        target_modules: str | Sequence[str] = ALL_LINEAR,
        fuse: bool = True,
    ) -> None:
        """`bases` are taken over: made to run on packed rows, frozen unless `train_base` (True, or names) says else."""
        super().__init__()
        self.sharding: Sharding | None = None  # nn/sharding.py: the bases in shards over processes
        if not bases:
            raise ValueError("bases is empty; a HydraModel needs at least one base")
        if len({id(base) for base in bases.values()}) < len(bases):
            raise ValueError("bases holds one model under two names; give each base a copy of its own")
        adapters = dict(adapters or {})
        self.bases = nn.ModuleDict({name: load_decoder(base, None, None) for name, base in bases.items()})
        self.roles: dict[str, Role] = default_roles(adapters, bases) if roles is None else dict(roles)
        self.target_modules = target_modules
        self.fuse = fuse
        self.trainable_bases = _trainable(train_base, list(bases))
        for name, base in self.decoders():
            base.requires_grad_(name in self.trainable_bases)
        self.routes: dict[str, AdapterRoutes] = {name: attach_adapters(m, {}) for name, m in self.decoders()}
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
            self.head(name)

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
        fuse: bool = True,
    ) -> "HydraModel":
        """A model from a transformers checkpoint: a directory, a hub id, or a module (taken over as it is).

        Args:
            path_or_id: base "base"; None where `bases` names them all.
            bases: further bases by name, each a copy of its own.
            train_base: whether the bases' own parameters train: all (True), none, or the named ones.
            target_modules: what adapters sit on: "all-linear" (every Linear of the decoder layers) or names as PEFT's.
            dtype: of the bases' weights; None: as stored. Adapters follow their LoraSpec, heads are fp32.
            fuse: compute projections of one tensor (q, k and v; gate and up) together.

        Heads are read from heads.safetensors beside the checkpoint where there is one.
        Raises ValueError for a path that is not there, an unsupported model, an unknown base, adapter or head.
        """
        sources: dict[str, Any] = {} if path_or_id is None else {"base": path_or_id}
        sources |= dict(bases or {})
        loaded, head_files = {}, {}
        for name, source in sources.items():
            if isinstance(source, (str, os.PathLike)):
                resolved = saved_base(source)
                head_files[name] = [Path(p) / disk.HEADS_FILE for p in (resolved, source)]
                source = resolved
            loaded[name] = load_decoder(source, dtype, device)
        model = cls(loaded, adapters, roles, train_base, target_modules, fuse)
        for name, files in head_files.items():
            file = next((f for f in files if f.is_file()), None)
            if file is not None:
                disk.load_base_heads(model, file, name)
        return model

    # ---- what there is -----------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.decoders())[1].device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoders())[1].dtype

    @property
    def adapters(self) -> dict[str, str]:
        """adapter -> the base it is on."""
        return {name: base for base, routes in self.routes.items() for name in routes.specs}

    def decoder(self, base: str) -> "PreTrainedModel":
        """The transformers model of a base."""
        return cast("PreTrainedModel", self.bases[base])

    def decoders(self) -> "Iterator[tuple[str, PreTrainedModel]]":
        """(name, transformers model) of every base."""
        return ((name, self.decoder(name)) for name in self.bases)

    def linear_heads(self) -> dict[str, nn.Linear]:
        """`heads` by key."""
        return {key: cast(nn.Linear, head) for key, head in self.heads.items()}

    def role(self, name: str) -> Role:
        """The role of that name. ValueError where there is none, or its adapter is not there."""
        if name not in self.roles:
            raise ValueError(f"role {name!r} is not one of {', '.join(self.roles)}")
        role = self.roles[name]
        if role.adapter is not None and role.adapter not in self.routes[role.base].specs:
            known = ", ".join(self.routes[role.base].specs) or "none"
            raise ValueError(f"role {name!r} uses adapter {role.adapter!r}; base {role.base!r} has {known}")
        return role

    def base_model(self, role: str) -> "PreTrainedModel":
        """The transformers model a role runs on."""
        return self.decoder(self.role(role).base)

    def trainable_parameters(self, role: str) -> list[nn.Parameter]:
        """The role's adapter, or without one its base's parameters where that base trains; and the role's own head."""
        which = self.role(role)
        found: list[nn.Parameter] = []
        if which.adapter is not None:
            for a, b in self._matrices(which.adapter):
                found += [a, b]
        elif which.base in self.trainable_bases:
            found += self.decoder(which.base).parameters()
            own = {
                id(p) for layer in lora_layers(self.decoder(which.base)).values() for p in _adapter_parameters(layer)
            }
            found = [p for p in found if id(p) not in own]
        if which.head != "lm":
            found += self.head(role).parameters()
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
        attach_adapters(self.decoder(where), {name: spec}, self.target_modules, self.fuse)
        for other, decoder in self.decoders():
            if other != where and other not in self.trainable_bases:  # an untrained actor is its separate reference
                match_layers(decoder, self.decoder(where), self.fuse)

    def delete_adapter(self, name: str) -> None:
        """Forgets an adapter; roles that name it raise ValueError until one of that name is added."""
        detach_adapter(self.decoder(self.base_of(name)), name)

    @torch.no_grad()
    def copy_adapter(self, src: str, dst: str) -> None:
        """Overwrites adapter `dst` with `src`'s values; both need the same layers and ranks."""
        pairs = list(self._matrices(src)), list(self._matrices(dst))
        shapes = [[p.shape for ab in pair for p in ab] for pair in pairs]
        scaling = [self.routes[self.base_of(name)].specs[name].scaling for name in (src, dst)]
        if shapes[0] != shapes[1] or scaling[0] != scaling[1]:
            raise ValueError(f"adapters {src!r} and {dst!r} differ in layers, rank or scaling; they must be alike")
        for (a, b), (to_a, to_b) in zip(*pairs):
            to_a.copy_(a)
            to_b.copy_(b)

    @torch.no_grad()
    def copy_head(self, src: str, dst: str) -> None:
        """Overwrites head `dst` with `src`'s values. Each is a key of `heads`, or a role, whose head is meant."""
        source, target = self.head(src), self.head(dst)
        if source.weight.shape != target.weight.shape:
            raise ValueError(f"heads {src!r} and {dst!r} have {source.in_features} and {target.in_features} features")
        target.weight.copy_(source.weight)

    def base_of(self, adapter: str) -> str:
        """The base an adapter is on. ValueError where there is no such adapter."""
        if adapter not in self.adapters:
            raise ValueError(f"adapter {adapter!r} is not one of {', '.join(self.adapters) or 'none'}")
        return self.adapters[adapter]

    def _matrices(self, adapter: str) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        for layer in lora_layers(self.decoder(self.base_of(adapter))).values():
            if adapter in layer.lora_A:
                yield layer.lora_A[adapter], layer.lora_B[adapter]

    def head(self, name: str) -> nn.Linear:
        """A head by key, or a role's: for "lm" the output embeddings, else one made on first use."""
        if name in self.heads:
            return cast(nn.Linear, self.heads[name])
        role = self.role(name)
        if role.head == "lm":
            return cast(nn.Linear, self.decoder(role.base).get_output_embeddings())
        if role.head_key not in self.heads:
            weight = cast(nn.Linear, self.decoder(role.base).get_output_embeddings()).weight
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
        return run_roles(
            self, tokens, lengths, roles, prompt_lengths, row_roles, temperature, entropy, divergence, grad_fields
        )

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
            return self.decoder(which.base)(
                input_ids=input_ids.unsqueeze(0),
                position_ids=position_ids.unsqueeze(0),
                use_cache=False,
                logits_to_keep=logits_to_keep,
                packed=packed,
            ).logits[0]

    def gradient_checkpointing_enable(self, use_reentrant: bool = False) -> None:
        """Recomputes decoder layers in the backward, each with the routing its forward had."""
        for name, base in self.decoders():
            checkpoint_layers(base, self.routes[name], use_reentrant)

    # ---- disk --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """directory/<adapter>/ in PEFT's layout, heads.safetensors, and each base that trains in directory/<base>/."""
        disk.save(self, Path(directory))

    def load_adapters(self, directory: str | os.PathLike[str], names: Mapping[str, str] | None = None) -> list[str]:
        """Reads every adapter in `directory` (of save_pretrained, or PEFT's), adding those that are new; heads too.

        The one that PEFT saves in the directory itself is "default"; `names` maps names there to names here. Returns
        the names here. ValueError, before anything is changed, for what is no plain LoRA (DoRA, biases, ...).
        """
        return disk.load_adapters(self, Path(directory), names)


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
