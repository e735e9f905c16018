"""Keys and tokens of the environment reach no file of a run: checkpoints, settings, logs, pages, what W&B keeps."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import record_set, text_set

ROOT = Path(__file__).resolve().parent.parent
NAMES = (
    *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"),
    *("GITHUB_TOKEN", "MY_PASSWORD", "DATABASE_URL"),
)
CANARIES = {name: f"canary{number:02d}" + "deadbeef" * 4 for number, name in enumerate(NAMES)}  # as long as W&B's keys
SCRIPT = """
import sys
from tests.runs import train, tune
from tests.tiny import tiny_preset
from pathlib import Path
home = Path(sys.argv[1])
more = {"max_steps": 2, "eval_interval": 1, "generate_interval": 1, "checkpoint_interval": 1, "wandb": True}
train(home / "text", home / "runs" / "pretrained", tensorboard=True, **more)
tune(home / "records", home / "runs" / "tuned", home / "runs" / "pretrained" / "model_00001.pt", **more)
"""


def contents(file: Path) -> Iterator[bytes]:
    """The bytes of a file, and those of what is packed in it."""
    data = file.read_bytes()
    yield data
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            yield from map(archive.read, archive.namelist())
    for unpack in (gzip.decompress, zlib.decompress):
        try:
            yield unpack(data)
        except (OSError, zlib.error, EOFError):
            continue


def leaks(folder: Path) -> list[str]:
    """Which secret stands in which file, forwards or in UTF-16."""
    found = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        for data in contents(file):
            found += [
                f"{name} in {file}"
                for name, canary in CANARIES.items()
                if canary.encode() in data or canary.encode("utf-16-le") in data
            ]
    return found


@pytest.mark.slow  # 20 s: two runs, each with W&B's own process
def test_no_secret_of_the_environment_is_kept(tmp_path: Path) -> None:
    text_set(tmp_path / "text", 12)
    record_set(tmp_path / "records", 12)
    environment = {**os.environ, **CANARIES, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    files = [path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "training.log", "model_00001.pt", "best.pt"} <= set(files)
    assert any(name.endswith(".wandb") for name in files), "W&B kept nothing: the test would show nothing"
    assert any(name.startswith("events.out") for name in files)
    assert not leaks(tmp_path)
    assert not any(canary in done.stdout + done.stderr for canary in CANARIES.values())


def test_the_search_finds_secrets(tmp_path: Path) -> None:
    """In plain files and packed ones."""
    secret = next(iter(CANARIES.values()))
    (tmp_path / "plain").write_text(f"key: {secret}")
    (tmp_path / "packed.gz").write_bytes(gzip.compress(secret.encode()))
    with zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", secret)
    assert len(leaks(tmp_path)) == 3
