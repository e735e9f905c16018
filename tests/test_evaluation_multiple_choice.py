"""Multiple choice: the files that it reads, the numbers that it gives, the lines that a bad file gets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import evaluate as script
from evaluation.continuations import encode_pair
from evaluation.multiple_choice import Choice, multiple_choice, read_choices
from evaluation.settings import EvaluateSettings
from formats.open_model import open_model
from tests.scripts import one_line_error, run_main
from tests.test_evaluation_continuations import plain
from tests.tiny_checkpoints import save_tiny

ENDINGS = ["a dog", "two cats and a mouse", "ten", "nothing 你好"]
ROWS = [{"ctx": f"One and {n} make", "endings": ENDINGS, "label": str(n % 4)} for n in range(9)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def read(tmp_path: Path, **row: Any) -> Choice:
    (found,) = read_choices(write(tmp_path / "q.jsonl", [row]))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 100])
def test_equals_the_likelihood_of_each_ending(tmp_path: Path, batch_size: int) -> None:
    opened = open_model(save_tiny(tmp_path / "m.pt"))
    questions = read_choices(write(tmp_path / "q.jsonl", ROWS))
    right, by_length = 0, 0
    for question in questions:
        pairs = [encode_pair(opened.tokenizer, question.context, " " + ending) for ending in question.endings]
        sums = [plain(opened.model, *pair).log_probability for pair in pairs]
        means = [value / len(ending) for value, ending in zip(sums, question.endings)]
        right += sums.index(max(sums)) == question.right
        by_length += means.index(max(means)) == question.right
    found = multiple_choice(opened, questions, batch_size=batch_size)
    assert (found["samples"], found["acc"], found["acc_norm"]) == (9, right / 9, by_length / 9)
    p = right / 9
    assert found["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 8))
    assert multiple_choice(opened, questions[:1])["acc_stderr"] is None


def test_the_length_is_that_in_characters(tmp_path: Path) -> None:
    """A model that finds every byte equally likely takes the shortest ending, and by length the most characters a byte:
    the first of the ASCII ones, since the space before it weighs least in the longest.
    """
    opened = open_model(save_tiny(tmp_path / "m.pt"))
    for parameter in opened.model.parameters():
        parameter.data.zero_()
    shortest, longest = ENDINGS.index("ten"), ENDINGS.index("two cats and a mouse")
    asked = [Choice("So", ENDINGS, shortest), Choice("So", ENDINGS, longest)]
    found = [multiple_choice(opened, [question]) for question in asked]
    assert [(each["acc"], each["acc_norm"]) for each in found] == [(1.0, 0.0), (0.0, 1.0)]


def test_files_of_many_shapes(tmp_path: Path) -> None:
    assert read(tmp_path, ctx="A", endings=["b", "c"], label=1) == Choice("A", ["b", "c"], 1)
    assert read(tmp_path, question="A?", choices=["b", "c"], answer="B").right == 1
    assert read(tmp_path, question="A?", context="P.", choices=["b", "c"], answer="c") == Choice(
        "P.\nA?", ["b", "c"], 1
    )
    assert read(tmp_path, question="A?", context="", choices=["b", "c"], answer=0).context == "A?"
    arc = {"text": ["b", "c", "d"], "label": ["1", "2", "3"]}
    assert read(tmp_path, question="A?", choices=arc, answerKey="3") == Choice("A?", ["b", "c", "d"], 2)
    assert (
        read(tmp_path, question_stem="A", choices={"text": ["b", "c"], "label": ["A", "B"]}, answerKey="B").right == 1
    )
    assert len(read_choices(write(tmp_path / "many.jsonl", ROWS), 4)) == 4


def test_hellaswags_own_rows_are_read_as_lm_eval_reads_them(tmp_path: Path) -> None:
    row = {
        "activity_label": "Baking",
        "ctx_a": "[header] How to bake [title] Heat the oven.",
        "ctx_b": "then the cook",
        "ctx": "[header] How to bake [title] Heat the oven. then the cook",
        "endings": ["stirs. [substeps] Slowly.", "leaves."],
        "label": 0,
    }
    found = read(tmp_path, **row)
    assert found.context == "Baking: How to bake. Heat the oven. Then the cook"
    assert found.endings == ["stirs. Slowly.", "leaves."]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 2], "expected an object with ctx, endings and label, found list"),
        ({"endings": ["b", "c"], "label": 0}, "has no ctx or question or query or context; found the fields 'endings'"),
        ({"ctx": "A", "label": 0}, "has no endings or choices or options; found the fields 'ctx', 'label'"),
        ({"ctx": "A", "endings": ["b", "c"]}, "has no label or answer or answerKey; found the fields 'ctx', 'endings'"),
        ({"ctx": 7, "endings": ["b", "c"], "label": 0}, "the field 'ctx' is int, expected text"),
        ({"ctx": "A", "endings": "bc", "label": 0}, "the field 'endings' is str, expected a list of two endings"),
        ({"ctx": "A", "endings": ["b"], "label": 0}, "the field 'endings' is a list of 1, expected"),
        ({"ctx": "A", "endings": ["b", None], "label": 0}, r"the field 'endings\[1\]' is NoneType, expected text"),
        ({"ctx": "A", "endings": ["b", " "], "label": 0}, r"the field 'endings\[1\]' is empty, expected text"),
        ({"ctx": "A", "choices": {"label": ["A"]}, "label": 0}, "the field 'choices' is NoneType, expected a list"),
        ({"ctx": "A", "endings": ["b", "c"], "label": 2}, "the field 'label' is 2, expected 0 to 1 or a letter"),
        ({"ctx": "A", "endings": ["b", "c"], "label": True}, "the field 'label' is True, expected 0 to 1"),
        ({"ctx": "A", "endings": ["b", "c"], "answer": "Z"}, "the field 'answer' is 'Z', expected 0 to 1 or a letter"),
        ({"ctx": "A", "endings": ["b", "c"], "answer": [0]}, r"the field 'answer' is \[0\], expected"),
    ],
)
def test_a_wrong_shape_names_line_and_field(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "q.jsonl", [ROWS[0], row])
    with pytest.raises(ValueError, match=rf"q\.jsonl:2: {message}"):
        read_choices(path)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [save_tiny(tmp_path / f"{name}.pt", seed) for name, seed in (("a", 0), ("b", 1))]
    questions = write(tmp_path / "q.jsonl", ROWS)
    out = tmp_path / "out.json"
    words = ["--checkpoints", *models, "--multiple_choice", questions, "--json", out, "--device", "cpu"]
    code, said, _ = run_main(capsys, script.main, EvaluateSettings, *words)
    assert code == 0
    results = json.loads(out.read_text())["results"]
    assert [(result["checkpoint"], result["text"]) for result in results] == [("a", "q.jsonl"), ("b", "q.jsonl")]
    wanted = multiple_choice(open_model(models[1]), read_choices(questions))
    assert {name: results[1][name] for name in wanted} == wanted
    assert f"Eval Accuracy: {wanted['acc']:.4f} +- {wanted['acc_stderr']:.4f}" in said
    assert "  Num examples = 9" in said and "acc_norm" in said

    def fails(*more: object) -> str:
        outcome = run_main(capsys, script.main, EvaluateSettings, "--checkpoints", models[0], *more)
        return one_line_error(outcome)

    assert "no such file" in fails("--multiple_choice", tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no questions" in fails("--multiple_choice", tmp_path / "empty.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"ctx": \n')
    assert "broken.jsonl:1" in fails("--multiple_choice", tmp_path / "broken.jsonl")
    long = write(tmp_path / "long.jsonl", [{"ctx": "A", "endings": ["b", "c" * 99], "label": 0}])
    assert "a.pt on long.jsonl: a continuation of 100 tokens" in fails("--multiple_choice", long)
