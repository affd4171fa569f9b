"""Two hosts for the tests of this folder."""

import pytest
from network import Network, missing


@pytest.fixture(scope="session")
def start_hosts():
    """start_hosts(...): a `Network` with these settings. Those of before are ended."""
    if lacking := missing():
        pytest.skip(f"two hosts cannot be made here without {lacking}")
    running = {}

    def start_hosts(**settings):
        for key, network in list(running.items()):
            if key != str(settings) or not network.alive():
                running.pop(key).__exit__()
        if not running:
            running[str(settings)] = Network(**settings).__enter__()
        network = running[str(settings)]
        network.mend()
        return network

    yield start_hosts
    for network in running.values():
        network.__exit__()


@pytest.fixture
def hosts(start_hosts):
    return start_hosts()
