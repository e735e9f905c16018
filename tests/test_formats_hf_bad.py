"""Damaged and hostile Hugging Face folders: one clear line each, in bounded time and memory."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.errors import FormatError
from formats.hf_folder import file_in, find_tensors, read_object
from formats.hf_read import read_huggingface
from tests.foreign_models import save_foreign


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A good folder of each layout, made once."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("gpt2", "llama2", "smollm2")}
    for family, folder in folders.items():
        save_foreign(family, folder)
    return folders


@pytest.fixture
def folder(made, tmp_path):
    return copy(made["llama2"], tmp_path / "model")


def copy(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit(folder, **changes):
    """Other keys in config.json; None takes one away."""
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def refused(folder, message):
    with pytest.raises(FormatError, match=message) as caught:
        read_huggingface(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_missing_a_surplus_and_a_misshapen_tensor(folder):
    good = (folder / "model.safetensors").read_bytes()
    name = "model.layers.1.mlp.up_proj.weight"
    for change, message in [
        (lambda state: state.pop(name), r"lacks the tensor layers\.1\.mlp\.up_proj\.weight \(48, 32\)"),
        (lambda state: state.pop("lm_head.weight"), "lacks the tensor lm_head.weight .* tie_word_embeddings"),
        (lambda state: state.update(extra=torch.ones(2)), "holds 'extra', which a model of its config.json"),
        (lambda state: state.update({name.replace("weight", "bias"): torch.ones(48)}), "layers.1.mlp.up_proj.bias"),
        (lambda state: state.update({name: torch.ones(32, 48)}), r"shape \(32, 48\), config.json asks for \(48, 32\)"),
        (lambda state: state.update({name: torch.ones(48, 32, dtype=torch.int32)}), "is stored as I32"),
        (lambda state: state.update({name.removeprefix("model."): torch.ones(48, 32)}), "twice, with and without"),
    ]:
        (folder / "model.safetensors").write_bytes(good)
        edit_weights(folder, change)
        refused(folder, message)


def test_a_tied_model_with_a_head_of_another_shape(made, tmp_path):
    folder = copy(made["smollm2"], tmp_path / "model")
    edit_weights(folder, lambda state: state.update({"lm_head.weight": torch.ones(64, 32)}))
    refused(folder, r"lm_head.weight has shape \(64, 32\)")


def test_gpt2_with_another_fused_width(made, tmp_path):
    folder = copy(made["gpt2"], tmp_path / "model")
    name = "transformer.h.0.attn.c_attn.weight"
    edit_weights(folder, lambda state: state.update({name: torch.ones(96, 32)}))
    refused(folder, r"h\.0\.attn\.c_attn\.weight has shape \(96, 32\), config.json asks for \(32, 96\)")


def test_a_config_that_lies_about_sizes_costs_nothing(folder):
    for changes, message in [
        ({"hidden_size": 1 << 30, "num_attention_heads": 4}, "n_embd is 1073741824"),
        ({"hidden_size": 1 << 20, "num_attention_heads": 4}, "has shape"),
        ({"intermediate_size": 1 << 24}, "has shape"),
        ({"num_hidden_layers": 10_000}, "lacks the tensor layers.3"),
        ({"num_hidden_layers": 1_000_000}, "from 1 to 10000"),
        ({"num_hidden_layers": 2}, "which a model of its config.json does not have"),
        ({"vocab_size": 1 << 30}, "has shape"),
        ({"vocab_size": 100}, "320 ids, its config.json a vocab_size of 100"),
    ]:
        before = (folder / "config.json").read_text()
        edit(folder, **changes)
        refused(folder, message)
        (folder / "config.json").write_text(before)


def test_cut_and_lying_files(folder):
    path = folder / "model.safetensors"
    good = path.read_bytes()
    for data, message in [
        (good[:-1], "lies at bytes"),
        (good[:200], "cut short"),
        (b"", "has 0 bytes"),
        (b"\xff" * 64, "says that its header has"),
    ]:
        path.write_bytes(data)
        refused(folder, message)


def test_a_folder_without_its_parts(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "aside")
    refused(folder, "holds no weights, expected model.safetensors or pytorch_model.bin")
    (folder / "tokenizer.json").unlink()
    refused(folder, r"holds no tokenizer, expected a tokenizer\.json: write one with transformers")
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    refused(folder, r"holds tokenizer\.model, expected a tokenizer\.json")
    (folder / "config.json").unlink()
    refused(folder, "holds no config.json")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is no valid JSON"),
        ("[1]", "holds a JSON list"),
        ("[" * 100_000, "is no valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is no valid JSON"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
    ],
)
def test_a_config_that_is_no_json(folder, text, message):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, message)


def test_a_huge_json_is_not_read(folder):
    with open(folder / "config.json", "r+b") as file:
        file.truncate(1 << 40)  # a hole: it takes no room
    refused(folder, "has 1,099,511,627,776 bytes, expected at most")


def sharded(folder, **changes):
    """The folder with its weights as one shard, and an index whose keys can be replaced."""
    shard = "model-00001-of-00001.safetensors"
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)} | changes
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names, shard


def test_an_index_is_followed(folder):
    wanted = read_huggingface(folder)["model"]
    sharded(folder)
    found = read_huggingface(folder)["model"]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "listed, message",
    [
        (None, "has no weight_map"),
        ([], "has no weight_map"),
        ({"a": 1}, "has no weight_map"),
        ({"a": "../model.safetensors"}, "expected one of the folder itself"),
        ({"a": "/etc/passwd"}, "expected one of the folder itself"),
        ({"a": ".."}, "expected one of the folder itself"),
        ({"a": ""}, "expected one of the folder itself"),
        ({"a": "sub/x.safetensors"}, "expected one of the folder itself"),
        ({"a": "sub\\x.safetensors"}, "expected one of the folder itself"),
        ({"a": "x\0.safetensors"}, "expected one of the folder itself"),
        ({"a": "gone.safetensors"}, "lists 'gone.safetensors', which is missing"),
        ({"a": "config.json"}, "lists 'config.json', which is of another kind"),
        ({"a": "sub"}, "is not a regular file"),
        ({"a": "model-00001-of-00001.safetensors"}, "says that 'a' lies in"),
    ],
)
def test_an_index_that_lies(folder, listed, message):
    (folder / "sub").mkdir()
    sharded(folder, weight_map=listed)
    refused(folder, message)


def test_a_tensor_in_two_shards(folder):
    names, shard = sharded(folder)
    other = "model-00002-of-00002.safetensors"
    (folder / other).write_bytes((folder / shard).read_bytes())
    listed = dict.fromkeys(names, shard) | {names[0]: other}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    refused(folder, "which .*00001-of-00001.safetensors holds too")


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to("../elsewhere.safetensors")
    refused(folder, "is a link to .*elsewhere.safetensors, outside the folder")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    refused(folder, "a link that leads nowhere")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone")
    refused(folder, "a link that leads nowhere")
    (folder / "model.safetensors").unlink()
    (tmp_path / "elsewhere.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert read_huggingface(folder)["model"], "a link inside the folder is no harm"


def test_links_of_a_hub_cache_are_followed_into_its_own_blobs_only(folder, tmp_path):
    home = tmp_path / "models--a--b"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots" / "rev").mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        (home / "blobs" / str(number)).write_bytes(file.read_bytes())
        (home / "snapshots" / "rev" / file.name).symlink_to(f"../../blobs/{number}")
    assert read_huggingface(home / "snapshots" / "rev")["model"]
    (tmp_path / "blobs").mkdir()
    (home / "blobs" / "0").rename(tmp_path / "blobs" / "0")
    (home / "blobs" / "0").symlink_to(tmp_path / "blobs" / "0")
    refused(home / "snapshots" / "rev", "outside the folder")


def test_a_pipe_is_not_opened(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refused(folder, "is not a regular file")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_bin_file_runs_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    for state, message in [
        ({"a": Evil()}, r"holds (posix|nt)\.system, expected only tensors"),
        ([torch.ones(2)], "something else than named tensors"),
        ({"a": 1}, "something else than named tensors"),
    ]:
        torch.save(state, folder / "pytorch_model.bin")
        refused(folder, message)
    assert not (tmp_path / "evil").exists()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 no archive")
    refused(folder, "cannot be read as tensors and plain values")


def test_a_bin_file_of_integers(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name: tensor.int() for name, tensor in state.items()}, folder / "pytorch_model.bin")
    refused(folder, "is stored as torch.int32")


def test_only_names_in_the_folder_are_opened(tmp_path):
    assert file_in(tmp_path, "config.json") is None and read_object(tmp_path, "config.json") is None
    with pytest.raises(FormatError, match="holds no weights"):
        find_tensors(tmp_path)
