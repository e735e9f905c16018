"""The embedded documentation: prose, and records made of it; the same each time, true, read without importing it."""

import inspect
import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data import stdlib_docs
from data.english import first_sentence, predicate
from data.pydocs import pydocs_documents, pydocs_records

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ["instruction", "context", "response", "category"]


def test_pydocs_is_prose_in_a_fixed_order() -> None:
    found = list(pydocs_documents())
    assert found == list(pydocs_documents())
    assert 1_500_000 < sum(map(len, found)) < 4_000_000
    assert 300 < len(found) < 1000
    assert len(set(found)) == len(found)
    assert any(text.startswith("The module textwrap\n\nText wrapping and filling.") for text in found)
    assert any('The "assert" statement' in text for text in found)


def test_pydocs_imports_no_module_that_it_reads() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from data.pydocs import pydocs_documents, pydocs_records\n"
        "before = set(sys.modules)\n"
        "n = sum(1 for _ in pydocs_documents()) + sum(1 for _ in pydocs_records())\n"
        "new = [name for name in set(sys.modules) - before if not name.startswith(('encodings', '_sysconfig'))]\n"
        "print(n > 4000, sorted(new))\n"
    )
    command = [sys.executable, "-c", program, str(ROOT)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True []\n"


def test_pydocs_records_are_many_different_and_complete() -> None:
    found = list(pydocs_records())
    assert found == list(pydocs_records())
    assert 4000 < len(found) < 6500
    assert all(list(record) == FIELDS for record in found)
    assert all(record["instruction"] and record["response"] and record["category"] for record in found)
    assert all(record[field] == record[field].strip() for record in found for field in FIELDS)
    assert len({(record["instruction"], record["context"]) for record in found}) == len(found)
    categories = Counter(record["category"] for record in found)
    assert len(categories) >= 6
    assert categories.most_common(1)[0][1] < len(found) / 2
    assert len({record["instruction"] for record in found[:200]}) > 150, "mixed and varied from the start"
    lengths = sorted(len(record["response"]) for record in found)
    assert lengths[len(lengths) // 2] < 80, "short answers"
    assert sum(bool(record["context"]) for record in found) > len(found) / 2


def test_an_answer_of_pydocs_is_true() -> None:
    by_question = {record["context"].split("\n")[0]: record for record in pydocs_records() if record["context"]}
    signatures = [record for record in by_question.values() if record["instruction"].startswith("How many arguments")]
    assert len(signatures) > 50
    for record in signatures:
        inside = record["context"][record["context"].index("(") + 1 : -1]
        depth = list(itertools.accumulate((c in "([{") - (c in ")]}") for c in inside))
        commas = sum(c == "," and level == 0 for c, level in zip(inside, depth))
        quoted = "'" in inside or '"' in inside or "lambda" in inside
        number = "no one two three four five six".split().index(record["response"].split()[2])  # noqa: SIM905
        assert quoted or number == (commas + 1 if inside else 0), record


@pytest.mark.parametrize(
    ("docstring", "said"),
    [
        ("Return the sum of all items.", "returns the sum of all items"),
        ("Returns the sum of all items.\n\nMore.", "returns the sum of all items"),
        ("Copy and return the list of names.", "copies and returns the list of names"),
        ("Recursively delete a directory tree.", "recursively deletes a directory tree"),
        ("A reader of ``csv`` files.", "is a reader of csv files"),
        ("Base class for all readers.", "is the base class for all readers"),
        ("Raised when the file is empty.", "is raised when the file is empty"),
        ("This function tests whether e.g. a file exists.", "tests whether e.g. a file exists"),
        ("A start boundary was found, but no end.", None),
        ("A boundary that was found at the start.", "is a boundary that was found at the start"),
        ("Utilities for the reading of files.", None),
        ("Return x -> y for all.", None),
        ("Internal: return the sum of all.", None),
        ("Short one.", None),
    ],
)
def test_docstrings_become_sentences(docstring: str, said: str | None) -> None:
    sentence = first_sentence(docstring)
    assert (predicate(sentence) if sentence else None) == said


def test_where_there_is_no_source_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stdlib_docs.sysconfig, "get_path", lambda name: str(tmp_path))
    fresh = inspect.unwrap(stdlib_docs.library_docstrings)  # without the cache
    with pytest.raises(OSError, match=r"no source files.*--input"):
        fresh()
