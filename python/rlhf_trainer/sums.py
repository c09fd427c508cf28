"""SHA256SUMS of a directory's files, in the form that `sha256sum -c` reads too.

A disk, a copy or an editor that changed a bit is found before anything is trained on it.
"""

import hashlib
import os
import re
from pathlib import Path

FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write(directory: Path) -> None:
    """Writes the sums of every file that is in `directory` now."""
    lines = [f"{_sum(directory / name)}  {name}\n" for name in _files(directory)]
    (directory / FILE).write_text("".join(lines))


def fault(directory: Path) -> str | None:
    """What is wrong with `directory`, as "FILE: what"; None when its files are those that were summed.

    Reads every file once.
    """
    name = FILE
    try:
        *lines, end = (directory / FILE).read_text().split("\n")
        matches = [_LINE.fullmatch(line) for line in lines]
        if end or not all(matches):
            return f"{FILE}: not a whole list of sums"
        written = {match[2]: match[1] for match in matches if match}
        for name in sorted(written.keys() | set(_files(directory))):
            if name not in written:
                return f"{name}: not among those of {FILE}"
            if _sum(directory / name) != written[name]:
                return f"{name}: not what was written"
    except FileNotFoundError:
        return f"{name}: missing"
    except (OSError, UnicodeDecodeError) as error:
        return f"{name}: {getattr(error, 'strerror', None) or 'not text'}"
    return None


def _files(directory: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(directory) if entry.name != FILE)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
