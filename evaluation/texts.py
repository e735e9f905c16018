"""Texts to score: files, standard input, and the two that papers report, `wikitext2` and `c4`.

The papers' protocol (GPTQ, SparseGPT, Wanda and those after them): the documents joined to one text, cut into windows
that do not overlap, the rest that fills no window left out, in every window all tokens but the first scored.
"""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.sources import record_rows
from data.tokenizer import Tokenizer
from evaluation.perplexity import ArrayTokens

PAPER_WINDOW = 2048  # tokens; what most tables of perplexity state


@dataclass(frozen=True)
class Recipe:
    """How papers make one text of a data set's file."""

    repository: str  # of the Hub
    file: str
    join: str
    how: str
    documents: int | None = None  # only the first
    windows: int | None = None  # only the first


RECIPES = {
    "wikitext2": Recipe(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        join="\n\n",
        how="lines joined by two line ends",
    ),
    "c4": Recipe(
        "allenai/c4",
        "en/c4-validation.00000-of-00008.json.gz",
        join=" ",
        how="the first 1,100 documents joined by a space, 256 windows at most",
        documents=1100,
        windows=256,
    ),
}


@dataclass(frozen=True)
class PlainText:
    """A text by name, and the recipe that it was made by, if any."""

    name: str
    characters: str
    recipe: Recipe | None = None

    def stream(self, tokenizer: Tokenizer) -> ArrayTokens:
        """Its tokens, behind the begin token of a model whose texts have one."""
        ids = tokenizer.encode_numpy(self.characters)
        if tokenizer.bos_id is not None:
            ids = np.concatenate([np.array([tokenizer.bos_id], ids.dtype), ids])
        return ArrayTokens(ids)

    def window(self, context: int) -> int:
        """The length of a window where none was asked for, for a model with this context."""
        return context if self.recipe is None else min(context, PAPER_WINDOW)

    def limit(self, n_tokens: int, block_size: int) -> int:
        """How many of its tokens are read: by a recipe those that fill windows of this length."""
        if self.recipe is None or n_tokens < block_size:
            return n_tokens
        return min(n_tokens // block_size, self.recipe.windows or n_tokens) * block_size


def read_text(name: str) -> PlainText:
    """A UTF-8 text file, `-` for standard input, `wikitext2` or `c4` from the Hub, or `c4:FILE` from a file of it.

    A file that exists is meant before a recipe. Raises ValueError or OSError, in one line, for what cannot be read.
    """
    recipe, _, file = name.partition(":")
    if recipe in RECIPES and not Path(name).exists():
        return _read_recipe(recipe, file)
    path = Path(name)
    if name != "-" and path.is_dir():
        raise ValueError(f"{path}: is a folder; --input takes text files, --data_dir a prepared set")
    if name != "-" and not path.exists():
        raise FileNotFoundError(f"{path}: no such text file; by name there are {' and '.join(RECIPES)}")
    where = "standard input" if name == "-" else str(path)
    characters = _decoded(sys.stdin.buffer.read() if name == "-" else path.read_bytes(), where)
    if not characters.strip():
        raise ValueError(f"{where}: is empty, expected a text to score")
    return PlainText(where if name == "-" else path.name, characters)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{where}:{line}: is not UTF-8 (byte {data[error.start]:#04x}); save the text as UTF-8"
        ) from None


def _read_recipe(name: str, file: str) -> PlainText:
    recipe = RECIPES[name]
    path = Path(file) if file else _fetched(name, recipe)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of {name}; expected {recipe.file} of {recipe.repository}")
    documents = list(itertools.islice(_documents(path), recipe.documents))
    characters = recipe.join.join(documents)
    if not characters.strip():
        raise ValueError(f"{path}: is empty, expected the text of {name}")
    return PlainText(name, characters, recipe)


def _documents(path: Path) -> Iterator[str]:
    """The documents of Parquet or JSON lines, or a text's lines as the Hub's WikiText has them: "" for an empty one."""
    if path.suffix in (".parquet", ".json", ".jsonl", ".gz"):
        for where, row in record_rows("parquet" if path.suffix == ".parquet" else "jsonl", [str(path)]):
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f"{where}: has no field 'text' that holds text")
            yield row["text"]
        return
    for line in io.StringIO(_decoded(path.read_bytes(), str(path)), newline="\n"):
        yield line if line.strip() else ""


def _fetched(name: str, recipe: Recipe) -> Path:
    """The recipe's file in the Hub's cache, downloaded where it is not there yet."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(recipe.repository, recipe.file, repo_type="dataset"))
    except Exception as error:  # the library's own, httpx's and OSError
        reason = " ".join(str(error).split())[:160]
        raise OSError(
            f"{name}: could not be read from the Hugging Face Hub ({reason}); give its file with --text {name}:FILE, "
            "or point HF_ENDPOINT to a mirror that can be reached"
        ) from None
