"""The direction of imports inside the package, read from the source with ast."""

import ast
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_PACKAGED = {"tests", "benchmarks", "examples", "docs", "build", "dist", "demo"}
MAX_LINES = 600

# Modules that every room but models may use, and that use only each other.
SHARED = (
    "entries",
    "errors",
    "heap",
    "products",
    "randomness",
    "records",
    "representation",
    "structure",
    "vision_compat",
)
# Which modules of the package a room may import; a room that is not listed may import anything but tools.
ALLOWED = {
    **dict.fromkeys(SHARED, SHARED),
    "runtime": ("runtime", *SHARED),
    "partitioner": ("partitioner", "runtime.instructions", "runtime.schedules", "runtime.program", *SHARED),
    "models": ("models", "errors", "vision_compat"),
}
# A plan is made without processes, so that it can be made for a cluster that is not there.
FORBIDDEN_OUTSIDE = {"partitioner": ("torch.distributed", "torch.multiprocessing", "subprocess", "multiprocessing")}
# cloudpickle: the registry marks a model that was loaded from a file, so that workers get it by value.
ALLOWED_OUTSIDE = {"models": ("torch", "torchvision", "timm", "transformers", "sklearn", "numpy", "cloudpickle")}


@dataclass(frozen=True)
class Import:
    """One import: ``target`` is a module of the package without ``stagecut.`` when ``inside``, else a dotted name."""

    source: str
    target: str
    inside: bool
    line: int


def package_modules(root):
    """Map each module's dotted name below the package (the package itself is ``""``) to its file."""
    modules = {}
    for folder, below, files in os.walk(root):
        parts = Path(folder).relative_to(root).parts
        below[:] = [name for name in below if not name.startswith(".") and name != "__pycache__"]
        below[:] = [name for name in below if not (Path(folder) / name / "pyvenv.cfg").exists()]
        if not parts:
            below[:] = [name for name in below if name not in NOT_PACKAGED]
        for name in files:
            if name.endswith(".py"):
                stem = () if name == "__init__.py" else (name.removesuffix(".py"),)
                modules[".".join((*parts, *stem))] = Path(folder) / name
    return modules


def is_below(name, prefix):
    return name == prefix or name.startswith(f"{prefix}.")


def runtime_nodes(tree):
    """Walk a syntax tree without what stands under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from runtime_nodes(other)
            continue
        yield node
        yield from runtime_nodes(node)


def inside_targets(node, source, is_package, modules):
    """Give the modules that a relative ``from`` import runs, beside the packages that the importer itself is in."""
    base = source.split(".") if source else []
    up = node.level - 1 if is_package else node.level
    base = base[: len(base) - up] + (node.module.split(".") if node.module else [])
    place = ".".join(base)
    names = [f"{place}.{alias.name}".lstrip(".") for alias in node.names]
    targets = {name if name in modules else place for name in names}
    for target in list(targets):
        parts = target.split(".")
        targets |= {".".join(parts[:end]) for end in range(1, len(parts))}
    # A module's own packages are imported before it; only naming something that their __init__ defines depends on them.
    own = {".".join(source.split(".")[:end]) for end in range(len(source.split(".")) + 1)}
    return {target for target in targets if target not in own or (target == place and set(names) - set(modules))}


def outside_targets(node):
    """Give the dotted names that a node takes from other packages, attribute access on torch included."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        return {f"torch.{node.attr}"}
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        return {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return set()


def imports_of(root):
    modules = package_modules(root)
    found = []
    for source, path in modules.items():
        for node in runtime_nodes(ast.parse(path.read_text(), str(path))):
            inside = isinstance(node, ast.ImportFrom) and node.level > 0
            is_package = path.name == "__init__.py"
            targets = inside_targets(node, source, is_package, modules) if inside else outside_targets(node)
            found += [Import(source, target, inside, node.lineno) for target in sorted(targets) if target != source]
    return found


def wrong_directions(root):
    wrong = []
    for item in imports_of(root):
        room = item.source.split(".")[0]
        if item.inside:
            allowed = ALLOWED.get(room)
            # `from ..runtime import schedules` also runs runtime/__init__.py, which is therefore kept free of imports.
            parent = allowed is not None and any(is_below(other, item.target) for other in allowed)
            permitted = allowed is None or parent or any(is_below(item.target, other) for other in allowed)
            bad = not permitted or (is_below(item.target, "tools") and room != "tools")
        else:
            bad = is_below(item.target, "stagecut")
            bad |= any(is_below(item.target, other) for other in FORBIDDEN_OUTSIDE.get(room, ()))
            top = item.target.split(".")[0]
            bad |= room in ALLOWED_OUTSIDE and top not in (*ALLOWED_OUTSIDE[room], *sys.stdlib_module_names)
        if bad:
            wrong.append(f"{item.source or '__init__'}:{item.line} imports {item.target or 'the package itself'}")
    return wrong


def cycles(root):
    graph = nx.DiGraph((item.source, item.target) for item in imports_of(root) if item.inside)
    return [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


def long_files(root):
    lengths = {name: len(path.read_text().splitlines()) for name, path in package_modules(root).items()}
    return [f"{name} has {length} lines" for name, length in lengths.items() if length > MAX_LINES]


def test_imports_run_in_the_direction_of_the_design():
    assert wrong_directions(ROOT) == []


def test_the_package_of_the_runtime_imports_nothing_that_the_partitioner_may_not():
    reached = {item.target for item in imports_of(ROOT) if item.source == "runtime" and item.inside}
    assert [name for name in reached if not any(is_below(name, other) for other in ALLOWED["partitioner"])] == []


def test_no_modules_import_each_other_in_a_cycle():
    assert cycles(ROOT) == []


def test_no_file_is_longer_than_a_room():
    assert long_files(ROOT) == []


@pytest.fixture
def tree(tmp_path):
    for folder in ("runtime/schedules", "partitioner", "models", "tools", "tests"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("", "runtime/", "runtime/schedules/", "partitioner/", "models/", "tools/"):
        (tmp_path / file / "__init__.py").touch()
    for file in ("errors", "api", "runtime/worker", "runtime/instructions", "partitioner/cut", "models/mlp"):
        (tmp_path / f"{file}.py").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("file", "line", "target"),
    [
        ("runtime/worker.py", "from ..partitioner.cut import cut", "partitioner.cut"),
        ("runtime/worker.py", "from ..partitioner import cut", "partitioner.cut"),
        ("runtime/schedules/__init__.py", "from ... import api", "api"),
        ("runtime/worker.py", "def run():\n    from .. import models", "models"),
        ("partitioner/cut.py", "from ..runtime import worker", "runtime.worker"),
        ("partitioner/cut.py", "from ..runtime.worker import run", "runtime.worker"),
        ("partitioner/cut.py", "import torch.distributed as dist", "torch.distributed"),
        ("partitioner/cut.py", "from torch import distributed", "torch.distributed"),
        ("partitioner/cut.py", "import torch\ntorch.distributed.barrier()", "torch.distributed"),
        ("partitioner/cut.py", "from subprocess import run", "subprocess"),
        ("partitioner/cut.py", "import concurrent, multiprocessing.pool", "multiprocessing.pool"),
        ("models/mlp.py", "from ..runtime import instructions", "runtime.instructions"),
        ("models/mlp.py", "import scipy.sparse", "scipy.sparse"),
        ("models/mlp.py", "import importlib\nimportlib.import_module('rich')", "rich"),
        ("errors.py", "from .models import mlp", "models.mlp"),
        ("api.py", "from .tools import viewer", "tools"),
        ("api.py", "import stagecut.errors", "stagecut.errors"),
        ("api.py", "from stagecut import errors", "stagecut.errors"),
        ("models/mlp.py", "from .. import __version__", "the package itself"),
    ],
)
def test_a_planted_wrong_import_is_found(tree, file, line, target):
    (tree / file).write_text(f"{line}\n")
    assert any(found.endswith(f" imports {target}") for found in wrong_directions(tree))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("partitioner/cut.py", "from ..runtime.schedules import one\nfrom ..runtime import instructions\nimport torch"),
        ("partitioner/cut.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..runtime import worker"),
        ("runtime/worker.py", "from .instructions import Send\nfrom ..errors import StageError\nimport subprocess"),
        ("models/mlp.py", "from ..errors import StagecutError\nfrom torch import nn\nimport sys, numpy"),
        ("api.py", "from .partitioner import cut\nfrom .runtime import worker\nimport torch.distributed"),
        ("tools/viewer.py", "from .. import api\nfrom . import other\nfrom ..runtime.worker import run"),
        ("tests/test_api.py", "import stagecut"),
    ],
)
def test_a_permitted_import_is_left_alone(tree, file, line):
    (tree / file).write_text(f"{line}\n")
    assert wrong_directions(tree) == []
    assert cycles(tree) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from .cut import one", "from .plan import two"),
        ("from . import cut", "def later():\n    from . import plan"),
        ("from . import cut", "from . import value_of_the_package"),
    ],
)
def test_a_planted_cycle_is_found(tree, first, second):
    (tree / "partitioner/__init__.py").write_text("from . import plan\n")
    (tree / "partitioner/plan.py").write_text(f"{first}\n")
    (tree / "partitioner/cut.py").write_text(f"{second}\n")
    (group,) = cycles(tree)
    assert {"partitioner.cut", "partitioner.plan"} <= set(group)


def test_a_planted_long_file_is_found(tree):
    (tree / "api.py").write_text("x = 1\n" * (MAX_LINES + 1))
    assert long_files(tree) == ["api has 601 lines"]
