"""prepare_data.py from the outside: flags, signals, one-line errors, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data.chat import ChatTemplate
from data.prepare import prepare
from data.settings import PrepareSettings
from data.shards import open_dataset
from data.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parent.parent


def text_rows(path: Path, count: int = 200) -> str:
    path.write_text("".join(json.dumps({"text": f"the quick brown fox number {n}"}) + "\n" for n in range(count)))
    return str(path)


def record_rows(path: Path, count: int = 100) -> str:
    rows = [{"instruction": f"say {n}", "response": f"it is {n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_half_set(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 1_000_000)  # seconds of work
    command = [sys.executable, str(ROOT / "prepare_data.py"), "--source", "text", "--input", str(tmp_path / "big.txt")]
    command += ["--data_dir", str(tmp_path / "set"), "--workers", "2"]
    # A shell starts what runs in its background with SIGINT ignored, and so would be all that these tests start.
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **heeds)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".tmp-set-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert not (tmp_path / "set").exists()
    if number == signal.SIGKILL:
        assert list(tmp_path.glob(".tmp-set-*")), "nobody could clean up"
        time.sleep(0.3)  # the workers notice and let go of the folder
        rows = text_rows(tmp_path / "a.jsonl")
        prepare(PrepareSettings(source="jsonl", input=(rows,), data_dir=str(tmp_path / "set"), tokenizer="byte"))
        assert open_dataset(tmp_path / "set", "train").n_documents > 100
    else:
        assert process.returncode == (130 if number == signal.SIGINT else 143)
        assert "Traceback" not in said
    assert not list(tmp_path.glob(".tmp-*"))


# ---- the script


def script(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "prepare_data.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "COLUMNS": "200"})


def test_help_names_every_flag() -> None:
    shown = script("--help").stdout
    for name in PrepareSettings.__dataclass_fields__:
        assert f"--{name}" in shown
    assert "inspect DIR" in shown


def test_help_needs_no_numpy_and_no_torch() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import prepare_data; print({'numpy', 'torch'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", program, str(ROOT)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_script_prepares_and_inspects(tmp_path: Path) -> None:
    path = record_rows(tmp_path / "a.jsonl")
    target = str(tmp_path / "set")
    done = script(
        "--source", "jsonl", "--input", path, "--data_dir", target, "--tokenizer", "byte", "--shard_size", "1e7"
    )
    assert done.returncode == 0, done.stderr
    assert "supervised" in done.stdout
    assert target in done.stdout
    shown = script("inspect", target, "--block_size", "64", "--records", "1")
    assert shown.returncode == 0, shown.stderr
    assert "instruction from jsonl" in shown.stdout


def test_the_script_takes_a_checkpoints_tokenizer(tmp_path: Path) -> None:
    from formats.checkpoint import save_checkpoint
    from prepare_data import _of_model

    tokenizer = train_bpe(["the quick brown fox"], 270)
    save_checkpoint(tmp_path / "model.pt", {"model": {}, "config": {}, "tokenizer": tokenizer.spec()})

    def of_model(name: str, template: str = "dolly") -> Any:
        return _of_model(PrepareSettings(tokenizer=name, prompt_template=template))

    found, template = of_model(str(tmp_path / "model.pt"))
    assert found.fingerprint == tokenizer.fingerprint and template is None
    assert of_model("gpt2") == (None, None)
    with pytest.raises(ValueError, match="has no template for prompts"):
        of_model(str(tmp_path / "model.pt"), "model")
    save_checkpoint(tmp_path / "bare.pt", {"model": {}, "config": {}})
    with pytest.raises(ValueError, match="holds no tokenizer"):
        of_model(str(tmp_path / "bare.pt"))


@pytest.mark.parametrize("form", ["checkpoint", "folder"])
def test_the_template_of_a_model_is_taken(form: str, tmp_path: Path) -> None:
    from formats.checkpoint import save_checkpoint
    from prepare_data import _of_model

    tokenizer, source = (
        train_bpe(["the quick brown fox"], 270),
        "{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}",
    )
    model = tmp_path / "model.pt"
    if form == "checkpoint":
        payload = {"model": {}, "config": {}, "tokenizer": tokenizer.spec()}
        save_checkpoint(model, {**payload, "template": ChatTemplate("own", source).spec()})
    else:
        model = tmp_path / "model"
        model.mkdir()
        names = {"chat_template": source, "eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
        for name, values in (("config.json", {"model_type": "llama"}), ("tokenizer_config.json", names)):
            (model / name).write_text(json.dumps(values))
        (model / "tokenizer.json").write_text(tokenizer.spec()["json"])
    target = str(tmp_path / "set")
    words = {"source": "jsonl", "input": (record_rows(tmp_path / "a.jsonl"),), "data_dir": target, "val_fraction": 0.0}
    values = PrepareSettings(**words, tokenizer=str(model), prompt_template="model")
    prepare(values, *_of_model(values))
    tokens = open_dataset(target, "train")
    assert tokens.meta["template"]["source"] == source and tokens.tokenizer_fingerprint == tokenizer.fingerprint
    first = tokens.tokens(0, int(tokens.document_starts[1]))
    assert tokenizer.decode(first) == "say 0<|endoftext|>it is 0<|endoftext|>"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "jsonl", "--input", "broken.jsonl"], "broken.jsonl:2: column 10: broken JSON"),
        (["--source", "text", "--input", "missing.txt"], "missing.txt: no such file"),
        (["--source", "text", "--input", "latin.txt"], "latin.txt: not UTF-8 at byte 3"),
        (["--source", "text", "--input", "empty.txt"], "empty.txt: holds no documents"),
        (["--source", "jsonl", "--input", "broken.jsonl", "--tokenizer", "gpt"], "Did you mean gpt2?"),
        (["--source", "jsonl", "--input", "broken.jsonl", "--data_dir", "."], "is no part of a token set"),
        (["--source", "text", "--input", "empty.txt", "--data_dir", "empty.txt"], "is a file, expected a folder"),
        (["--sauce", "text"], "Did you mean --source?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": b}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    before = sorted(path.name for path in tmp_path.iterdir())
    words = [*words, *([] if "--data_dir" in words else ["--data_dir", "./set"])]
    done = script(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "pydoc"}, "Did you mean pydocs?"),
        ({"format": "instructions"}, "Did you mean instruction?"),
        ({"prompt_template": "doly"}, "Did you mean dolly?"),
        ({"source": "text"}, "name them with --input"),
        ({"input": ("a",)}, "takes no --input"),
        ({"val_fraction": 1.0}, "less than 1"),
        ({"shard_size": 0}, "--shard_size 0"),
        ({"workers": -1}, "--workers -1"),
    ],
)
def test_settings_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        PrepareSettings(**changes)
    assert message in str(caught.value)
