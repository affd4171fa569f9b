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

    A transport that loses a host says "timed out", or nothing at all. So each rank keeps a port for
    itself, where there are several hosts, and others ask to connect to it. The kernel of a host
    that is there refuses, whatever the rank does, and also when the rank has ended.

    Args:
        allgather: `Communicator.allgather_object` of the group. Collective.
    """

    def __init__(self, allgather: Callable[[Any], list[Any]]) -> None:
        self._here = platform.node()
        self._names = allgather(self._here)
        self._addresses: dict[str, tuple[str, int]] = {}
        self._said = False
        if len(set(self._names)) == 1:
            return
        held = _held_port()
        weakref.finalize(self, held.close if held else bool)
        found = zip(self._names, allgather(_address(held)), strict=True)
        self._addresses = {name: tuple(address) for name, address in found if address}
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


def _held_port() -> socket.socket | None:
    # It is never listened at: the kernel refuses, which is an answer, however many ask. A queue of
    # connections that nobody takes would fill up. No error: it would be this rank's alone.
    try:
        held = socket.socket()
        held.bind(("", 0))
    except OSError:
        return None
    return held


def _address(held: socket.socket | None) -> tuple[str, int] | None:
    """Where others ask for a port, by this host's name; None where they cannot."""
    if held is None:
        return None
    try:
        address = socket.gethostbyname(platform.node())
    except OSError:
        return None
    return None if address.startswith("127.") else (address, held.getsockname()[1])


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
