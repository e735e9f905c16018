"""Names that files give lead to nothing outside of their folder, and writing follows no link."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.shards import open_dataset
from formats.checkpoint import TEMPORARY, load_checkpoint, write_durably
from formats.open_model import load_payload, open_model
from report.files import write_file
from tests.adapters import make_adapter
from tests.foreign_models import save_foreign
from tests.tiny import record_set
from tests.tiny_checkpoints import save_tiny
from tests.token_sets import edit_manifest

NAMES = {
    "up": "../outside",
    "far up": "../../../../../../../../etc/passwd",
    "up and down": "folder/../../outside",
    "dots": "..",
    "dot": ".",
    "nothing": "",
    "absolute": "/etc/passwd",
    "absolute, here": "{home}/outside",
    "inside a folder": "folder/file",
    "this folder": "./file",
    "with a separator at its end": "file/",
    "backslashes": "..\\outside",
    "a drive": "C:\\outside",
    "a share": "\\\\host\\outside",
    "a zero": "file\0.safetensors",
    "only a zero": "\0",
    "long": "a" * 300,
    "very long": "a" * 70_000,
    "zeros without end": "/dev/zero",
    "standard input": "/dev/stdin",
    "home": "~/outside",
    "a variable": "$HOME/outside",
    "an address": "http://127.0.0.1:9/outside",
    "a file's address": "file:///etc/passwd",
    "a command": "|touch outside",
    "line ends": "file\n",
    "a link out": "link",
    "a link to a link out": "link-to-link",
    "links in a circle": "circle",
    "a link to nothing": "gone",
    "a link to a folder": "link-to-folder",
    "a pipe": "pipe",
    "a folder": "folder",
}
assert len(NAMES) >= 20

_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_audit)


@contextmanager
def nothing_outside(home: Path) -> Iterator[None]:
    """Fails where a file is opened that the names lead to."""
    global _opened
    _opened = []
    try:
        yield
    finally:
        real = {os.path.realpath(name) for name in _opened if "\0" not in name}
        _opened = None
    assert not real & {str(home / "outside"), "/etc/passwd", "/dev/zero", "/dev/stdin"}


def furnish(folder: Path) -> None:
    """What the names mean, in `folder` and beside it."""
    (folder.parent / "outside").write_bytes(b"secret")
    (folder / "link").symlink_to(folder.parent / "outside")
    (folder / "link-to-link").symlink_to("link")
    (folder / "circle").symlink_to("circle")
    (folder / "gone").symlink_to("nowhere")
    (folder / "link-to-folder").symlink_to("/etc")
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()


def named(case: str, home: Path) -> str:
    return NAMES[case].replace("{home}", str(home))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder whose weights an index lists."""
    home = tmp_path_factory.mktemp("names")
    save_foreign("smollm2", home / "model")
    weights = load_file(home / "model" / "model.safetensors")
    (home / "model" / "model.safetensors").unlink()
    save_file(weights, home / "model" / "good.safetensors")
    write_index(home / "model", "good.safetensors", list(weights))
    open_model(home / "model")
    furnish(home / "model")
    return home / "model"


def write_index(folder: Path, file: str, weights: list[str]) -> None:
    index = {"weight_map": dict.fromkeys(weights[1:], "good.safetensors") | {weights[0]: file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("case", NAMES)
def test_an_index_opens_only_files_of_its_folder(case: str, model: Path) -> None:
    weights = list(load_file(model / "good.safetensors"))
    write_index(model, named(case, model.parent), weights)
    with nothing_outside(model.parent), pytest.raises(ValueError) as caught:
        open_model(model)
    told = str(caught.value)
    assert str(model) in told and "\n" not in told and len(told) < 600


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = record_set(tmp_path_factory.mktemp("names") / "records", 12)
    furnish(folder)
    return folder


@pytest.mark.parametrize("entry", ["tokens", "mask", "docs"])
@pytest.mark.parametrize("case", NAMES)
def test_a_manifest_opens_only_files_of_its_folder(case: str, entry: str, records: Path) -> None:
    manifest = (records / "dataset.json").read_bytes()

    def rename(meta: dict[str, Any]) -> None:
        shard = meta["splits"]["train"]["shards"][0]
        (shard if entry == "tokens" else shard[entry])["file"] = named(case, records.parent)

    try:
        edit_manifest(records, rename)
        with nothing_outside(records.parent), pytest.raises(ValueError) as caught:
            open_dataset(records, "train")
    finally:
        (records / "dataset.json").write_bytes(manifest)
    told = str(caught.value)
    assert str(records) in told and "\n" not in told and len(told) < 600


@pytest.mark.parametrize("case", NAMES)
def test_an_adapters_hint_at_its_base_is_a_name_and_no_more(case: str, tmp_path: Path) -> None:
    """The base may lie anywhere, and is read as a model: whatever is none ends in one line, and at once."""
    (tmp_path / "run").mkdir()
    furnish(tmp_path / "run")
    adapter = make_adapter(save_tiny(tmp_path / "base.pt"), tmp_path / "run" / "adapter.pt")
    payload = load_checkpoint(adapter)
    name = named(case, tmp_path)
    payload["base"] |= {"path": name, "name": name}
    torch.save(payload, adapter.with_name("hinting.pt"))  # the first one's tensors are mapped from it
    with pytest.raises((ValueError, OSError)) as caught:
        open_model(adapter.with_name("hinting.pt"))
    assert "\n" not in str(caught.value).replace(name, "")


@pytest.mark.parametrize("case", NAMES)
def test_so_is_that_of_a_folder_of_pefts(case: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    furnish(tmp_path / "run")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": named(case, tmp_path)}
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, OSError)) as caught:
        load_payload(tmp_path / "run")
    assert "\n" not in str(caught.value).replace(named(case, tmp_path), "")


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "model.safetensors.index.json", "good.safetensors"),
    ],
)
def test_a_folders_own_files_are_no_links_out_of_it(name: str, model: Path, tmp_path: Path) -> None:
    home = tmp_path / "model"
    home.mkdir()
    for file in model.iterdir():
        if file.is_file() and not file.is_symlink():
            (home / file.name).write_bytes(file.read_bytes())
    weights = list(load_file(home / "good.safetensors"))
    write_index(home, "good.safetensors", weights)
    content = (home / name).read_bytes() if (home / name).exists() else b"{{ messages }}"
    (tmp_path / "outside").write_bytes(content)
    (home / name).unlink(missing_ok=True)
    (home / name).write_bytes(content)
    open_model(home)
    (home / name).unlink()
    (home / name).symlink_to(tmp_path / "outside")
    with nothing_outside(tmp_path), pytest.raises(ValueError, match="outside the folder"):
        open_model(home)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_nor_are_those_of_an_adapter(name: str, tmp_path: Path) -> None:
    home = tmp_path / "adapter"
    home.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": []}
    config["base_model_name_or_path"] = str(save_tiny(tmp_path / "base.pt"))
    (home / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, home / "adapter_model.safetensors")
    os.rename(home / name, tmp_path / "outside")
    (home / name).symlink_to(tmp_path / "outside")
    with nothing_outside(tmp_path), pytest.raises(ValueError, match="outside the folder"):
        load_payload(home)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    special = tmp_path / "model.pt"
    if kind == "pipe":
        os.mkfifo(special)
    else:
        special.symlink_to("/dev/zero")
    for door in (load_checkpoint, open_model):
        with pytest.raises(ValueError, match="is not a regular file"):
            door(special)


@pytest.mark.parametrize("write", ["write_durably", "write_file"])
@pytest.mark.parametrize("stale", ["link", "file", "link to nothing"])
def test_a_temporary_is_made_anew_never_written_through(write: str, stale: str, tmp_path: Path) -> None:
    """In a folder that others write to, a link may wait under the name that a temporary will have."""
    victim, target = tmp_path / "victim", tmp_path / "run.html"
    temporary = tmp_path / f"{TEMPORARY}run.html-{os.getpid()}"
    if stale != "link to nothing":
        victim.write_bytes(b"precious")
    if stale == "file":
        temporary.write_bytes(b"of a life before")
    else:
        temporary.symlink_to(victim)
    if write == "write_file":
        write_file(target, b"new")
    else:
        write_durably(target, lambda file: file.writelines([b"new"]))
    assert target.read_bytes() == b"new" and not target.is_symlink()
    assert not temporary.is_symlink() and not temporary.exists()
    assert victim.exists() is (stale != "link to nothing")
    assert stale == "link to nothing" or victim.read_bytes() == b"precious"
