"""Endpoints: what may be bound, and what other machines could reach. Strings in, strings out."""

from __future__ import annotations

import ipaddress
import re

from .errors import BadEndpoint, RemoteBindRefused

_TCP = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.]+\]|[^\[\]:/\s]+):(?P<port>\d{1,5}|\*)\Z")


def parse(endpoint: str) -> tuple[str, str]:
    """Host (without brackets) and port of a `tcp://HOST:PORT` endpoint.

    Raises:
        BadEndpoint: any other form.
    """
    match = _TCP.match(endpoint)
    if match is None or (match["port"] != "*" and int(match["port"]) > 65535):
        raise BadEndpoint(
            f"{endpoint!r} is not an endpoint", "Write tcp://HOST:PORT, for example tcp://127.0.0.1:5555"
        )
    return match["host"].strip("[]"), match["port"]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a bind to `host`; names but `localhost` and `lo` are remote."""
    if host in ("localhost", "lo"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(endpoint: str, *, allow_remote: bool) -> None:
    """Refuse a bind which other machines could reach unless it was asked for: there is no authentication.

    Raises:
        BadEndpoint: not `tcp://HOST:PORT`.
        RemoteBindRefused: not a loopback address.
    """
    host, _ = parse(endpoint)
    if not allow_remote and not is_loopback(host):
        raise RemoteBindRefused(
            f"{endpoint} can be reached from other machines, and clients are not authenticated",
            "Bind to 127.0.0.1, or pass --allow-remote on a network where every machine is trusted",
        )
