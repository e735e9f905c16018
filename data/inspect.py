"""A token set in plain text: what it holds, how long its records are, what a context length does to them."""

import itertools
import os
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from data.answer_windows import PairWindows, PromptWindows
from data.chat import stop_ids
from data.manifest import read_manifest, resolve_data_dir
from data.packing import pack
from data.shards import TokenSet, open_dataset
from data.templates import template_from_spec
from data.windows import supervised_counts

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

_BAR = 40  # characters of the longest bar
_GREEN, _RED, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[0m"
_BLOCK = 4 << 20  # tokens looked at at a time


def inspect_dataset(
    data_dir: str | os.PathLike[str], block_size: int, n_records: int = 3, *, color: bool = False
) -> str:
    """Check the set at `data_dir` whole and describe it.

    Counts and lengths of each split; what is cut and how full packed rows are at `block_size` tokens; warnings where
    nothing is supervised or no end is learnt; what padding is; the first `n_records` records or pairs of the first
    split, decoded, with supervised tokens [[marked]], or with `color` green, of a rejected answer red.
    Raises ValueError as `open_dataset` does.
    """
    from data.tokenizer import load_tokenizer

    if block_size < 1:
        raise ValueError(f"--block_size is {block_size}, expected at least 1 token")
    if n_records < 0:
        raise ValueError(f"--records is {n_records}, expected at least 0")
    folder = resolve_data_dir(data_dir)
    meta = read_manifest(folder)
    splits = [open_dataset(folder, name) for name in meta["splits"]]
    tokenizer = load_tokenizer(str(folder))
    parts = [_heading(str(folder), meta), _table(splits)]
    for split in splits:
        parts += [_histogram(split), _at_block_size(split, block_size), *_findings(split, tokenizer)]
    if meta["kind"] in ("instruction", "preference"):
        parts.append(_padding(meta, tokenizer))
    if n_records:
        parts.append(_records(splits[0], tokenizer, n_records, block_size, color))
    return "\n\n".join(parts)


def _heading(folder: str, meta: dict[str, Any]) -> str:
    template = (meta["template"] or {}).get("name", "none")
    return (
        f"{folder}: {meta['kind']} from {meta['source'].get('name', 'an unnamed source')}\n"
        f"tokenizer {meta['tokenizer'].get('kind', '?')} ({meta['vocab_size']:,} ids, {meta['dtype']}), "
        f"prompt template {template}, seed {meta['seed']}, val_fraction {meta['val_fraction']}"
    )


def _table(splits: list[TokenSet]) -> str:
    lines = [
        f"{'split':<8}{'shards':>8}{'documents':>13}{'tokens':>16}{'supervised':>12}"
        f"{'mean':>9}{'median':>9}{'p95':>9}{'max':>9}"
    ]
    for split in splits:
        lengths = np.diff(split.document_starts)
        p50, p95 = np.percentile(lengths, [50, 95])
        shards = len(split.meta["splits"][split.split]["shards"])
        lines.append(
            f"{split.split:<8}{shards:>8,}{split.n_documents:>13,}{split.n_tokens:>16,}"
            f"{split.n_supervised / split.n_tokens:>12.1%}"
            f"{lengths.mean():>9,.1f}{p50:>9,.0f}{p95:>9,.0f}{lengths.max():>9,}"
        )
    return "\n".join(lines)


def _histogram(split: TokenSet) -> str:
    """Documents by length, in classes that double: lengths are spread over several powers of two."""
    classes = np.frexp(np.diff(split.document_starts))[1] - 1  # floor(log2(length))
    first = int(classes.min())
    counts = np.bincount(classes - first)
    lines = [f"{split.split}: documents by length in tokens"]
    for power, count in enumerate(counts.tolist(), start=first):
        bar = "#" * -(-count * _BAR // int(counts.max()))  # rounded up: what is there is seen
        lines.append(f"  {1 << power:>9,} to {(2 << power) - 1:<9,} {count:>11,}  {bar}".rstrip())
    return "\n".join(lines)


def _at_block_size(split: TokenSet, block_size: int) -> str:
    title = f"{split.split} at --block_size {block_size}: "
    needed = np.diff(split.document_starts) - 1  # slots: the last token is a target only
    longer = _share(needed > block_size)
    if split.meta["kind"] in ("preference", "prompts"):
        cut_windows = PairWindows if split.meta["kind"] == "preference" else PromptWindows
        try:
            return title + cut_windows(split, block_size, None).describe()
        except ValueError as error:  # not one fits
            return f"{title}{error}"
    if split.meta["kind"] == "text":
        windows = -(-(split.n_tokens - 1) // block_size)
        return f"{title}{windows:,} windows; {longer} documents are longer than one"
    starts, slots = split.document_starts[:-1], np.minimum(needed, block_size)
    kept = supervised_counts(split, starts, slots)
    lose = _share(kept < supervised_counts(split, starts, needed))
    cut = f"{longer} records are truncated, {lose} lose supervised tokens"
    if not (kept > 0).any():
        return f"{title}{cut}, none has any left"
    used = slots[kept > 0]
    rows = len(pack(used, block_size, seed=0)[1]) - 1
    out = int((kept == 0).sum())
    without = f", {out:,} left out with none" if out else ""
    fill = used.sum() / (rows * block_size)
    return f"{title}{cut}{without}; packed into {rows:,} rows, {fill:.1%} of their slots in use"


def _share(which: np.ndarray) -> str:
    """How many of a boolean array are true, and their share."""
    return f"{int(which.sum()):,} ({which.mean():.1%})"


def _findings(split: TokenSet, tokenizer: "Tokenizer") -> list[str]:
    """Warnings on answers that teach nothing, or not where to stop."""
    if split.meta["kind"] not in ("instruction", "preference"):
        return []
    ends = stop_ids(template_from_spec(split.meta["template"]), tokenizer)
    supervised, learnt = _supervised_and_ends(split, ends)
    found = []
    if not supervised.all():
        found.append(f"{_share(supervised == 0)} documents have no supervised token, so nothing is learnt from them")
    endless = (supervised > 0) & (learnt == 0)
    if endless.any():
        names = ", ".join(_harmless(tokenizer.decode([token])) for token in ends)
        which = (
            "no end token is learnt in any document" if endless.all() else f"{_share(endless)} documents teach no end"
        )
        found.append(
            f"{which}: none of {names} is supervised there, so a model would not learn to stop; either the "
            "answers were cut, or what the template writes behind them is no token of this tokenizer"
        )
    return [f"{split.split}: warning: {text}" for text in found]


def _supervised_and_ends(split: TokenSet, ends: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens of each document are supervised, and how many of these end an answer: int64 (documents,) each."""
    bounds = split.document_starts
    counts = np.zeros((2, split.n_documents), dtype=np.int64)
    first = 0
    while first < split.n_documents:  # a block of documents at a time: constant memory
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + _BLOCK)) - 1)
        start, stop = int(bounds[first]), int(bounds[last])
        mask = split.mask(start, stop)
        is_end = np.isin(split.tokens(start, stop), ends) & (mask > 0)
        for row, values in enumerate((mask, is_end)):
            counts[row, first:last] = np.add.reduceat(values, bounds[first:last] - start, dtype=np.int64)
        first = last
    return counts[0], counts[1]


def _padding(meta: dict[str, Any], tokenizer: "Tokenizer") -> str:
    """What fills up rows, and whether that can be mistaken for the end of an answer."""
    ends = stop_ids(template_from_spec(meta["template"]), tokenizer)
    name = f"{tokenizer.decode([meta['eot_id']])} (id {meta['eot_id']})"
    text = f"padding: rows are filled up with {name}, which is never supervised and never attended to"
    others = [_harmless(tokenizer.decode([token])) for token in ends if token != meta["eot_id"]]
    if others:
        return f"{text}; answers may end with {', '.join(others)} as well"
    return (
        f"{text}. The same token ends answers: padding is told by its place, not by its id, so that such an end is "
        "learnt all the same; a program that masks every pad token by its id would lose it"
    )


def _records(split: TokenSet, tokenizer: "Tokenizer", n_records: int, block_size: int, color: bool) -> str:
    is_pairs = split.meta["kind"] == "preference"
    what = "pairs" if is_pairs else "records"
    marks = "every token is supervised"
    if split.has_mask:
        marks = ("green, of rejected answers red" if is_pairs else "green") if color else "[[marked]]"
        marks += " = supervised"
    blocks = [f"The first {what} of {split.split} ({marks})"]
    for number in range(min(n_records, split.n_documents // (1 + is_pairs))):
        show = _pair if is_pairs else _record
        blocks.append(show(split, tokenizer, number, block_size, color))
    return "\n\n".join(blocks)


def _record(split: TokenSet, tokenizer: "Tokenizer", number: int, block_size: int, color: bool) -> str:
    start, end = _bounds(split, number)
    text = _shown(split, tokenizer, start, end, block_size, _GREEN if color else "")
    return f"--- {number}: {end - start:,} tokens, {int(split.mask(start, end).sum()):,} supervised\n{text}"


def _pair(split: TokenSet, tokenizer: "Tokenizer", number: int, block_size: int, color: bool) -> str:
    """The prompt once, and both answers under it."""
    sides = [_bounds(split, 2 * number), _bounds(split, 2 * number + 1)]
    counts = [int(split.mask(start, end).sum()) for start, end in sides]
    prompt = int(split.mask(*sides[0]).argmax())
    text = _shown(split, tokenizer, sides[0][0], sides[0][0] + prompt, block_size, "")
    lines = [f"--- {number}: {prompt:,} tokens of prompt, {counts[0]:,} chosen, {counts[1]:,} rejected\n{text}"]
    for name, mark, (start, end) in zip(("chosen", "rejected"), (_GREEN, _RED), sides):
        room = max(1, block_size - prompt)
        lines.append(f"{name}: {_shown(split, tokenizer, start + prompt, end, room, mark if color else '')}")
    return "\n".join(lines)


def _bounds(split: TokenSet, number: int) -> tuple[int, int]:
    start, end = split.document_starts[number : number + 2].tolist()
    return start, end


def _shown(split: TokenSet, tokenizer: "Tokenizer", start: int, end: int, limit: int, color: str) -> str:
    """The tokens [start, end) as text, `limit` of them at most, the supervised ones marked or in `color`."""
    shown = min(end, start + limit)
    ids, mask = split.tokens(start, shown), split.mask(start, shown)
    text = "".join(_marked(ids, mask, tokenizer, color)) if split.has_mask else _harmless(tokenizer.decode(ids))
    return f"{text} ... ({end - shown:,} more tokens)" if shown < end else text


def _marked(ids: np.ndarray, mask: np.ndarray, tokenizer: "Tokenizer", color: str) -> Iterator[str]:
    """The text of each run of tokens with equal mask, the supervised ones in `color`, or between brackets without."""
    before, after = (color, _PLAIN) if color else ("[[", "]]")
    if len(ids) == 0:
        return
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    for start, end in itertools.pairwise(borders):
        text = _harmless(tokenizer.decode(ids[start:end].tolist()))
        yield f"{before}{text}{after}" if mask[start] else text


def _harmless(text: str) -> str:
    """Data must not steer the terminal: control characters other than line ends and tabs become their escapes."""
    return "".join(
        f"\\x{ord(each):02x}" if unicodedata.category(each) == "Cc" and each not in "\n\t" else each for each in text
    )
