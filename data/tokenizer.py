"""Text to token ids and back: GPT-2's BPE, plain bytes, or any tokenizer.json, one trained here among them.

    tokenizer = load_tokenizer("gpt2")
    ids = tokenizer.encode("Hello world")        # [15496, 995]
    tokenizer.decode(ids)                        # "Hello world"

Text never turns into a special id: "<|endoftext|>" inside a document is encoded as the 13 characters that it is.
Only `encode_special`, which chat templates need, takes names of special tokens for their ids.
`spec()` is what checkpoints and data sets store; `tokenizer_from_spec` builds the same tokenizer from it.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.tokenizer_base import END_OF_TEXT, ByteTokenizer, Tokenizer, utf8
from data.tokenizer_gpt2 import Gpt2Tokenizer
from data.tokenizer_json import BpeTokenizer

__all__ = [
    "END_OF_TEXT",
    "BpeTokenizer",
    "ByteTokenizer",
    "Gpt2Tokenizer",
    "Tokenizer",
    "load_tokenizer",
    "tokenizer_from_spec",
    "train_bpe",
]

_TOKENIZER_JSON_BYTES = 64 << 20  # the largest published ones have 35 MB


def load_tokenizer(ref: str) -> Tokenizer:
    """The tokenizer that `ref` names: "gpt2", "byte", a tokenizer.json, or a folder with one or with a dataset.json.

    Raises ValueError that says what was found instead.
    """
    if ref == "gpt2":
        return Gpt2Tokenizer()
    if ref == "byte":
        return ByteTokenizer()
    path = Path(ref)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return BpeTokenizer(_read_tokenizer_json(path), str(path))
    close = difflib.get_close_matches(ref, ("gpt2", "byte"), n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ValueError(
        f"tokenizer {ref!r}: no such file or folder; expected gpt2, byte, a tokenizer.json, "
        f"or a folder that holds dataset.json or tokenizer.json.{hint}"
    )


def tokenizer_from_spec(spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `spec()` described. Raises ValueError for an unknown kind or another vocabulary than then."""
    kind, names = spec.get("kind"), [spec.get("eot"), spec.get("bos")]
    if not all(isinstance(name, (str, type(None))) for name in (kind, *names)):
        raise ValueError("tokenizer specification: its kind, eot and bos are not all texts")
    if kind == "gpt2":
        tokenizer: Tokenizer = Gpt2Tokenizer()
    elif kind == "byte":
        tokenizer = ByteTokenizer()
    elif kind == "bpe" and isinstance(spec.get("json"), str):
        tokenizer = BpeTokenizer(spec["json"], "the stored tokenizer", eot=spec.get("eot"), bos=spec.get("bos"))
    else:
        raise ValueError(
            f"tokenizer specification: kind {kind!r:.40} is unknown or incomplete, expected gpt2, byte or bpe"
        )
    expected = spec.get("fingerprint")
    if expected is not None and expected != tokenizer.fingerprint:
        raise ValueError(
            f"tokenizer specification: the {kind} vocabulary here has fingerprint {tokenizer.fingerprint[:12]}, "
            f"expected {str(expected)[:12]!r}: it is not the one that the data or model was made with"
        )
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids learned from `texts`; the same texts give the same vocabulary.

    Id 0 is <|endoftext|>, 1..256 are the bytes, so that any text can be encoded. Raises ValueError below 257 ids.
    """
    if vocab_size < 257:
        raise ValueError(f"--vocab_size {vocab_size}: a byte-level BPE needs at least 257 (bytes and {END_OF_TEXT})")
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's split into words
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((utf8(text) for text in texts), trainer)
    return BpeTokenizer(backend.to_str())


def _from_folder(folder: Path) -> Tokenizer:
    manifest = folder / "dataset.json"
    if not manifest.is_file():
        return BpeTokenizer(_read_tokenizer_json(folder / "tokenizer.json"), str(folder / "tokenizer.json"))
    from data.manifest import read_manifest

    spec = dict(read_manifest(folder)["tokenizer"])
    if spec.get("kind") == "bpe":
        spec["json"] = _read_tokenizer_json(folder / "tokenizer.json")
    try:
        return tokenizer_from_spec(spec)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _read_tokenizer_json(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a tokenizer's folder holds dataset.json or tokenizer.json")
    if path.stat().st_size > _TOKENIZER_JSON_BYTES:
        raise ValueError(f"{path}: has {path.stat().st_size:,} bytes, expected a tokenizer.json of at most 64 MiB")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}, expected a tokenizer.json") from error
