"""A HydraModel whose bases lie in shards over the processes of a group, by FSDP2 (torch.distributed.fsdp.fully_shard).

Each decoder layer is gathered while it runs, forward and backward; what lies around the layers (embeddings, last norm,
output head) is gathered while HydraModel.forward runs, which alone reads the head's weight. Adapters and scalar heads
are small: they stay whole on every rank, and summing their gradients is the trainer's. Every rank must run the model as
often as the others do; `rollout` sees to it where that is not known beforehand.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_kernels.integrations import peft_layout
from rlhf_kernels.nn.lora import decoder_layers, lora_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from rlhf_kernels.nn.hydra import HydraModel

Rollouts = Literal["whole", "steps"]
ROLLOUTS = ("whole", "steps")


@dataclass
class Sharding:
    """How a model lies in shards. mesh: of one dimension; rollouts: see `shard`."""

    mesh: "DeviceMesh"
    rollouts: Rollouts
    reshard_after_forward: bool
    announcing: bool = False  # a rollout by steps is under way: every forward is announced to the other ranks
    broken: bool = False  # a forward of it ended half-way: the others wait in the middle of theirs, out of reach

    @property
    def group(self) -> Any:
        return self.mesh.get_group()

    @property
    def leads(self) -> bool:
        """Whether this rank writes files."""
        return self.mesh.get_local_rank() == 0

    def anyone(self, mine: bool) -> bool:
        """Whether any rank says yes; all must ask."""
        votes = torch.tensor([int(mine)], device=self.mesh.device_type)
        dist.all_reduce(votes, group=self.group)
        return bool(votes.item())


def shard(
    model: "HydraModel",
    mesh: "DeviceMesh | None" = None,
    *,
    rollouts: Rollouts = "whole",
    reshard_after_forward: bool = True,
    mp_policy: Any = None,
    offload_policy: Any = None,
) -> "HydraModel":
    """Shards `model`'s bases in place over `mesh` and returns it; to be called on every rank, on equal models.

    Gradients of trained bases come out summed over the ranks, not averaged: losses here divide by counts over the batch
    of all ranks. What holds parameters (an optimiser) must be made afterwards: a sharded one is another object, a
    DTensor, whose optimiser state is sharded as it is.

    Args:
        model: with all its adapters attached, its gradient checkpointing enabled, and its trained bases known.
        mesh: DeviceMesh of one dimension; None: all ranks, on the kind of device the model is on. Bases move there.
        rollouts: how SlicedGenerator runs the model. "whole": the role's base is gathered once, held whole for the
            rollout's duration, and sharded again; ranks need not keep step. "steps": it stays sharded, each step
            gathers layer by layer, and ranks that have finished take part until all have: for a base that does not fit.
        reshard_after_forward: frees a layer's weights between its forward and its backward.
        mp_policy, offload_policy: as fully_shard's. None: gradients are summed in fp32; nothing is offloaded.

    Raises ValueError where the model is sharded already, has forward hooks, or an argument does not fit.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if model.sharding is not None:
        raise ValueError("model is sharded already")
    if rollouts not in ROLLOUTS:
        raise ValueError(f"rollouts is {rollouts!r}; it must be one of {', '.join(ROLLOUTS)}")
    if mesh is None:
        mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    if mesh.ndim != 1:
        raise ValueError(f"mesh has {mesh.ndim} dimensions; it must have one")
    for name, base in model.decoders():
        if name not in model.trainable_bases:  # never changes, and could not be read off the shards by one rank alone
            base._fingerprint = peft_layout.base_fingerprint(base)  # type: ignore[assignment]
    whole = _kept_whole(model)
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": reshard_after_forward,
        "ignored_params": set(whole),
        "mp_policy": mp_policy or MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    if offload_policy is not None:
        options["offload_policy"] = offload_policy
    for _, base in model.decoders():
        for layer in decoder_layers(base)[1]:
            fully_shard(layer, **options)
    model.register_forward_hook(_own_outputs)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "decode")
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for parameter in whole:
        parameter.data = parameter.data.to(model.device)
    model.sharding = Sharding(mesh, rollouts, reshard_after_forward)
    return model


def sharded_modules(model: nn.Module) -> list[Any]:
    """The FSDP modules of a model, in the order in which a forward gathers them."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def rollout(model: "HydraModel", role: str) -> Iterator[None]:
    """Open for as long as `role` generates, on every rank: inside, ranks may run any number of steps."""
    sharding = model.sharding
    if sharding is None:
        yield
        return
    groups = [model, *sharded_modules(model.decoder(model.role(role).base))]
    run = _whole if sharding.rollouts == "whole" else _by_steps
    try:
        with run(groups, sharding):
            yield
    finally:
        # Ranks have run different numbers of forwards. FSDP gathers ahead, in the backward, what the forwards before
        # it used: that must be the same on all ranks, so nothing is left to be remembered.
        cast(Any, model).reset_iter_state()


@contextmanager
def _whole(groups: list[Any], sharding: Sharding) -> Iterator[None]:
    for module in groups:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in groups:
            module.set_reshard_after_forward(sharding.reshard_after_forward, recurse=False)
            module.reshard()


@contextmanager
def _by_steps(groups: list[Any], sharding: Sharding) -> Iterator[None]:
    """A rank that has finished, or failed between two steps, gathers along with the others' until all have."""
    sharding.announcing = True
    try:
        yield
    finally:
        sharding.announcing = False
        model, *layers = groups
        while not sharding.broken and sharding.anyone(False):
            model.unshard()
            for layer in layers:
                layer.unshard()
                layer.reshard()
            model.reshard()


@contextmanager
def announced(model: "HydraModel") -> Iterator[None]:
    """Around a forward of which the other ranks do not know."""
    sharding = model.sharding
    if sharding is None or not sharding.announcing:
        yield
        return
    sharding.anyone(True)
    sharding.broken = True
    yield
    sharding.broken = False  # not where it raised


def _kept_whole(model: "HydraModel") -> list[nn.Parameter]:
    """The parameters of adapters and scalar heads."""
    found = list(model.heads.parameters())
    for _, base in model.decoders():
        for layer in lora_layers(base).values():
            found += [*layer.lora_A.parameters(), *layer.lora_B.parameters()]
    return found


def _own_outputs(model: nn.Module, inputs: Any, output: Any) -> Any:
    """FSDP's hook on an output that is a view would be lost if someone wrote to it: it gets tensors of their own."""
    if isinstance(output, Tensor):
        return output  # decode's, which carries no gradient
    for fields in output.values():
        for name, value in vars(fields).items():
            if isinstance(value, Tensor) and value.requires_grad and value._base is not None:
                setattr(fields, name, value.clone())
    return output
