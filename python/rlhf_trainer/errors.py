"""Errors a user can act on: one line that names the argument, what it was, and what would be right."""


class UserError(ValueError):
    """Wrong input rather than a wrong program; the command line prints it alone, without traceback, exits with 2."""


class PeerError(RuntimeError):
    """Another of the processes that train together failed; it has said why, and the message repeats it."""


def one_line(message: object) -> str:
    """`message` on a single line, whatever line breaks a library put into it."""
    return " ".join(str(message).split())


def shorten(text: str, width: int = 80) -> str:
    """`text` quoted on one line, its middle left out beyond `width` characters."""
    flat = one_line(text)
    if len(flat) > width:
        half = (width - 5) // 2
        flat = f"{flat[:half]} ... {flat[-half:]}"
    return repr(flat)
