"""Hosts that no longer answer: what is said, and of which ranks. tests/hosts has real ones."""

import platform
import socket

import pytest

from aadl_hvd.comm import hosts


def of(*names):
    """The hosts of ranks with these names; this rank's own host is its real name."""
    said = iter([[*names], [("192.0.2.1", 9)] * len(names)])
    return hosts.Hosts(lambda own: next(said))


def test_one_host_is_not_named(monkeypatch):
    monkeypatch.setattr(hosts, "_held_port", lambda: pytest.fail("nobody will ask"))
    alone = of(platform.node(), platform.node())
    assert alone.place(1) == ""
    assert alone.silent() == []


def test_a_rank_without_a_port_tells_the_others_so(monkeypatch):
    def refuse(*_):
        raise OSError("no")

    monkeypatch.setattr("socket.socket", refuse)
    said = []
    hosts.Hosts(lambda own: said.append(own) or [own, "b"])
    assert said == [platform.node(), None]


def test_any_number_of_ranks_may_ask():
    """A queue that nobody empties would be full after some 100."""
    held = hosts._held_port()
    address = "127.0.0.1", held.getsockname()[1]
    for _ in range(300):
        assert not set(hosts._unreachable({"b": address}))
    held.close()


def test_a_silent_host_is_named_with_its_ranks(monkeypatch):
    monkeypatch.setattr(hosts, "_unreachable", lambda addresses: set(addresses) - {"c"})
    here = platform.node()
    several = of(here, "b", "b", "c")
    assert several.place(2) == " on host b"
    said = f"Host b (ranks 1, 2) does not answer host {here}: "
    (line,) = several.silent()
    assert line.startswith(said)
    several.explain(error := ValueError("x"))
    assert error.__notes__ == [line]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), None])
def test_an_error_that_was_not_explained_is_at_the_end(monkeypatch, capsys, error):
    monkeypatch.setattr(hosts, "_unreachable", set)
    monkeypatch.setattr("sys.last_value", error, raising=False)
    several = of(platform.node(), "b")
    for _ in range(2):
        several.say_at_exit()
    assert capsys.readouterr().err.count("Host b (ranks 1)") == isinstance(error, ValueError)


def test_who_answers():
    """One that listens, and one that refuses, because the rank there has ended; not one without a
    route: no address of this kind is ever used."""
    with socket.create_server(("127.0.0.1", 0)) as listens, socket.socket() as refuses:
        refuses.bind(("127.0.0.1", 0))
        addresses = {
            "listens": listens.getsockname(),
            "refuses": refuses.getsockname(),
            "nowhere": ("255.255.255.255", 9),
        }
        assert set(hosts._unreachable(addresses)) == {"nowhere"}
