"""Trains a residual network on a folder of images: ``python -m models.train --help``.

Runs on one rank by itself, and on several under horovodrun, mpirun, srun or jsrun.

A signal (SIGTERM, SIGUSR1 or SIGUSR2) to any rank stops all ranks. They finish the interval of
`--log-every` steps, write a checkpoint and exit with code 75. `--resume auto` resumes from it.
"""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Sequence

from aadl_hvd import HorovodMissingError
from models.command_line import parse
from models.errors import UserError
from models.preemption import EXIT_CODE
from models.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        arguments: The command line without the program's name; None takes this process's.

    Returns:
        Exit code, the same on all ranks: 0; 2 for wrong input; 75 if it was asked to stop and wrote
        a checkpoint. Under a launcher it is 1 for any other error, which is printed.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments):
        try:
            parse(arguments)
        except UserError as error:  # an option before it is wrong
            _complain(f"error: {error}")
            return 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # File names may be invalid text, and printing them must not fail.
            stream.reconfigure(errors="backslashreplace")
    try:
        import models.horovod  # noqa: F401 - the modules below need it
    except HorovodMissingError as error:
        _complain(f"error: {error}")
        return 2
    return _on_ranks(arguments)


def _on_ranks(arguments: Sequence[str]) -> int:
    """Runs the program on every rank; see `main`. Horovod must be installed."""
    from horovod.common.exceptions import HorovodInternalError

    from models.dist import launcher, on_rank0, start
    from models.horovod import hvd
    from models.training import run

    start()
    rank, started_by = hvd.rank(), launcher()
    settings: Settings | None = None
    try:
        try:
            settings = on_rank0(lambda: parse(arguments))
            code = 0 if run(settings) else EXIT_CODE
        except UserError as error:  # the same on every rank; one prints it
            text = str(error) if settings is None else settings.as_typed(str(error))
            if rank == 0:
                _complain(f"error: {text}")
            code = 2
        if code:
            if rank == 0 and started_by is not None:
                _complain(f"(the program ends with exit code {code}; the rest is {started_by}'s)")
            hvd.barrier()  # launchers end all ranks as soon as the first one fails
        return code
    except Exception as error:
        if started_by is None:
            raise
        # Now, not at the end of the process: by then the other ranks have failed, too.
        traceback.print_exc()
        why = "of this error"
        if isinstance(error, HorovodInternalError):
            why = "Horovod lost another rank, whose own error is the cause"
        _complain(
            f"rank {rank} ends because {why}; what follows is said by {started_by}, and by "
            "other ranks for the same reason"
        )
        return 1
    finally:
        hvd.shutdown()


def _complain(text: str) -> None:
    # In one write: a launcher puts its tag between text and end of line otherwise.
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
