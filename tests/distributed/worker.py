"""One of several processes of a test: trains the configurations of a file, the last one as a command line, and leaves
what it saw beside it.
"""

import contextlib
import hashlib
import io
import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from rlhf_trainer import TrainConfig, cli, core
from rlhf_trainer.errors import UserError
from rlhf_trainer.processes import join

FAILING = 1  # the process on which `fails` fails
calls = []  # of `dies`


def length(prompts, completions, **_):
    """A reward: the number of words."""
    return [float(len(completion.split())) for completion in completions]


def fails(prompts, completions, **_):
    """A reward that one process cannot compute."""
    if os.environ.get("RANK") == str(FAILING):
        raise RuntimeError("no luck here")
    return length(prompts, completions)


def dies(prompts, completions, **_):
    """A reward in whose second call one process is killed."""
    calls.append(len(prompts))
    if os.environ.get("RANK") == str(FAILING) and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return length(prompts, completions)


def digest(tensors):
    """The bits of all of them."""
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def run(values):
    """Trains; what this process ends with."""
    policies, build = [], core.build

    def kept(*arguments):
        policies.append(build(*arguments))
        return policies[-1]

    core.build = kept
    try:
        history = core.train(TrainConfig(**values)).history
    except UserError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        core.build = build
    return {"history": history, "weights": digest(policies[-1].kept.values())}


def command(values, jobs):
    """The same as a command line; its exit code and what it prints here."""
    file = jobs.with_suffix(f".yaml-{os.environ['RANK']}")
    TrainConfig(**values).to_yaml(file)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = cli.main([values["algorithm"], "--config", str(file)])
    return {"code": code, "said": said.getvalue()}


def probe(processes):
    """What the processes' own methods give here."""
    shared, late, unused = (
        nn.Parameter(torch.zeros(2, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float32)
    )
    shared.grad = torch.full((2,), 1.0 + processes.rank)
    if processes.rank == FAILING:
        late.grad = torch.tensor([0.0, 5.0], dtype=torch.bfloat16)
    processes.sum_gradients([shared, late, unused])
    weight = torch.full((1,), float(processes.rank))
    processes.copy_from_main([weight])
    try:
        processes.each(lambda: 1 // (FAILING - processes.rank))
        error = None
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    gradients = [None if p.grad is None else p.grad.tolist() for p in (shared, late, unused)]
    return {
        "each": processes.each(lambda: processes.rank),
        "gradients": gradients,
        "copied": float(weight),
        "error": error,
    }


def main():
    jobs = Path(sys.argv[1])
    *trained, failing = json.loads(jobs.read_text())
    seen = [probe(join("cpu")), *map(run, trained), command(failing, jobs)]
    jobs.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
