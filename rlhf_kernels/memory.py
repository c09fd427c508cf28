"""x"""

import re

_UNITS = {
    "": 1,
    "b": 1,
    **{u: 1024 ** (i + 1) for i, u in enumerate(("kib", "mib", "gib", "tib"))},
    **{u: 1000 ** (i + 1) for i, u in enumerate(("kb", "mb", "gb", "tb"))},
}


def parse_bytes(value):
    m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value).lower())
    if not m or m[2] not in _UNITS:
        raise ValueError(f"{value!r} is not a number of bytes, such as 536870912, '512MiB' or '2GiB'")
    return int(float(m[1]) * _UNITS[m[2]])
