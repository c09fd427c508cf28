"""Sizes of memory as people write them: `512MiB`, `1.5 GB`, or a plain number of bytes."""

import re

UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_BY_LOWER_CASE = {unit.lower(): factor for unit, factor in UNITS.items()}


def parse_bytes(value: int | str, name: str = "size") -> int:
    """The number of bytes that `value` names, rounded down: an int, or a number with a unit ("512MiB", "2 GB", "4096").

    KiB, MiB, GiB, TiB are powers of 1024; KB, MB, GB, TB powers of 1000; case does not matter.
    Raises ValueError, which calls the argument `name`, for anything else, and for a negative number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{name} is {value!r}; it must be a number of bytes or a string such as '512MiB'")
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{name} is {value} bytes; it must not be negative")
        return value
    match = _SIZE.fullmatch(value)
    unit = match[2].lower() if match else ""
    if match is None or (unit and unit not in _BY_LOWER_CASE):
        raise ValueError(f"{name} is {value!r}; it must be a number with one of the units {', '.join(UNITS)}")
    number = float(match[1]) if "." in match[1] else int(match[1])
    return int(number * _BY_LOWER_CASE.get(unit, 1))


def format_bytes(count: int) -> str:
    """ "1.50 GiB"; nothing for 0."""
    if count == 0:
        return ""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"
