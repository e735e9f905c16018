"""Cleaning: what is certain is repaired, what stands well is left alone, duplicates are found and others are not."""

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import duplicates
from data.clean import Cleaner, repair_unicode, strip_punctuation, tidy_space
from data.duplicates import EXACT, NEAR, Duplicates, rows_of_bands
from data.prepare import prepare
from data.records import Sample, Unusable
from data.settings import PrepareSettings
from data.shards import open_dataset
from data.tokenizer import load_tokenizer

BYTES = load_tokenizer("byte")
WORDS = [f"w{n}" for n in range(4000)]


def misread(text: str) -> str:
    """`text` as a program shows it that takes its UTF-8 for Windows-1252."""
    return "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode())


# ---- Unicode


@pytest.mark.parametrize(
    "text",
    [
        "It\u2019s here",
        "\u201cquoted\u201d",
        "un caf\u00e9 \u00e0 la carte",
        "na\u00efve \u2013 and\u00a0more",
        "5\u20ac for l\u2019\u00e9t\u00e9",
    ],
)
def test_text_that_was_misread_is_read_again(text: str) -> None:
    assert misread(text) != text
    assert repair_unicode(misread(text)) == text
    assert repair_unicode(misread(misread(text))) == text, "twice misread"
    assert repair_unicode("fine\n" + misread(text) + "\n\u00dcbung") == f"fine\n{text}\n\u00dcbung", "line by line"


@pytest.mark.parametrize(
    "text",
    [
        "CAF\u00c9\u2122",  # capitals with a sign: two bytes that would be valid UTF-8
        "\u00abMA\u00c7\u00c3\u00bb",
        "caff\u00e8\u2026\u201d",
        "\u00c3\u00a9 is what a bad caf\u00e9 shows",  # the line holds real letters too
        "\u041f\u0440\u0438\u0432\u0435\u0442, \u4f60\u597d, \u0645\u0631\u062d\u0628\u0627,"
        "\u0939\u093f\u0928\u094d\u0926\u0940 \U0001f468\u200d\U0001f469\u200d\U0001f467",
        "a\tb\n    indented",
    ],
)
def test_text_that_may_be_meant_stays(text: str) -> None:
    assert repair_unicode(text) == text


def test_invisible_characters_go() -> None:
    assert repair_unicode("\ufeffa\x00b\x1b[31m\u200bc\x7f\r\nd\re\u2028f") == "ab[31mc\nd\ne\nf"
    assert repair_unicode("e\u0301") == "\u00e9"
    assert repair_unicode("it\x92s \x93so\x94\x81") == "it\u2019s \u201cso\u201d", "bytes of Windows-1252 in Latin-1"
    bad_dash = "\u00e2\x80\x94"  # UTF-8 read as Latin-1
    assert repair_unicode(f"along {bad_dash} it") == "along \u2014 it"
    assert repair_unicode(f"caf\u00e9 {bad_dash} it") == "caf\u00e9 \u2014 it", "a dash beside what is right"
    assert repair_unicode("caf\u00e9 na\u00c3\u00afve") == "caf\u00e9 na\u00c3\u00afve", "letters only if all is bad"
    assert repair_unicode("a\ud800b") == "a\ufffdb"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(max_size=60) | st.text("aZ\u00c3\u00c2\u00e2\u20ac\u2122\u00a9 \n\x81\x92\u0301", max_size=12))
def test_repairing_twice_changes_nothing_more(text: str) -> None:
    once = repair_unicode(text)
    assert repair_unicode(once) == once == unicodedata.normalize("NFC", once)
    tidied = tidy_space(once)
    assert tidy_space(tidied) == tidied
    assert tidied.split() == once.split()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(st.characters(codec="latin-1", categories=["L", "N", "P", "Zs"]), max_size=40))
def test_letters_of_western_europe_survive_unless_they_are_valid_utf8(text: str) -> None:
    repaired = repair_unicode(text)
    assert repaired == unicodedata.normalize("NFC", text) or misread(repaired) == text


def test_white_space() -> None:
    assert tidy_space("\n \n    code  \n\tmore \t\n\n\n\n\nend\u00a0of it \n\n") == "    code\n\tmore\n\nend of it"
    assert strip_punctuation("  What's (new),\n  in 3.12? \u00dcber_alles!") == "Whats new in 312 \u00dcber_alles"


# ---- duplicates


def text_of(rng: random.Random, count: int) -> list[str]:
    return rng.choices(WORDS, k=count)


def runs(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + 3]) for at in range(len(words) - 2)}


def changed(rng: random.Random, words: list[str], count: int) -> list[str]:
    words = list(words)
    for at in rng.sample(range(len(words)), count):
        words[at] = rng.choice(WORDS) + "x"
    return words


def test_the_share_of_equal_minima_is_the_similarity() -> None:
    rng = random.Random(1)
    hashes = Duplicates(0.8, seed=3)
    errors = []
    for count in (0, 1, 3, 6, 15, 40) * 10:
        one = text_of(rng, 200)
        other = changed(rng, one, count)
        similarity = len(runs(one) & runs(other)) / len(runs(one) | runs(other))
        estimate = float((hashes.minima(one) == hashes.minima(other)).mean())
        errors.append(estimate - similarity)
        assert abs(estimate - similarity) < 0.16, "over four times the standard error at 0.5"
    assert abs(np.mean(errors)) < 0.02, "without bias"


def test_near_duplicates_are_found_and_others_are_not() -> None:
    rng = random.Random(2)
    found = Duplicates(0.8, seed=1)
    texts = [text_of(rng, 150) for _ in range(300)]
    assert [found.seen([" ".join(words)]) for words in texts] == [None] * 300
    near = [found.seen([" ".join(changed(rng, words, 2))]) for words in texts]  # similarity about 0.92
    assert near.count(NEAR) >= 298
    far = [found.seen([" ".join(changed(rng, words, 12))]) for words in texts]  # about 0.62
    assert far.count(None) >= 298
    assert [found.seen(["  " + " \n".join(words).upper()]) for words in texts] == [EXACT] * 300


def test_a_record_is_a_duplicate_only_if_each_part_is() -> None:
    rng = random.Random(3)
    schema, answer = " ".join(text_of(rng, 200)), " ".join(text_of(rng, 60))
    found = Duplicates(0.8, seed=1)
    assert found.seen([schema + " how many", answer]) is None
    assert found.seen([schema + " which one", " ".join(text_of(rng, 60))]) is None, "another answer"
    assert found.seen([" ".join(text_of(rng, 200)), answer]) is None, "another question"
    assert found.seen([schema + " how many now", answer + " too"]) == NEAR
    assert found.seen([answer, schema + " how many"]) is None, "parts do not change places"
    signs = Duplicates(0.8, seed=1)
    assert (signs.seen(["a < b", "yes"]), signs.seen(["a > b", "yes"])) == (None, None)


def test_scripts_without_spaces_are_compared_by_characters() -> None:
    rng = random.Random(4)
    text = "".join(chr(rng.randint(0x4E00, 0x9000)) for _ in range(200))
    found = Duplicates(0.8, seed=1)
    assert found.seen([text]) is None
    assert found.seen([text[:100] + "\u4e00" + text[101:]]) == NEAR
    assert found.seen(["".join(rng.sample(text, 200))]) is None


def test_exact_duplicates_alone() -> None:
    words = text_of(random.Random(5), 100)
    found = Duplicates(1.0, seed=1)
    assert [found.seen([" ".join(words)]), found.seen([" ".join(words[:-1])]), found.seen([" ".join(words)])] == [
        None,
        None,
        EXACT,
    ]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_NEAR_TEXTS", 20)
    monkeypatch.setattr(duplicates, "_EXACT_TEXTS", 50)
    rng = random.Random(6)
    texts = [" ".join(text_of(rng, 50)) for _ in range(100)]
    found = Duplicates(0.8, seed=1)
    assert all(found.seen([text]) is None for text in texts)
    assert len(found._texts) == 20 and len(found._exact) == 50
    assert len(found._bands) <= 20 * (128 // rows_of_bands(0.8))
    assert found.seen([texts[-1] + " more"]) == NEAR and found.seen([texts[60]]) == EXACT
    assert found.seen([texts[0]]) is None, "forgotten"


@given(threshold=st.floats(0.05, 0.999))
@settings(deadline=None, derandomize=True)
def test_bands_find_a_pair_at_the_threshold(threshold: float) -> None:
    rows = rows_of_bands(threshold)
    assert 1 <= rows <= 128
    if rows > 1:
        assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.995


# ---- records and sets


def cleaner(**changes: Any) -> Cleaner:
    return Cleaner(PrepareSettings(clean=True, **changes))


def sample(question: str, answer: str, context: str = "", rejected: str | None = None) -> Sample:
    user = {"role": "user", "content": question, **({"context": context} if context else {})}
    answers = [answer] if rejected is None else [answer, rejected]
    both = [[user, {"role": "assistant", "content": each}] for each in answers]
    return Sample("here", *both)


def test_every_message_is_cleaned_and_what_was_done_is_counted() -> None:
    clean = cleaner()
    given = sample("What\x00?  ", "    x = 1  \n\n\n\n    y", "It\u00e2\u20ac\u2122s", rejected="no \n")
    cleaned = clean.sample(given)
    assert cleaned == sample("What?", "    x = 1\n\n    y", "It\u2019s", rejected="no")
    assert clean.sample(sample("All", "well")) == sample("All", "well")
    assert dict(clean.changed) == {"had broken Unicode repaired": 1, "had white space tidied": 1}
    stripped = cleaner(strip_punctuation=True).sample(sample("What's this?", "A (small) test."))
    assert stripped == sample("Whats this", "A small test")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (sample("\x00", "b"), "with an empty message after cleaning"),
        (sample("a", "\u200b\x07"), "with an empty message after cleaning"),
        (sample("a" * 50, "b" * 50), "of more than 99 characters"),
        (sample("First", "the ANSWER "), "that are exact duplicates"),
    ],
)
def test_what_goes_says_why(given: Sample, why: str) -> None:
    clean = cleaner(max_characters=99)
    clean.sample(sample("First", "The answer"))
    with pytest.raises(Unusable, match=why):
        clean.sample(given)


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_set_is_cleaned_before_it_is_split_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(7)
    rows = [{"instruction": " ".join(text_of(rng, 40)), "output": " ".join(text_of(rng, 40))} for _ in range(50)]
    copies = [{**row, "output": row["output"] + " now"} for row in rows[:10]]
    odd = [rows[3], {"instruction": "a", "output": "\x00"}, {"instruction": "caf\u00c3\u00a9", "output": "b "}]
    file = write(tmp_path / "a.jsonl", [*rows, *copies, *odd])
    common = {"source": "jsonl", "input": (file,), "tokenizer": "byte", "val_fraction": 0.2, "workers": 1}
    meta = prepare(PrepareSettings(**common, data_dir=str(tmp_path / "set"), clean=True))
    assert sum(split["documents"] for split in meta["splits"].values()) == 51
    assert meta["left_out"] == {
        "that are near duplicates (0.8 alike)": 10,
        "that are exact duplicates": 1,
        "with an empty message after cleaning": 1,
    }
    assert meta["cleaned"] == {"had broken Unicode repaired": 1}
    assert "left out 10 records that are near duplicates" in caplog.text
    assert "1 records had broken Unicode repaired" in caplog.text
    plain = prepare(PrepareSettings(**common, data_dir=str(tmp_path / "plain")))
    assert plain["cleaned"] is None and sum(split["documents"] for split in plain["splits"].values()) == 63


def test_documents_of_text_are_cleaned_too(tmp_path: Path) -> None:
    rows = [{"text": "  one\x00 \n\n\n\n two"}, {"text": "  one \n\n\n\n two"}, {"text": "three"}]
    common = {"source": "jsonl", "tokenizer": "byte", "val_fraction": 0.0, "clean": True, "workers": 1}
    values = {**common, "input": (write(tmp_path / "a.jsonl", rows),), "data_dir": str(tmp_path / "set")}
    meta = prepare(PrepareSettings(**values))
    tokens = open_dataset(tmp_path / "set", "train")
    ends = "<|endoftext|>"
    assert BYTES.decode(tokens.tokens(0, tokens.n_tokens)) == f"  one \n\n\n\n two{ends}three{ends}"
    assert meta["left_out"] == {"that are exact duplicates": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strip_punctuation": True}, "--strip_punctuation is a part of --clean"),
        ({"duplicate_similarity": 0.0}, "--duplicate_similarity 0.0: expected more than 0"),
        ({"duplicate_similarity": 1.1}, "at most 1"),
        ({"max_characters": 0}, "--max_characters 0"),
    ],
)
def test_settings_of_cleaning_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareSettings(**changes)
