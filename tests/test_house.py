"""The structure: rooms in one order, arrows down it alone, nothing loose, nothing heavy at import, and no public name lost."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import exitkit

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "exitkit"
ROOMS = """common models surgery exits methods multi_exit training evaluation analysis calibration engine packages rl
    report retrofitting reproduction serving cli integrations""".split()
"""A room imports from those before it."""

KEPT = {("evaluation", "calibration")}
"""Not an arrow of the code's: names that were in ``exitkit.evaluation`` in version 0.1 are found there still."""

HEAVY = (
    "matplotlib",
    "scipy",
    "accelerate",
    "huggingface_hub",
    "triton",
    "sklearn",
    "torchvision",
    "timm",
    "transformers",
    "onnx",
    "rich",
    "lightning",
    "gymnasium",
    "stable_baselines3",
    "ray",
    "starlette",
    "pyarrow",
)

NAMES = {
    "exitkit": """GPF PBEE SDN ZTW BranchyNet Engine ExitOutputs ExitkitError ImagePreprocessing Method MultiExitModel
        MultiExitOutput Prediction TextPreprocessing Trainer attach choose_threshold collect compile detach evaluation export
        inspect load models time_exits training""",
    "exitkit.evaluation": """BudgetPoint BudgetTable ChosenThreshold Curve ExitChoice ExitOutputs ExitTimes Interval
        Overthinking PairedTest PairedTests PerExitThresholds RegressionOutputs Reliability ShiftMonitor ShiftReport
        ThresholdPath bootstrap calibration_error choose_threshold collect content_hashes exit_rates_by_class
        exits_that_do_not_pay fit_temperatures head_macs overthinking paired_tests per_exit_thresholds plot_curves
        plot_hindsight reliability threshold_path""",
    "exitkit.training": "Distillation Epoch Loss Phase Trainer fit_ensemble",
    "exitkit.models": "cifar_resnet msdnet",
    "exitkit.exits": """AdditiveEnsemble CascadeLink GeometricEnsemble HeadOutput InternalClassifier MeanEnsemble PastFuture
        PastFutureClassifier SDNPool StandardisedLinear TokenPool""",
    "exitkit.report": """Calibrated Check Result Run Sample Stage calibrated read_comparison read_run stages_of write_report
        write_samples write_thresholds""",
}
"""Public names of version 0.1, but for ``ScaledThreshold``: a policy carries its temperatures."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The package's modules that a file imports, inside of functions too, but not for type checkers alone."""

    def walk(node: ast.AST) -> Iterator[ast.stmt]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child
            yield from walk(child)

    for statement in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        else:
            assert isinstance(statement, ast.ImportFrom)
            assert statement.level == 0, f"{path}: relative import"
            base = statement.module or ""
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in statement.names]
        yield from (name for name in names if name in known and name != "exitkit")


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


def test_arrows_run_one_way() -> None:
    known = modules()
    wrong = []
    for module, path in known.items():
        here = room(module)
        for target in imports(path, known) if here else ():
            there = room(target)
            if there and ROOMS.index(there) > ROOMS.index(str(here)) and (here, there) not in KEPT:
                wrong.append(f"{module} -> {target}")
    assert not wrong


def test_no_module_imports_itself_through_others() -> None:
    """Importing a module runs the ``__init__`` of every package around it, which counts."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        around = {module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1)}
        targets = set(imports(path, known))
        targets |= {target.rsplit(".", n)[0] for target in targets for n in range(1, target.count("."))}
        graph[module] = targets - around - {module, "exitkit"}
    del graph["exitkit.evaluation"]  # see KEPT; its own imports are checked below
    graph["exitkit.evaluation"] = set(imports(known["exitkit.evaluation"], known)) - {"exitkit.calibration"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_nothing_is_loose_at_the_top() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {"__init__.py", "__main__.py", "py.typed"}
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert folders == set(ROOMS)


def test_no_module_bears_the_name_of_what_is_in_it() -> None:
    for info in pkgutil.walk_packages(exitkit.__path__, "exitkit."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        parent, _, name = info.name.rpartition(".")
        assert getattr(sys.modules[parent], name) is module, f"{info.name} is shadowed"
        own = getattr(module, name, None)
        assert not inspect.isfunction(own), f"{info.name} has a function of its own name"
        assert not inspect.isclass(own), f"{info.name} has a class of its own name"


def test_importing_costs_nothing_that_nobody_asked_for() -> None:
    code = """
import json, sys, torch
before = set(sys.modules)
import exitkit
for name in exitkit.__all__:
    getattr(exitkit, name)
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "exitkit" in loaded
    assert not loaded & set(HEAVY)


def test_every_public_name_is_where_it_is_said_to_be() -> None:
    """For type checkers they are imported; at run time they are looked up in a table, of the same names and modules."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    declared = {
        alias.name: str(statement.module)
        for block in tree.body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    rooms = {name for name, module in declared.items() if module == "exitkit"}
    assert {name: module for name, module in declared.items() if name not in rooms} == exitkit._HOMES
    assert rooms == set(exitkit._ROOMS)
    assert set(exitkit.__all__) == set(declared)
    for name in exitkit.__all__:
        assert getattr(exitkit, name) is not None
    assert set(exitkit.__all__) <= set(dir(exitkit))


def test_torchvision_can_be_imported_either_way() -> None:
    """By the user after exitkit, and by exitkit first."""
    guard = "from exitkit.common.torchvision_guard import import_torchvision; import_torchvision('models')"
    for code in ("import exitkit, torchvision.models", f"import exitkit; {guard}; import torchvision.models"):
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, check=True, cwd=ROOT)


def test_help_is_there_at_once() -> None:
    """Without torch, in less than a second of CPU."""
    code = """
import sys
from exitkit.cli.app import app
try:
    app(sys.argv[1:])
except SystemExit:
    assert "torch" not in sys.modules
    raise
"""
    for arguments in (["--help"], ["report", "--help"], ["train", "-h"], ["export", "-h"], ["calibrate", "-h"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_no_public_name_is_lost() -> None:
    for module, names in NAMES.items():
        for name in names.split():
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    assert {*NAMES["exitkit"].split()} <= {*exitkit.__all__}


def test_the_architecture_page_names_the_rooms_in_their_order() -> None:
    page = (ROOT / "docs" / "explain" / "architecture.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)/` \|", page, re.MULTILINE) == ROOMS
