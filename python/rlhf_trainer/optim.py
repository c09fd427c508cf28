"""AdamW over groups of named parameters, fp32 masters for low-precision weights, a schedule by the step alone.

Each group's gradients are clipped by their own norm, so that a critic far off does not scale down the policy's step.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kernels.nn.shards import fill, own
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.processes import ALONE, Processes, is_sharded


def schedule(config: TrainConfig, update: int, total: int) -> float:
    """The factor on the learning rate at optimiser step `update` (from 0) of `total`."""
    if update < config.warmup_steps:
        return (update + 1) / (config.warmup_steps + 1)
    if config.lr_scheduler_type == "constant":
        return 1.0
    progress = min((update - config.warmup_steps) / max(total - config.warmup_steps, 1), 1.0)
    if config.lr_scheduler_type == "linear":
        return 1.0 - progress
    if config.lr_scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    raise ValueError(f"lr_scheduler_type: {config.lr_scheduler_type!r}; it must be constant, linear or cosine")


class Optimizer:
    """groups: name -> (learning rate, parameters by their names in the model). Vectors do not decay.

    processes: those whose gradients add up before each step.
    """

    def __init__(
        self,
        groups: Mapping[str, tuple[float, Mapping[str, nn.Parameter]]],
        config: TrainConfig,
        total_updates: int,
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.total_updates, self.updates = config, total_updates, 0
        self.processes = processes
        self.parameters: dict[str, nn.Parameter] = {}
        self.masters: dict[str, Tensor] = {}  # what AdamW steps: the parameter itself where it is fp32
        self._clipped: dict[str, list[nn.Parameter]] = {}
        self._rates: list[float] = []
        adam_groups: list[dict[str, Any]] = []
        for group, (rate, parameters) in groups.items():
            for decays, sharded in product((True, False), (True, False)):  # one call of AdamW takes one kind
                masters = []
                for name, parameter in parameters.items():
                    if (parameter.ndim >= 2) != decays or is_sharded(parameter) != sharded:
                        continue
                    exact = parameter.dtype == torch.float32
                    self.masters[name] = parameter if exact else parameter.detach().float().clone()
                    masters.append(self.masters[name])
                if masters:
                    weight_decay = float(config.weight_decay or 0.0) if decays else 0.0
                    adam_groups.append({"params": masters, "lr": rate, "weight_decay": weight_decay})
                    self._rates.append(rate)
            self.parameters.update(parameters)
            self._clipped[group] = list(parameters.values())
        betas = (config.adam_beta1, config.adam_beta2 if config.adam_beta2 is not None else 0.999)
        # fused: in one sweep and without temporaries; over lists of tensors it would hold a copy of a group
        self.adam = torch.optim.AdamW(adam_groups, betas=betas, eps=config.adam_epsilon, fused=True)

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def step(self, only: str | None = None) -> dict[str, float]:
        """One clipped step at the scheduled rate; gradients are gone after it. Returns `lr` and `grad_norm`.

        only: the one group that moves; the others keep their weights and moments.
        Raises FloatingPointError, leaving the weights as they were, for a gradient that is not finite.
        """
        squares = 0.0
        for name, group in self._clipped.items():
            if only is not None and name != only:
                for parameter in group:
                    parameter.grad = None
                continue
            self.processes.sum_gradients(group)
            limit = self.config.max_grad_norm if self.config.max_grad_norm > 0 else math.inf
            clip = _clip_shards if any(map(is_sharded, group)) else nn.utils.clip_grad_norm_
            squares += float(clip(group, limit)) ** 2
        if not math.isfinite(squares):
            raise FloatingPointError(
                f"the gradient norm is {math.sqrt(squares)} at optimiser step {self.updates + 1}; "
                "a lower learning_rate or max_grad_norm may help"
            )
        factor = schedule(self.config, self.updates, self.total_updates)
        for adam_group, rate in zip(self.adam.param_groups, self._rates):
            adam_group["lr"] = rate * factor
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None  # one by one, so that both are never there for all of them
        self.adam.step()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])
                    self.masters[name].grad = None
        self.zero_grad()
        self.updates += 1
        return {"lr": self._rates[0] * factor, "grad_norm": math.sqrt(squares)}

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and masters by parameter name, for a checkpoint."""
        tensors: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            for key, value in self.adam.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value
            if master is not self.parameters[name]:
                tensors[f"master.{name}"] = master
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """The inverse of `state_tensors`."""
        self.updates = updates
        for name, master in self.masters.items():
            if f"master.{name}" in tensors:
                fill(master, tensors[f"master.{name}"])
            if f"step.{name}" in tensors:
                moments = {key: torch.empty_like(master) for key in ("exp_avg", "exp_avg_sq")}
                for key, moment in moments.items():
                    fill(moment, tensors[f"{key}.{name}"])
                self.adam.state[master] = {"step": tensors[f"step.{name}"].to(master.device), **moments}


@torch.no_grad()
def _clip_shards(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """clip_grad_norm_ where some gradients lie in shards over all processes; returns the norm before it."""
    there = [p.grad for p in parameters if p.grad is not None]
    device = parameters[0].device
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for grad in filter(is_sharded, there):
        squares += own(grad).double().square().sum()
    torch.distributed.all_reduce(squares)
    for grad in there:
        if not is_sharded(grad):
            squares += grad.double().square().sum()
    norm = float(squares.sqrt())
    factor = min(1.0, limit / (norm + 1e-6))
    for grad in there:
        own(grad).mul_(factor)
    return norm
