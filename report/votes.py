"""Files of blind votes, as the comparison page saves them: who was preferred how often, and whether that may be chance.

    {"format": 1, "kind": "votes", "title", "comparison": digest of the page, "checkpoints": [label], "rows": 40,
     "seed": 7, "votes": [{"row": 3, "prompt", "category", "shown": [1, 0], "choice": 0 or None}]}

`shown` holds the columns in the order in which they stood, `choice` the column that was preferred, None for neither.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report.page import counted, show_controls

MAX_BYTES = 64_000_000  # a vote takes about 300 bytes: enough for 200,000


def votes_report(paths: Sequence[str | Path]) -> str:
    """The tally of one file, or of several readers' files on the same page, as text.

    Raises ValueError or OSError for what is no file of votes, and for files on different pages.
    """
    if not paths:
        raise ValueError("no file of votes: python -m report votes FILE (the page saves one after a blind vote)")
    files = [read_votes(path) for path in paths]
    for path, file in zip(paths, files):
        if any(file[name] != files[0][name] for name in ("comparison", "checkpoints")):
            raise ValueError(f"{path}: votes on another page than {paths[0]}: tally them apart")
    labels = [show_controls(label) for label in files[0]["checkpoints"]]
    votes = [vote for file in files for vote in file["votes"]]
    readers = f" of {len(files)} files" if len(files) > 1 else ""
    lines = [show_controls(files[0]["title"]), f"{counted(len(votes), 'vote')}{readers}", ""]
    wins = Counter(vote["choice"] for vote in votes)
    width = max(map(len, [*labels, "neither"]))
    seen = sorted({column for vote in votes for column in vote["shown"]})
    lines += [f"{labels[column]:<{width}}  {wins[column]:>5}" for column in seen]
    lines += [f"{'neither':<{width}}  {wins[None]:>5}", ""]
    return "\n".join(lines + [_pair_line(votes, labels, one, two) for one, two in itertools.combinations(seen, 2)])


def _pair_line(votes: Sequence[dict[str, Any]], labels: Sequence[str], one: int, two: int) -> str:
    """How two columns did where both were shown, and how often chance alone would be as uneven."""
    both = Counter(vote["choice"] for vote in votes if {one, two} <= set(vote["shown"]))
    score = f"{labels[one]} {both[one]} : {both[two]} {labels[two]}"
    if not both[one] + both[two]:
        return f"{score}, no vote for either"
    p = sign_test(both[one], both[two])
    return (
        f"{score}, p = {p:.3f} (two-sided sign test)" if p >= 0.001 else f"{score}, p = {p:.1e} (two-sided sign test)"
    )


def sign_test(wins: int, losses: int) -> float:
    """The probability that a fair coin, thrown once for each decided vote, is at least as uneven as this; 1 for none.

    Exact: sums of binomial coefficients as whole numbers.
    """
    throws = wins + losses
    tail = sum(math.comb(throws, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**throws)


def read_votes(path: str | Path) -> dict[str, Any]:
    """A file of votes, checked. Raises ValueError or OSError naming the file and what is wrong."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of votes")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes are too many for a file of votes")
    try:
        file = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); the page's `Save the votes` writes such a file") from None
    if not isinstance(file, dict) or file.get("kind") != "votes":
        raise ValueError(f"{path}: is JSON of something else, expected the votes that a comparison page saves")
    if file.get("format") != 1:
        raise ValueError(f"{path}: votes of format {file.get('format')!r:.40}, this version reads format 1")
    kinds = {"title": str, "comparison": str, "checkpoints": list, "rows": int, "votes": list}
    for name, kind in kinds.items():
        if not isinstance(file.get(name), kind):
            raise ValueError(f"{path}: `{name}` is {str(file.get(name))[:40]!r}, expected {kind.__name__}")
    if not all(isinstance(label, str) for label in file["checkpoints"]):
        raise ValueError(f"{path}: `checkpoints` holds something other than names")
    seen = set()
    for number, vote in enumerate(file["votes"], start=1):
        _check_vote(vote, len(file["checkpoints"]), file["rows"], f"{path}: vote {number}")
        if vote["row"] in seen:
            raise ValueError(f"{path}: vote {number}: row {vote['row']} was voted on before")
        seen.add(vote["row"])
    return file


def _check_vote(vote: Any, columns: int, rows: int, where: str) -> None:
    if not isinstance(vote, dict):
        raise ValueError(f"{where}: is not an object")
    shown, choice, row = vote.get("shown"), vote.get("choice"), vote.get("row")
    if not _is_index(row, rows):
        raise ValueError(f"{where}: `row` is {str(row)[:40]!r}, expected 0 to {rows - 1}")
    if not isinstance(shown, list) or not all(_is_index(c, columns) for c in shown) or len(set(shown)) < len(shown):
        raise ValueError(
            f"{where}: `shown` is {str(shown)[:40]!r}, expected different columns, each 0 to {columns - 1}"
        )
    if "choice" not in vote:
        raise ValueError(f"{where}: has no `choice`, expected one of {shown} or null")
    if choice is not None and not (_is_index(choice, columns) and choice in shown):
        raise ValueError(f"{where}: `choice` is {str(choice)[:40]!r}, expected one of {shown} or null")


def _is_index(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count
