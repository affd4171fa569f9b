"""A real Slurm on this machine for tests: one controller, and two nodes of two CPUs each.

`python tests/slurm/cluster.py start FOLDER [NAME=VALUE ...]` starts one whose whole state is in
FOLDER, with some settings of slurm.conf changed; `stop FOLDER` ends it and its jobs. After
`export SLURM_CONF=FOLDER/slurm.conf` Slurm's commands speak to it. It uses free ports and a munge
of its own, so it disturbs no other Slurm, and several may run.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
from pathlib import Path

TEMPLATE = Path(__file__).with_name("slurm.conf")
NODES = ("n1", "n2")
PROGRAMS = {
    "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "srun": "slurm-wlm", "munged": "munge",
}  # fmt: skip
# Slurm's plugin opens the library by the name without a version, which Debian has in libpmix-dev.
PMIX = "pmix2/lib/libpmix.so"
# The daemons are often not on an ordinary PATH.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def missing():
    """What keeps a Slurm from running here, in one line; empty: nothing."""
    found = [] if os.geteuid() == 0 else ["root"]
    packages = {package for program, package in PROGRAMS.items() if not which(program)}
    if not packages and not list(Path("/usr/lib").glob(f"*/{PMIX}")):
        packages.add("libpmix-dev")
    if packages:
        found.append(f"Debian's {', '.join(sorted(packages))} (apt-get install)")
    return " and ".join(found)


def which(program):
    return shutil.which(program, path=PATH)


class Cluster:
    """A Slurm whose state is in a folder.

    Attributes:
        environment: for Slurm's commands, and for what calls them.
    """

    def __init__(self, folder):
        self.folder = Path(folder).resolve()
        self.environment = dict(os.environ, PATH=PATH, SLURM_CONF=str(self.folder / "slurm.conf"))

    def start(self, **settings):
        """Starts the daemons and waits until both nodes are idle.

        Args:
            settings: of slurm.conf, in place of those of the template.

        Raises:
            RuntimeError: A daemon did not start; the message has what the logs say.
        """
        # munge wants to be reachable by all users, and Slurm has sockets of their own in here.
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        for name in ("controller", *NODES):
            (self.folder / name).mkdir(exist_ok=True)
        (self.folder / "slurm.conf").write_text(self._configuration(settings))
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self._daemon(
            "munged", f"--socket={self.folder}/munge.socket", f"--key-file={key}",
            f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munge.seed",
        )  # fmt: skip
        self._daemon("slurmctld")
        for node in NODES:
            self._daemon("slurmd", "-N", node)
        self.wait_for_nodes("idle", limit=30)

    def _configuration(self, settings):
        with contextlib.ExitStack() as stack:
            ports = []
            for _ in range(3):
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", 0))
                ports.append(probe.getsockname()[1])
        text = string.Template(TEMPLATE.read_text()).substitute(
            folder=self.folder, host=socket.gethostname().split(".")[0],
            first=NODES[0], second=NODES[1],
            controller_port=ports[0], first_port=ports[1], second_port=ports[2],
        )  # fmt: skip
        for name, value in settings.items():
            text = re.sub(rf"(?m)^{name}=.*\n", "", text)
            text += f"{name}={value}\n"
        return text

    def _daemon(self, program, *arguments):
        """Starts a daemon, which leaves its process number in a file, and returns at once."""
        log = self.folder / f"{program}.start.log"
        with open(log, "w") as file:
            code = subprocess.run(
                [which(program), *arguments], env=self.environment, stdin=subprocess.DEVNULL,
                stdout=file, stderr=file, timeout=30,
            ).returncode  # fmt: skip
        if code:
            raise RuntimeError(f"{program} ended with exit code {code}:\n{self.logs()}")

    def stop(self):
        """Ends all jobs, and the daemons that `start` has started."""
        if (self.folder / "slurmctld.pid").exists():
            with contextlib.suppress(subprocess.TimeoutExpired, AssertionError):
                self.cancel_all()
        for name in (*(f"slurmd.{node}" for node in NODES), "slurmctld", "munged"):
            with contextlib.suppress(OSError, ValueError):
                self._end(int((self.folder / f"{name}.pid").read_text()))

    def cancel_all(self, limit=20):
        """Ends all jobs, by force, and waits until none is left."""
        end = time.monotonic() + limit
        while numbers := self.run("squeue", "--noheader", "--format=%A").split():
            assert time.monotonic() < end, f"jobs {numbers} do not end"
            self.run("scancel", "--quiet", *numbers)
            self.run("scancel", "--quiet", "--full", "--signal=KILL", *numbers)
            time.sleep(0.3)

    def _end(self, process):
        """Ends a process that has this folder's name among its words or its environment."""

        def words(name="cmdline"):
            return Path("/proc", str(process), name).read_bytes()

        if str(self.folder).encode() not in words() + words("environ"):
            return  # the number is another's by now
        os.kill(process, signal.SIGTERM)
        end = time.monotonic() + 10
        while words() and time.monotonic() < end:  # empty: it has ended, if nobody asked for it yet
            time.sleep(0.05)

    def run(self, *words, limit=30):
        """The output of one of Slurm's commands; AssertionError where it fails."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=limit
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def node_states(self):
        return self.run("sinfo", "--noheader", "--Node", "--format=%T").split()

    def wait_for_nodes(self, state, *, limit):
        """Waits until all nodes are in a state. RuntimeError after `limit` seconds."""
        end = time.monotonic() + limit
        said = ""
        while time.monotonic() < end:
            try:
                if set(said := self.node_states()) == {state}:
                    return
            except AssertionError as error:  # the controller does not listen yet
                said = error
            time.sleep(0.1)
        raise RuntimeError(f"nodes not {state} after {limit} s: {said}\n{self.logs()}")

    def logs(self):
        """The last lines of all logs."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-8:]
            parts += [f"-- {path.name}", *lines] if lines else []
        return "\n".join(parts)

    def job(self, number):
        """What Slurm says of a job, by names as scontrol has them."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(number))
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, number, *states, limit=60):
        """Waits until a job is in one of some states, "RUNNING" for instance; what Slurm says."""
        end = time.monotonic() + limit
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < end, f"not {states} after {limit} s: {job}\n{self.logs()}"
            time.sleep(0.1)
        return job


def main(words):
    """The exit code of the command line; see the module's docstring."""
    usage = f"usage: {sys.argv[0]} start FOLDER [NAME=VALUE ...] | stop FOLDER"
    if len(words) < 2 or words[0] not in ("start", "stop") or any("=" not in w for w in words[2:]):
        print(usage, file=sys.stderr)
        return 2
    cluster = Cluster(words[1])
    if words[0] == "stop":
        cluster.stop()
        return 0
    if lacking := missing():
        print(f"Slurm cannot run here without {lacking}", file=sys.stderr)
        return 1
    cluster.stop()
    cluster.start(**dict(word.split("=", 1) for word in words[2:]))
    print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
