"""Every reader of what strangers may write, with good inputs to start from, for the fuzzer."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from data.augment import _from_file as read_thesaurus
from data.chat import CHAT_TEMPLATES, render_conversation
from data.inspect import inspect_dataset
from data.manifest import read_manifest
from data.prompt_template import TEMPLATES
from data.records import Unusable, format_of, sample_of
from data.sandbox import render
from data.shards import open_dataset
from data.sources import record_rows
from data.templates import template_from_spec
from data.tokenizer import BpeTokenizer, load_tokenizer, train_bpe
from evaluation.compare import Sampling
from evaluation.instructions import RecordFile
from evaluation.multiple_choice import read_choices
from evaluation.prompts import read_prompts
from evaluation.texts import read_text
from formats.checkpoint import load_checkpoint, save_checkpoint
from formats.checkpoint_command import show
from formats.compact import to_compact
from formats.gguf_header import GgufHeader, read_gguf_header
from formats.gguf_read import read_config as read_gguf_config
from formats.gguf_tokenizer import read_vocabulary
from formats.gguf_write import write_gguf
from formats.hf_config import to_gpt_config
from formats.hf_folder import find_tensors
from formats.hf_read import read_huggingface
from formats.open_model import open_model
from formats.peft import read_peft, write_peft
from formats.safetensors_file import read_blocks, read_header
from model.config import GPTConfig
from model.masks import Mask
from pruning.cache import _load as load_statistics
from report.live import Metrics
from report.records import read_run
from report.run import render_runs
from report.votes import votes_report
from serve.api import ApiError, read_request
from tests.adapters import make_adapter
from tests.fuzz import (
    Reader,
    mutated_bytes,
    mutated_json,
    mutated_lines,
    mutated_text,
    mutated_value,
    plain_json,
)
from tests.runs import train, without_pictures
from tests.tiny import BYTES, record_set, text_set, train_settings
from tests.tiny_checkpoints import save_tiny
from tests.token_sets import write_set
from training.launch import pretrain
from training.loop import Trainer
from training.metrics import JsonLines
from training.run_settings import FinetuneSettings
from training.search_settings import read_space
from training.settings import load_yaml, parse

ROOT = Path(__file__).resolve().parent.parent
SMALL: dict[str, Any] = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_kv_head": 1, "head_dim": 4, "mlp_dim": 8}
LLAMA: dict[str, Any] = {"position": "rope", "norm": "rmsnorm", "norm_bias": False, "mlp": "swiglu"}


def readers(home: Path) -> list[Reader]:
    """All of them; each works in a folder of its own in `home`."""
    makers: Sequence[Callable[[Path], Iterable[Reader]]] = (
        token_sets, checkpoints, training_state, plain_values, safetensors, gguf, huggingface, peft, tokenizers,
        templates, settings, records, texts, runs,
    )  # fmt: skip
    found = []
    for make in makers:
        folder = home / make.__name__
        folder.mkdir(parents=True)
        found += make(folder)
    return found


def from_file(path: Path, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """A reader of bytes from one of files."""

    def given(data: bytes) -> Any:
        path.unlink(missing_ok=True)  # what was read before may be mapped still
        path.write_bytes(data)
        return read(path)

    return given


def quiet(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Without what it prints."""

    def given(value: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return read(value)

    return given


# ---- token sets


def token_sets(home: Path) -> Iterable[Reader]:
    masks = [[0, 1, 1], [0, 1], [1, 1, 1]]
    write_set(home / "set", [[1, 2, 3], [4, 5], [6, 7, 256]], masks=masks, shard_size=4, kind="instruction")
    record_set(home / "records", 12)
    meta = json.loads((home / "set" / "dataset.json").read_bytes())
    (home / "set" / "dataset.json").unlink()

    def shard(name: str, entry: Callable[[Any], Any]) -> Reader:
        good = (home / "set" / name).read_bytes()

        def read(data: bytes) -> None:
            (home / "set" / name).write_bytes(data)
            entry(meta["splits"]["train"]["shards"][0])["sha256"] = hashlib.sha256(data).hexdigest()
            (home / "set" / "dataset.json").write_text(json.dumps(meta))
            try:
                split = open_dataset(home / "set", "train")
                found = split.tokens(0, split.n_tokens), split.mask(0, split.n_tokens), split.document_starts
                assert all(len(values) for values in found)
            finally:
                (home / "set" / name).write_bytes(good)
                entry(meta["splits"]["train"]["shards"][0])["sha256"] = hashlib.sha256(good).hexdigest()

        return Reader(f"shard{Path(name).suffix}", [good], mutated_bytes, read, 4000)

    def manifest(path: Path) -> None:
        known = read_manifest(path.parent)
        for split in known["splits"]:
            open_dataset(path.parent, split)
        template_from_spec(known["template"])
        load_tokenizer(str(path.parent))
        inspect_dataset(path.parent, 32, 1)

    yield shard("train_000000.bin", lambda entry: entry)
    yield shard("train_000000.mask", lambda entry: entry["mask"])
    yield shard("train_000000.docs", lambda entry: entry["docs"])
    file = home / "records" / "dataset.json"
    yield Reader("dataset.json", [file.read_bytes()], mutated_json, from_file(file, manifest), 4000)


# ---- checkpoints


def checkpoints(home: Path) -> Iterable[Reader]:
    for name, more in {"gpt2": {}, "llama": LLAMA}.items():
        save_tiny(home / f"{name}.pt", template="dolly", block_size=8, **SMALL, **more)
    gpt2, llama = (load_checkpoint(home / f"{name}.pt") for name in ("gpt2", "llama"))
    make_adapter(home / "gpt2.pt", home / "adapter.pt")
    masked = {**gpt2, "model": dict(gpt2["model"])}
    kept = torch.zeros(8, 8, dtype=torch.bool)
    kept[:4] = True
    name = "h.0.mlp.up_proj.weight"
    masked["model"][name] = masked["model"][name] * kept
    masked["masks"] = {name: Mask.of(kept, (4, 4)).spec()}
    compact = to_compact(masked, {name: Mask.of(kept, (4, 4))}, "f16")
    chat = {**gpt2, "template": CHAT_TEMPLATES["chatml"].spec()}
    adapter = load_checkpoint(home / "adapter.pt")
    payloads = [plain_copy(payload) for payload in (gpt2, llama, masked, compact, chat, adapter)]

    def write(payload: Any) -> bytes:
        file = io.BytesIO()
        torch.save(payload, file)
        return file.getvalue()

    def read(path: Path) -> None:
        opened = open_model(path)
        with torch.no_grad():
            opened.model(torch.zeros(1, 4, dtype=torch.int64))
        show(str(path))

    file = from_file(home / "given.pt", read)
    files = [write(payload) for payload in payloads]
    yield Reader("checkpoint, bytes", files, mutated_bytes, quiet(file), 4000)
    own = [(home / "gpt2.pt").read_bytes()]
    yield Reader("checkpoint, signed", own, lambda *given: signed_again(mutated_bytes(*given)), quiet(file), 1500)
    yield Reader("checkpoint, entries", payloads, mutated_value, quiet(lambda p: file(written(p, write))), 5000)
    spec = masked["masks"][name]
    yield Reader("mask", [spec], mutated_value, Mask.from_spec, 4000)


def signed_again(data: bytes) -> bytes:
    """With the digest of what it has become."""
    content = data[:-82]
    return content + data[-82:-64] + hashlib.sha256(content).hexdigest().encode()


def plain_copy(payload: Any) -> Any:
    """With tensors of its own, dicts that are dicts."""
    if isinstance(payload, dict):
        return {key: plain_copy(value) for key, value in payload.items()}
    return payload.clone() if isinstance(payload, torch.Tensor) else payload


def written(payload: Any, write: Callable[[Any], bytes]) -> bytes:
    try:
        return write(payload)
    except (RecursionError, UnicodeEncodeError):  # pickle goes no deeper, and holds no half characters
        return write([])


def training_state(home: Path) -> Iterable[Reader]:
    """What a resumed run takes from a checkpoint besides its weights."""
    data = text_set(home / "text", 12)
    run: dict[str, Any] = {"max_steps": 3, "eval_interval": 0, "generate_interval": 0, "checkpoint_interval": 1}
    quiet(lambda _: train(data, home / "run", **run))(None)
    payload = plain_copy(load_checkpoint(home / "run" / "model_00001.pt"))
    state = {key: value for key, value in payload.items() if key not in ("model", "config", "tokenizer", "template")}
    state["rng"][0]["python"][1] = state["rng"][0]["python"][1][:3]  # else most mutations would be of its 625 numbers
    state["rng"][0]["numpy"][1] = state["rng"][0]["numpy"][1][:3]

    real_run = Trainer.run

    def run_if_short(trainer: Trainer) -> bool:
        """Steps of a million windows are what a checkpoint may ask for, and no hang."""
        return real_run(trainer) if trainer.plan.windows_per_step <= 64 else False

    def read(given: Any) -> None:
        if isinstance(given, dict) and isinstance(given.get("rng"), list) and given["rng"]:
            for kind, words in (("python", 625), ("numpy", 624)):
                with contextlib.suppress(TypeError, LookupError):
                    if isinstance(given["rng"][0][kind][1], list):
                        given["rng"][0][kind][1] = list(range(words))
        path = home / "given" / "model_00001.pt"
        path.unlink(missing_ok=True)
        try:
            save_checkpoint(path, {**payload, **given} if isinstance(given, dict) else payload)
        except (RecursionError, UnicodeEncodeError):
            return
        shutil.copy(home / "run" / "metrics.jsonl", home / "given")
        with without_pictures(), mock.patch.object(Trainer, "run", run_if_short):
            pretrain(train_settings(data, home / "given", resume=True, checkpoint_path=str(path), **run))

    yield Reader("training state", [state], mutated_value, quiet(read), 600)


def plain_values(_: Path) -> Iterable[Reader]:
    config = GPTConfig(
        block_size=64, vocab_size=257, padded_vocab_size=384, n_layer=3, n_head=(4, 0, 2), n_kv_head=(2, 0, 1),
        head_dim=8, n_embd=32, mlp_dim=(24, 40, 0),
    ).to_dict()  # fmt: skip
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {**config, **LLAMA, "rope_scaling": {**scaled, "original_max_position_embeddings": 16}}

    def from_dict(values: Any) -> None:
        if isinstance(values, dict):
            GPTConfig.from_dict(values)

    yield Reader("GPTConfig", [config, rope], mutated_value, from_dict, 4000)
    request = {
        "model": "a", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "stop": ["x"],
        "temperature": 0.5, "top_p": 0.9, "max_tokens": 4, "seed": 1, "stream": True, "n": 1,
        "stream_options": {"include_usage": True}, "logit_bias": {}, "response_format": {"type": "text"},
    }  # fmt: skip

    def completion(body: bytes) -> None:
        try:
            read_request(body, Sampling())
        except ApiError as error:
            json.dumps(error.body)
            raise ValueError(" ".join(str(error).split())) from None

    yield Reader("request of a completion", [json.dumps(request).encode()], mutated_json, completion, 5000)


# ---- files of other projects


def safetensors(home: Path) -> Iterable[Reader]:
    from safetensors.torch import save

    good = save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}, {"format": "pt"})

    def read(path: Path) -> None:
        for name, entry in read_header(path).items():
            for _, rows in read_blocks(path, name, entry):
                rows.float()

    def header(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        length = int.from_bytes(data[:8], "little")
        text = mutated_json(data[8 : 8 + length], rng, [seed[8 : 8 + length] for seed in seeds])
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    file = from_file(home / "model.safetensors", read)
    yield Reader("safetensors, bytes", [good], mutated_bytes, file, 5000)
    yield Reader("safetensors, header", [good], header, file, 5000)
    yield Reader("statistics", [good], mutated_bytes, from_file(home / "layer.safetensors", load_statistics), 1500)


def gguf(home: Path) -> Iterable[Reader]:
    bpe = train_bpe(["the quick brown fox"], 260)
    headers, files = [], []
    for name, more in {
        "gpt2": {"n_kv_head": 2},
        "llama": LLAMA | {"qkv_bias": False, "o_bias": False, "mlp_bias": False},
    }.items():
        save_tiny(home / f"{name}.pt", block_size=8, **{**SMALL, **more})
        payload = load_checkpoint(home / f"{name}.pt")
        if name == "llama":
            payload["template"] = CHAT_TEMPLATES["chatml"].spec()
        write_gguf(payload, home / f"{name}.gguf")
        files.append((home / f"{name}.gguf").read_bytes())
        headers.append(read_gguf_header(home / f"{name}.gguf"))
    metadata = [listed(header.metadata) for header in headers]
    metadata.append({**metadata[1], **sentencepiece()})

    def read(path: Path) -> None:
        open_model(path)

    def of_values(values: Any) -> None:
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            return
        header = GgufHeader(home / "given.gguf", {key: tupled(value) for key, value in values.items()}, tensors)
        read_gguf_config(header)
        tokenizer, template = read_vocabulary(header)
        tokenizer.encode("the fox")
        if template is not None:
            template.text([{"role": "user", "content": "hi"}])

    tensors = headers[1].tensors
    assert bpe.vocab_size
    yield Reader("GGUF, bytes", files, mutated_bytes, from_file(home / "given.gguf", read), 4000)
    yield Reader("GGUF, metadata", metadata[1:], mutated_value, of_values, 4000)


def sentencepiece() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(8)), "\u2581", "a", "b", "ab", "\u2581a"]
    types = [2, 3, 3, *[6] * 8, 1, 1, 1, 1, 1]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [0.0] * 11 + [-1.0, -2.0, -3.0, -4.0, -5.0], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.pre": "default",
    }  # fmt: skip


def listed(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in metadata.items()}


def tupled(value: Any) -> Any:
    """As a header's reader gives values: arrays as tuples, numbers of 64 bits, and no objects."""
    if isinstance(value, int) and not isinstance(value, bool):
        return max(-(1 << 63), min(value, (1 << 64) - 1))
    return tuple(map(tupled, value)) if isinstance(value, list) else "" if isinstance(value, dict) else value


def huggingface(home: Path) -> Iterable[Reader]:
    from safetensors.torch import save_file

    llama = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 260, "hidden_size": 8,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "eos_token_id": [0],
        "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": 4,
    }  # fmt: skip
    gpt2 = {"model_type": "gpt2", "vocab_size": 260, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    qwen = {**llama, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
    configs = [json.dumps(config).encode() for config in (llama, gpt2, qwen)]

    def config(data: bytes) -> None:
        with contextlib.suppress(UnicodeDecodeError, json.JSONDecodeError, RecursionError):  # read_object's business
            values = json.loads(data)
            if isinstance(values, dict):
                try:
                    to_gpt_config(values, "config.json")
                except json.JSONDecodeError as error:
                    raise AssertionError("none is read there") from error

    save_tiny(home / "tiny.pt", block_size=16, vocab_size=260, padded_vocab_size=384, **SMALL, **LLAMA,
              qkv_bias=False, o_bias=False, mlp_bias=False)  # fmt: skip
    weights = load_checkpoint(home / "tiny.pt")["model"]
    folder = home / "model"
    folder.mkdir()
    names = {
        "wte.weight": "model.embed_tokens.weight", "ln_f.weight": "model.norm.weight", "h.0.": "model.layers.0.",
        "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.": "self_attn.",
    }  # fmt: skip
    theirs = {}
    for name, tensor in weights.items():
        for ours, other in names.items():
            name = name.replace(ours, other)
        theirs[name] = tensor[:260].clone() if "embed" in name else tensor.clone()
    save_file(theirs, folder / "a.safetensors")
    files = {
        "config.json": llama,
        "generation_config.json": {"eos_token_id": [0, 3]},
        "model.safetensors.index.json": {"metadata": {}, "weight_map": dict.fromkeys(theirs, "a.safetensors")},
        "tokenizer_config.json": {
            "bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|endoftext|>", "add_bos_token": True,
            "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
        },
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.loads(json.dumps(train_bpe(["the fox"], 260).spec()))["json"])

    def whole(given: Any) -> None:
        for name in files:
            value = given.get(name) if isinstance(given, dict) else given
            (folder / name).unlink(missing_ok=True)
            if value is not None:
                (folder / name).write_bytes(plain_json(value))
        payload = read_huggingface(folder)
        template_from_spec(payload["template"])

    bin_folder = home / "bin"
    bin_folder.mkdir()

    def bin_weights(path: Path) -> None:
        for tensor in find_tensors(path.parent).values():
            for _, rows in tensor.blocks():
                rows.float()

    yield from (
        Reader(f"pytorch_model.bin, {kind}", [torch_saved(theirs, kind == "archive")], mutated_bytes,
               from_file(bin_folder / "pytorch_model.bin", bin_weights), 1500)
        for kind in ("archive", "old")
    )  # fmt: skip
    yield Reader("config.json", configs, mutated_json, config, 4000)
    yield Reader("folder of Hugging Face's", [files], mutated_value, whole, 2500)


def torch_saved(value: Any, as_archive: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=as_archive)
    return file.getvalue()


def peft(home: Path) -> Iterable[Reader]:
    base = save_tiny(home / "base.pt", block_size=8, **{**SMALL, "n_kv_head": 2})
    write_peft(load_checkpoint(make_adapter(base, home / "adapter.pt")), home / "peft")
    file, config = home / "peft" / "adapter_config.json", load_checkpoint(base)["config"]
    good = {**json.loads(file.read_bytes()), "rank_pattern": {"c_attn": 12}, "alpha_pattern": {}, "use_dora": False}
    seeds = [file.read_bytes(), json.dumps(good).encode()]
    read = from_file(file, lambda path: read_peft(path.parent, config))
    yield Reader("adapter_config.json", seeds[:1], mutated_json, read, 3000)


def tokenizers(home: Path) -> Iterable[Reader]:
    learned = train_bpe(["the quick brown fox jumps over the lazy dog"], 265).spec()["json"]
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, "a": 4, "b": 5, "ab": 6, "<0x41>": 7}
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    metaspace = {
        "version": "1.0",
        "added_tokens": [
            {"id": token, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False} for name, token in list(pieces.items())[:3]
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False},
        "post_processor": {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": pieces,
                  "merges": [["a", "b"]]},
    }  # fmt: skip

    def read(data: bytes) -> None:
        path = home / "tokenizer.json"
        path.write_bytes(data)
        tokenizer = load_tokenizer(str(path))
        ids = tokenizer.encode("the fox a\u4e2d<s>")
        tokenizer.decode(ids)
        tokenizer.encode_special("<s>ab<|endoftext|>")
        assert isinstance(tokenizer, BpeTokenizer) and tokenizer.fingerprint and tokenizer.spec()

    seeds = [learned.encode(), json.dumps(metaspace).encode()]
    yield Reader("tokenizer.json", [*seeds, seeds[1], seeds[1]], mutated_json, read, 3000)


# ---- templates, settings, records


FRAGMENTS = [
    "{% for m in messages %}{{ m.role ~ m.content|trim }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}",
    "{% set ns = namespace(a=[]) %}{% for m in messages[::-1] %}{% set ns.a = ns.a + [m] %}{% endfor %}{{ ns.a }}",
    "{% macro f(x, y=2) %}{{ x * y }}{% endmacro %}{{ f('ab') }}{{ messages|map(attribute='role')|join(', ')|upper }}",
    "{{ '%s %d' % ('a', 3) }}{{ '{:>9}'.format(bos_token) }}{{ messages|selectattr('role', 'eq', 'user')|list }}",
]


def templates(_: Path) -> Iterable[Reader]:
    sources = [*(template.source for template in CHAT_TEMPLATES.values()), *FRAGMENTS]
    messages = [{"role": "user", "content": "hi <b>"}, {"role": "assistant", "content": "\u4f60\u597d"}]

    def read(source: str) -> None:
        render(source, {"messages": messages, "bos_token": "<s>", "add_generation_prompt": True}, "mine")

    yield Reader("chat template", sources, mutated_text, read, 6000)


def settings(home: Path) -> Iterable[Reader]:
    files = [file.read_bytes() for file in sorted((ROOT / "configs").glob("*.yaml"))]
    tuning = [
        file.read_bytes()
        for file in sorted((ROOT / "configs").glob("[dl]*.yaml"))
        if b"preset" not in file.read_bytes()
    ]
    searching = [file.read_bytes() for file in sorted((ROOT / "configs").glob("search_*.yaml"))]
    config = from_file(home / "run.yaml", lambda path: load_yaml(str(path), FinetuneSettings, beside=("search",)))
    space = from_file(home / "search.yaml", lambda path: read_space(str(path)))
    words = [
        ["--max_lr", "1e-4", "--epochs", "2", "--finetune_method=lora", "--lora_r", "4", "--no_packing"],
        ["--data_dir", "a b", "--sample_prompts", "one", "two", "--compile", "off", "--lora-target-modules", "q_proj"],
        ["--total_batch_size", "1e5", "--eval_interval", "epoch", "--wandb", "--learning_rate", "3"],
    ]

    def flags(given: Any) -> None:
        if isinstance(given, list) and all(isinstance(word, str) for word in given):
            with contextlib.suppress(SystemExit):  # of --help
                parse(FinetuneSettings, given)

    def yaml_lines(data: bytes, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        if rng.random() < 0.3:
            return mutated_bytes(data, rng, seeds)
        return mutated_text(data.decode(), rng, [seed.decode() for seed in seeds]).encode("utf-8", "surrogatepass")

    usable = [data for data in files if takes(config, data)]
    assert len(usable) > 3 and tuning
    yield Reader("YAML", usable, yaml_lines, config, 4000)
    yield Reader("YAML of a search", searching[:1], yaml_lines, space, 150)
    yield Reader("flags", words, mutated_value, quiet(flags), 500)


def takes(read: Callable[[bytes], Any], data: bytes) -> bool:
    try:
        read(data)
    except ValueError:
        return False
    return True


RECORDS: list[list[dict[str, Any]]] = [
    [{"instruction": "a", "context": "b", "response": "c", "category": "d", "system": "e"}],
    [{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "t"}]},
                   {"role": "assistant", "content": "a"}]}],
    [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}],
    [{"prompt": "p", "chosen": "c", "rejected": [{"role": "assistant", "content": "r"}]}],
    [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}],
    [{"problem": "p", "solution": "  s"}, {"prompt": [{"role": "user", "content": "p"}], "completion": "c"}],
    [{"text": "t"}, {"prompt": "p"}, {"question": "q", "instruction": "i", "output": "o", "input": None}],
]  # fmt: skip


def records(home: Path) -> Iterable[Reader]:
    lines = ["\n".join(map(json.dumps, rows)).encode() + b"\n" for rows in RECORDS]
    dolly, chatml = TEMPLATES["dolly"], CHAT_TEMPLATES["chatml"]

    def read(path: Path) -> None:
        for where, row in record_rows("jsonl", [str(path)]):
            try:
                sample = sample_of(row, format_of(row, where), where)
            except Unusable:
                continue
            except ValueError as error:
                if "is a record of" in str(error) or format_of(row, where) != "text":
                    raise
                continue
            for template in (chatml, dolly):
                with contextlib.suppress(ValueError):  # a template may refuse an order of roles
                    render_conversation(sample.messages, template, BYTES)
            assert sample.text

    def packed(path: Path) -> None:
        for where, row in record_rows("jsonl", [str(path)]):
            format_of(row, where)

    def scored(path: Path) -> None:
        RecordFile(path, 100)

    choices = [
        b'{"ctx": "a", "endings": ["b", "c"], "label": 1}\n',
        b'{"question": "a", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B", "context": "c"}\n',
        b'{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d [x]", "e"], "label": "0"}\n',
    ]
    prompts = [b'{"prompt": "a", "context": "b", "reference": "c"}\n{"instruction": "d", "category": "e"}\n']
    table = parquet(home / "seed.parquet")
    yield Reader("records", lines, mutated_lines, from_file(home / "a.jsonl", read), 8000)
    yield Reader("records to score", lines[:3], mutated_lines, from_file(home / "s.jsonl", scored), 3000)
    yield Reader("records, packed", [gzip.compress(line) for line in lines], mutated_bytes,
                 from_file(home / "a.jsonl.gz", packed), 2000)  # fmt: skip
    yield Reader("records, Parquet", [table], mutated_bytes, from_file(home / "a.parquet", parquet_rows), 2000)
    yield Reader("questions", choices, mutated_lines, from_file(home / "q.jsonl", read_choices), 4000)
    yield Reader("prompts", prompts, mutated_lines, from_file(home / "p.jsonl", lambda p: read_prompts(str(p))), 4000)


def parquet(path: Path) -> bytes:
    import pyarrow
    import pyarrow.parquet

    rows = {"instruction": ["a", "b"], "response": ["c", "d"], "messages": [[{"role": "user", "content": "x"}], []]}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    return path.read_bytes()


def parquet_rows(path: Path) -> None:
    for where, row in record_rows("parquet", [str(path)]):
        format_of(row, where)


def texts(home: Path) -> Iterable[Reader]:
    text = "the quick\n brown \u4e2d fox\n".encode()
    synonyms = b"# words\nfast,quick,swift\nslow,idle\n"
    c4 = b'{"text": "one"}\n{"text": "two"}\n'
    yield Reader("text", [text], mutated_bytes, from_file(home / "a.txt", lambda path: read_text(str(path))), 2000)
    yield Reader("text of C4", [c4], mutated_lines, from_file(home / "c.jsonl", lambda p: read_text(f"c4:{p}")), 2000)
    yield Reader("thesaurus", [synonyms], mutated_bytes, from_file(home / "w", lambda p: read_thesaurus(str(p))), 1500)


# ---- what runs and pages leave


def runs(home: Path) -> Iterable[Reader]:
    metrics = b"".join(
        json.dumps({"step": step, "loss": 3.0 - step / 50, "lr": 1e-3, "grad_norm": 1.0, "tokens": 512 * step,
                    "tokens_per_s": 9.5, "val_loss": 3.0, "rewards/gap": 0.1, "skipped": step == 3}).encode() + b"\n"
        for step in range(24)
    )  # fmt: skip
    samples = b'{"step": 2, "prompt": "a", "text": "b"}\n{"step": 4, "prompt": "a", "text": "c"}\n'
    folder = home / "run"
    folder.mkdir()
    files = {
        "metrics.jsonl": metrics,
        "samples.jsonl": samples,
        "config.yaml": b"max_lr: 0.001\nlog_dir: logs\nsample_prompts: [a, b]\n",
        "status.json": b'{"state": "running", "step": 3}\n',
        "training.log": b"Step 1/4 | Loss: 2\nWarning: Overfitting detected\nloss is not finite (step 3)\n",
    }

    def page(_: Path) -> None:
        render_runs([read_run(folder)])

    def live(_: Path) -> None:
        answer = json.loads(Metrics([folder]).answer())
        if "error" in answer:
            raise ValueError(" ".join(str(answer["error"]).split()))

    def cut(path: Path) -> None:
        lines = JsonLines(path, print)
        lines.cut_after(9)
        lines.records()

    for name, content in files.items():
        (folder / name).write_bytes(content)
    for name, content in files.items():
        mutate = mutated_lines if name.endswith(".jsonl") else mutated_json if name.endswith(".json") else mutated_bytes

        def read(data: bytes, name: str = name, content: bytes = content) -> None:
            try:
                from_file(folder / name, page)(data)
            finally:
                (folder / name).write_bytes(content)

        yield Reader(f"page of {name}", [content], mutate, read, {"metrics.jsonl": 2000}.get(name, 800))
    live_home = home / "live"
    live_home.mkdir()
    folder = live_home
    yield Reader("live metrics", [metrics], mutated_lines, from_file(live_home / "metrics.jsonl", live), 2000)
    yield Reader("metrics cut", [metrics], mutated_lines, from_file(home / "metrics.jsonl", cut), 2000)
    votes = {
        "format": 1, "kind": "votes", "title": "t", "comparison": "c", "checkpoints": ["a", "b"], "rows": 4, "seed": 7,
        "votes": [{"row": 3, "prompt": "p", "category": "", "shown": [1, 0], "choice": 0},
                  {"row": 1, "prompt": "p", "category": "", "shown": [0, 1], "choice": None}],
    }  # fmt: skip
    tally = from_file(home / "votes.json", lambda path: votes_report([path]))
    yield Reader("votes", [json.dumps(votes).encode()], mutated_json, tally, 4000)
