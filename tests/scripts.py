"""A script's main in this process, as its command line would run it: what several scripts' tests share."""

from __future__ import annotations

from typing import Any

from training.settings import run_script


def run_main(capsys: Any, main: Any, settings: type, *words: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    code = 0
    try:
        run_script(main, settings, "", [str(word) for word in words])
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    return code, out, err


def one_line_error(outcome: tuple[int, str, str]) -> str:
    """The one line that a mistake is answered with."""
    code, _, err = outcome
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err
