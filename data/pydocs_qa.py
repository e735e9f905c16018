"""About 5,000 questions and answers made from the installed Python's documentation, in Dolly's four fields.

Made by rule from docstrings and signatures, so every answer is true of this Python. Answers are short, and more than
half of the records hold in `context` what the answer needs: a small model learns to read before it learns to know.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from data.english import first_sentence, listed, predicate, without_markup
from data.stdlib_docs import Docstring, language_topics, library_docstrings

Record = dict[str, str]
_WHEN = re.compile(r"is (raised|called|invoked|used) (?=when|if|before|after|just|once|whenever|while|on|for)")
_PASSIVES = ("is raised", "is called", "is invoked", "is used", "is equivalent")
# A paragraph that is prose: no list, table, grammar or note on versions.
_PROSE = re.compile(r"(?!See |Changed in |New in |Deprecated )[A-Z\"](?!.*\n )(?!.*::=).*\.", re.S)
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def pydocs_records() -> Iterator[Record]:
    """Records with instruction, context, response, category: the same ones in the same order on the same Python.

    Seven categories are mixed throughout; no two records ask the same of the same context; no response is empty.
    """
    docstrings = [each for each in library_docstrings() if each.is_public]
    chosen: dict[tuple[str, str], Record] = {}
    for make, count in _MAKERS:
        made = {(record["instruction"], record["context"]): record for record in make(docstrings)}
        new = sorted((key for key in made if key not in chosen), key=lambda key: _hash(*key))
        chosen.update((key, made[key]) for key in new[:count])
    for key in sorted(chosen, key=lambda key: _hash("order", *key)):
        yield chosen[key]


def _hash(*parts: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big")


def _pick(choices: Sequence[str], key: str) -> str:
    """One of the phrasings, always the same for the same key."""
    return choices[_hash(key, choices[0]) % len(choices)]


def _record(instruction: str, response: str, category: str, context: str = "") -> Record:
    return {"instruction": instruction, "context": context, "response": response, "category": category}


def _described(docstrings: Sequence[Docstring]) -> Iterator[tuple[Docstring, str]]:
    """Docstrings whose first sentence can be said with "It", and what follows the "It"."""
    for each in docstrings:
        sentence = first_sentence(each.text)
        said = predicate(sentence) if sentence else None
        if said and (_WHEN.match(said) or not said.startswith(_PASSIVES)):
            yield each, said


# ---- without context


def _what_it_does(docstrings: Sequence[Docstring]) -> Iterator[Record]:
    for each, said in _described(docstrings):
        name = each.full_name
        if done := _WHEN.match(said):
            asked = _pick((f"When is {name} {done[1]}?", f"In which case is {name} {done[1]}?"), name)
        elif said.startswith("is "):
            asked = _pick((f"What is {name}?", f"Tell me what {name} is.", f"In Python, what is {name}?"), name)
        elif each.kind == "module":
            asked = _pick((f"What does the module {name} do?", f"What can I do with the Python module {name}?"), name)
        else:
            asked = _pick(
                (
                    f"What does {name} do?",
                    f"What does the {each.kind} {name} do?",
                    f"Explain in one sentence what {name} does.",
                    f"In Python, what does {name} do?",
                    f"What happens when I call {name}?",
                    f"Tell me what {name} does.",
                ),
                name,
            )
        yield _record(asked, f"It {said}.", "open_qa")


def _which_one(docstrings: Sequence[Docstring]) -> Iterator[Record]:
    for each, said in _described(docstrings):
        if each.kind not in ("function", "method") or said.startswith("is ") or len(said) > 110:
            continue
        owner = each.full_name.rpartition(".")[0]
        short = each.name.rpartition(".")[2]
        of = f"the module {owner}" if each.kind == "function" else f"the class {owner}"
        asked = _pick(
            (
                f"Which {each.kind} of {of} {said}?",
                f"Name the {each.kind} of {of} that {said}.",
                f"Which {each.kind} of {owner} {said}?",
            ),
            each.full_name,
        )
        yield _record(
            asked, _pick((f"{each.full_name}.", f"It is {short}.", f"The {each.kind} {short}."), asked), "open_qa"
        )


def _members(docstrings: Sequence[Docstring]) -> Iterator[Record]:
    kinds = {"function": ("module", "functions"), "method": ("class", "methods"), "class": ("module", "classes")}
    named = [each for each in docstrings if each.kind in kinds and not (each.kind == "class" and "." in each.name)]
    key: Callable[[Docstring], tuple[str, str]] = lambda each: (each.full_name.rpartition(".")[0], each.kind)  # noqa: E731
    for (owner, kind), group in itertools.groupby(sorted(named, key=key), key=key):
        names = [each.name.rpartition(".")[2] for each in group]
        count = 3 if len(names) > 2 else 2
        if len(names) < 2:
            continue
        what, plural = kinds[kind]
        number = _NUMBERS[count]
        asked = _pick(
            (
                f"Name {number} {plural} of the {what} {owner}.",
                f"List {number} {plural} of the Python {what} {owner}.",
                f"Give me {number} examples of {plural} in {owner}.",
            ),
            owner + kind,
        )
        yield _record(asked, f"{listed(names[:count])}.", "brainstorming")


# ---- with the answer in the context


def _from_the_text(docstrings: Sequence[Docstring]) -> Iterator[Record]:
    for each, said in _described(docstrings):
        if each.kind == "module" or not 80 <= len(each.text) <= 600 or ">>>" in each.text or _WHEN.match(said):
            continue
        short = each.name.rpartition(".")[2]
        verb = "is" if said.startswith("is ") else "does"
        tail = "" if verb == "is" else " do"
        asked = _pick(
            (
                f"According to the text, what {verb} {short}{tail}?",
                f"Read the description of {short}. What {verb} it{tail}?",
                f"What {verb} {short}{tail}? Answer from the text.",
            ),
            each.full_name,
        )
        yield _record(asked, f"It {said}.", "closed_qa", f"{each.signature}\n\n{without_markup(each.text)}")


def _from_the_signature(docstrings: Sequence[Docstring]) -> Iterator[Record]:
    for each in docstrings:
        if each.kind not in ("function", "method") or len(each.arguments) > 6 or len(each.signature) > 160:
            continue
        short, names = each.name.rpartition(".")[2], [argument.name for argument in each.arguments]
        question = _hash("question", each.full_name) % 3
        defaults = [argument for argument in each.arguments if argument.default is not None]
        if question == 0 and names:
            asked = _pick((f"Which arguments does {short} take?", f"List the arguments of {short}."), each.full_name)
            yield _record(asked, f"It takes {listed(names)}.", "closed_qa", each.signature)
        elif question == 1 and "*" not in each.signature:
            answer = f"It takes {_NUMBERS[len(names)]} argument{'' if len(names) == 1 else 's'}."
            yield _record(f"How many arguments does {short} take?", answer, "closed_qa", each.signature)
        elif defaults:
            argument = defaults[_hash("default", each.full_name) % len(defaults)]
            asked = f"What is the default of {argument.name} in {short}?"
            yield _record(asked, f"The default of {argument.name} is {argument.default}.", "closed_qa", each.signature)


def _summaries(docstrings: Sequence[Docstring]) -> Iterator[Record]:
    asked = (
        "Summarize this description in one sentence.",
        "Give a one-sentence summary of the text.",
        "What is the text about? Answer in one sentence.",
        "Sum up the following in a single sentence.",
    )
    for each in docstrings:
        first, _, rest = each.text.partition("\n\n")
        sentence = first_sentence(first)
        rest = without_markup(rest.strip())
        if (
            sentence is None
            or not 100 <= len(rest) <= 600
            or ">>>" in rest
            or "(c)" in rest
            or len(first) > len(sentence) + 8
        ):
            continue
        response = sentence if each.kind in ("class", "module") else f"It {predicate(sentence) or ''}."
        if response != "It .":
            yield _record(_pick(asked, each.full_name), response, "summarization", f"{each.signature}\n\n{rest}")


def _which_of_these(docstrings: Sequence[Docstring]) -> Iterator[Record]:
    """Three functions with what they do; the question repeats one line's words, the answer is its name."""
    fitting = [
        (each, said)
        for each, said in _described(docstrings)
        if each.kind in ("function", "method") and len(said) <= 90 and not said.startswith("is ")
    ]
    for (_, kind), group in itertools.groupby(fitting, key=lambda pair: (pair[0].module, pair[0].kind)):
        pairs = list(group)
        for start in range(0, len(pairs) - 2, 3):
            three = pairs[start : start + 3]
            names = [each.name for each, _ in three]
            if len({said for _, said in three}) < 3 or len(set(names)) < 3:
                continue
            each, said = three[_hash("three", *names) % 3]
            context = "\n".join(f"{name}: {text[0].upper()}{text[1:]}." for name, (_, text) in zip(names, three))
            asked = _pick((f"Which of these {said}?", f"Which {kind} in the list {said}?"), each.full_name)
            yield _record(asked, each.name, "information_extraction", context)


def _exceptions(docstrings: Sequence[Docstring]) -> Iterator[Record]:
    pattern = re.compile(r"\b[A-Z]\w*(?:Error|Exception|Warning|Interrupt)\b")
    for each in docstrings:
        text = without_markup(each.text)
        names = set(pattern.findall(text))
        if len(names) == 1 and 60 <= len(text) <= 600 and re.search(r"\b[Rr]aise", text) and each.kind != "class":
            asked = _pick(
                ("Which exception does the text mention?", "Which exception can be raised, according to the text?"),
                each.full_name,
            )
            yield _record(asked, names.pop(), "information_extraction", f"{each.signature}\n\n{text}")


def _owners(docstrings: Sequence[Docstring]) -> Iterator[Record]:
    for each in docstrings:
        owner, _, short = each.full_name.rpartition(".")
        if each.kind == "method":
            yield _record(f"To which class does the method {each.full_name} belong?", owner, "information_extraction")
        elif each.kind != "module":
            asked = f"From which module can I import {short}, if its full name is {each.full_name}?"
            yield _record(asked, f"From {each.module}.", "information_extraction")


def _kinds(docstrings: Sequence[Docstring]) -> Iterator[Record]:
    for each in docstrings:
        if each.kind == "module":
            continue
        article = "a " + each.kind
        sentence = first_sentence(each.text)
        if sentence is None:
            continue
        asked = _pick(
            (
                f"Is {each.full_name} a class, a function or a method?",
                f"Classify {each.full_name}: class, function or method?",
            ),
            each.full_name,
        )
        yield _record(asked, f"It is {article}.", "classification", f"{each.signature}\n\n{sentence}")


# ---- from the language reference


def _topics(_: Sequence[Docstring]) -> Iterator[Record]:
    for title, blocks in _sections():
        for number, block in enumerate(blocks):
            paragraph = without_markup(" ".join(block.split()))
            if not _PROSE.fullmatch(block) or not 60 <= len(paragraph) <= 400:
                continue
            if number == 0:
                asked = _pick(
                    (f"What does the Python reference say about {title}?", f"Explain {title} in Python."), title
                )
                yield _record(asked, paragraph, "general_qa")
            else:
                asked = _pick(
                    ("Give this passage a title.", "What is the passage about?", "Name the topic of this passage."),
                    paragraph,
                )
                yield _record(asked, title[0].upper() + title[1:], "summarization", paragraph)


def _sections() -> Iterator[tuple[str, list[str]]]:
    """(title, paragraphs) of every section of every topic; a title is a line that is underlined."""
    for text in language_topics().values():
        parts = re.split(r"^(.+)\n[*=\-~]{3,}\n", text, flags=re.M)
        for title, body in zip(parts[1::2], parts[2::2]):
            title = without_markup(title.strip()).rstrip(".")
            if 4 <= len(title) <= 60:
                yield (
                    re.sub(r'^(The|A|An) (?=")', lambda match: match[0].lower(), title),
                    body.strip("\n").split("\n\n"),
                )


_MAKERS: tuple[tuple[Callable[[Sequence[Docstring]], Iterator[Record]], int], ...] = (
    (_what_it_does, 1200),
    (_which_one, 450),
    (_members, 350),
    (_from_the_text, 800),
    (_from_the_signature, 700),
    (_summaries, 350),
    (_which_of_these, 350),
    (_exceptions, 200),
    (_owners, 150),
    (_kinds, 200),
    (_topics, 300),
)
