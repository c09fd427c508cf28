"""The processes that train one model together: which one this is, its share of the work, sums and gathers over all.

`torchrun` or `accelerate launch` start them; accelerate sets up their group (gloo on the CPU, nccl on CUDA). Each holds
every trained weight, samples, scores and differentiates its share, and takes the same optimiser step on the sum of all
gradients. What one step needs is a pure function of the configuration and the step, so it does not depend on how many
share it. A process alone pays nothing: its methods give back what they are given.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import PeerError, UserError, one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

BUCKET = 1 << 23  # gradients summed in one message, at most: 8 Mi numbers, 32 MiB; one above that goes alone
PATIENCE = timedelta(hours=2)  # how long a process may wait for one that still samples


@dataclass(frozen=True)
class Processes:
    """This process, number `rank` of `count`, and the device its models are on."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def main(self) -> bool:
        """Whether this is the one that writes: logs, samples, checkpoints, the report."""
        return self.rank == 0

    def share(self, items: int) -> slice:
        """Which of `items` numbered things are this process's: neighbours, the first processes take one more."""
        size, more = divmod(items, self.count)
        first = self.rank * size + min(self.rank, more)
        return slice(first, first + size + (self.rank < more))

    def check(self, name: str, items: int, what: str) -> None:
        """UserError, naming argument `name`, where there is less than one of `items` for each process."""
        if items < self.count:
            raise UserError(f"{name}: {items} {what} cannot be shared by {self.count} processes; each needs one")

    def pieces(self, mine: Any, size: int, items: int, even: bool) -> Iterator[tuple[Any, bool]]:
        """`mine`, this process's share of `items`, in pieces of `size`, each with whether it counts.

        even: as many pieces as the largest share gives, because all must run a sharded model equally often; those that
        a smaller share lacks repeat the first and do not count. mine: a list or tensor, then not empty.
        """
        wanted = -(-items // self.count) if even else len(mine)
        for first in range(0, wanted, size):
            yield (mine[first : first + size], True) if first < len(mine) else (mine[:size], False)

    def each(self, work: Callable[[], T], linked: bool = False) -> list[T]:
        """What `work()` gave on each process, on all of them (pickled: keep tensors on the CPU).

        Where it raises on one process it raises on all: UserErrors as they are, anything else as a PeerError on those
        that were well. So nobody waits for a process that has failed. `work` must not wait for the others itself.

        linked: it does (a model in shards); the others are then out of reach in the middle of it. An error on this
        process alone is raised at once: it ends, and its launcher ends the others.
        """
        if self.count == 1:
            return [work()]
        result: Any = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            if linked and isinstance(raised, (UserError, PeerError)):  # `together` inside has told the others
                raise
            if linked:
                raise RuntimeError(f"process {self.rank} failed while it shared a model in shards") from raised
            error = raised
        found = self._gather((result, None if error is None else self._portable(error)))
        for rank, (_, failure) in enumerate(found):
            if failure is not None:
                raise (error if rank == self.rank and error is not None else failure)
        return [result for result, _ in found]

    @contextmanager
    def together(self, broken: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """`each` for a block that gives nothing: it ends on all processes, or raises on all.

        broken: whether an error has left the others out of reach, as in `each` where it is linked.
        """
        error = None
        try:
            yield
        except Exception as raised:
            if self.count == 1 or broken():
                raise
            error = raised

        def outcome() -> None:
            if error is not None:
                raise error

        self.each(outcome)

    def sum_gradients(self, parameters: Iterable["nn.Parameter"]) -> None:
        """Adds the gradients of all processes, in fp32; a parameter without one anywhere stays without.

        Every process must pass the same parameters in the same order. Those in shards have their sums already.
        """
        if self.count == 1:
            return
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in parameters:
            if is_sharded(parameter):
                continue
            if bucket and size + parameter.numel() > BUCKET:
                _sum_bucket(bucket)
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.numel()
        if bucket:
            _sum_bucket(bucket)

    def copy_from_main(self, tensors: Iterable["Tensor"]) -> None:
        """Writes the main process's values into the tensors of the others, but for tensors in shards."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        for tensor in tensors:
            if not is_sharded(tensor):
                broadcast(tensor.detach())

    def _gather(self, value: T) -> list[T]:
        from accelerate.utils import gather_object

        return gather_object([value])

    def _portable(self, error: Exception) -> Exception:
        """What the other processes raise for an error of this one."""
        if isinstance(error, UserError):
            return type(error)(str(error))
        return PeerError(f"process {self.rank} failed: {type(error).__name__}: {one_line(error)[:300]}")


ALONE = Processes()


def is_sharded(tensor: "Tensor") -> bool:
    """Whether this process holds a part of the tensor only (FSDP2)."""
    from rlhf_kernels.nn.shards import is_sharded

    return is_sharded(tensor)


def join(device: str) -> Processes:
    """The processes that a launcher started with this one, or it alone on `device` ("cpu", "cuda" or "cuda:N").

    UserError for a device that they cannot have each for itself.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes(device=device)
    from accelerate import PartialState

    if ":" in device:
        raise UserError(f"device: {device!r} is one device; with several processes say cuda, and each takes its own")
    if device == "cuda":
        _check_devices(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    if state.device.type != device:
        raise UserError(f"device: is {device!r}, and the processes were set up for {state.device.type!r}")
    return Processes(state.process_index, state.num_processes, str(state.device))


def leave() -> None:
    """Ends the group that `join` set up, once nothing more is to be trained."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    from accelerate import PartialState

    PartialState().destroy_process_group()


def speaks() -> bool:
    """Whether this process may print: one on each machine, so that a line is not printed by all."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def summed(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Numbers by name, added over the processes' parts."""
    total = dict(parts[0])
    for part in parts[1:]:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _check_devices(wanted: int) -> None:
    import torch

    if torch.cuda.device_count() < wanted:
        raise UserError(f"device: {wanted} processes here, and PyTorch sees {torch.cuda.device_count()} CUDA devices")


def _sum_bucket(bucket: Sequence["nn.Parameter"]) -> None:
    """One all-reduce of the gradients end to end; behind them, which of them are there."""
    import torch

    flat = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in bucket]
        + [torch.tensor([float(p.grad is not None) for p in bucket], device=bucket[0].device)]
    )
    torch.distributed.all_reduce(flat)
    *sums, there = flat.split([*(p.numel() for p in bucket), len(bucket)])
    for parameter, total, holders in zip(bucket, sums, there.tolist()):
        if holders:
            gradient = torch.empty_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = gradient.copy_(total.view_as(parameter))
