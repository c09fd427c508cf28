"""One of several processes of a test: trains the configurations of a file, and leaves what it saw beside it."""

import hashlib
import json
import os
import sys
from pathlib import Path

from rlhf_trainer import TrainConfig, core
from rlhf_trainer.errors import UserError

FAILING = 1  # the process on which `fails` fails


def length(prompts, completions, **_):
    """A reward: the number of words."""
    return [float(len(completion.split())) for completion in completions]


def fails(prompts, completions, **_):
    """A reward that one process cannot compute."""
    if os.environ.get("RANK") == str(FAILING):
        raise RuntimeError("no luck here")
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


def main():
    jobs = Path(sys.argv[1])
    seen = [run(values) for values in json.loads(jobs.read_text())]
    jobs.with_suffix(f".{os.environ.get('RANK', '0')}").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
