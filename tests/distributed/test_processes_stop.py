"""A signal to one of several processes: all finish the step, one saves, all leave; a second run keeps out."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_processes import TORCHRUN

from rlhf_trainer import checkpoint
from rlhf_trainer.lock import DirectoryLock

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "trainer")]
import tiny  # noqa: E402

RUN = """
import os, sys
from pathlib import Path
from rlhf_trainer import cli
Path(sys.argv[1], "process-" + os.environ["RANK"]).write_text(str(os.getpid()))
code = cli.main(["--config", sys.argv[1] + "/run.yaml"])
Path(sys.argv[1], "code-" + os.environ["RANK"]).write_text(str(code))
sys.exit(code)
"""


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_saves_once_and_both_leave(tmp_path):
    out = tmp_path / "out"
    tiny.config(tmp_path, output_dir=str(out), total_steps=5000, save_steps=0).to_yaml(tmp_path / "run.yaml")
    (tmp_path / "run.py").write_text(RUN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *TORCHRUN, "2", str(tmp_path / "run.py"), str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        metrics, deadline = out / "metrics.jsonl", time.monotonic() + 240
        while not (metrics.exists() and metrics.stat().st_size):
            assert run.poll() is None, run.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(int((tmp_path / "process-1").read_text()), signal.SIGTERM)
        run.communicate(timeout=240)
    steps = checkpoint.steps(out)
    assert len(steps) == 1
    assert metrics.read_text().count("\n") == steps[0]
    assert {(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)} == {"143"}
    assert DirectoryLock(out).take(make=False)  # let go of
