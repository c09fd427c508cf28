"""Gloo processes on this machine: a function runs once a rank, and what the ranks return comes back in their order.

They are forked from a server that has imported what they need once. A rank that fails ends the others at once, and
whoever waits for longer than the limit is killed: a deadlock is a failure, never a hang.
"""

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from typing import Any

IMPORTED = [
    "torch._dynamo",  # an optimiser's first step imports it
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama", "qwen3")),
    "rlhf_kernels.generation",
    "rlhf_kernels.nn",
]
PATIENCE = 300.0  # seconds for all of a call: generous, for machines that do other things besides


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, patience: float = PATIENCE) -> list[Any]:
    """[function(*arguments) of rank 0, of rank 1, ...], each in a process of a gloo group of `world`."""
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        ranks = [
            context.Process(target=_rank, args=(rank, world, folder, patience, mine, function, arguments))
            for rank, (_, mine) in enumerate(pipes)
        ]
        try:
            for process, (_, mine) in zip(ranks, pipes):
                process.start()
                mine.close()
            return _collect([reader for reader, _ in pipes], time.monotonic() + patience)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(readers: list[Any], deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(readers):
        waiting = [reader for rank, reader in enumerate(readers) if rank not in found]
        ready = connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(readers)) if rank not in found]
            raise AssertionError(f"ranks {late} have not finished: a deadlock, or too slow")
        for reader in ready:
            rank = readers.index(reader)
            try:
                value, error = reader.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            if error is not None:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            found[rank] = value
    return [found[rank] for rank in range(len(readers))]


def _rank(
    rank: int, world: int, folder: str, patience: float, pipe: Any, function: Callable[..., Any], arguments: tuple
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        limit = timedelta(seconds=patience)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=limit
        )
        pipe.send((function(*arguments), None))
        dist.barrier()  # nobody leaves while another still talks to it
    except BaseException:
        pipe.send((None, traceback.format_exc()))
    pipe.close()
    os._exit(0)  # gloo's threads may outlive the group and abort an ordinary exit
