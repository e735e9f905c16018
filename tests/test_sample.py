"""sample.py from the outside, and what it stands on: prompts in, the same input for all, answers side by side."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import save_tiny

import sample as script
from data.templates import TEMPLATES, render_prompt, render_record
from evaluation.checkpoints import expand_checkpoints, short_labels
from evaluation.compare import Sampling, compare, reference_loss
from evaluation.prompts import prompt_record, read_prompts
from evaluation.settings import SampleSettings
from formats.open_model import open_model
from model.generate import generate
from tests.scripts import one_line_error, run_main

SHORT = Sampling(max_new_tokens=12, temperature=1.0, top_k=0, seed=3)
FLAGS = ["--max_new_tokens", "8", "--device", "cpu"]


def run(capsys, *words):
    """(exit code, stdout, stderr) of sample.py."""
    return run_main(capsys, script.main, SampleSettings, *words, *FLAGS)


def fails(capsys, *words):
    """The one line that a mistake is answered with."""
    return one_line_error(run(capsys, *words))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base model without a template, and two tuned ones with different templates."""
    folder = tmp_path_factory.mktemp("models")
    base = save_tiny(folder / "logs" / "model_00007.pt", seed=0)
    tuned = save_tiny(folder / "tuned" / "model_00007.pt", seed=1, template="dolly")
    other = save_tiny(folder / "other" / "best.pt", seed=2, template="alpaca")
    return base, tuned, other


def prompts(*texts, reference=""):
    return [{**prompt_record(text), "response": reference} for text in texts]


def texts(comparison, column=0):
    return [row["answers"][column]["text"] for row in comparison["rows"]]


# ---- compare


def test_answers_are_what_generate_gives(models):
    comparison = compare(models[:1], prompts("One", "Two longer"), SHORT, prompt_template="none")
    opened = open_model(models[0])
    for row, text in zip(comparison["rows"], ["One", "Two longer"]):
        ids = opened.tokenizer.encode(text)
        (expected,) = generate(opened.model, [ids], max_new_tokens=12, temperature=1.0, seed=3, stop_ids=(256,))
        answer = row["answers"][0]
        assert answer["text"] == opened.tokenizer.decode(expected)
        assert answer["tokens"] == len(expected) > 0
        assert answer["prompt_tokens"] == len(ids)
        assert answer["seconds"] > 0
        assert answer["tokens_per_s"] == pytest.approx(len(expected) / answer["seconds"])


def test_the_batch_size_and_the_other_prompts_do_not_change_an_answer(models):
    asked = ["a", "bcd ef", "Hello there, how", "x y", "zz"]
    one = compare(models[:1], prompts(*asked), SHORT, prompt_template="none")
    many = compare(models[:1], prompts(*asked), SHORT, prompt_template="none", batch_size=3)
    alone = compare(models[:1], prompts("x y"), SHORT, prompt_template="none")
    assert texts(one) == texts(many)
    assert texts(one)[3] == texts(alone)[0]
    assert len(set(texts(one))) > 1


def test_a_model_beside_itself_says_the_same(models):
    comparison = compare([models[0], models[0], models[1]], prompts("Once upon"), SHORT)
    first, second, third = (answer["text"] for answer in comparison["rows"][0]["answers"])
    assert first == second != third
    assert len({head["label"] for head in comparison["checkpoints"]}) == 3


@pytest.mark.parametrize(
    ("order", "asked", "name", "note"),
    [
        ((0, 1, 2), "auto", "dolly", "prompt template dolly (found in tuned/model_00007)"),
        ((2, 1, 0), "auto", "alpaca", "prompt template alpaca (found in other/best)"),
        ((0, 1, 2), "human_assistant", "human_assistant", "prompt template human_assistant"),
        ((0, 1, 2), "none", "none", "the raw prompt"),
    ],
)
def test_all_columns_read_the_same_input(models, order, asked, name, note):
    lines = []
    refs = [models[i] for i in order]
    comparison = compare(refs, prompts("Why?"), SHORT, prompt_template=asked, say=lines.append)
    tokenizer = open_model(refs[0]).tokenizer
    length = len(render_prompt("Why?", TEMPLATES.get(name), tokenizer))
    assert {answer["prompt_tokens"] for answer in comparison["rows"][0]["answers"]} == {length}
    assert comparison["settings"]["prompt_template"] == name
    assert comparison["notes"][0] == lines[0] == f"Input of every checkpoint: {note}"
    assert comparison["rows"][0]["input"] == (TEMPLATES[name].prompt(prompt_record("Why?")) if name != "none" else "")
    assert [head["template"] for head in comparison["checkpoints"]] == [[None, "dolly", "alpaca"][i] for i in order]


def test_without_any_template_the_prompt_is_raw(models):
    comparison = compare(models[:1], prompts("Why?"), SHORT)
    assert comparison["notes"] == ["Input: the raw prompt (no checkpoint holds a template)"]


def test_finish_tells_the_end_of_text_from_the_length(models, tmp_path):
    """A model whose last bias-free head prefers the end of text stops at once; the other runs to its limit."""
    from formats.checkpoint import load_checkpoint, save_checkpoint

    payload = load_checkpoint(models[0])
    weights = {name: tensor.clone() for name, tensor in payload["model"].items()}
    weights["ln_f.weight"].zero_()
    weights["ln_f.bias"].copy_(100 * weights["wte.weight"][256] / weights["wte.weight"][256].norm())
    save_checkpoint(tmp_path / "stops.pt", {**payload, "model": weights})
    greedy = Sampling(max_new_tokens=5, temperature=0.0)
    stops, runs = compare([tmp_path / "stops.pt", models[0]], prompts("a"), greedy)["rows"][0]["answers"]
    assert (stops["finish"], stops["tokens"], stops["text"], stops["tokens_per_s"]) == ("end of text", 0, "", 0.0)
    assert stops["seconds"] > 0
    assert (runs["finish"], runs["tokens"]) == ("length", 5)


@pytest.mark.parametrize("name", ["dolly", "zh_code", None])
def test_the_reference_is_scored_after_its_prompt(models, name):
    opened = open_model(models[0])
    record = {**prompt_record("Name a colour."), "response": "Blue, say."}
    template = TEMPLATES.get(name or "")
    if template:
        ids, mask = render_record(record, template, opened.tokenizer)
    else:
        ids = opened.tokenizer.encode("Name a colour. Blue, say.")
        mask = [0] * len("Name a colour.") + [1] * len(" Blue, say.")
    assert len(ids) <= 64  # one window: the plain logits below are the whole truth
    with torch.no_grad():
        log_probabilities = torch.log_softmax(opened.model(torch.tensor([ids[:-1]]))[0], -1)
    scores = log_probabilities[range(len(ids) - 1), ids[1:]][torch.tensor(mask[1:], dtype=torch.bool)]
    found = reference_loss(opened, record, template)
    assert found["tokens"] == sum(mask)
    assert found["loss"] == pytest.approx(-float(scores.mean()), rel=1e-4)
    assert found["perplexity"] == pytest.approx(float(torch.exp(-scores.mean())), rel=1e-4)


def test_the_column_sums_up_its_references_by_token(models):
    asked = [*prompts("a", reference="short"), *prompts("b", reference="a rather longer one"), *prompts("c")]
    comparison = compare(models[:2], asked, SHORT, prompt_template="none")
    for column, head in enumerate(comparison["checkpoints"]):
        found = [row["answers"][column]["reference"] for row in comparison["rows"]]
        assert found[2] is None
        mean = sum(r["loss"] * r["tokens"] for r in found[:2]) / sum(r["tokens"] for r in found[:2])
        assert head["summary"]["reference_perplexity"] == pytest.approx(np.exp(mean))
        assert head["summary"]["tokens"] == sum(row["answers"][column]["tokens"] for row in comparison["rows"])
        assert (head["step"], head["val_loss"]) == (7, 4.5)


def test_text_streams_in_whole_characters(models):
    pieces = {}
    comparison = compare(
        models[:1],
        prompts("a", "b", "c"),
        SHORT,
        batch_size=2,
        on_text=lambda row, text: pieces.setdefault(row, []).append(text),
    )
    assert ["".join(pieces[row]) for row in range(3)] == texts(comparison)
    assert len(pieces[0]) > 1


def test_going_beyond_the_context_is_said(models):
    comparison = compare(models[:2], prompts("x" * 100, "short"), SHORT, prompt_template="none")
    assert [note for note in comparison["notes"] if "1 answer went beyond the context of 64 tokens" in note] != []


def test_a_comparison_is_json(models):
    comparison = compare(models[:2], prompts("a", reference="b"), SHORT)
    assert json.loads(json.dumps(comparison, allow_nan=False)) == comparison


def test_labels_are_short_and_distinct():
    assert short_labels(["runs/x/model_00009.pt"]) == ["model_00009"]
    assert short_labels(["logs/m.pt", "tuned/m.pt"]) == ["logs/m", "tuned/m"]
    assert short_labels(["a/x/m.pt", "b/x/m.pt", "b/y/m.pt"]) == ["a/x/m", "b/x/m", "b/y/m"]
    assert short_labels(["m.pt", "m.pt"]) == ["m (1)", "m (2)"]


@given(st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map("/".join), min_size=1, max_size=5))
def test_labels_never_collide(paths):
    labels = short_labels([path + ".pt" for path in paths])
    assert len(set(labels)) == len(paths)


# ---- prompts


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_plain_lines(tmp_path):
    found = read_prompts(write(tmp_path / "p.txt", "\ufeffFirst, {\r\n\n   \n  indented \nlast"))
    assert [record["instruction"] for record in found] == ["First, {", "  indented ", "last"]
    assert found[0] == prompt_record("First, {")


def test_json_lines_under_every_name(tmp_path):
    lines = [
        {"prompt": "def f(x):\n    ", "reference": "return x", "context": "code"},
        {"instruction": " Name one. ", "context": "c", "response": "Blue.", "category": "open_qa"},
        {"instruction": "A", "input": "i", "output": "o"},
        {"prompt": "alone"},
        {"prompt": "nothing known", "reference": None, "context": None},
    ]
    found = read_prompts(write(tmp_path / "p.jsonl", "\n\n".join(map(json.dumps, lines))))
    keys = ("instruction", "context", "response", "category")
    assert [tuple(record[key] for key in keys) for record in found] == [
        ("def f(x):\n    ", "code", "return x", ""),
        ("Name one.", "c", "Blue.", "open_qa"),
        ("A", "i", "o", ""),
        ("alone", "", "", ""),
        ("nothing known", "", "", ""),
    ]
    same = read_prompts(write(tmp_path / "p.txt", "\n".join(map(json.dumps, lines))))
    assert same == found  # known by its first line, whatever its name


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "", "holds no prompts"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.txt", b"fine\nbad \xff\n", "p.txt:2: is not UTF-8 (byte 0xff)"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": ', "p.jsonl:3: is not JSON"),
        ("p.jsonl", "plain words", "p.jsonl:1: is not JSON"),
        ("p.jsonl", '["prompt"]', "p.jsonl:1: expected an object with a `prompt`, found a list"),
        ("p.jsonl", '{"question": "a"}', "its fields are 'question'"),
        ("p.jsonl", '{"prompt": "  "}', "expected a non-empty text in `prompt`"),
        ("p.jsonl", '{"prompt": 3}', "expected a non-empty text in `prompt`"),
        ("p.jsonl", '{"prompt": "a", "reference": 3}', "p.jsonl:1: the field 'response' is int, expected text"),
        ("p.jsonl", '{"prompt": "a \\ud800"}', "p.jsonl:1: holds half a surrogate pair"),
    ],
)
def test_what_is_no_prompt_is_named_with_its_line(tmp_path, name, content, expected):
    with pytest.raises(ValueError) as error:
        read_prompts(write(tmp_path / name, content))
    assert expected in str(error.value) and "\n" not in str(error.value)


# ---- the script


def test_several_checkpoints_side_by_side_in_json_and_html(models, tmp_path, capsys):
    asked = tmp_path / "prompts.jsonl"
    asked.write_text(json.dumps({"prompt": "<b>Why</b>?", "reference": "Because."}) + "\n")
    page, data = tmp_path / "out" / "page.html", tmp_path / "out" / "answers.json"
    words = ["--checkpoints", *models, "--prompt", "Tell me more", "--prompts", asked, "--json", data, "--html", page]
    code, out, err = run(capsys, *words, "--seed", "5")
    assert code == 0
    comparison = json.loads(data.read_text("utf-8"))
    assert [row["prompt"] for row in comparison["rows"]] == ["Tell me more", "<b>Why</b>?"]
    assert comparison["settings"]["seed"] == 5 and comparison["settings"]["max_new_tokens"] == 8
    assert out.count("--- tuned/model_00007") == 2  # piped: stacked, once a prompt
    assert f"JSON: {data}" in out and f"Page: {page}" in out
    assert "prompt template dolly (found in tuned/model_00007)" in out and "tuned/model_00007: 2 answers" in err
    html = page.read_text("utf-8")
    assert "&lt;b&gt;Why&lt;/b&gt;?" in html and "<b>Why" not in html
    assert html.count("reference perplexity") >= 3


def test_a_single_checkpoint_streams(models, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"One\n\nTwo\n")))
    code, out, _ = run(capsys, "--checkpoints", models[1], "--prompts", "-")
    assert code == 0
    assert out.index("[1/2] One") < out.index("(8 tokens") < out.index("[2/2] Two")
    batched = run(capsys, "--checkpoints", models[1], "--prompt", "One", "Two", "--batch_size", "2")[1]
    assert batched.index("[1/2] One") < batched.index("--- model_00007") < batched.index("[2/2] Two")


def test_a_terminal_gets_columns(models, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = run(capsys, "--checkpoints", *models[:2], "--prompt", "One")
    assert any("logs/model_00007" in line and "| tuned/model_00007" in line for line in out.split("\n"))


def test_mistakes_cost_one_line(models, tmp_path, capsys):
    def why(*words):
        return fails(capsys, "--checkpoints", models[0], *words)

    ask = ("--prompt", "a")
    assert "no checkpoint" in fails(capsys, *ask)
    assert "no prompt" in why()
    assert "no prompt" in why("--prompt", " ")
    assert "no such file of prompts" in why("--prompts", tmp_path / "none.txt")
    assert "is a folder" in why("--prompts", tmp_path)
    assert "Did you mean alpaca?" in why(*ask, "--prompt_template", "alpacca")
    assert "batch_size 0" in why(*ask, "--batch_size", "0")
    assert "--temperature" in why(*ask, "--temperatur", "1")
    assert "no such checkpoint" in fails(capsys, "--checkpoints", models[0], tmp_path / "b.pt", *ask)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    small = save_tiny(tmp_path / "small.pt", vocab_size=200, padded_vocab_size=256)
    with pytest.raises(ValueError, match=r"small\.pt: its tokenizer has ids up to 256, its model only up to 199"):
        compare([small], prompts("a"), SHORT)


def test_a_mistyped_name_is_told_before_anything_is_generated(models, tmp_path):
    told = []
    with pytest.raises(FileNotFoundError, match=r"typo\.pt"):
        compare(
            [models[0], tmp_path / "typo.pt"], prompts("a"), SHORT, say=told.append, on_text=lambda *x: told.append(x)
        )
    assert told == []


# ---- many checkpoints, many seeds


def test_a_folder_a_pattern_and_every_nth_name_the_checkpoints_of_a_run(tmp_path):
    run = tmp_path / "logs"
    run.mkdir()
    for step in (2, 4, 100000, 6, 8):
        (run / f"model_{step:05d}.pt").touch()
    (run / "best.pt").touch()

    def steps(*refs, every=1):
        return [Path(ref).stem.removeprefix("model_") for ref in expand_checkpoints([str(ref) for ref in refs], every)]

    everything = ["00002", "00004", "00006", "00008", "100000"]
    assert steps(run) == steps(run / "model_*.pt") == everything
    assert (
        steps(*sorted(run.glob("model_*.pt"), key=lambda file: len(file.name)), every=2)
        == steps(run, every=2)
        == ["00002", "00006", "100000"]
    )
    assert steps("base.pt", run, run / "best.pt", every=4) == ["base", "00002", "100000", "best"]
    assert steps("owner/name", "x.gguf") == ["name", "x"]


def test_a_folder_of_a_model_is_one_model_and_a_folder_of_nothing_is_told(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert expand_checkpoints([str(tmp_path / "hf")]) == [str(tmp_path / "hf")]
    (tmp_path / "empty").mkdir()
    for refs, every, message in (
        (["empty"], 1, "empty: holds neither checkpoints"),
        (["no_*.pt"], 1, "no file fits this pattern"),
        (["hf"], 0, "--every 0"),
    ):
        with pytest.raises(ValueError, match=message):
            expand_checkpoints([str(tmp_path / ref) for ref in refs], every)


def test_each_seed_gives_a_row_that_a_run_with_this_seed_alone_gives(models):
    asked = [*prompts("One", reference="Un."), *prompts("Two longer")]
    many = compare(models[:2], asked, SHORT, seeds=3, batch_size=2)
    assert [(row["prompt"], row["seed"]) for row in many["rows"]] == [
        (text, seed) for text in ("One", "Two longer") for seed in (3, 4, 5)
    ]
    for offset in range(3):
        alone = compare(models[:2], asked, replace(SHORT, seed=3 + offset), batch_size=2)
        assert [row["seed"] for row in alone["rows"]] == [None, None]
        for column in range(2):
            assert texts(many, column)[offset::3] == texts(alone, column)
        assert [row["answers"][0]["reference"] for row in many["rows"]][offset::3] == [
            row["answers"][0]["reference"] for row in alone["rows"]
        ]
        for head, single in zip(many["checkpoints"], alone["checkpoints"]):
            assert head["summary"]["reference_perplexity"] == single["summary"]["reference_perplexity"]
    head = many["checkpoints"][0]
    assert head["summary"]["mean_tokens"] == pytest.approx(head["summary"]["tokens"] / 6)
    assert head["bytes"] == models[0].stat().st_size
    assert many["settings"]["seeds"] == 3 and "seeds" not in alone["settings"]


def test_seeds_without_chance_are_refused(models, capsys):
    ask = ("--checkpoints", models[0], "--prompt", "a", "--seeds")
    assert "seeds 0" in fails(capsys, *ask, "0")
    assert "seeds 2 with temperature 0" in fails(capsys, *ask, "2", "--temperature", "0")


def test_a_run_folder_becomes_columns_of_a_page(models, tmp_path, capsys):
    for step in (1, 2, 3):
        save_tiny(tmp_path / "run" / f"model_{step:05d}.pt", seed=step)
    words = ["--checkpoints", tmp_path / "run", "--every", "2", "--prompt", "One", "--seeds", "2"]
    code, out, _ = run(capsys, *words, "--html", tmp_path / "page.html")
    assert code == 0 and "--- model_00001" in out and "--- model_00003" in out and "model_00002" not in out
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count("<article") == 2 and "seed 1337" in page and "seed 1338" in page
