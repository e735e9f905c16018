"""Texts for pruning and the cache of statistics: which tokens, which windows, what is kept and how it comes back."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.tokenizer import ByteTokenizer
from model.gpt import GPT
from model.pruning.statistics import LayerStatistics, collect, gradients
from pruning.cache import StatisticsCache
from pruning.text import Text, read_text, source_of
from tests.model_helpers import GPT2, LLAMA, UNBALANCED, build
from tests.pruning_runs import prune_command, save_model, write_texts
from tests.tiny import text_set

BYTES = ByteTokenizer()


def test_documents_stand_one_after_the_other_each_with_its_end(tmp_path: Path) -> None:
    (tmp_path / "two.jsonl").write_text('{"text": "ab"}\n{"text": "c"}\n')
    (tmp_path / "one.txt").write_text("ab\n\ncd\n")
    assert read_text(str(tmp_path / "two.jsonl"), BYTES, "train").ids.tolist() == [97, 98, 256, 99, 256]
    assert read_text(str(tmp_path / "one.txt"), BYTES, "val").ids.tolist() == [*b"ab\n\ncd\n", 256]


def test_a_long_text_in_pieces_gives_the_tokens_of_the_whole(tmp_path: Path) -> None:
    text = "".join(f" = Heading {i} = \n\n some words, and 12{i} more .\n" for i in range(5000))
    (tmp_path / "long.txt").write_text(text)
    assert read_text(str(tmp_path / "long.txt"), BYTES, "val").ids[:-1].tolist() == list(text.encode())


def test_a_limit_reads_no_more_than_it_must(tmp_path: Path) -> None:
    write_texts(tmp_path)
    whole = read_text(str(tmp_path / "docs.jsonl"), BYTES, "train").ids
    begun = read_text(str(tmp_path / "docs.jsonl"), BYTES, "train", limit=300).ids
    assert 300 <= len(begun) < 500 and np.array_equal(begun, whole[: len(begun)])


def test_the_embedded_text_is_split_for_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pruning.text.pydocs_documents", lambda: (f"document {i:03d}" for i in range(100)))
    train, val = (bytes(i for i in read_text(None, BYTES, split).ids if i < 256) for split in ("train", "val"))
    parts = [{text[i : i + 12] for i in range(0, len(text), 12)} for text in (train, val)]
    assert len(parts[0]) == 90 and len(parts[1]) == 10 and not parts[0] & parts[1]


def test_a_prepared_set_is_read_as_it_is_and_must_speak_the_same_tokens(tmp_path: Path) -> None:
    folder = text_set(tmp_path / "set")
    text = read_text(str(folder), BYTES, "val")
    assert text.name == "set/val" and (text.ids == BYTES.eot_id).sum() == 12

    class Other(ByteTokenizer):
        fingerprint = "another"

    with pytest.raises(ValueError, match="was prepared with another tokenizer than the model's"):
        read_text(str(folder), Other(), "val")


def test_windows_are_seeded_apart_and_evenly_spread() -> None:
    text = Text("numbers", np.arange(105))
    chosen = text.chosen_windows(4, 10, seed=3, flags="")
    assert chosen.shape == (4, 10) and chosen.dtype == torch.int64
    assert torch.equal(chosen, text.chosen_windows(4, 10, seed=3, flags=""))
    assert not torch.equal(chosen, text.chosen_windows(4, 10, seed=4, flags=""))
    assert len(set(chosen[:, 0].tolist())) == 4 and all(row[0] % 10 == 0 for row in chosen.tolist())
    assert text.even_windows(3, 10, "")[:, 0].tolist() == [0, 40, 90]  # of 10 windows: 0, 4.5 rounded to even, 9
    assert len(text.even_windows(0, 10, "")) == 10
    with pytest.raises(ValueError, match=r"numbers: has 105 tokens, 11 windows of 10 take 110: .* less with --flag"):
        text.chosen_windows(11, 10, seed=0, flags="--flag")


@pytest.mark.parametrize(("ref", "source"), [("c4", "c4"), ("owner/name:en", "owner/name:en"), ("pydocs", "pydocs")])
def test_names_of_the_hub_are_told_from_files(ref: str, source: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_of(ref) == (source, ())
    for missing in ("missing.txt", "data/missing.jsonl", "nothing"):
        with pytest.raises(ValueError, match="no such text; expected a file, a prepared set, or a set of the Hub"):
            source_of(missing)
    with pytest.raises(ValueError, match=r"is a folder without dataset\.json"):
        source_of(str(tmp_path))


def test_a_set_of_the_hub_is_read_no_further_than_evaluation_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    save_model(tmp_path / "model.pt")
    read = itertools.count()
    monkeypatch.setattr("data.sources._hub_rows", lambda hub: (("row", {"text": "x" * 50}) for _ in endless(read)))
    code, out, err = prune_command(capsys, "--method", "magnitude", "--out", "a.pt", "--eval_text", "c4")
    assert code == 0, err
    assert "Perplexity is measured on c4" in out
    assert next(read) <= 27, "4 windows of 32 tokens are chosen among 40, 1,280 tokens of documents of 51"


def endless(read: Iterator[int]) -> Iterator[int]:
    """Counts what is asked for, and complains in place of reading on without end."""
    for number in read:
        assert number < 1000, "the whole set is read"
        yield number


# -- statistics on disk ----------------------------------------------------------------------------------------------


def same_layer(one: LayerStatistics, other: LayerStatistics) -> bool:
    for site in ("attn_in", "attn_out", "mlp_in", "mlp_out"):
        a, b = getattr(one, site), getattr(other, site)
        if (a is None) != (b is None):
            return False
        if a is not None and not (torch.equal(a.second, b.second) and torch.equal(a.mean, b.mean)):
            return False
        if a is not None and a.tokens != b.tokens:
            return False
    return one.influence == other.influence


@pytest.mark.parametrize("config", [GPT2, dataclasses.replace(LLAMA, **UNBALANCED)], ids=["gpt2", "unbalanced"])
def test_what_comes_back_from_disk_is_what_was_made(config: Any, tmp_path: Path) -> None:
    model, windows = build(config).eval(), torch.randint(97, (3, 12), generator=torch.Generator().manual_seed(0))
    wanted = dict(collect(model, windows))
    said: list[str] = []
    for _ in range(2):
        cache = StatisticsCache(model, windows, tmp_path, said.append)
        assert all(same_layer(cache.layer(i), wanted[i]) for i in (2, 0, 1))
        found, made = cache.gradients(2), gradients(model, windows[:2])
        for part in ("output", "gate"):
            a, b = getattr(found, part), getattr(made, part)
            assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in b)
    assert len(said) == 2, "made once, the second time they were there"
    assert all(same_layer(StatisticsCache(model, windows, None, said.append).layer(i), wanted[i]) for i in (0, 1))


def test_another_model_or_text_has_statistics_of_its_own(tmp_path: Path) -> None:
    windows = torch.randint(97, (3, 12), generator=torch.Generator().manual_seed(0))
    folders = set()
    for seed, rows in ((0, windows), (1, windows), (0, windows.flip(0)), (0, windows.view(6, 6))):
        for weigh in (False, True):
            cache = StatisticsCache(build(LLAMA, seed), rows, tmp_path, print, weigh=weigh)
            folders.add(cache.folder)
    assert len(folders) == 8
    wanted = dict(collect(cache.model, cache.windows, weigh=True))
    assert all(same_layer(cache.layer(i), wanted[i]) for i in range(3))


def test_an_interrupted_collection_leaves_whole_layers_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    model: GPT = build(LLAMA).eval()
    windows = torch.randint(97, (2, 8), generator=torch.Generator().manual_seed(0))
    cache = StatisticsCache(model, windows, tmp_path, print)
    wanted = cache.layer(2)
    assert cache.folder is not None
    (cache.folder / "layer_00002.safetensors").unlink()
    assert same_layer(cache.layer(2), wanted)
    (cache.folder / "layer_00001.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0")
    with pytest.raises(ValueError, match=r"layer_00001\.safetensors: is damaged .*; delete it to have it made again"):
        cache.layer(1)


def test_statistics_behind_pruned_layers_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    save_model(tmp_path / "model.pt")
    for number, (words, kept) in enumerate([("--pattern 2:4", 0), ("--pattern block --block_size 8", 3)]):
        assert prune_command(capsys, "--method", "wanda", *words.split(), "--out", f"{number}.pt")[0] == 0
        assert len(list(tmp_path.glob("logs/statistics/*/layer_*.safetensors"))) == kept, words
