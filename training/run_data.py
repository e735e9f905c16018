"""The data of a run, its tokenizer and its template: on every machine from its own disk, and everywhere the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.chat import Template
from data.manifest import resolve_data_dir
from data.shards import TokenSet, open_dataset
from data.templates import template_from_spec
from data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_spec
from training.distributed import Dist
from training.objectives.build import check_data
from training.run_settings import FinetuneSettings, RunSettings
from training.start import Start, model_template
from training.step_plan import refuse_without_validation

_REMEDY = (
    "each machine needs the data of rank 0, byte for byte: copy them there, or prepare them there from the same files "
    "with the same command"
)


@dataclass(frozen=True)
class RunData:
    """Both splits, checked, and how their tokens are read."""

    train: TokenSet
    val: TokenSet | None
    tokenizer: Tokenizer
    template: Template | None


def open_data(settings: RunSettings, here: Dist, start: Start) -> RunData:
    """Open what `--data_dir` names. Every process calls this.

    Raises ValueError or OSError on all of them where one cannot, where model and data differ, and where a machine has
    other data than rank 0, naming the machine.
    """
    folder = _prepared(settings, here, start)
    found = here.everywhere(lambda: _open(settings, here, start, folder), _REMEDY)
    theirs = here.from_main(lambda: _identity(found))

    def compare() -> None:
        differing = [name for name, value in _identity(found).items() if value != theirs[name]]
        if differing:
            raise ValueError(f"{folder}: is another set than that of rank 0 (another {', '.join(differing)})")

    here.everywhere(compare, _REMEDY)
    return found


def _prepared(settings: RunSettings, here: Dist, start: Start) -> Path:
    """The folder of shards; of a file of records one in the cache, which one process a machine prepares."""
    folder = resolve_data_dir(settings.data_dir)
    if not (isinstance(settings, FinetuneSettings) and settings.data_dir.endswith((".jsonl", ".json"))):
        return folder
    spec = (start.payload or {}).get("tokenizer")
    tokenizer = load_tokenizer("gpt2") if spec is None else tokenizer_from_spec(spec)
    # Rank 0, then the other machines (which find what it made, on a shared disk), then who shares a machine with these.
    own_turn = 0 if here.is_main else 1 if here.local_rank == 0 else 2
    for turn in range(3):
        if turn == own_turn:
            folder = here.everywhere(lambda: _records_cache(settings, tokenizer, start), _REMEDY)
        else:
            here.everywhere(lambda: None, _REMEDY)
    return folder


def _records_cache(settings: FinetuneSettings, tokenizer: Tokenizer, start: Start) -> Path:
    from data.cache import prepare_records_cache

    return prepare_records_cache(
        settings.data_dir,
        settings.prompt_template,
        tokenizer,
        template=model_template(start) if settings.prompt_template == "model" else None,
        format=settings.format,
        system=settings.system,
        train_on=settings.train_on,
        bad_records=settings.bad_records,
    )


def _open(settings: RunSettings, here: Dist, start: Start, folder: Path) -> RunData:
    verify: Literal["full", "size"] = "full" if here.local_rank == 0 else "size"  # once a machine
    train_set = open_dataset(folder, "train", verify=verify)
    check_data(settings, train_set)
    has_val = train_set.meta["splits"].get("val", {}).get("tokens", 0) > 1
    val_set = open_dataset(folder, "val", verify=verify) if has_val else None
    if val_set is None:
        refuse_without_validation(settings, folder)
    spec = (start.payload or {}).get("tokenizer")
    tokenizer = load_tokenizer(str(folder)) if spec is None else tokenizer_from_spec(spec)
    if tokenizer.fingerprint != train_set.tokenizer_fingerprint:
        raise ValueError(
            f"{folder} was tokenized with {train_set.meta['tokenizer'].get('kind')} ({train_set.vocab_size} ids, "
            f"{train_set.tokenizer_fingerprint[:8]}), {start.path} speaks {tokenizer.kind} "
            f"({tokenizer.vocab_size} ids, {tokenizer.fingerprint[:8]}): prepare the data again with "
            f"--tokenizer {start.path}"
        )
    template = train_set.meta.get("template") or (start.payload or {}).get("template")
    return RunData(train_set, val_set, tokenizer, template_from_spec(template))


def _identity(data: RunData) -> dict[str, Any]:
    """What must be the same on all machines for a sample's number to mean the same tokens."""
    meta = data.train.meta
    return {
        "training split": data.train.fingerprint,
        "validation split": data.val.fingerprint if data.val is not None else None,
        **{name: meta.get(name) for name in ("kind", "template", "tokenizer_fingerprint", "eot_id")},
    }
