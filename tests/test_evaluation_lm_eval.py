"""lm-eval drives a model of ours on a task of this folder: the same numbers as our own, and what it asks answered."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

import evaluate as script
from data.tokenizer import ByteTokenizer
from evaluation.continuations import encode_pair
from evaluation.lm_eval_adapter import check_lm_eval, language_model, rolling_windows
from evaluation.multiple_choice import multiple_choice, read_choices
from evaluation.settings import EvaluateSettings
from formats.open_model import OpenModel, open_model
from model.generate import generate
from tests.scripts import one_line_error, run_main
from tests.test_evaluation_continuations import plain
from tests.test_evaluation_multiple_choice import ROWS, write
from tests.tiny_checkpoints import save_tiny

ROOT = Path(__file__).resolve().parent.parent
TASK = """
task: espalier_choice
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {file}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{ctx}}}}"
doc_to_target: "{{{{label|int}}}}"
doc_to_choice: "{{{{endings}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 2.0}}
"""
BYTES = ByteTokenizer()


class Request(NamedTuple):
    """What lm-eval's instances have that a model looks at."""

    args: tuple[Any, ...]


@pytest.fixture
def opened(tmp_path: Path) -> OpenModel:
    return open_model(save_tiny(tmp_path / "m.pt"))


def test_a_local_task_gives_our_own_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, questions = save_tiny(tmp_path / "m.pt"), write(tmp_path / "q.jsonl", ROWS)
    task = tmp_path / "task.yaml"
    task.write_text(TASK.format(file=questions), "utf-8")
    out = tmp_path / "out.json"
    words = ["--checkpoints", model, "--lm_eval", task, "--json", out, "--device", "cpu", "--max_samples", "8"]
    code, said, err = run_main(capsys, script.main, EvaluateSettings, *words)
    assert code == 0, err
    (result,) = json.loads(out.read_text())["results"]
    wanted = multiple_choice(open_model(model), read_choices(questions, 8))
    assert {name: result[name] for name in wanted} == pytest.approx(wanted)
    assert result["lm_eval"]["version"] == 2.0 and result["text"] == "lm-eval task"
    assert f"Eval acc: {wanted['acc']:.4f}" in said


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    """Slow: two processes import torch and lm-eval."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")
    model, questions = save_tiny(tmp_path / "m.pt"), write(tmp_path / "q.jsonl", ROWS)
    task = tmp_path / "task.yaml"
    task.write_text(TASK.format(file=questions), "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "evaluate.py"]
    words = ["--checkpoints", model, "--lm_eval", task, "--batch_size", 3, "--json", tmp_path / "two.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, *map(str, words), "--device", "cpu"], cwd=ROOT, env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = json.loads((tmp_path / "two.json").read_text())["results"]
    wanted = multiple_choice(open_model(model), read_choices(questions))
    assert {name: result[name] for name in wanted} == pytest.approx(wanted)


@pytest.mark.slow
def test_an_unknown_task_costs_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slow: lm-eval indexes its tasks."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")
    words = ["--checkpoints", save_tiny(tmp_path / "m.pt"), "--lm_eval", "no_such_task"]
    message = one_line_error(run_main(capsys, script.main, EvaluateSettings, *words))
    assert "--lm_eval no_such_task: lm-eval has no such task" in message


def test_hellaswags_rows_are_prepared_as_there(tmp_path: Path) -> None:
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils", reason="lm-eval is not installed")
    from datasets import Dataset

    row = {
        "activity_label": "Baking  bread",
        "ctx_a": "[header] How to bake [title] Heat the oven.  Wait",
        "ctx_b": "then the Cook",
        "ctx": "not read",
        "endings": [" stirs. [substeps] Slowly.", "leaves [step] the [title] House."],
        "label": "1",
    }
    (theirs,) = utils.process_docs(Dataset.from_list([row]))
    (ours,) = read_choices(write(tmp_path / "q.jsonl", [row]))
    assert (theirs["query"], theirs["choices"], theirs["gold"]) == ours


def test_without_lm_eval_the_package_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "m.pt")
    loaded = {name: value for name, value in sys.modules.items() if name.partition(".")[0] != "lm_eval"}
    absent = mock.patch("importlib.util.find_spec", lambda name, *_: None)
    with (
        absent,
        mock.patch.dict(sys.modules, loaded, clear=True),
        pytest.raises(ValueError, match="pip install lm-eval"),
    ):
        check_lm_eval()
    if "lm_eval" not in sys.modules:
        with mock.patch("evaluation.evaluate.check_lm_eval", side_effect=ValueError("needs it")):
            words = ("--checkpoints", model, "--lm_eval", "hellaswag")
            assert "needs it" in one_line_error(run_main(capsys, script.main, EvaluateSettings, *words))


def test_a_text_is_scored_token_by_token_in_full_windows(opened: OpenModel) -> None:
    """As lm-eval asks of `loglikelihood_rolling`: each token once, the last window full to the left."""
    text = "abcdefghij" * 15  # 150 tokens, 64 a window
    windows = rolling_windows(opened, text)
    assert [len(window.ids) for window in windows] == [64, 64, 22]
    assert [len(window.context) for window in windows] == [1, 1, 43]
    assert [token for window in windows for token in window.ids] == BYTES.encode(text)
    ids = [256, *BYTES.encode(text)]
    assert windows[0].context == [256] and windows[2].context == ids[150 - 64 : 129]
    assert rolling_windows(opened, "ab")[0] == ([256], [97, 98]) and rolling_windows(opened, "") == []


@pytest.fixture
def adapter(opened: OpenModel) -> Any:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")
    return language_model(opened, batch_size=2)


def test_likelihoods(opened: OpenModel, adapter: Any) -> None:
    asked = [("The cat", " sat"), ("The cat", " ran"), ("", "One"), ("A", "b")]
    found = adapter.loglikelihood([Request(pair) for pair in asked])
    wanted = [plain(opened.model, *encode_pair(BYTES, *pair)) for pair in asked]
    assert [value for value, _ in found] == pytest.approx([each.log_probability for each in wanted], 1e-5)
    assert [greedy for _, greedy in found] == [each.is_greedy for each in wanted]
    text = "abcdefghij" * 15
    parts = [plain(opened.model, *window).log_probability for window in rolling_windows(opened, text)]
    assert adapter.loglikelihood_rolling([Request((text,)), Request(("",))]) == pytest.approx([math.fsum(parts), 0.0])


def test_answers_end_where_the_task_says(opened: OpenModel, adapter: Any) -> None:
    (ids,) = generate(opened.model, [BYTES.encode("Go")], max_new_tokens=12, temperature=0.0, stop_ids=[256])
    text = BYTES.decode(ids)
    options = {"until": [], "max_gen_toks": 12}
    ends = [text[5], text[3:5], "never said"]
    requests = [("Go", options), ("Go", {**options, "until": ends}), ("Go", {**options, "until": ends[1]})]
    found = adapter.generate_until([Request(request) for request in requests])
    assert found == [text, text[: min(text.index(end) for end in ends[:2])], text[: text.index(ends[1])]]
    (shorter,) = adapter.generate_until([Request(("Go", {"max_gen_toks": 3}))])
    assert shorter == text[:3]
