"""Answers to instructions: what a model reads, what it is compared with, and the numbers by category."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluate as script
from data.prepare import prepare
from data.settings import PrepareSettings
from data.shards import open_dataset
from data.templates import TEMPLATES, render_prompt, render_record
from data.tokenizer import ByteTokenizer
from evaluation.evaluate import evaluate
from evaluation.instructions import PreparedSet, RecordFile
from evaluation.settings import EvaluateSettings
from evaluation.text_metrics import score_answers
from formats.open_model import OpenModel, open_model
from model.generate import generate
from tests.scripts import one_line_error, run_main
from tests.tiny import pair_set, text_set
from tests.tiny_checkpoints import instruction_set, save_tiny

BYTES = ByteTokenizer()
RECORDS: list[dict[str, Any]] = [
    {"instruction": f"Say {word}.", "context": context, "response": word * 2, "category": category}
    for word, context, category in (
        ("ab", "", "short"),
        ("cd", "Some context.", "short"),
        ("hello there", "", "long"),
        ("你好", "", "long"),
        ("x", "", ""),
    )
]
ALL = ("loss", "accuracy", "bleu", "chrf", "rouge", "exact_match", "f1")


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return write(tmp_path / "records.jsonl", RECORDS)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "m.pt", template="dolly", block_size=256)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def measure(model: Path, data: Path, metrics: tuple[str, ...] = ALL, **more: Any) -> dict[str, Any]:
    settings = EvaluateSettings(
        checkpoints=(str(model),), data_dir=str(data), metrics=metrics, **{"max_new_tokens": 6, **more}
    )
    (result,) = evaluate(settings)["results"]
    return result


def loss_and_hits(opened: OpenModel, record: dict[str, Any]) -> tuple[float, int, int]:
    """(summed loss, tokens, tokens that were the likeliest) of a record's answer, from plain logits."""
    ids, mask = render_record(record, TEMPLATES["dolly"], opened.tokenizer)
    with torch.no_grad():
        logits = opened.model(torch.tensor([ids[:-1]]))[0]
    places = [place for place, marked in enumerate(mask[1:]) if marked]
    wanted = torch.tensor(ids[1:])[places]
    losses = torch.nn.functional.cross_entropy(logits[places].double(), wanted, reduction="sum")
    return float(losses), len(places), int((logits[places].argmax(-1) == wanted).sum())


def test_loss_and_accuracy_of_answers_by_category(model: Path, records: Path) -> None:
    opened = open_model(model)
    found = measure(model, records, ("loss", "accuracy"))
    by_category = found["categories"]
    assert list(by_category) == ["", "long", "short"]
    for category in (None, "", "long", "short"):
        sums = [loss_and_hits(opened, r) for r in RECORDS if category in (None, r["category"])]
        loss, tokens, hits = (sum(column) for column in zip(*sums))
        values = found if category is None else by_category[category]
        assert values["tokens"] == tokens
        assert values["loss"] == pytest.approx(loss / tokens, rel=1e-6)
        assert values["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)
        assert values["accuracy"] == hits / tokens
    assert by_category["long"]["samples"] == 2 and found["scored"] == "answers only"


def test_accuracy_counts_what_the_model_would_say(tmp_path: Path, model: Path) -> None:
    opened = open_model(model)
    prompt = render_prompt("Go on.", TEMPLATES["dolly"], BYTES)
    (said,) = generate(opened.model, [prompt], max_new_tokens=4, temperature=0.0)
    said[2] = (said[2] + 1) % 256
    ids = np.array([*prompt, *said[:3]])
    tokens = instruction_set(tmp_path / "set", [(ids, np.arange(len(ids)) >= len(prompt))])
    assert measure(model, tokens.folder, ("accuracy",))["accuracy"] == pytest.approx(2 / 3)


def test_answers_are_greedy_and_the_metrics_are_theirs(model: Path, records: Path) -> None:
    opened = open_model(model)
    found = measure(model, records, keep_predictions=3)
    prompts = [render_prompt(record, TEMPLATES["dolly"], BYTES) for record in RECORDS]
    answers = [
        BYTES.decode(generate(opened.model, [prompt], max_new_tokens=6, temperature=0.0, stop_ids=[256])[0]).strip()
        for prompt in prompts
    ]
    references = [record["response"] for record in RECORDS]
    wanted = score_answers(answers, references, ALL[2:])
    assert {name: found[name] for name in wanted.values} == wanted.values
    assert found["signatures"] == wanted.signatures and found["samples"] == 5
    assert found["predictions"] == [
        {
            "prompt": "\n\n".join(part for part in (record["instruction"], record["context"]) if part),
            "category": record["category"],
            "reference": record["response"],
            "prediction": answer,
        }
        for record, answer in zip(RECORDS[:3], answers)
    ]
    shorts = score_answers(answers[:2], references[:2], ["f1", "chrf"]).values
    assert {name: found["categories"]["short"][name] for name in shorts} == shorts
    assert (found["template"], found["max_new_tokens"]) == ("dolly", 6)
    assert "tok:13a" in found["signatures"]["bleu"] and "tok:13a" in found["categories"]["long"]["signatures"]["bleu"]


def test_a_category_in_chinese_counts_by_its_signs(tmp_path: Path, model: Path) -> None:
    rows = [{"instruction": "A", "response": text, "category": text[0]} for text in ("你好", "ab", "ac", "ad")]
    found = measure(model, write(tmp_path / "mixed.jsonl", rows), ("bleu",))
    assert "tok:13a" in found["signatures"]["bleu"]
    assert {name: "tok:zh" in values["signatures"]["bleu"] for name, values in found["categories"].items()} == {
        "a": False,
        "你": True,
    }


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_any_batch_size_gives_the_same(model: Path, records: Path, batch_size: int) -> None:
    found, wanted = (measure(model, records, batch_size=size) for size in (batch_size, 3))
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    for name in ("predictions", "accuracy", "tokens", "bytes", "bleu", "chrf", "rougeL", "f1"):
        assert found[name] == wanted[name], name


def test_a_prepared_set_is_read_back_as_its_records(tmp_path: Path, model: Path, records: Path) -> None:
    words: dict[str, Any] = {"source": "jsonl", "input": (str(records),), "data_dir": str(tmp_path / "set")}
    prepare(PrepareSettings(**words, tokenizer="byte", prompt_template="dolly", val_fraction=0.0, workers=1))
    opened = open_model(model)
    prepared = PreparedSet(open_dataset(tmp_path / "set", "train"), None).asked(opened, None)
    direct = RecordFile(records, None).asked(opened, TEMPLATES["dolly"])
    key = lambda question: question.prompt  # noqa: E731
    one, other = sorted(prepared.questions, key=key), sorted(direct.questions, key=key)
    assert [(q.prompt, q.reference) for q in one] == [(q.prompt, q.reference) for q in other]
    assert prepared.stop_ids == direct.stop_ids == (256,) and prepared.template == TEMPLATES["dolly"]
    names = ("loss", "accuracy", "chrf", "rougeL", "f1", "tokens", "samples", "bits_per_byte")
    ours, theirs = measure(model, tmp_path / "set", split="train"), measure(model, records)
    assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-9)
    assert ours["categories"] == {}
    first = measure(model, tmp_path / "set", split="train", max_samples=2)
    assert first["samples"] == 2 and first["tokens"] < ours["tokens"]


def test_of_a_conversation_the_last_answer_is_compared(tmp_path: Path, model: Path) -> None:
    turns = [("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    talk = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path = write(tmp_path / "talk.jsonl", [talk])
    (question,) = RecordFile(path, None).asked(open_model(model), TEMPLATES["dolly"]).questions
    assert (question.shown, question.reference) == ("Two?", "2")
    assert BYTES.decode(question.prompt).replace("<|endoftext|>", "|") == (
        "### Instruction:\nOne?\n\n### Response:\n1|### Instruction:\nTwo?\n\n### Response:\n"
    )
    words: dict[str, Any] = {"source": "jsonl", "input": (str(path),), "data_dir": str(tmp_path / "set")}
    prepare(PrepareSettings(**words, tokenizer="byte", prompt_template="dolly", val_fraction=0.0, workers=1))
    (same,) = PreparedSet(open_dataset(tmp_path / "set", "train"), None).asked(open_model(model), None).questions
    assert (same.prompt, same.reference) == (question.prompt, "2")


def test_what_a_template_puts_after_an_answer_is_none_of_it(tmp_path: Path) -> None:
    records = write(tmp_path / "code.jsonl", [{"problem": "Print 1.", "solution": "print(1)"}])
    words: dict[str, Any] = {"source": "jsonl", "input": (str(records),), "data_dir": str(tmp_path / "set")}
    prepare(PrepareSettings(**words, tokenizer="byte", prompt_template="zh_code", val_fraction=0.0, workers=1))
    opened = open_model(save_tiny(tmp_path / "m.pt", template="zh_code"))
    asked = PreparedSet(open_dataset(tmp_path / "set", "train"), None).asked(opened, None)
    assert asked.questions[0].reference == "print(1)"
    assert asked.answer(BYTES.encode("print(1)\n```"), BYTES) == "print(1)"


def test_the_template_is_the_models_own_or_the_one_that_is_named(tmp_path: Path, records: Path) -> None:
    bare, tuned = save_tiny(tmp_path / "bare.pt"), save_tiny(tmp_path / "tuned.pt", template="dolly")
    names = [measure(model, records, ("f1",), batch_size=2)["template"] for model in (bare, tuned)]
    assert names == [None, "dolly"]
    assert measure(tuned, records, ("f1",), prompt_template="none")["template"] is None
    named, own = (measure(model, records, prompt_template="dolly") for model in (bare, tuned))
    assert (named["loss"], named["template"]) == (own["loss"], "dolly")
    raw = measure(bare, records, ("loss",), max_samples=1)
    assert raw["tokens"] == len(" abab"), "no end of text: the text simply goes on"


def test_records_without_an_answer_are_left_out_and_told(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "some.jsonl", [{"instruction": "A", "response": " "}, RECORDS[0]])
    words = ["--checkpoints", model, "--data_dir", path, "--metrics", "f1,bleu", "--max_new_tokens", "2"]
    code, out, _ = run_main(capsys, script.main, EvaluateSettings, *words)
    assert code == 0 and "some.jsonl: left out 1 record without an instruction or a response" in out
    assert "  Num examples = 1" in out and "Eval F1: " in out and "bleu: nrefs:1|" in out


def test_prompts_with_references_are_records_too(tmp_path: Path, model: Path) -> None:
    row = {"prompt": "Say ab.", "context": "Some context.", "reference": "abab", "category": "short"}
    usual = {"instruction": "Say ab.", "context": "Some context.", "response": "abab", "category": "short"}
    asked = [
        RecordFile(write(tmp_path / "x.jsonl", [each]), None).asked(open_model(model), TEMPLATES["dolly"])
        for each in (row, usual)
    ]
    assert asked[0].questions == asked[1].questions and asked[0].questions[0].reference == "abab"


def test_too_little_memory_costs_one_line(
    model: Path, records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPU: can't allocate memory")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr("evaluation.answers.generate", fail)
        words = ("--checkpoints", model, "--data_dir", records, "--metrics", "f1")
        line = one_line_error(run_main(capsys, script.main, EvaluateSettings, *words))
        assert "m.pt on records.jsonl: out of memory: use a smaller --batch_size" in line


def test_control_characters_and_half_characters_are_data(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "odd.jsonl", [{"instruction": "A\x1b[2J\x00\u202e\n\nb", "response": "\x07<b>\ud800"}])
    out_file = tmp_path / "out.json"
    words = ["--checkpoints", model, "--data_dir", path, "--metrics", *ALL, "--max_new_tokens", "2"]
    code, out, _ = run_main(capsys, script.main, EvaluateSettings, *words, "--json", out_file)
    assert code == 0 and not set("\x1b\x00\x07\u202e") & set(out)
    (result,) = json.loads(out_file.read_text())["results"]
    assert result["predictions"][0]["prompt"] == "A\x1b[2J\x00\u202e\n\nb"


def test_answers_of_several_checkpoints_stand_under_their_reference(
    tmp_path: Path, records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [save_tiny(tmp_path / f"{name}.pt", seed, template="dolly") for name, seed in (("one", 0), ("two", 1))]
    words = ["--checkpoints", *models, "--data_dir", records, "--metrics", "exact_match", "--json", "beside"]
    _, out, _ = run_main(capsys, script.main, EvaluateSettings, *words, "--max_new_tokens", "3")
    lines = out.split("\n")
    at = lines.index("records.jsonl, answer 2 (short)")
    assert [line.split()[0] for line in lines[at + 1 : at + 5]] == ["prompt", "reference", "one", "two"]
    assert lines[at + 1].endswith("Say cd. Some context.") and lines[at + 2].endswith("cdcd")
    longs = [line.split()[0] for line in lines if "records.jsonl: long" in line]
    assert longs == ["one", "two"], "a row of the table for each category"
    for name in ("one", "two"):
        (result,) = json.loads((tmp_path / f"{name}.eval.json").read_text())["results"]
        assert result["checkpoint"] == name and len(result["predictions"]) == 5
        assert f"Results: {tmp_path / name}.eval.json" in out


def test_mistakes_cost_one_line(tmp_path: Path, model: Path, records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def why(*words: object, metrics: str = "f1") -> str:
        words = ("--checkpoints", model, "--metrics", metrics, *words)
        return one_line_error(run_main(capsys, script.main, EvaluateSettings, *words))

    empty = write(tmp_path / "empty.jsonl", [])
    assert "empty.jsonl: holds no record" in why("--data_dir", empty)
    blank = write(tmp_path / "blank.jsonl", [{"instruction": "A", "response": ""}] * 2)
    assert "blank.jsonl: holds no record to compare with (left out 2 without" in why("--data_dir", blank)
    text = write(tmp_path / "text.jsonl", [{"text": "A"}])
    assert "text.jsonl:1: is a record of text, expected an instruction" in why("--data_dir", text)
    odd = write(tmp_path / "odd.jsonl", [RECORDS[0], {"instruction": 3, "response": "B"}])
    assert "odd.jsonl:2: the field 'instruction' is int" in why("--data_dir", odd)
    odd = write(tmp_path / "odd.jsonl", [{**RECORDS[0], "category": 3}])
    assert "odd.jsonl:1: the field 'category' is int" in why("--data_dir", odd)
    assert "f1 compares answers with references: give --data_dir" in why("--input", records)
    assert "--metrics f1 measures nothing of --input" in why("--input", records, "--data_dir", records)
    assert "holds text; answers are compared" in why("--data_dir", text_set(tmp_path / "text"))
    assert "holds preference; answers are compared" in why("--data_dir", pair_set(tmp_path / "pairs"))
    assert "which --max_samples does not count" in why("--data_dir", tmp_path / "text", "--max_samples", "2")
    assert "--max_samples 2: counts records and questions" in why(
        "--input", records, "--max_samples", "2", metrics="loss"
    )
    assert "--prompt_template chatml: " in why("--data_dir", tmp_path / "pairs", "--prompt_template", "chatml")
    for name in ("--max_samples", "--max_new_tokens", "--batch_size"):
        assert f"{name} 0: expected at least 1" in why("--data_dir", records, name, "0")
    assert "--keep_predictions -1" in why("--data_dir", records, "--keep_predictions", "-1")
    assert "dolly" in why("--data_dir", records, "--prompt_template", "doly")
    bare = save_tiny(tmp_path / "bare.pt")
    talk = {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant") * 2]}
    talks = write(tmp_path / "talks.jsonl", [talk])
    words = ("--checkpoints", bare, "--data_dir", talks, "--metrics", "f1")
    assert "talks.jsonl:1: a conversation of 4 messages needs a template" in one_line_error(
        run_main(capsys, script.main, EvaluateSettings, *words)
    )
    wrong = [{"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "tool", "assistant")]}]
    path = write(tmp_path / "tools.jsonl", [RECORDS[0], *wrong])
    for metrics in ("loss", "f1"):
        assert "tools.jsonl:2: messages: prompt template dolly takes turns" in why("--data_dir", path, metrics=metrics)
    silent = instruction_set(tmp_path / "silent", [([65, 66, 256], [0, 0, 1])])
    assert "none of its first 1 answers holds any text" in why("--data_dir", silent.folder)
    words = ("--checkpoints", "some/model", "--input", records, "--json", "beside")
    assert "--json beside: some/model is no file" in one_line_error(
        run_main(capsys, script.main, EvaluateSettings, *words)
    )
