"""The performance figures of a machine file."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

from models.errors import UserError

FOLDER = Path("launch/machines")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the cost model knows of a machine.

    Attributes:
        name: of its file.
        gpu: name.
        gpus_per_node: g.
        gpu_memory_bytes: of one GPU.
        memory_bandwidth: of one GPU's memory, bytes/s.
        intranode_bandwidth: from one GPU to another of its node, bytes/s per direction.
        intranode_latency: of a message within a node, s.
        injection_bandwidth: from one node to the network, bytes/s per direction.
        network_latency: of a message between nodes, s.
    """

    name: str
    gpu: str
    gpus_per_node: int
    gpu_memory_bytes: float
    memory_bandwidth: float
    intranode_bandwidth: float
    intranode_latency: float
    injection_bandwidth: float
    network_latency: float


def read_machine(name: str) -> Machine:
    """Reads `[node] gpus` and `[performance]` of a machine file; other tables are others' business.

    Args:
        name: of a file in launch/machines, or the path of a TOML file.

    Raises:
        UserError: there is no such file, or a figure is missing or no positive number.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.toml"))) or "none"
        raise UserError(
            f"--machine {name}: cannot read {path} ({error.strerror}). Must be 'here', a file in "
            f"{FOLDER} ({known}), or the path of a TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--machine {name}: {path} is no TOML: {error}") from None
    performance = _table(content, "performance", path)
    figures: dict[str, Any] = {}
    for field in dataclasses.fields(Machine):
        if field.name == "name":
            continue
        key, table = field.name, performance
        if key == "gpus_per_node":
            key, table = "gpus", _table(content, "node", path)
        value = table.get(key)
        wanted = str if key == "gpu" else int if key == "gpus" else (int, float)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise UserError(f"{path}: {key} is {value!r}, the cost model needs it")
        if not isinstance(value, str) and not 0 < value < math.inf:
            raise UserError(f"{path}: {key} is {value!r}, must be positive and finite")
        figures[field.name] = value
    return Machine(name=path.stem, **figures)


def _table(content: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    table = content.get(name)
    if not isinstance(table, dict):
        raise UserError(f"{path}: no table [{name}], which the cost model needs")
    return table
