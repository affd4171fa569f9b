"""Programs forked from one process that has imported torch, Horovod and this project before.

Importing them takes each rank 3 to 6 seconds of a core, which is most of the time of a short test.

`python tests/warm.py serve SOCKET` imports and then waits; it ends with its standard input.
`python tests/warm.py run SOCKET [-m MODULE | -c CODE | FILE] ARGUMENTS` stands for `python [...]`,
under a launcher as well: it hands its environment, folder, cores and streams to a fork of the
first process. It passes signals on, and ends as the fork has ended. This half imports little.

What a fork cannot show: imports themselves, OMP_NUM_THREADS other than 1 in libraries that read it
when they are loaded, and an order of sets that differs between ranks (forks share one hash seed).
"""

import contextlib
import json
import os
import signal
import socket
import struct
import sys

WARM = ("horovod.torch", "horovod.runner.launch", "models.train", "aadl_hvd.elastic", "psutil")
FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCONT")
HEAD = struct.Struct("!Q")  # length of a request, in bytes
WORD = struct.Struct("!i")  # the fork's process id; at its end what waitpid says


def run(path, words):
    """Asks the server for a fork; does not return."""
    request = {
        "words": words,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "cores": sorted(os.sched_getaffinity(0)),
    }
    data = json.dumps(request).encode()
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    socket.send_fds(server, [HEAD.pack(len(data))], [0, 1, 2])
    server.sendall(data)
    pid = receive(server)

    def forward(number, frame):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    for name in FORWARDED:
        signal.signal(getattr(signal, name), forward)
    status = receive(server)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def receive(server):
    data = server.recv(WORD.size, socket.MSG_WAITALL)
    if len(data) < WORD.size:
        sys.exit("the warm process has ended")
    return WORD.unpack(data)[0]


def serve(path):
    """Serves requests. Returns in each fork, with the words of its program."""
    import importlib
    import selectors

    import numpy as np
    import torch

    for name in WARM:
        importlib.import_module(name)
    torch.set_num_threads(1)
    assert "mpi4py.MPI" not in sys.modules, "it joins the MPI of whoever loads it"
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    wait = selectors.DefaultSelector()
    wait.register(listener, selectors.EVENT_READ)
    wait.register(0, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in wait.select():
            if key.fileobj is listener:
                client, _ = listener.accept()
                head, streams, _, _ = socket.recv_fds(client, HEAD.size, 3)
                size = HEAD.unpack(head)[0]
                request = json.loads(client.recv(size, socket.MSG_WAITALL))
                pid = os.fork()
                if pid == 0:
                    wait.close()
                    listener.close()
                    client.close()
                    become(request, streams)
                    np.random.seed()
                    return request["words"]
                for stream in streams:
                    os.close(stream)
                ended = os.pidfd_open(pid)
                wait.register(ended, selectors.EVENT_READ, (pid, client))
                wait.register(client, selectors.EVENT_READ, (pid, None))
                with contextlib.suppress(OSError):
                    client.sendall(WORD.pack(pid))
            elif key.fileobj == 0:
                for other in list(wait.get_map().values()):
                    if other.data:
                        kill(other.data[0])
                sys.exit(0)
            elif key.data[1] is None:  # whoever asked is gone
                if key.fileobj.fileno() < 0:  # and the fork has ended at the same moment
                    continue
                kill(key.data[0])
                wait.unregister(key.fileobj)
            else:
                pid, client = key.data
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError):
                    client.sendall(WORD.pack(status))
                wait.unregister(key.fileobj)
                os.close(key.fileobj)
                with contextlib.suppress(KeyError):
                    wait.unregister(client)
                client.close()


def kill(pid):
    """Ends a fork and what it has started, unless that has a process group of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def become(request, streams):
    """Takes over all that a program inherits from who starts it."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.sched_setaffinity(0, request["cores"])
    # The old ones know the kind of file that the server's were.
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = open(  # noqa: SIM115
            number,
            "w" if number else "r",
            buffering=1 if name == "stderr" else -1,
            encoding=encoding or "utf-8",
            errors="backslashreplace" if name == "stderr" else errors or "strict",
            closefd=False,
        )
        if number and os.environ.get("PYTHONUNBUFFERED"):
            stream.reconfigure(write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def execute(words):
    """What `python WORDS` does."""
    import runpy

    kind, *rest = words
    if kind == "-m":
        sys.argv = rest
        sys.path[0] = os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[0] = ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path[0] = os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    what, path, *words = sys.argv[1:]
    if what == "run":
        run(path, words)
    execute(serve(path))
