"""Two hosts on this machine, with a wire between them that can be cut, for tests.

A host is a network, a host name (UTS) and mounts of its own. Both are in one process namespace:
what runs in it ends with the process that made the network, however that ends, and the namespaces
and the wire with it. Nothing of the machine itself changes, and several networks may exist at once.

The hosts resolve each other's names, and share all files. `ssh HOST COMMAND`, which is first on
their PATH, stands for the program of that name. The session itself does not use the wire, and so it
survives a cut. It tells Open MPI's mpirun that its daemon has ended when the wire is back.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOSTS = ("a", "b")
PROGRAMS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "sysctl": "procps"}
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
ADDRESS = "10.77.0.{}"
ROOT = Path(__file__).parents[2]
RELAY = Path(__file__).with_name("relay.py")
WARM = ROOT / "tests" / "warm.py"

# Becomes a host: HOST FOLDER. `here` is another folder on each host, by the same name.
HOST = """\
set -e
hostname "$0"
mount --bind "$1/names" /etc/hosts
mount --bind "$1/$0" "$1/here"
ip link set lo up
echo $$ >"$1/$0.new" && mv "$1/$0.new" "$1/$0.pid"
exec sleep infinity
"""
# Like sshd, it hands on nothing of the caller's environment. Like ssh, it is a process of its own,
# which passes output on: who kills it hears no more of the other host, where the command goes on.
SSH = """\
#!{python} -IS
import os, subprocess, sys, threading, time
words, parent = sys.argv[1:], os.getppid()
while words[0].startswith("-"):
    words = words[2 if words[0] in ("-o", "-p", "-l", "-i") else 1:]
host, *words = words
while words and words[0].startswith("-"):
    words = words[2 if words[0] in ("-o", "-p", "-l", "-i") else 1:]
keeper = open("{folder}/" + host + ".pid").read().strip()
enter = ["nsenter", "--target", keeper, "--net", "--uts", "--mount", "--", "sh", "-c"]
session = subprocess.Popen(
    [*enter, " ".join(words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    start_new_session=True,
    env={{"HOME": os.environ.get("HOME", "/"), "PATH": "{folder}/bin:{path}"}},
)

def pass_on(pipe, number):
    while data := os.read(pipe.fileno(), 65536):
        os.write(number, data)

passing = [
    threading.Thread(target=pass_on, args=pair)
    for pair in ((session.stdout, 1), (session.stderr, 2))
]
for thread in passing:
    thread.start()
code = session.wait()
for thread in passing:
    thread.join()
# mpirun must not hear through a cut wire that its daemon has ended.
daemon = "orted" in " ".join(words)
while daemon and os.path.exists("{folder}/cut") and os.getppid() == parent:
    time.sleep(0.2)
sys.exit(code if code >= 0 else 128 - code)
"""


def missing():
    """What keeps hosts from being made here, in one line; empty: nothing."""
    if os.geteuid():
        return "root"
    packages = {pack for name, pack in PROGRAMS.items() if not shutil.which(name, path=PATH)}
    if packages:
        return f"Debian's {', '.join(sorted(packages))} (apt-get install)"
    words = ["unshare", "--net", "--uts", "--pid", "--fork", "--mount-proc"]
    made = subprocess.run(
        [*words, "ip", "link", "add", "x", "type", "veth", "peer", "name", "y"],
        env=dict(os.environ, PATH=PATH), capture_output=True, text=True,
    )  # fmt: skip
    return f"namespaces and veth pairs ({made.stderr.strip()})" if made.returncode else ""


class Network:
    """The hosts "a" and "b", as a context manager.

    Args:
        delay: seconds that a packet takes from one host to the other.
        loss: the part of all packets that is lost. With either of the two a program carries the
            packets, because not every kernel can delay and lose them (netem).
        retries: after how many tries the kernel gives a connection up (`net.ipv4.tcp_retries2`):
            with 4 after about 10 seconds, with 15, which is its default, after 15 minutes.
    """

    def __init__(self, *, delay=0.0, loss=0.0, retries=4):
        self._warm = []
        self._retries = retries
        self._relay = [str(delay), str(loss)] if delay or loss else None
        self.folder = Path(tempfile.mkdtemp(prefix="hosts"))

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self):
        for name in ("bin", "here", *HOSTS):
            (self.folder / name).mkdir()
        lines = [f"{ADDRESS.format(i)} {host}\n" for i, host in enumerate(HOSTS, start=1)]
        (self.folder / "names").write_text("127.0.0.1 localhost\n" + "".join(lines))
        ssh = self.folder / "bin" / "ssh"
        ssh.write_text(SSH.format(folder=self.folder, path=PATH, python=sys.executable))
        ssh.chmod(0o755)
        # It ends with its standard input, and the kernel then ends all others in the namespace.
        self._all = subprocess.Popen(
            [
                "unshare",
                "--net",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "cat",
            ],
            stdin=subprocess.PIPE,
        )
        children = Path(f"/proc/{self._all.pid}/task/{self._all.pid}/children")
        self._first = _soon(lambda: children.read_text().split())[0]
        _soon(lambda: os.readlink(f"/proc/{self._first}/exe").endswith("cat"))
        for host in HOSTS:
            words = ["unshare", "--net", "--uts", "--mount", "sh", "-c", HOST, host, self.folder]
            subprocess.Popen(self._within(*words))
        pids = [
            _soon((self.folder / f"{host}.pid").read_text).strip() for host in HOSTS
        ]  # fmt: skip
        if self._relay:
            command = self._within(sys.executable, RELAY, *self._relay)
            relay = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert relay.stdout.readline() == "ready\n", "the relay does not start"
            for port, pid in zip(("port0", "port1"), pids, strict=True):
                self._run("ip", "link", "set", port, "netns", pid, "name", "eth0")
        else:
            ends = ["eth0", "netns", pids[0], "type", "veth", "peer", "eth0", "netns", pids[1]]
            self._run("ip", "link", "add", *ends)
        for i, host in enumerate(HOSTS, start=1):
            self.check(host, "sysctl", "-q", "-w", f"net.ipv4.tcp_retries2={self._retries}")
            self.check(host, "ip", "address", "add", f"{ADDRESS.format(i)}/24", "dev", "eth0")
            self.check(host, "ip", "link", "set", "eth0", "up")

    def __exit__(self, *_):
        if hasattr(self, "_all"):
            for server in self._warm:
                server.stdin.close()
            self._all.stdin.close()
            self._all.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def alive(self):
        """Whether nothing has been killed."""
        return all(server.poll() is None for server in [self._all, *self._warm])

    def warm(self, limit=300):
        """What stands for `python` on both hosts, to have programs forked; see tests/warm.py."""
        socket, words = self.folder / "here" / "socket", [sys.executable, WARM]
        if not self._warm:
            environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
            for host in HOSTS:
                command, pipe = self.on(host, *words, "serve", socket), subprocess.PIPE
                self._warm.append(
                    subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
                )
            for server in self._warm:
                ready = select.select([server.stdout], [], [], limit)[0]
                assert ready and server.stdout.readline() == b"ready\n", "no warm process"
        return [sys.executable, "-I", "-S", str(WARM), "run", str(socket)]

    @property
    def path(self):
        """PATH for what runs on a host."""
        return f"{self.folder}/bin{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{PATH}"

    def on(self, host, *words):
        """The command that runs another command on a host, in the folder of the caller."""
        enter = f"nsenter --target $(cat {self.folder}/{host}.pid) --net --uts --mount"
        script = f'exec {enter} -- sh -c \'cd "$0" && exec "$@"\' "$@"'
        return self._within("sh", "-c", script, "sh", os.getcwd(), *words)

    def check(self, host, *words):
        """Runs a command on a host; its output. AssertionError where it fails."""
        return self._checked(self.on(host, *words))

    def cut(self, host=HOSTS[1]):
        """Takes the wire out of a host."""
        (self.folder / "cut").touch()
        self.check(host, "ip", "link", "set", "eth0", "down")

    def mend(self):
        """Puts the wire back."""
        (self.folder / "cut").unlink(missing_ok=True)
        for host in HOSTS:
            self.check(host, "ip", "link", "set", "eth0", "up")

    def processes(self, host):
        """Numbers of all processes on a host, as the caller sees them, by their command lines."""
        found = {}
        keeper = self._keeper(host)
        network = os.readlink(f"/proc/{keeper}/ns/net")
        for number in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{number}/ns/net") == network and number != keeper:
                    words = Path(f"/proc/{number}/cmdline").read_bytes()
                    found[int(number)] = words.replace(b"\0", b" ").decode()
        return found

    def kill(self, host):
        """Ends all processes of a host. Its kernel closes their connections: else `cut` first."""
        while processes := self.processes(host):
            for number in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)

    def _keeper(self, host):
        """The process that keeps a host, by its number outside."""
        inside = (self.folder / f"{host}.pid").read_text().strip()
        for number in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                same = os.readlink(f"/proc/{number}/ns/pid") == self._processes_namespace
                status = Path(f"/proc/{number}/status").read_text() if same else ""
                if f"\nNSpid:\t{number}\t{inside}\n" in status:
                    return number
        raise AssertionError(f"there is no host {host}")

    @property
    def _processes_namespace(self):
        return os.readlink(f"/proc/{self._first}/ns/pid")

    def _within(self, *words):
        enter = ["nsenter", "--target", self._first, "--net", "--mount", "--pid", "--"]
        return [*enter, *map(str, words)]

    def _run(self, *words):
        return self._checked(self._within(*words))

    def _checked(self, command):
        done = subprocess.run(
            command, env=dict(os.environ, PATH=PATH), capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout


def _soon(ask, limit=20):
    """What `ask` returns once it is neither empty nor an OSError."""
    end = time.monotonic() + limit
    while True:
        with contextlib.suppress(OSError):
            if found := ask():
                return found
        assert time.monotonic() < end, "the hosts do not start"
        time.sleep(0.01)
