"""One run at a time in an output directory: a lock on its file `.lock`, which the kernel drops with its process.

The file stays where it is: a lock file that is deleted may be locked by two.
"""

import errno
import fcntl
import os
import socket
import warnings
from contextlib import suppress
from pathlib import Path

from .errors import UserError

FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class DirectoryLock:
    """Not held until `take`; released on leaving the `with` block, or by the end of the process, whatever ends it."""

    def __init__(self, directory: Path, active: bool = True) -> None:
        """active: whether this process is the one of its run that writes; for the others every call does nothing."""
        self.directory, self.active = directory, active
        self._descriptor: int | None = None

    def take(self, make: bool = True) -> bool:
        """Whether this call took the lock (False: it was held already). UserError when another run holds it.

        make: makes the directory and its lock file; without it nothing is written, and where there is no lock file
        there is no run either, and no lock is taken.
        """
        if self._descriptor is not None or not self.active:
            return False
        if make:
            self.directory.mkdir(parents=True, exist_ok=True)
        try:
            opened = os.open(self.directory / FILE, os.O_RDWR | (os.O_CREAT if make else 0), 0o644)
        except OSError:
            if make:
                raise
            return False
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _text(opened)
            os.close(opened)
            raise UserError(
                f"output_dir: another run is at work in {str(self.directory)!r} ({holder}); "
                "wait for its end, or give another output_dir"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(opened)
                raise
            warnings.warn(
                f"output_dir: the file system of {str(self.directory)!r} has no locks; "
                "see to it that no second run writes there",
                stacklevel=2,
            )
        self._descriptor = opened
        with suppress(OSError):  # of a full disk: the lock holds without its text
            os.ftruncate(opened, 0)
            os.pwrite(opened, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return True

    def release(self) -> None:
        """Lets the next run in; safe to call twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _text(descriptor: int) -> str:
    """Who holds the lock, by its own words."""
    return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "it does not say which"
