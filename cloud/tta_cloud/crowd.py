"""Connections that nobody has heard a word of: how many there may be, and which one goes. Pure but for `shut`.

An end that is silent costs a descriptor until its handshake has taken too long, and who opens them fast enough takes
them all. Those who mean it say something within the time of a handshake; so beyond a bound the one goes that has been
silent for the longest. libzmq has no such bound, and closes what is shut down here as if the other end had hung up.
"""

from __future__ import annotations

import os
import socket
from collections import OrderedDict


class Crowd:
    """The silent connections of one listening socket, by descriptor.

    Args:
        most: of them.
        forgives: whether one that has said something is none of them any more; at a door through which everybody may
            come saying something proves nothing.
    """

    def __init__(self, most: int, *, forgives: bool = True) -> None:
        self._most = most
        self._forgives = forgives
        self._silent: OrderedDict[int, None] = OrderedDict()  # the longest silent first

    def __len__(self) -> int:
        return len(self._silent)

    def accepted(self, descriptor: int) -> list[int]:
        """Somebody has connected; the descriptors that have to go for it."""
        self._silent.pop(descriptor, None)  # its end was not told of: another has its number now
        self._silent[descriptor] = None
        return [self._silent.popitem(last=False)[0] for _ in range(len(self._silent) - self._most)]

    def heard(self, descriptor: int) -> None:
        """A message has come over a connection."""
        if self._forgives:
            self._silent.pop(descriptor, None)

    def closed(self, descriptor: int) -> None:
        """A connection is no more."""
        self._silent.pop(descriptor, None)


def shut(descriptor: int, port: int) -> bool:
    """Hang up a connection of this process that somebody else owns; whether it was one to a port.

    The descriptor may have been closed meanwhile and be something else now. A copy of it is looked at: what it refers
    to cannot change any more, and at worst another connection to the same port is hung up, which comes again.

    Args:
        descriptor: of the connection; it stays open for its owner to close.
        port: on which it was accepted.
    """
    try:
        copy = os.dup(descriptor)
    except OSError:
        return False
    try:
        with socket.socket(fileno=copy) as found:
            name = found.getsockname()
            if found.family not in (socket.AF_INET, socket.AF_INET6) or name[1] != port:
                return False
            found.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    return True
