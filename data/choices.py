"""One message for a name that is not among the known ones."""

import difflib
from collections.abc import Iterable


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """ValueError with the nearest name unless `value` is one of `choices`; `what` is the flag that holds it."""
    known = list(choices)
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"{what} {value!r} is unknown, expected one of {', '.join(known)}.{hint}")
