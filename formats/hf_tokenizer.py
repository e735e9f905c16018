"""The tokenizer and the chat template of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.chat import ChatTemplate
from data.tokenizer import END_OF_TEXT, BpeTokenizer, Tokenizer
from formats.errors import FormatError
from formats.hf_folder import file_in, read_object, read_text

_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds any file of a tokenizer, readable here or not."""
    return any(file_in(folder, name) is not None for name in _FILES)


def read_hf_tokenizer(folder: str | Path) -> tuple[Tokenizer, ChatTemplate | None]:
    """The folder's tokenizer, and its chat template if it has one.

    The end of text is the first of the ids at which the model stops; all of them end an answer of the template.
    FormatError, naming the remedy, where there is no tokenizer.json (GPT-2's vocab.json with merges.txt is read too).
    """
    folder = Path(folder)
    text = _tokenizer_json(folder)
    settings = read_object(folder, "tokenizer_config.json") or {}
    special = _special_tokens(folder, text)
    stop = [special[token] for token in _stop_ids(folder) if token in special]
    end = _content(folder, settings, "eos_token")
    stop += [end] if end in special.values() and end not in stop else []
    begin = _content(folder, settings, "bos_token")
    adds = settings.get("add_bos_token")
    if adds not in (None, True, False):
        shown = folder / "tokenizer_config.json"
        raise FormatError(f"{shown}: add_bos_token is {str(adds)[:80]}, expected true or false")
    bos = None if adds is None else begin if adds else ""
    where = str(folder / "tokenizer.json")
    try:
        tokenizer = BpeTokenizer(text, where, eot=stop[0] if stop else None, bos=bos)
    except ValueError as error:
        raise FormatError(str(error)) from None
    source = _chat_template(folder, settings)
    if source is None:
        return tokenizer, None
    return tokenizer, ChatTemplate("chat_template", source, begin, end, tuple(stop))


def _tokenizer_json(folder: Path) -> str:
    text = read_text(folder, "tokenizer.json")
    if text is not None:
        return text
    config = read_object(folder, "config.json") or {}
    vocabulary, merges = (file_in(folder, name) for name in ("vocab.json", "merges.txt"))
    # The same two files of another family are split into words in another way, which only a tokenizer.json tells.
    if config.get("model_type") == "gpt2" and vocabulary is not None and merges is not None:
        return _gpt2_tokenizer_json(vocabulary, merges)
    found = [name for name in _FILES if file_in(folder, name) is not None]
    raise FormatError(
        f"{folder}: holds {', '.join(found) if found else 'no tokenizer'}, expected a tokenizer.json: write one with "
        "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _gpt2_tokenizer_json(vocabulary: Path, merges: Path) -> str:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise FormatError(f"{vocabulary}: no vocabulary of {merges.name} ({str(error)[:120]})") from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    text: str = backend.to_str()
    return text


def _special_tokens(folder: Path, text: str) -> dict[int, str]:
    """Id -> content of the special tokens of a tokenizer.json."""
    try:
        added = json.loads(text)["added_tokens"]
        return {token["id"]: token["content"] for token in added if token["special"]}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        raise FormatError(f"{folder / 'tokenizer.json'}: no tokenizer.json that can be read ({reason})") from None


def _stop_ids(folder: Path) -> list[Any]:
    """The ids at which the model's text ends: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        ids = (read_object(folder, name) or {}).get("eos_token_id")
        if ids is not None:
            listed = ids if isinstance(ids, list) else [ids]
            if not all(type(token) is int for token in listed):
                raise FormatError(f"{folder / name}: eos_token_id is {str(ids)[:80]}, expected an id or a list of ids")
            return list(dict.fromkeys(listed))
    return []


def _content(folder: Path, settings: dict[str, Any], name: str) -> str:
    """A token of tokenizer_config.json, which is text or an object with "content"; "" where there is none."""
    token = settings.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise FormatError(f"{folder / 'tokenizer_config.json'}: {name} is {str(token)[:80]}, expected text")
    return token or ""


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja before tokenizer_config.json's chat_template, as in transformers; of several, "default"."""
    source: Any = read_text(folder, "chat_template.jinja")
    where = folder / "tokenizer_config.json"
    if source is None:
        source = settings.get("chat_template")
    if source is None:
        where = folder / "chat_template.json"
        source = (read_object(folder, where.name) or {}).get("chat_template")
    if isinstance(source, list):
        entries = [entry for entry in source if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
        named = {entry["name"]: entry.get("template") for entry in entries}
        if "default" not in named:
            names = ", ".join(map(str, named))
            raise FormatError(f"{where}: has chat templates named {names[:200]}, expected one named default")
        source = named["default"]
    if source is not None and not isinstance(source, str):
        raise FormatError(f"{where}: chat_template is a JSON {type(source).__name__}, expected text")
    return source
