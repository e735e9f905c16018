"""Pages of finished and of living runs, and the tally of blind votes.

    python -m report logs_finetune                        # logs_finetune/run.html
    python -m report logs logs_finetune --html both.html  # several runs over one another
    python -m report serve logs_finetune --port 8765      # live, on this machine alone
    python -m report votes votes-*.json                   # what readers preferred

Exit code 2 for bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from report.page import show_controls

COMMANDS = ("serve", "votes")


class Parser(argparse.ArgumentParser):
    """Mistakes cost one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (--help tells what can be given)", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str]) -> None:
    """Run one of the three commands."""
    words = list(arguments)
    command = words.pop(0) if words[:1] and words[0] in COMMANDS else "page"
    work = make_work(command, words)
    try:
        work()
    except (ValueError, OSError) as error:
        if os.environ.get("ESPALIER_DEBUG"):
            raise
        print(f"error: {show_controls(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


def make_work(command: str, words: Sequence[str]) -> Callable[[], None]:
    """What the words ask for, ready to be called. Raises SystemExit for --help and mistakes."""
    name = "python -m report" if command == "page" else f"python -m report {command}"
    parser = Parser(
        prog=name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if command == "votes":
        parser.add_argument("files", nargs="+", metavar="FILE", help="votes that a comparison page saved")
        files = parser.parse_args(words).files
        return lambda: votes(files)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, with metrics.jsonl in it")
    if command == "serve":
        parser.add_argument("--port", type=int, default=8765, help="port on 127.0.0.1; 0 = any free one")
        given = parser.parse_args(words)
        return lambda: serve(given.runs, given.port)
    parser.add_argument("--html", metavar="FILE", help="the page; run.html in the folder of a single run by default")
    asked = parser.parse_args(words)
    return lambda: page(asked.runs, asked.html)


def page(runs: Sequence[str], html: str | None) -> None:
    """Write the page of finished (or living) runs."""
    from report.run import run_page

    print(f"Page: {run_page(runs, html)}")


def serve(runs: Sequence[str], port: int) -> None:
    """Show runs while they go on."""
    from report.live import serve_runs

    serve_runs(runs, port, lambda line: print(line, flush=True))


def votes(files: Sequence[str]) -> None:
    """Print the tally of blind votes."""
    from report.votes import votes_report

    print(votes_report(files))


if __name__ == "__main__":
    main(sys.argv[1:])
