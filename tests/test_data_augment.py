"""Augmentation: questions change, answers and validation do not, and the seed decides all of it."""

import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.augment import Augmenter, replace_words
from data.prepare import prepare
from data.records import Sample
from data.settings import PrepareSettings
from data.shards import open_dataset
from data.tokenizer import load_tokenizer

BYTES = load_tokenizer("byte")
TABLE = {"big": ["large", "huge"], "name": ["state"], "dog": ["hound"], "学习": ["研习"]}


def synonyms(word: str) -> list[str]:
    return TABLE.get(word, [])


def sample(question: str, answer: str, context: str = "", rejected: str | None = None) -> Sample:
    user = {"role": "user", "content": question, **({"context": context} if context else {})}
    both = [[user, {"role": "assistant", "content": each}] for each in (answer, rejected) if each is not None]
    return Sample("here", *both)


def replaced(text: str, kept: set[str] = frozenset(), seed: int = 0) -> str:  # type: ignore[assignment]
    return replace_words(text, synonyms, kept, random.Random(seed))


def test_a_fifth_of_the_known_words_is_replaced_in_their_case() -> None:
    assert replaced("a dog!") == "a hound!"
    assert replaced("Dog's DOG")[-3:] in ("DOG", "UND")
    assert {replaced("A Big one", seed=seed) for seed in range(20)} == {"A Large one", "A Huge one"}
    assert replaced("NAME it") == "STATE it"
    changed = replaced(" ".join(["dog"] * 20))
    assert changed.split().count("hound") == 4
    assert replaced("no such words: dogs, bigger") == "no such words: dogs, bigger"


def test_code_and_words_of_the_answer_stay() -> None:
    assert replaced("what does `dog` do\n```\nbig = dog\n```") == "what does `dog` do\n```\nbig = dog\n```"
    assert replaced("the big dog", kept={"big", "dog"}) == "the big dog"
    assert replaced("the big dog", kept={"big"}) == "the big hound"


def test_scripts_without_spaces_are_searched_for_words() -> None:
    assert replaced("我想学习机器") == "我想研习机器"
    assert replaced("我想学机器") == "我想学机器"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    text=st.text(max_size=40) | st.lists(st.sampled_from([*TABLE, "x", "`", "9"])).map(" ".join), seed=st.integers(0, 9)
)
def test_nothing_but_known_words_changes(text: str, seed: int) -> None:
    changed = replaced(text, seed=seed)
    for word, others in TABLE.items():
        for other in others:
            changed = changed.replace(other, word).replace(other.upper(), word).replace(other.capitalize(), word)
            text = text.replace(other, word).replace(word.upper(), word).replace(word.capitalize(), word)
    assert changed == text


# ---- records


def thesaurus(folder: Path) -> str:
    file = folder / "words.txt"
    file.write_text("# a comment\nbig, large, huge\n\nDog,hound\n", "utf-8")
    return str(file)


def test_copies_are_as_many_as_asked_and_a_function_of_the_seed(tmp_path: Path) -> None:
    given = sample("Name a big dog.", "A mastiff.", "dogs: mastiff", "a big cat")

    def copies(seed: int, ratio: float = 0.3) -> list[Sample | None]:
        augmenter = Augmenter(ratio, thesaurus(tmp_path), seed)
        return [augmenter.copy(given, index) for index in range(400)]

    first = copies(1)
    assert first == copies(1) and first != copies(2)
    made = [copy for copy in first if copy is not None]
    assert 90 <= len(made) <= 150
    questions = {copy.messages[0]["content"] for copy in made}
    assert "Name a big hound." in questions, "big is in an answer, so it stays"
    assert "Please help with this: Name a big dog." in questions and len(questions) == 7
    for copy in made:
        assert copy.rejected is not None and copy.rejected[0] == copy.messages[0]
        assert copy.messages[0]["context"] == "dogs: mastiff"
        assert (copy.messages[1], copy.rejected[1]) == (given.messages[1], given.rejected[1])  # type: ignore[index]
    assert copies(1, 0.0) == [None] * 400 and None not in copies(1, 1.0)


def test_without_a_thesaurus_questions_get_frames() -> None:
    augmenter = Augmenter(1.0, None, seed=1)
    plain = [augmenter.copy(sample("{} of sets?", "b"), index) for index in range(50)]
    assert all(copy is not None and "{} of sets?" in copy.messages[0]["content"] for copy in plain)
    assert len({copy.messages[0]["content"] for copy in plain if copy}) == 6
    chinese = augmenter.copy(sample("什么是机器学习？", "b"), 0)
    assert chinese is not None and not chinese.messages[0]["content"].isascii()
    assert "Please" not in chinese.messages[0]["content"]


def test_only_the_training_split_grows(tmp_path: Path) -> None:
    rows = [{"instruction": f"Name dog {n}.", "output": f"It is {n}."} for n in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"source": "jsonl", "input": (str(tmp_path / "a.jsonl"),), "tokenizer": "byte", "val_fraction": 0.2}

    def texts(name: str, split: str, **changes: Any) -> list[str]:
        prepare(PrepareSettings(**common, data_dir=str(tmp_path / name), **changes))
        tokens = open_dataset(tmp_path / name, split)
        bounds = tokens.document_starts.tolist()
        return [BYTES.decode(tokens.tokens(a, b)) for a, b in zip(bounds, bounds[1:])]  # noqa: RUF007

    options = {"augment_ratio": 0.5, "thesaurus": thesaurus(tmp_path)}
    plain, more = texts("plain", "train"), texts("more", "train", **options)
    assert [text for text in more if text in plain] == plain, "all of the originals, in order"
    added = [text for text in more if text not in plain]
    assert 25 <= len(added) <= 55
    answers = [text.split("### Response:\n")[1] for text in plain]
    assert all(text.split("### Response:\n")[1] in answers for text in added)
    assert any("hound" in text for text in added)
    assert texts("more", "val", **options) == texts("plain", "val")
    meta = prepare(PrepareSettings(**common, data_dir=str(tmp_path / "more"), **options))
    assert meta["augmented"] == len(added)


# ---- what cannot be


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"words.txt: cannot be read \(No such file"),
        (b"\xff\xfe", "words.txt: not UTF-8 at byte 0"),
        (b"big,large\nsmall\n", "words.txt:2: expected a word and its synonyms"),
        (b"big,,large\n", "words.txt:1: expected a word"),
        (b"# nothing\n", "words.txt: holds no words"),
    ],
)
def test_a_thesaurus_that_is_none(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Augmenter(0.5, str(tmp_path / "words.txt"), 1)


def test_wordnet_where_it_is_installed_and_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ValueError, match="pip install nltk"):
        Augmenter(0.5, "wordnet", 1)

    class Lemma:
        def __init__(self, name: str) -> None:
            self.name = lambda: name

    sense = types.SimpleNamespace(lemmas=lambda: [Lemma("dog"), Lemma("domestic_dog")])
    wordnet = types.SimpleNamespace(ensure_loaded=lambda: None, synsets=lambda word: [sense] * (word == "dog"))
    monkeypatch.setitem(sys.modules, "nltk", types.ModuleType("nltk"))
    corpus = types.ModuleType("nltk.corpus")
    corpus.wordnet = wordnet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nltk.corpus", corpus)
    augmenter = Augmenter(1.0, "wordnet", 1)
    made = [augmenter.copy(sample("A dog?", "No."), index) for index in range(20)]
    assert "A domestic dog?" in {copy.messages[0]["content"] for copy in made if copy}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment_ratio": 1.5}, "--augment_ratio 1.5: expected 0 to 1"),
        ({"thesaurus": "words.txt"}, "--thesaurus is for --augment_ratio"),
    ],
)
def test_settings_of_augmentation_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareSettings(**changes)


def test_text_has_no_questions(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    values = {"source": "jsonl", "input": (str(tmp_path / "a.jsonl"),), "data_dir": str(tmp_path / "set")}
    with pytest.raises(ValueError, match="changes the questions of records, and this is text"):
        prepare(PrepareSettings(**values, augment_ratio=0.5, tokenizer="byte"))
