"""The figures of a machine file that the cost model needs."""

from __future__ import annotations

import dataclasses

from launch.machines import LaunchError, Performance, load_machine
from models.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine(Performance):
    """A machine's peak figures.

    Attributes:
        name: name of its file.
        gpus_per_node: g.
    """

    name: str
    gpus_per_node: int


def read_machine(name: str) -> Machine:
    """Reads a machine file, see `launch.machines.load_machine`.

    Raises:
        UserError: it cannot be read, or lacks figures that the cost model needs.
    """
    try:
        machine = load_machine(name)
    except LaunchError as error:
        raise UserError(str(error)) from None
    if machine.performance is None:
        raise UserError(f"--machine {name}: no table [performance], which the cost model needs")
    if machine.node.gpus is None:
        raise UserError(f"--machine {name}: [node] has no gpus, which the cost model needs")
    figures = dataclasses.asdict(machine.performance)
    return Machine(name=machine.name, gpus_per_node=machine.node.gpus, **figures)
