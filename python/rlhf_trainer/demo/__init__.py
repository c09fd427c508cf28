"""The embedded default: a 0.9M-parameter Llama on CPython's own documentation, its data, its score and its demo run.

Everything it needs at run time is in `assets/` beside this file; `build_checkpoint.py` makes those files again.
"""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
DATA = ("prompts", "eval_prompts", "preferences", "demonstrations")


def checkpoint_path() -> str:
    """Directory of the embedded checkpoint, in transformers' format."""
    return str(ASSETS)


def data_path(which: str) -> str:
    """Path of one embedded JSONL file: prompts, eval_prompts, preferences or demonstrations."""
    if which not in DATA:
        raise ValueError(f"which must be one of {', '.join(DATA)}, got {which!r}")
    return str(ASSETS / f"{which}.jsonl")
