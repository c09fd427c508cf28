"""`rlhf-train ALGORITHM | COMMAND`: flags over YAML files, one line and exit code 2 for what cannot work.

torch is imported only once the input has been read and checked. `rlhf_trainer.help` has the exit codes.
"""

import sys
import traceback
import warnings
from collections.abc import Sequence

from .commands import quiet_libraries, run_command, version_line
from .errors import PeerError, UserError, one_line
from .flags import COMMANDS, algorithm, load_config
from .help import algorithm_help, overview
from .processes import leave, speaks
from .signals import Terminated

BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143  # exit codes: a usage error, 128 + SIGINT and 128 + SIGTERM
TRAINER = {  # modules that come with the extra `trainer`
    "accelerate",
    "datasets",
    "jsonargparse",
    "matplotlib",
    "peft",
    "psutil",
    "rich",
    "shtab",
    "tokenizers",
    "yaml",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 0, or 2 after one line on stderr that says what was wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return dispatch(words)
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            sys.stdout = None  # type: ignore[assignment]
            return 0
        except (KeyboardInterrupt, Terminated) as stopped:
            if speaks():
                said = str(stopped) or "interrupted; --resume goes on from the last checkpoint"
                print(f"rlhf-train: {said}", file=sys.stderr)
            return TERMINATED if isinstance(stopped, Terminated) else INTERRUPTED
        except Exception as error:
            if not expected(error):
                raise
            if debug:
                traceback.print_exc()
            if speaks():
                print(f"rlhf-train: error: {_line(error)}", file=sys.stderr)
            return BAD_INPUT


def dispatch(words: list[str]) -> int:
    """The command that the first word names."""
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(version_line())
        return 0
    if words[0] == "demo":
        from .demo.run import main as demo

        return int(demo(words[1:]) or 0)
    if words[0] in COMMANDS:
        return run_command(words[0], words[1:])
    if "--help" in words or "-h" in words:
        print(overview() if words[0].startswith("-") else algorithm_help(algorithm(words[0])))
        return 0
    return train_command(words)


def train_command(words: list[str]) -> int:
    """Train; everything about the input is checked before the output directory is touched."""
    config = load_config(words).validate()
    quiet_libraries()
    from . import train

    result = train(config)
    leave()
    if speaks():
        print(f"{config.algorithm}: {result.step} steps, results in {result.output_dir}")
    return 0


def expected(error: Exception) -> bool:
    """Whether an error is the user's to mend: ours by class, a ValueError of this project's code, an extra left out."""
    if isinstance(error, UserError | PeerError):
        return True
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").partition(".")[0] in TRAINER
    if not isinstance(error, ValueError | FloatingPointError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return module.partition(".")[0] in ("rlhf_kernels", "rlhf_trainer")


def _line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; pip install 'rlhf-kernels[trainer]' brings what the trainer needs"
    return one_line(error)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    if speaks():
        print(f"rlhf-train: warning: {one_line(message)}", file=sys.stderr)
