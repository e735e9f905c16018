"""The embedded text: the documentation of the installed Python as documents (`pydocs`) and as records (`pydocs-qa`)."""

import itertools
from collections.abc import Iterator

from data.pydocs_qa import pydocs_records
from data.stdlib_docs import language_topics, library_docstrings

__all__ = ["pydocs_documents", "pydocs_records"]

_SHORTEST = 200  # characters; below are code pages and stubs whose docstring is one boilerplate line


def pydocs_documents() -> Iterator[str]:
    """One document a module (its docstrings under light headings), then one a topic of the language reference.

    About 400 documents, 2 MB of prose; the same ones in the same order on the same Python.
    """
    for module, docstrings in itertools.groupby(library_docstrings(), key=lambda each: each.module):
        parts = [each.text if each.kind == "module" else f"{each.signature}\n\n{each.text}" for each in docstrings]
        document = "\n\n".join([f"The module {module}", *parts])
        if len(document) >= _SHORTEST:
            yield document
    yield from dict.fromkeys(language_topics().values())  # some topics share their text
