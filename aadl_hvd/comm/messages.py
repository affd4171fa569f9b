"""What messages on an MPI communicator carry besides their numbers: a tag and a header.

The header says which operation a message belongs to. Ranks that are in different operations see
it at once. Without headers they would add up numbers that have nothing to do with each other.
"""

from __future__ import annotations

import enum
from typing import NoReturn

from aadl_hvd.comm.base import ADVICE
from aadl_hvd.errors import CommunicationError


class Tag(enum.IntEnum):
    """MPI's tags: what kind of message it is."""

    VALUES = 1
    """A header and float64 numbers (`tree`)."""
    LEFT = 2
    """The sender has left, and why: text (`departures`)."""
    QUESTION = 3
    """The sender has waited for a while, and where: two numbers (`departures`)."""
    JOIN = 4
    """The sender has called hvd.join(), and how often: one number (`departures`)."""
    ROWS = 5
    """Rows of a large block, without a header (`mpi`)."""


KINDS = ("sum", "maximum", "broadcast", "gathering")

# A header is one float64 number: `kind_and_length(...) + number * PER_OPERATION`, in which `number`
# counts the operations of this rank from 1. All headers below 2**53 are exact.
_PER_KIND = 2**24
PER_OPERATION = 4.0 * _PER_KIND

NO_OPERATION = 0.0
"""In place of a header: no operation, as before the first one and in a wait for gradients."""


def kind_and_length(kind: str, length: int) -> float:
    """The part of the header that is the same for all operations of one kind and length."""
    return float(KINDS.index(kind) * _PER_KIND + length)


def operation_number(header: float) -> int:
    """How many operations the rank had entered, this one included; 0 for `NO_OPERATION`."""
    return int(header // PER_OPERATION)


def in_words(header: float) -> str:
    """The operation of a header, for an error message."""
    number, rest = divmod(int(header), int(PER_OPERATION))
    kind, length = divmod(rest, _PER_KIND)
    return f"its operation {number}, a {KINDS[kind]} of {length} numbers"


def refuse(rank: int, there: float, this_rank: int, here: float) -> NoReturn:
    """Raises `CommunicationError`: `rank` is in operation `there`, `this_rank` in `here`."""
    raise CommunicationError(
        f"Rank {rank} is in {in_words(there)}. This rank, {this_rank}, is in {in_words(here)}. "
        f"{ADVICE}"
    )
