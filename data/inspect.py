"""A token set in plain text: what it holds, how long its records are, what a context length does to them."""

import itertools
import os
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from data.manifest import read_manifest, resolve_data_dir
from data.packing import pack
from data.shards import TokenSet, open_dataset
from data.windows import supervised_counts

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

_BAR = 40  # characters of the longest bar
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"


def inspect_dataset(
    data_dir: str | os.PathLike[str], block_size: int, n_records: int = 3, *, color: bool = False
) -> str:
    """Check the set at `data_dir` whole and describe it.

    Counts and lengths of each split; what is cut and how full packed rows are at `block_size` tokens; the first
    `n_records` records of the first split, decoded, with supervised tokens [[marked]], or green with `color`.
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
        parts += [_histogram(split), _at_block_size(split, block_size)]
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


def _records(split: TokenSet, tokenizer: "Tokenizer", n_records: int, block_size: int, color: bool) -> str:
    if not split.has_mask:
        title = f"The first records of {split.split} (every token is supervised)"
    else:
        title = f"The first records of {split.split} ({'green' if color else '[[marked]]'} = supervised)"
    blocks = [title]
    for number in range(min(n_records, split.n_documents)):
        start, end = (int(bound) for bound in split.document_starts[number : number + 2])
        shown = min(end, start + block_size)
        ids, mask = split.tokens(start, shown), split.mask(start, shown)
        text = "".join(_marked(ids, mask, tokenizer, color)) if split.has_mask else _harmless(tokenizer.decode(ids))
        if shown < end:
            text += f" ... ({end - shown:,} more tokens)"
        blocks.append(f"--- {number}: {end - start:,} tokens, {int(split.mask(start, end).sum()):,} supervised\n{text}")
    return "\n\n".join(blocks)


def _marked(ids: np.ndarray, mask: np.ndarray, tokenizer: "Tokenizer", color: bool) -> Iterator[str]:
    """The text of each run of tokens with equal mask, the supervised ones between marks."""
    before, after = (_GREEN, _PLAIN) if color else ("[[", "]]")
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    for start, end in itertools.pairwise(borders):
        text = _harmless(tokenizer.decode(ids[start:end].tolist()))
        yield f"{before}{text}{after}" if mask[start] else text


def _harmless(text: str) -> str:
    """Data must not steer the terminal: control characters other than line ends and tabs become their escapes."""
    return "".join(
        f"\\x{ord(each):02x}" if unicodedata.category(each) == "Cc" and each not in "\n\t" else each for each in text
    )
