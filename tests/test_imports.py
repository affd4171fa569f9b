"""The rules of which module may import which, read from the source; and what works without MPI."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import aadl_hvd

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "aadl_hvd"

# From the bottom: a module imports from its own package and from packages below it. No circle.
PACKAGES = [
    {"errors"},
    {"config", "schema", "kernels", "comm"},
    {"stats", "core.sharding"},
    {"checkpoint"},
    {"core"},
    {"optim"},
    {"engines"},
    {"elastic"},
    {"__init__"},
]
LONGEST = 400, 600  # lines of a file of the library, of any other
MAY_IMPORT = {
    "horovod": {
        "comm.horovod",
        "comm.horovod_groups",
        "engines.distributed",  # types alone
        "engines.horovod",
        "engines.horovod_elastic",
        "engines.horovod_engine",
    },
    "mpi4py": {"comm.mpi", "comm.tree", "comm.departures"},
}
# They import Horovod when they are imported: others may import them only when they need them.
WITH_HOROVOD = {
    "comm.horovod",
    "comm.horovod_groups",
    "engines.horovod_elastic",
    "engines.horovod_engine",
}


# They measure parts of the library that no user meets alone.
FROM_INSIDE = {
    "benchmarks/gpu/__main__.py": {"aadl_hvd.kernels"},
    "benchmarks/gpu/one_rank.py": {
        "aadl_hvd.comm.base",
        "aadl_hvd.core.accelerator",
        "aadl_hvd.core.chunking",
        "aadl_hvd.core.gram",
        "aadl_hvd.core.replicas",
        "aadl_hvd.core.state",
        "aadl_hvd.kernels",
        "aadl_hvd.optim.gradient_samples",
        "aadl_hvd.optim.problem",
        "aadl_hvd.stats",
    },
    "benchmarks/host.py": {"aadl_hvd.comm.base", "aadl_hvd.comm.local", "aadl_hvd.optim.local"},
    "benchmarks/latency.py": {"aadl_hvd.comm.horovod"},
    "benchmarks/launches.py": {"aadl_hvd.optim.gradient_samples"},
    # The options of the training program come from the fields of AndersonConfig.
    "models/anderson_options.py": {"aadl_hvd.config"},
    "models/options.py": {"aadl_hvd.config"},
}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports(path):
    """(module, names, whether it is executed when the file is imported) of every import."""
    found = []

    def visit(node, at_import):
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                inside = True
            if isinstance(child, ast.Import):
                found.extend((alias.name, [], at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                found.append((child.module, [alias.name for alias in child.names], at_import))
            visit(child, at_import and not inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def own_imports(path):
    """Modules of the package that a file imports: "comm.base", "config", ..."""
    known = {module_name(other) for other in PACKAGE.rglob("*.py")}
    for module, names, _ in imports(path):
        if module.split(".")[0] != "aadl_hvd":
            continue
        inner = module.removeprefix("aadl_hvd").lstrip(".")
        joined = [f"{inner}.{name}".lstrip(".") for name in names]
        yield from [name for name in joined if name in known] or [inner or "__init__"]


LIBRARY = sorted(PACKAGE.rglob("*.py"))
FOLDERS = "models", "benchmarks", "examples"
PROGRAMS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_something_is_looked_at():
    assert {"core.accelerator", "comm.horovod"} <= {module_name(path) for path in LIBRARY}
    assert PROGRAMS
    assert {"core.acceptance", "stats"} <= set(own_imports(PACKAGE / "core" / "accelerator.py"))
    assert "process_sets._basics" in set(of_other_objects(PACKAGE / "comm" / "horovod_groups.py"))
    assert ("horovod.torch", [], True) in imports(PACKAGE / "comm" / "horovod.py")


def height(name):
    """Of the package that a module belongs to, counted from the bottom."""
    known = [i for i, packages in enumerate(PACKAGES) if {name, name.split(".")[0]} & packages]
    assert known, f"{name} is in no package: say in this test where it belongs"
    return known[0]


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_imports_go_downwards(path):
    name = module_name(path)
    top = name.split(".")[0]
    above = {
        other
        for other in own_imports(path)
        if height(other) >= height(name) and other.split(".")[0] != top
    }
    assert not above, f"{name} imports {sorted(above)}"
    if name == "core.sharding":  # below checkpoint, which is below core
        assert set(own_imports(path)) <= {"errors"}


def test_no_circle():
    needs = {module_name(path): set(own_imports(path)) - {module_name(path)} for path in LIBRARY}
    assert tuple(graphlib.TopologicalSorter(needs).static_order())  # raises CycleError


def of_other_objects(path):
    """Private attributes that a file reads or writes on anything but `self`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            yield from [] if ast.unparse(node.value) in ("self", "super()") else [ast.unparse(node)]


@pytest.mark.parametrize(
    "path", [path for path in LIBRARY if {"comm", "core"} & {*path.parts}], ids=module_name
)
def test_private_attributes_are_used_by_their_owner(path):
    # Horovod has no public way to find existing process sets.
    of_horovod = "process_sets._basics", "process_sets._basics._get_process_set_ids_and_ranks"
    # Nor has torch one to read the timeout of a process group.
    backend = "group._get_backend", "group._get_backend(torch.device(device)).options._timeout"
    of_torch = {"torch._foreach_copy_", *backend}
    assert set(of_other_objects(path)) <= {*of_horovod, *of_torch}


TRACKED = [
    path
    for folder in ("aadl_hvd", "models", "launch", "benchmarks", "examples", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def test_no_file_is_long():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in TRACKED}
    too_long = {
        str(path.relative_to(ROOT)): n
        for path, n in lines.items()
        if n > LONGEST[PACKAGE not in path.parents]
    }
    assert not too_long


def test_the_algorithm_is_on_one_page():
    path = PACKAGE / "core" / "accelerator.py"
    text = path.read_text(encoding="utf-8")
    methods = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
    }
    assert len(text.splitlines()) <= 350 and max(methods.values()) <= 80, methods


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_horovod_and_mpi_stay_behind_their_adapters(path):
    name = module_name(path)
    for module, names, at_import in imports(path):
        top = module.split(".")[0]
        if top in MAY_IMPORT:
            assert name in MAY_IMPORT[top], f"{name} imports {module}"
            assert not at_import or name in WITH_HOROVOD, f"{name}: at import"
        full_names = {module, *(f"{module}.{name}" for name in names)}
        imported = {full_name.removeprefix("aadl_hvd.") for full_name in full_names}
        if at_import and imported & WITH_HOROVOD:
            allowed = name in WITH_HOROVOD or name == "elastic"
            assert allowed, f"{name} imports {module}, and with it horovod, at import"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_programs_use_public_names(path):
    inside = FROM_INSIDE.get(path.relative_to(ROOT).as_posix(), set())
    for module, names, _ in imports(path):
        if module == "aadl_hvd.elastic":  # no part of aadl_hvd's own names: it imports Horovod
            assert set(names) <= {"TorchState"}, f"{path}: {names}"
        elif module.split(".")[0] == "aadl_hvd" and module not in inside:
            assert module == "aadl_hvd", f"{path}: {module}"
            assert set(names) <= set(aadl_hvd.__all__), f"{path}: {names}"
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):  # import aadl_hvd; aadl_hvd.x
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            public = node.value.id != "aadl_hvd" or node.attr in aadl_hvd.__all__
            assert public, f"{path}: {ast.unparse(node)}"


def test_public_names_exist():
    assert sorted(aadl_hvd.__all__) == list(aadl_hvd.__all__)
    assert all(hasattr(aadl_hvd, name) for name in aadl_hvd.__all__)


def test_without_horovod_and_mpi():
    """Both made unimportable, in a process of its own."""
    program = """
import sys
sys.modules["horovod"] = sys.modules["horovod.torch"] = sys.modules["mpi4py"] = None
import torch, aadl_hvd
model = torch.nn.Linear(4, 2)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
opt = aadl_hvd.AndersonOptimizer(opt, anderson=aadl_hvd.AndersonConfig(noise_gate=None))
for _ in range(6):
    opt.zero_grad()
    model(torch.ones(3, 4)).square().sum().backward()
    opt.step()
assert opt.anderson.stats.stored == 6 and opt.anderson.stats.accelerated > 0
try:
    aadl_hvd.DistributedAndersonOptimizer(opt)
except ImportError:
    print("fine")
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == "fine", run.stderr
    assert run.returncode == 0
