"""The network: whether a server can be reached, found out within seconds, and where ours may be reached."""

from __future__ import annotations

import errno
import ipaddress
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


def listening_socket(host: str, port: int, *, from_elsewhere: bool) -> socket.socket:
    """A socket that waits at `host`:`port` and at no other address of this machine. Raises OSError.

    from_elsewhere: whether other machines come as well. For them a name must mean another address than loopback, and
    where this machine does not know that address as its own, the socket waits at all that it has.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if not (from_elsewhere and ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback):
        try:
            return socket.create_server((str(address[0]), port), family=family, backlog=_BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    return socket.create_server(("", port), backlog=_BACKLOG)


_BACKLOG = 2048  # ranks that come at the same moment
