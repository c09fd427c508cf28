"""Whether a checkpoint is of the model that is to go on from it: the same tensors, on the same frozen weights.

Settings are compared before any model is built (`core`); here is what only the built model tells, such as a directory
that now holds another base, or a checkpoint copied from elsewhere.
"""

from collections.abc import Mapping

from torch import Tensor

from rlhf_trainer.checkpoint import Checkpoint
from rlhf_trainer.errors import UserError
from rlhf_trainer.models import Policy
from rlhf_trainer.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def check_checkpoint(found: Checkpoint, policy: Policy, optimizer: Optimizer) -> None:
    """UserError that names the first difference; changes nothing."""
    where = f"resume: checkpoint-{found.step}"
    if set(found.model) != set(policy.kept):
        name = min(set(found.model) ^ set(policy.kept))
        has, lacks = ("the checkpoint", "the model") if name in found.model else ("the model", "the checkpoint")
        raise UserError(f"{where} is of another model or other adapters: {has} has {name!r} and {lacks} does not")
    _check_shapes(where, found.model, policy.kept)
    _check_shapes(f"{where}'s optimiser state", *_moments(found.optimizer, optimizer))
    if found.state["frozen"] != policy.frozen:
        raise UserError(
            f"{where} is of a run on other frozen weights than those that were loaded now: the model's directory, or "
            "its reward model's, has changed since"
        )


def _moments(tensors: Mapping[str, Tensor], optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The checkpoint's moments and masters beside what they are of."""
    names = {f"{key}.{name}": master for key in (*MOMENTS, "master") for name, master in optimizer.masters.items()}
    saved = {name: tensor for name, tensor in tensors.items() if not name.startswith("step.")}
    strange = sorted(saved.keys() - names.keys())
    incomplete = [
        f"{key}.{name}"
        for name in optimizer.masters
        for key in MOMENTS
        if f"step.{name}" in tensors and f"{key}.{name}" not in tensors
    ]
    if strange or incomplete:
        raise UserError(f"resume: the checkpoint's optimiser state does not fit: {(strange + incomplete)[0]!r}")
    return saved, {name: names[name] for name in saved}


def _check_shapes(where: str, tensors: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != present[name].shape or tensor.dtype != present[name].dtype:
            raise UserError(
                f"{where} is of another model or other adapters: {name!r} is {_said(tensor)} in it "
                f"and {_said(present[name])} in the model"
            )


def _said(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
