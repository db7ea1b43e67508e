"""Whether a server can be reached, found out within seconds: the libraries that talk to it would try for minutes."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


def why_unreachable(url: str, limit_s: float) -> str | None:
    """Why the server of `url` cannot be reached, by its proxy where the environment names one; None where it can."""
    parts, way = urlsplit(url), ""
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy)
        way = f"by the proxy {parts.hostname}: "
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), limit_s).close()
    except OSError as error:
        return f"{way}{error}"
    return None
