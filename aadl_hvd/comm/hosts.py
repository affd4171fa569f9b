"""Which hosts the ranks are on, and which of them no longer answer."""

from __future__ import annotations

import atexit
import errno
import itertools
import platform
import selectors
import socket
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

PATIENCE = 2.0  # seconds that a host may take to answer
_AT_ONCE = 200  # hosts that are asked at the same time: each takes an open file


class Hosts:
    """The hosts of the ranks of a group.

    A transport that loses a host says "timed out", or nothing at all. So each rank keeps a socket
    that listens, where there are several hosts. A kernel answers for it, whatever the rank does,
    and also when the rank has ended. Nobody ever reads from it.

    Args:
        allgather: `Communicator.allgather_object` of the group. Collective.
    """

    def __init__(self, allgather: Callable[[Any], list[Any]]) -> None:
        listener = _listener()
        found = allgather((platform.node(), _address(listener)))
        self._names = [name for name, _ in found]
        self._addresses = {name: tuple(address) for name, address in found if address}
        self._here = platform.node()
        self._said = False
        close = weakref.finalize(self, listener.close if listener else bool)
        if len(set(self._names)) == 1:
            close()
        else:
            _register(self)

    def place(self, rank: int) -> str:
        """Words after the name of a rank: " on host b"; none where all ranks share a host."""
        return "" if len(set(self._names)) == 1 else f" on host {self._names[rank]}"

    def explain(self, error: BaseException) -> None:
        """Adds a note to an error: the hosts that do not answer. Takes 2 seconds if there are any.

        Not collective.
        """
        self._said = True
        for line in self.silent():
            error.add_note(line)

    def silent(self) -> list[str]:
        """A sentence for each host that this one cannot reach."""
        if len(set(self._names)) == 1:
            return []
        others = (name for name in self._addresses if name != self._here)
        gone: set[str] = set()
        while some := list(itertools.islice(others, _AT_ONCE)):
            gone.update(_unreachable({name: self._addresses[name] for name in some}))
        return [
            f"Host {name} (ranks {_listed(r for r, n in enumerate(self._names) if n == name)}) "
            f"does not answer host {self._here}: it is down, or the network between them is."
            for name in sorted(gone)
        ]

    def say_at_exit(self) -> None:
        """Says which hosts do not answer if an error that was not explained ends the program.

        Such an error is torch's own in the backward pass.
        """
        if isinstance(getattr(sys, "last_value", None), Exception) and not self._said:
            self._said = True
            for line in self.silent():
                print(f"aadl_hvd: {line}", file=sys.stderr, flush=True)


def _listener() -> socket.socket | None:
    # No error: it would be this rank's alone, and the others would wait for it.
    try:
        return socket.create_server(("", 0))
    except OSError:
        return None


def _address(listener: socket.socket | None) -> tuple[str, int] | None:
    """Where others reach a socket, by this host's name; None where they cannot."""
    if listener is None:
        return None
    try:
        address = socket.gethostbyname(platform.node())
    except OSError:
        return None
    return None if address.startswith("127.") else (address, listener.getsockname()[1])


def _unreachable(addresses: dict[str, tuple[str, int]]) -> Iterable[str]:
    """Names whose addresses do not answer. One that refuses has answered: its rank has ended."""
    answers = {0, errno.ECONNREFUSED, errno.ECONNRESET}
    waiting = set()
    with selectors.DefaultSelector() as wait:
        for name, address in addresses.items():
            asked = socket.socket()
            asked.setblocking(False)
            code = asked.connect_ex(address)
            if code == errno.EINPROGRESS:
                waiting.add(name)
                wait.register(asked, selectors.EVENT_WRITE, name)
                continue
            asked.close()
            if code not in answers:
                yield name
        deadline = time.monotonic() + PATIENCE
        while waiting and (left := deadline - time.monotonic()) > 0.0:
            for key, _ in wait.select(left):
                asked = key.fileobj  # type: ignore[assignment]
                code = asked.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                wait.unregister(asked)
                asked.close()
                waiting.discard(key.data)
                if code not in answers:
                    yield key.data
        for key in list(wait.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
    yield from waiting


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))


_registered: weakref.WeakSet[Hosts] = weakref.WeakSet()


def _register(hosts: Hosts) -> None:
    _registered.add(hosts)
    # Hooks run in the reverse order: before those of transports, which may hang without a host.
    atexit.unregister(_say_at_exit)
    atexit.register(_say_at_exit)


def _say_at_exit() -> None:
    for hosts in list(_registered):
        hosts.say_at_exit()
