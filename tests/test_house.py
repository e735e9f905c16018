"""The house rules that a machine can check: which room may import which, what is never written, pins within ranges."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("data", "model", "formats", "evaluation", "training", "report", "pruning", "serve")
MAY_IMPORT = {
    "data": set(),
    "model": set(),
    "formats": {"data", "model"},
    "evaluation": {"data", "model", "formats"},
    "training": {"data", "model", "formats", "evaluation", "report"},
    "report": set(),
    "pruning": {"data", "model", "formats", "evaluation", "training", "report"},
    "serve": set(ROOMS),
}
NO_TORCH = (
    "training/settings.py",
    "training/run_settings.py",
    "training/search_settings.py",
    "training/heap.py",
    "training/peers.py",
    "data/settings.py",
    "evaluation/settings.py",
    "pruning/settings.py",
    "model/config.py",
)


def tracked(*suffixes: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # an archive without its history
        return [file for suffix in suffixes for file in ROOT.rglob("*" + suffix) if ".venv" not in file.parts]
    return [ROOT / name for name in listed.stdout.split("\n") if name.endswith(suffixes) and (ROOT / name).exists()]


def code() -> list[Path]:
    return [file for file in tracked(".py") if file.relative_to(ROOT).parts[0] != "tests"]


def imported(file: Path, top_level_only: bool = False) -> set[str]:
    """The names of the top packages that a file imports."""
    tree = ast.parse(file.read_text("utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_imports_flow_downhill(room: str) -> None:
    for file in code():
        if file.relative_to(ROOT).parts[0] != room or file.name == "finetune_dolly.py":
            continue
        upward = imported(file) & set(ROOMS) - MAY_IMPORT[room] - {room}
        assert not upward, f"{file.relative_to(ROOT)} imports {sorted(upward)}, which {room}/ may not know"


def test_settings_modules_load_nothing_heavy() -> None:
    for name in NO_TORCH:
        assert not imported(ROOT / name) & {"torch", "numpy", "datasets", "wandb", "matplotlib"}, name


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    for file in code():
        if file.relative_to(ROOT).parts[0] in ROOMS:
            heavy = imported(file, top_level_only=True) & {"datasets", "wandb", "matplotlib", "transformers", "optuna"}
            assert not heavy, f"{file.relative_to(ROOT)} imports {heavy} at its top"


def test_files_and_functions_stay_short() -> None:
    for file in code():
        text = file.read_text("utf-8")
        assert text.count("\n") <= 450, f"{file.relative_to(ROOT)} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 80, f"{file.relative_to(ROOT)}: {node.name} has {length} lines"


def test_public_functions_have_docstrings() -> None:
    missing = []
    for file in code():
        if file.relative_to(ROOT).parts[0] not in ROOMS:
            continue
        for node in ast.parse(file.read_text("utf-8")).body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None:
                missing.append(f"{file.relative_to(ROOT)}: {node.name}")
    assert not missing, missing


def test_pins_lie_within_the_ranges_for_users() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    block = project.split("dependencies = [", 1)[1].split("]\n", 1)[0]
    ranges = {r.name.lower(): r for r in map(Requirement, re.findall(r'"([^"]+)"', block))}
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    pins = {r.name.lower(): r for r in map(Requirement, (line for line in lines if line and not line.startswith("#")))}
    assert set(pins) == set(ranges)
    for name, pin in pins.items():
        (exact,) = pin.specifier
        assert exact.operator == "==" and ranges[name].specifier.contains(exact.version), name


def test_the_text_speaks_of_the_project_alone() -> None:
    # Paths of one machine and hosts of package registries have no place here; the pattern is split, not to find itself.
    bad = re.compile("/" + r"(?:work|root|farm)/|files\.python" + r"hosted|registry\.np" + "mjs")
    for file in tracked(".py", ".md", ".toml", ".yaml", ".txt", ".html", "Makefile"):
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            assert not bad.search(line), f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
