"""Every command that the documentation shows is one that the scripts take; the slow test runs them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.settings import InspectSettings, PrepareSettings
from evaluation.settings import EvaluateSettings, SampleSettings
from export import COMMANDS as EXPORTS
from pruning.settings import PruneSettings
from training.run_settings import FinetuneSettings, TrainSettings
from training.search_settings import SearchSettings
from training.settings import parse

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").glob("*.md"))]
SETTINGS = {
    "prepare_data.py": PrepareSettings,
    "train_gpt2.py": TrainSettings,
    "finetune_dolly.py": FinetuneSettings,
    "model/finetune_dolly.py": FinetuneSettings,
    "sample.py": SampleSettings,
    "evaluate.py": EvaluateSettings,
    "prune.py": PruneSettings,
    "tune.py": SearchSettings,
    "export.py": object,
}
# Blocks tagged so need what this machine may lack; they are parsed, the others run.
NEEDS = {"gpu", "hub", "cluster", "peer", "person"}


def commands(page: Path) -> list[tuple[str, set[str]]]:
    """(command line, tags) of each line in the page's ```sh blocks, continued lines joined."""
    found = []
    for tags, body in re.findall(r"```sh([^\n]*)\n(.*?)```", page.read_text("utf-8"), flags=re.S):
        for line in body.replace("\\\n", " ").splitlines():
            line = line.split("  #")[0].strip()
            if line and not line.startswith("#"):
                found.append((line, set(tags.split())))
    return found


def all_commands() -> list[tuple[str, str, set[str]]]:
    return [(page.name, line, tags) for page in PAGES if page.exists() for line, tags in commands(page)]


@pytest.mark.parametrize(("page", "line", "tags"), all_commands())
def test_every_documented_flag_exists(page: str, line: str, tags: set[str]) -> None:
    assert tags <= NEEDS, f"{page}: unknown tag in {tags}"
    words = shlex.split(line)
    if words[:3] == ["python", "-m", "report"]:
        from report.__main__ import make_work

        command = words[3] if words[3] in ("serve", "votes") else "page"
        make_work(command, words[3 + (command != "page") :])
    scripts = [index for index, word in enumerate(words) if word in SETTINGS]
    if not scripts:
        return
    index = scripts[0]
    cls, rest = SETTINGS[words[index]], words[index + 1 :]
    rest = rest[: rest.index("|")] if "|" in rest else rest
    if words[index] == "export.py":
        cls, names, _ = EXPORTS[rest[0]]
        rest = [word for name, value in zip(names, rest[1:]) for word in (f"--{name}", value)] + rest[1 + len(names) :]
    if cls is PrepareSettings and rest[:1] == ["inspect"]:
        cls, rest = InspectSettings, ["--data_dir", *rest[1:]]
    if "--help" in rest:
        return
    parse(cls, [word for word in rest if word != "--print_config"])


@pytest.mark.slow
def test_every_documented_command_runs(tmp_path: Path) -> None:
    """In a copy of the checkout, page by page in order, as a reader would; README's own make targets excepted."""
    copy = tmp_path / "a copy with spaces"
    skip = shutil.ignore_patterns(".venv", ".git", "logs*", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, copy, ignore=skip)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # all cores
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # its python
    for page, line, tags in all_commands():
        if tags or line.startswith(("make ", "git ", "pip ", "cd ")):
            continue
        done = subprocess.run(
            ["bash", "-c", line], cwd=copy, env=environment, capture_output=True, text=True, timeout=3600
        )
        assert done.returncode == 0, f"{page}: {line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
