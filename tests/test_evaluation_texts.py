"""Texts by name: files, and WikiText-2 and C4 as papers make one text of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from data.tokenizer import ByteTokenizer
from evaluation.evaluate import evaluate
from evaluation.settings import EvaluateSettings
from evaluation.texts import RECIPES, read_text
from formats.open_model import open_model
from tests.foreign_models import save_foreign
from tests.tiny_checkpoints import save_tiny

# As the Hub's rows: a line end in each, nothing in the empty ones.
ROWS = ["", " = Robert = \n", "", " Robert is an actor . \n", " He lives\x0b here .\n"]
JOINED = "\n\n = Robert = \n\n\n\n\n Robert is an actor . \n\n\n He lives\x0b here .\n"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "wiki.test.raw"
    path.write_text(" \n = Robert = \n \n Robert is an actor . \n He lives\x0b here .\n", "utf-8")
    return path


def parquet(path: Path, texts: list[str]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    return path


def test_wikitext2_is_its_lines_joined_by_two_line_ends(tmp_path: Path, raw: Path) -> None:
    assert "\n\n".join(ROWS) == JOINED
    assert read_text(f"wikitext2:{raw}").characters == JOINED
    assert read_text(f"wikitext2:{parquet(tmp_path / 'x.parquet', ROWS)}").characters == JOINED


def test_c4_is_its_first_documents_joined_by_a_space(tmp_path: Path) -> None:
    path = tmp_path / "c4-validation.json.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": f"doc {n}\n", "url": ""}) + "\n" for n in range(1200))
    assert read_text(f"c4:{path}").characters == " ".join(f"doc {n}\n" for n in range(1100))


def test_without_a_file_the_hubs_is_fetched(tmp_path: Path) -> None:
    file = parquet(tmp_path / "test.parquet", ROWS)
    with mock.patch("huggingface_hub.hf_hub_download", return_value=str(file)) as fetch:
        assert read_text("wikitext2").characters == JOINED
    fetch.assert_called_once_with(RECIPES["wikitext2"].repository, RECIPES["wikitext2"].file, repo_type="dataset")
    no_route = mock.patch("huggingface_hub.hf_hub_download", side_effect=RuntimeError("no route\nto host"))
    message = r"c4: could not be read .*\(no route to host\).*--text c4:FILE.*HF_ENDPOINT"
    with no_route, pytest.raises(OSError, match=message):
        read_text("c4")


def test_a_file_of_that_name_is_meant_before_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c4").write_text("my own")
    found = read_text("c4")
    assert (found.characters, found.recipe) == ("my own", None)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n\n \n")
    (tmp_path / "no.jsonl").write_text('{"title": "x"}\n')
    for name, error, message in (
        (f"wikitext2:{tmp_path}/none.txt", FileNotFoundError, "none.txt: no such file of wikitext2"),
        (f"wikitext2:{tmp_path}/blank.txt", ValueError, "blank.txt: is empty"),
        (f"c4:{tmp_path}/no.jsonl", ValueError, "no.jsonl:1: has no field 'text'"),
        ("wikitex2", FileNotFoundError, "wikitex2: no such text file; by name there are wikitext2 and c4"),
    ):
        with pytest.raises(error, match=message):
            read_text(name)


def test_by_a_recipe_windows_are_full_and_do_not_overlap(tmp_path: Path, raw: Path) -> None:
    model = save_tiny(tmp_path / "m.pt")
    settings = EvaluateSettings(checkpoints=(str(model),), input=(f"wikitext2:{raw}", str(raw)), block_size=16)
    paper, plain = evaluate(settings)["results"]
    full = len(JOINED.encode()) // 16
    assert len(JOINED.encode()) % 16, "a rest is left out"
    assert (paper["windows"], paper["tokens"], paper["stride"]) == (full, full * 15, 16)
    assert paper["protocol"].endswith("no begin token; lines joined by two line ends, all tokens")
    assert plain["tokens"] == len(raw.read_bytes()) - 1 and plain["stride"] == 8

    # The loop of the papers, restated: the mean of the means of windows that are equally long.
    ids = ByteTokenizer().encode_numpy(JOINED).astype(np.int64)
    losses = []
    for start in range(0, full * 16, 16):
        row = torch.from_numpy(ids[None, start : start + 16])
        with torch.no_grad():
            logits = open_model(model).model(row)[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, row[0, 1:]).item())
    assert paper["loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_the_windows_of_papers_have_2048_tokens_and_c4_256_of_them() -> None:
    from evaluation.texts import PlainText

    c4, plain = PlainText("c4", "", RECIPES["c4"]), PlainText("x", "")
    assert [c4.window(context) for context in (1024, 131072)] == [1024, 2048]
    assert plain.window(131072) == 131072
    assert [c4.limit(n, 10) for n in (5, 25, 10**6)] == [5, 20, 2560]
    assert plain.limit(25, 10) == 25


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [32, 12])
def test_equals_transformers_on_the_same_windows(tmp_path: Path, bos: bool, stride: int) -> None:
    """Its tokenizer's ids of the whole text, its own loss with the labels of all but the new tokens at -100."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_foreign("llama3", tmp_path / "hf", bos=bos)
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text("utf-8")[:700], "utf-8")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf")(text.read_text("utf-8"), return_tensors="pt").input_ids
    total, count, done = 0.0, 0, 0
    for begin in range(0, ids.size(1), stride):
        end = min(begin + 32, ids.size(1))
        labels = ids[:, begin:end].clone()
        labels[:, : done - begin] = -100
        new = int((labels[:, 1:] != -100).sum())
        if new:
            with torch.no_grad():
                total += theirs(ids[:, begin:end], labels=labels).loss.item() * new
        count, done = count + new, end
        if end == ids.size(1):
            break
    words = {"checkpoints": (str(tmp_path / "hf"),), "input": (str(text),), "block_size": 32, "stride": stride}
    (found,) = evaluate(EvaluateSettings(**words))["results"]
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)
    assert ("behind the begin token" in found["protocol"]) == bos
