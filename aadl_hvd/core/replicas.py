"""Whether all ranks hold the same weights, and what is done where they do not."""

from __future__ import annotations

import inspect
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from aadl_hvd import kernels
from aadl_hvd.config import AndersonConfig
from aadl_hvd.core.captures import Captures, none, where
from aadl_hvd.core.collectives import Collectives
from aadl_hvd.core.fixed_point import FixedPoint, work_dtype
from aadl_hvd.core.reduction import COMPARED, compared, equal, numbers_of
from aadl_hvd.core.solve import Vector
from aadl_hvd.errors import ReplicaMismatchError

# Numbers that are read at a time: little memory, and few kernels (n is tens of millions).
CHUNK = 2**17
CHUNK_GPU = 2**22
PRIME = 2**36 - 5  # two halves of 18 bits, whose squares sum up exactly over 2^16 ranks

# Rows [lo, hi) of the flat vector into memory [hi - lo], as `FixedPoint.read`.
Read = Callable[[int, int, Tensor], Tensor]


class Replicas:
    """Compares the weights of all ranks by a checksum, as a `reduction.Payload`.

    Args:
        config: settings.
        collectives: of the ranks that train together.

    Attributes:
        equal: whether the last comparison found the same weights on all ranks.
        use_kernels: whether all ranks can use `kernels`, and do.
        stepped_apart: whether this rank's base optimizer has stepped by itself. Ranks that have
            get weights and state of those that have not.
    """

    part = "replicas"

    def __init__(self, config: AndersonConfig, collectives: Collectives) -> None:
        self._config, self._collectives = config, collectives
        self.equal = self.use_kernels = self.stepped_apart = False
        self._captures = none()
        self._were_equal = False  # whether all ranks have ever held the same weights
        self._warned = False
        self._checksum: kernels.Checksum | None = None
        self._problem: FixedPoint
        self._own = 0
        self._share: Vector | float = 1.0

    def of(self, problem: FixedPoint, captures: Captures) -> Replicas:
        """Compares the current weights of `problem` in the next reduction.

        Args:
            problem: whose weights are compared.
            captures: runs the work on them.
        """
        self._problem, self._captures = problem, captures
        return self

    def pending(self) -> list[Tensor]:
        """Checksums: of this rank's weights, and of replicated ones beside sharded; int64 []."""
        return self._checksums(self._problem)

    def pack(self, numbers: list[Vector]) -> Vector:
        """[COMPARED] numbers to be summed over ranks."""
        self._own = int(numbers[0][0])
        found = compared(self._own) * self._share
        if len(numbers) > 1:
            # With sharded weights the second half is free. These sum up to 0 over all ranks.
            share = self._collectives.size - 1.0 if self._collectives.rank == 0 else -1.0
            found[COMPARED // 2 :] = share * compared(int(numbers[1][0]))[: COMPARED // 2]
        return found

    def unpack(self, sums: Vector, size: int) -> None:
        """Takes in their sums."""
        del self._problem  # between steps nothing here keeps the model alive
        self.equal = equal(sums, size)
        if self.equal:
            self._were_equal, self.stepped_apart = True, False

    def compare(self, problem: FixedPoint) -> bool:
        """Whether all ranks hold the same weights now. Collective."""
        sums = self._collectives.agree(self.pack(numbers_of(self._checksums(problem))))
        same = equal(sums, self._collectives.size)
        self._were_equal |= same
        return same

    def agree(self, problem: FixedPoint, fingerprint: int) -> bool:
        """Whether all ranks wait to take in the same history; also sets `use_kernels`. Collective.

        Args:
            problem: what is accelerated.
            fingerprint: of the pending history of this rank, 0 for none.
        """
        # Checksums are those of the memory, which lies on all ranks alike or is read in order.
        # One number has no stride. Where a rank has no part of it (FSDP2), it has a vector of none.
        strides = [t.stride() or (1,) for t in problem.tensors]
        layout = zlib.crc32(repr(strides).encode())
        work = work_dtype(problem)
        able = kernels.usable(problem.device, work, self._config.history_dtype or work)
        sums = self._collectives.agree(
            np.concatenate([compared(fingerprint), compared(layout), [able]])
        )
        size = self._collectives.size
        fingerprints, layouts, (able_ranks,) = np.split(sums, [COMPARED, 2 * COMPARED])
        self.use_kernels = bool(able_ranks == size and equal(layouts, size))
        return equal(fingerprints, size)

    def settle(self, problem: FixedPoint, step: int) -> None:
        """Decides what follows from different weights, the same on all ranks. Collective.

        The caller has reset the history: where warnings are errors this raises one.

        Args:
            problem: whose weights differ.
            step: its number, for messages.

        Raises:
            ReplicaMismatchError: on all ranks, if on_desync="error" and weights were equal before.
        """
        if problem.sharded:
            raise ReplicaMismatchError(
                f"Copies of the sharded weights (HSDP), or weights that fully_shard has not "
                f"sharded, differ between ranks in step {step}. Must be the same: give all the "
                "same weights before training, or go on from a checkpoint."
            )
        found = self._collectives.all_objects((self._own, self.stepped_apart, problem.config_lines))
        self.stepped_apart = False
        staying = [rank for rank, (_, apart, _) in enumerate(found) if not apart]
        if 0 < len(staying) < len(found) and len({found[rank][0] for rank in staying}) == 1:
            self._resync(problem, staying[0])
            self._were_equal = True
            return
        root, others = outliers([number for number, _, _ in found])
        named = f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
        what = f"Weights of {named} differ from those of rank {root} in step {step}"
        if self._were_equal and self._config.on_desync == "error":
            pairs = zip(found[others[0]][2], found[root][2], strict=False)
            why = "a fault of the machine, or one rank changed them by itself"
            for there, here in pairs:
                if there != here:
                    why = f"rank {others[0]} has {there}, rank {root} has {here}"
                    break
            raise ReplicaMismatchError(
                f"{what}, and were equal before: {why}. Go on from a checkpoint, or choose "
                "on_desync='resync'."
            )
        if self._were_equal:
            self._resync(problem, root)
            message = f"{what}: these ranks get weights and state of rank {root}"
            warnings.warn(message, stacklevel=_level_of_user())  # last: it may be an error
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"{what}, and were never equal: no acceleration. Call "
                "hvd.broadcast_parameters(model.state_dict(), root_rank=0) before training; "
                "DistributedDataParallel does so by itself.",
                stacklevel=_level_of_user(),
            )

    def _resync(self, problem: FixedPoint, root: int) -> None:
        """Gives all ranks the weights and the base optimizer's state of one. Collective."""
        collectives = self._collectives
        mine = collectives.rank == root
        state = problem.state_tensors()
        shapes = collectives.all_objects([tuple(tensor.shape) for tensor in state])
        if any(other != shapes[root] for other in shapes):
            raise ReplicaMismatchError(
                f"Ranks hold optimizer states of different shapes, unlike rank {root}: they cannot "
                "be made equal. Go on from a checkpoint."
            )
        # Sums with zeros: the one large message that all communicators have.
        flat = torch.zeros(problem.n, dtype=work_dtype(problem), device=problem.device)
        if mine:
            problem.read(0, problem.n, flat)
        problem.write(collectives.from_one_rank(flat))
        for tensor in state:
            values = tensor.detach().to(torch.float64).reshape(-1)
            values = collectives.from_one_rank(values if mine else torch.zeros_like(values))
            tensor.copy_(values.reshape(tensor.shape))

    def _checksums(self, problem: FixedPoint) -> list[Tensor]:
        found = [self._checksum_of(problem)]
        if whole := problem.replicated:
            dtype = work_dtype(problem)
            flat = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in whole])

            def read(lo: int, hi: int, out: Tensor) -> Tensor:
                return out.copy_(flat[lo:hi])

            found.append(checksum(read, len(flat), dtype, problem.device))
        return found

    def _checksum_of(self, problem: FixedPoint) -> Tensor:
        if self._collectives.size == 1 or (problem.sharded and self._collectives.copies == 1):
            return torch.zeros((), dtype=torch.int64, device="cpu")  # nobody has the same weights
        if problem.sharded:
            # Ranks hold different parts, some of them the same. Their numbers are not equal, but
            # these sum up to 0 over the copies of each part.
            first = self._collectives.copy == 0
            self._share = np.zeros(COMPARED)
            self._share[: COMPARED // 2] = self._collectives.copies - 1.0 if first else -1.0
        if not (self.use_kernels and kernels.usable(problem.device)):
            what = problem.read, problem.n, work_dtype(problem), problem.device
            if problem.sharded or not self._captures.used:
                return checksum(*what)
            found: Tensor = self._captures.run(
                lambda: checksum(*what), "checksum", where(*problem.tensors)
            )
            return found
        tensors = problem.tensors
        now = tuple(tensor.numel() for tensor in tensors), problem.device
        if self._checksum is None or (self._checksum.sizes, self._checksum.device) != now:
            self._checksum = kernels.Checksum(*now)
        return self._checksum.of(tensors, PRIME)


def _level_of_user() -> int:
    """The `stacklevel` with which the caller's warning points at the line that called `step`."""
    frame, level = inspect.currentframe(), 0
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.split(".")[0] not in ("aadl_hvd", "torch", "contextlib"):
            return level
        frame, level = frame.f_back, level + 1
    return 1


def checksum(read: Read, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number below 2^36 from the bits of a flat vector: int64, [], on the device.

    Any single bit that differs changes it. The weights are passed over once, without a
    synchronization.

    Args:
        read: reads rows of the vector.
        n: its length.
        dtype: to read it in: float32 or float64, no narrower than what is read.
        device: where it is.
    """
    if n == 0:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    size = min(CHUNK if device.type == "cpu" else CHUNK_GPU, n + n % 2)
    buffer = torch.empty(size, dtype=dtype, device=device)
    sums = []
    for lo in range(0, n, size):
        hi = min(lo + size, n)
        read(lo, hi, buffer[: hi - lo])
        if (hi - lo) % 2:  # two float32 make one int64
            buffer[hi - lo] = 0.0
        sums.append(buffer[: hi - lo + (hi - lo) % 2].view(torch.int64).sum())
    if len(sums) == 1:
        return sums[0].remainder(PRIME)
    # Factors are odd and differ, so that chunks that change places are noticed.
    factors = torch.arange(1, 2 * len(sums), 2, device=device)
    return (torch.stack(sums) * factors).sum().remainder(PRIME)


def outliers(checksums: Sequence[int]) -> tuple[int, list[int]]:
    """Of all ranks' checksums: a rank that holds what most do, and those that do not.

    If no checksum is the most frequent, that of the lowest rank counts.
    """
    counts = Counter(checksums)
    most = max(counts.values())
    root = next(rank for rank, found in enumerate(checksums) if counts[found] == most)
    return root, [rank for rank, found in enumerate(checksums) if found != checksums[root]]
