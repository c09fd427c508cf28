"""The model hub, asked only when it can answer."""

import socket
from urllib.parse import urlparse
from urllib.request import getproxies


def unreachable() -> str | None:
    """The hub's host when its name does not resolve and no proxy may do that for us, else None.

    The hub's own client finds out by retrying for half a minute, with a line for each try.
    """
    from huggingface_hub import constants

    host = urlparse(constants.ENDPOINT).hostname
    if host is None or getproxies():
        return None
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return host
    return None
