"""Hub names, against a cache folder made by hand: no test touches the network (HF_HUB_OFFLINE is set)."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

from formats.hf_folder import file_in
from formats.hf_read import read_huggingface
from formats.hub import fetch_from_hub
from tests.foreign_models import save_foreign

ROOT = Path(__file__).resolve().parent.parent
REVISION = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, name: str, source: Path | None) -> Path:
    """A repository as huggingface_hub caches it: snapshots/REVISION/FILE link into blobs/. Returns the snapshot."""
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / REVISION
    for folder in (home / "blobs", home / "refs", snapshot):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text(REVISION)
    for number, file in enumerate(sorted(source.iterdir()) if source else []):
        blob = home / "blobs" / f"{number:040x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["somebody/tiny", "somebody/tiny@main", f"somebody/tiny@{REVISION}"])
def test_a_cached_model_is_read_without_a_network(cache, tmp_path, name):
    save_foreign("smollm2", tmp_path / "made")
    snapshot = cached(cache, "somebody/tiny", tmp_path / "made")
    folder = fetch_from_hub(name)
    assert folder == snapshot
    assert read_huggingface(folder)["config"]["n_layer"] == 3


def test_a_gguf_file_of_a_repository(cache, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "tiny.Q8_0.gguf").write_bytes(b"GGUF")
    snapshot = cached(cache, "somebody/tiny-GGUF", tmp_path / "made")
    assert fetch_from_hub("somebody/tiny-GGUF:tiny.Q8_0.gguf") == snapshot / "tiny.Q8_0.gguf"


def test_old_weights_are_asked_for_only_where_there_are_no_new_ones(cache, tmp_path, monkeypatch):
    asked = []

    def download(_, allow_patterns, **where):
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    fetch_from_hub("a/b")
    assert len(asked) == 1 and not any(pattern.endswith(".bin") for pattern in asked[0])
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    fetch_from_hub("a/b")
    assert asked[2] == ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def test_a_network_that_fails_leaves_the_cache(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "model.safetensors").touch()
    snapshot = cached(tmp_path / "hub", "somebody/tiny", tmp_path / "made")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    code = "from formats.hub import fetch_from_hub; print(fetch_from_hub('somebody/tiny'))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **nowhere}, capture_output=True)
    assert found.stdout.decode().strip() == str(snapshot), found.stderr.decode()


def test_what_cannot_be_fetched_is_one_line_with_a_remedy(cache):
    with pytest.raises(ValueError, match=r"somebody/missing could not .* HF_ENDPOINT .* local folder") as caught:
        fetch_from_hub("somebody/missing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["tiny", "a/b/c", "a/..", "../b", "a/b:model.bin", "a/b:../x.gguf", "a/b@", "a b/c", ""]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="no model of the Hub"):
        fetch_from_hub(name)


def test_links_into_another_repository_are_refused(cache, tmp_path):
    snapshot = cached(cache, "somebody/tiny", None)
    other = cached(cache, "somebody/secret", None).parent.parent / "blobs" / "1"
    other.write_text("{}")
    (snapshot / "config.json").symlink_to(other)
    with pytest.raises(ValueError, match="outside the folder"):
        file_in(snapshot, "config.json")
