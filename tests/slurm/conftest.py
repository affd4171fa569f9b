"""Slurm for the tests of this folder."""

import shutil
import tempfile

import pytest
from cluster import Cluster, missing
from slurm_jobs import Jobs


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    from models.data import write_digits

    return write_digits(tmp_path_factory.mktemp("data") / "digits", size=16)


@pytest.fixture(scope="module")
def start_slurm():
    """start_slurm(NAME=VALUE, ...): a Slurm with these settings; it ends with the file's tests.

    Where it does not start, as a container may have it, the tests are skipped with what logs say.
    """
    if lacking := missing():
        pytest.skip(f"Slurm cannot run here without {lacking}")
    clusters = []

    def start_slurm(**settings):
        # A short path: sockets have names in it, of at most 107 characters.
        cluster = Cluster(tempfile.mkdtemp(prefix="slurm"))
        clusters.append(cluster)
        try:
            cluster.start(**settings)
        except RuntimeError as error:
            pytest.skip(f"Slurm does not start here: {error}")
        return cluster

    yield start_slurm
    for cluster in clusters:
        cluster.stop()
        shutil.rmtree(cluster.folder)


@pytest.fixture
def jobs_on(tmp_path):
    return lambda cluster: Jobs(cluster, tmp_path)
