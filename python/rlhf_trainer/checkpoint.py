"""Checkpoints that are either whole or not there: written beside their place, synced to disk, then renamed.

    output_dir/checkpoint-N/   model.safetensors      what is trained, by parameter name
                               optimizer.safetensors  AdamW's moments and fp32 masters, by parameter name
                               rng.safetensors        torch's generators
                               state.json             position, KL coefficient, configuration, Python's generator
                               SHA256SUMS             of the files above
Nothing is pickled. A kill or a full disk while writing leaves the earlier checkpoints as they were. A newest checkpoint
that is damaged is an error that says how to go on from the one before, which is never done unasked.
"""

import json
import os
import random
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_trainer import sums
from rlhf_trainer.errors import UserError, one_line

_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = ".partial-"


@dataclass
class Checkpoint:
    """model and optimizer: tensors by name. state: JSON values."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def atomic_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Runs `write(partial directory)`, syncs what it wrote and renames it to `target`, which must not exist."""
    partial = target.parent / f"{_PARTIAL}{target.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        sync(partial)
        os.replace(partial, target)
        _sync_one(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync(directory: Path) -> None:
    """Forces every file below `directory`, and the directory entries, to the disk."""
    for root, _, files in os.walk(directory):
        for name in files:
            _sync_one(Path(root) / name)
        _sync_one(Path(root))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def steps(output_dir: Path) -> list[int]:
    """Steps of the whole checkpoints below `output_dir`, ascending."""
    if not output_dir.is_dir():
        return []
    return sorted(int(m[1]) for entry in output_dir.iterdir() if (m := _NAME.fullmatch(entry.name)))


def check(output_dir: Path) -> None:
    """UserError, with the way on, when a file of the newest checkpoint is missing, unreadable or not as written."""
    found = steps(output_dir)
    if found and (fault := sums.fault(output_dir / f"checkpoint-{found[-1]}")) is not None:
        raise UserError(_damaged(output_dir, fault))


def newest_state(output_dir: Path) -> dict[str, Any] | None:
    """state.json of the newest checkpoint, nothing else read or set; None when there is no checkpoint."""
    found = steps(output_dir)
    if not found:
        return None
    with _reading(output_dir):
        state: dict[str, Any] = json.loads((output_dir / f"checkpoint-{found[-1]}" / "state.json").read_text())
    return state


def save(output_dir: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes `checkpoint-{step}` (once: a step is a state) and deletes all but the newest `keep`."""
    target = output_dir / f"checkpoint-{checkpoint.step}"

    def write(directory: Path) -> None:
        save_file(_owned(checkpoint.model), directory / "model.safetensors")
        save_file(_owned(checkpoint.optimizer), directory / "optimizer.safetensors")
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
        save_file(generators, directory / "rng.safetensors")
        state = checkpoint.state | {"step": checkpoint.step, "python_rng": random.getstate(), "numpy_rng": _numpy_rng()}
        (directory / "state.json").write_text(json.dumps(state))
        sums.write(directory)

    if not target.exists():
        for entry in output_dir.glob("*.jsonl"):  # no line may be missing before a checkpoint that is there
            _sync_one(entry)
        atomic_directory(target, write)
    for step in steps(output_dir)[: -max(keep, 1)]:
        _delete(output_dir / f"checkpoint-{step}")
    return target


def load(output_dir: Path) -> Checkpoint | None:
    """The newest checkpoint, with the random generators set to where it left them; None when there is none.

    Nothing is set before everything is read; UserError when that fails.
    """
    clear(output_dir)
    found = steps(output_dir)
    if not found:
        return None
    directory = output_dir / f"checkpoint-{found[-1]}"
    with _reading(output_dir):
        state = json.loads((directory / "state.json").read_text())
        generators, model, optimizer = (
            load_file(directory / f"{name}.safetensors") for name in ("rng", "model", "optimizer")
        )
    version, internal, gauss = state.pop("python_rng")
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state.pop("numpy_rng")
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(generators.pop("cpu"))
    if generators and torch.cuda.device_count() == len(generators):
        torch.cuda.set_rng_state_all([generators[f"cuda{i}"] for i in range(len(generators))])
    return Checkpoint(found[-1], model, optimizer, state)


def clear(output_dir: Path) -> None:
    """Deletes what a kill left half written or half deleted. Only one that holds the directory's lock may."""
    for leftover in output_dir.glob(f"{_PARTIAL}*") if output_dir.is_dir() else ():
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _reading(output_dir: Path) -> Iterator[None]:
    """What can go wrong with the newest checkpoint's files, as one line."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(_damaged(output_dir, one_line(error))) from error


def _damaged(output_dir: Path, fault: str) -> str:
    """The line about the newest checkpoint."""
    *before, step = steps(output_dir)
    newest = output_dir / f"checkpoint-{step}"
    aside = shlex.join(["mv", str(newest), str(output_dir / f"damaged-{newest.name}")])
    on = f"checkpoint-{before[-1]}" if before else "the beginning, as there is none before it"
    return f"resume: {str(newest)!r} is damaged ({fault}); after `{aside}` --resume goes on from {on}"


def _numpy_rng() -> list[Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return [kind, keys.tolist(), position, has_gauss, cached]  # type: ignore[union-attr]


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, as safetensors wants them."""
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _delete(directory: Path) -> None:
    """Renames first, so that a kill half-way leaves no directory that looks like a checkpoint."""
    doomed = directory.parent / f"{_PARTIAL}{directory.name}-old"
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
