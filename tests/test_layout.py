"""The house rules that a reader of the code relies on: which way imports point, and what no file may do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import paving

ROOT = Path(paving.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# From the top of the house to its foundations. A part may import parts of its own tier and of those below it.
TIERS = (
    (
        "cli",
        "cli_circuit",
        "cli_compare",
        "cli_contrast",
        "cli_judge",
        "cli_reproduce",
        "cli_router",
        "cli_serve",
        "cli_utility",
        "__main__",
        "demo",
    ),
    ("reproduce", "circuit_run", "compare"),
    (
        "terminal",
        "diagnose",
        "utility",
        "run",
        "run_engine",
        "run_folder",
        "run_labels",
        "run_records",
        "run_rows",
        "run_splits",
        "ablations",
        "router_search",
        "router_shift",
        "chat",
        "progress",
        "presets",
    ),
    ("report", "evaluation", "serving"),
    ("training", "circuit", "steering"),
    ("controller",),
    ("generation", "traces", "intervention"),
    ("backbone", "processes"),
    ("prompts",),
)
TIER = {part: i for i, parts in enumerate(TIERS) for part in parts}
METHODS = {"controller", "circuit", "steering"}
DOOR = "__init__"  # `import paving` offers the top of the house by name, on first use


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions, as absolute dotted names."""
    package = ["paving", *path.relative_to(ROOT).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*stem, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def imported_parts(path: Path) -> set[str]:
    """Parts of the house that a file imports, its own left out."""
    names = (m.split(".") for m in imported_modules(path) if m.startswith("paving."))
    return ({n[1] for n in names} & TIER.keys()) - {part_of(path)}


def calls(path: Path) -> set[str]:
    """The last names of everything that a file calls or reads as an attribute: `x.load(...)` gives `load`."""
    return {n.attr for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Attribute)}


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_file = pytest.mark.parametrize("path", FILES, ids=named)


def test_every_part_of_the_house_has_its_tier():
    parts = {part_of(p) for p in FILES} - {DOOR}
    assert parts <= TIER.keys(), f"say in TIERS where these stand: {sorted(parts - TIER.keys())}"


@every_file
def test_imports_point_one_way(path):
    if part_of(path) == DOOR:
        return
    upwards = {p for p in imported_parts(path) if TIER[p] < TIER[part_of(path)]}
    assert not upwards, f"{named(path)} stands below {sorted(upwards)} and may not import them"


def test_the_walk_sees_relative_and_late_imports(tmp_path):
    assert "prompts" in imported_parts(ROOT / "cli.py"), "cli imports inside its functions"
    assert "paving.prompts.types" in imported_modules(ROOT / "prompts" / "__init__.py"), "prompts imports relatively"
    assert {"evaluation", "training", "controller"} <= imported_parts(ROOT / "run.py")


@every_file
def test_methods_do_not_know_each_other(path):
    if part_of(path) in METHODS:
        assert not imported_parts(path) & METHODS


@every_file
def test_evaluation_knows_no_method(path):
    if part_of(path) == "evaluation":
        assert not imported_parts(path) & (METHODS | {"training"})


@every_file
def test_no_file_is_too_long_to_read(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{named(path)} has {lines} lines; find the seam"


@every_file
def test_hooks_are_registered_in_one_file_only(path):
    registers = {name for name in calls(path) if name.startswith("register_") and name.endswith("_hook")}
    assert not registers or named(path) == "backbone/hooks.py"


@every_file
def test_nothing_is_pickled_or_unpickled(path):
    modules = imported_modules(path)
    assert not {m.split(".")[0] for m in modules} & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    assert not modules & {"torch.load", "torch.save", "torch.serialization"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in {"load", "save"}


@every_file
def test_code_of_a_model_repository_runs_only_where_the_user_asked(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert not (isinstance(node.value, ast.Constant) and node.value.value is True)
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False


@every_file
def test_bad_input_is_not_met_with_assert(path):
    asserts = [n.lineno for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Assert)]
    assert not asserts, f"{named(path)}:{asserts}: `assert` vanishes under -O and says nothing; raise an error"


@every_file
def test_no_device_is_written_into_the_code(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in {"cuda", "cuda:0"}
        if isinstance(node, ast.Attribute):
            assert node.attr != "cuda"


def test_test_files_have_names_of_their_own():
    names = [p.name for p in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names)), "without packages, two test files of one name cannot be collected together"
