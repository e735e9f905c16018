"""The run of `prune.py`: open, measure, prune, measure, recover, measure, compare."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from data.templates import template_from_spec
from data.tokenizer import Tokenizer
from formats.adapter import is_adapter, weights_digest
from formats.checkpoint import load_checkpoint, save_checkpoint, stream_order
from formats.open_model import build_model, check_exists, load_payload, payload_tokenizer
from model.gpt import GPT
from model.pruning.structured import NothingToPrune
from model.pruning.units import drop_layers
from pruning import comparison, recovery, rounds
from pruning.cache import StatisticsCache
from pruning.files import holds_weights, model_payload, refuse_what_is_there
from pruning.measure import kept_by_layer, layer_numbers, measure_perplexity, show, sizes
from pruning.methods import (
    Outcome,
    cheap_rival,
    check_model,
    needs_text,
    prune_model,
    unpruned,
    zeros_as_masks,
)
from pruning.settings import PruneSettings, allocation, check, reorders, with_changes
from pruning.text import TRAIN, VAL, Text, fingerprint, is_split, is_streamed, read_text
from training.distributed import choose_device
from training.metrics import Console
from training.run_folder import RunFolder
from training.saver import versions
from training.settings import to_dict

# The settings that decide what the pruned model is: the same ones on the same base make it once.
_MAKES = (
    *("method", "pruning_ratio", "sparsity", "pattern", "block_size", "importance", "prune_mlp", "budget", "refit"),
    *("protect_first", "protect_last", "min_groups", "channel_multiple", "layer_start", "layer_end", "seed"),
    *("calibration", "importance_samples", "importance_seq_len", "gradient_samples"),
)
_POOL = 10  # times the windows that are used are read of a text that has more


def prune(settings: PruneSettings) -> dict[str, Any]:
    """Prune, recover and compare as the settings say; returns {"pruned", "recovered", "finished", "perplexity", ...}.

    Nothing that is there already is overwritten but this very run's: where the pruned model exists and these settings
    made it, the run goes on from it. Raises ValueError or OSError, one line, for what a user can mend.
    """
    check(settings)
    check_exists(settings.base_model)
    refuse_what_is_there(settings)
    if settings.compares:
        comparison.check_report_path(settings, _MAKES)
        comparison.check_prompts(settings)
    console, folder = Console(True), RunFolder(settings.folder)
    try:
        folder.open()
    except ValueError as error:  # the training loop's name for it
        raise ValueError(f"--save_ckpt_log_name: {str(error).removeprefix('--log_dir ')}") from None
    try:
        console.open_log(folder.path / "training.log")
        _say_what_is_not_read(settings, console.say)
        result = _in_rounds(settings, console.say) if settings.rounds > 1 else _Run(settings, console.say).run()
        if result["finished"] and settings.compares:
            comparison.compare(settings, result, console.say)
        return result
    finally:
        console.close()
        folder.close()


def _say_what_is_not_read(settings: PruneSettings, say: Callable[[str], None]) -> None:
    """Texts are no mistake where they are not needed: who compares methods names the same for all."""
    if settings.calibration is not None and not _reads_calibration(settings):
        say(f"Note: --calibration {settings.calibration} is not read, --method {settings.method} needs none")
    if settings.finetune_data is not None and not settings.finetune:
        say(f"Note: --finetune_data {settings.finetune_data} is not read without --finetune")


def _reads_calibration(settings: PruneSettings) -> bool:
    """Whether the run looks at the calibration text."""
    return settings.method != "none" and needs_text(settings)


def _in_rounds(settings: PruneSettings, say: Callable[[str], None]) -> dict[str, Any]:
    """Prune a part of the way, recover, and again; each round starts from what the one before it left.

    A round that finds nothing to prune is left out. The last one, whose files are those asked for, then only recovers.
    """
    base, first, result, left = settings.base_model, None, {}, 1.0
    done: dict[int, dict[str, Any]] = {}  # the entry `pruning` of each round
    for number in range(1, settings.rounds + 1):
        last = number == settings.rounds
        ratio, sparsity = rounds.round_shares(settings, number, left)
        say(f"Round {number} of {settings.rounds}: {rounds.share_line(settings, ratio, sparsity)}")
        changes = {"base_model": base, "pruning_ratio": ratio, "sparsity": sparsity}
        changes["teacher"] = settings.teacher or settings.base_model
        changes["save_ckpt_log_name"] = f"{settings.log_name}/round-{number}"
        changes["out"] = str(settings.pruned_path if last else settings.folder / f"round-{number}" / "pruned.pt")
        try:
            result = _Run(with_changes(settings, changes), say, settings, first).run()
        except NothingToPrune as nothing:
            if last:
                raise
            say(f"Round {number} is left out: {nothing}")
            continue
        first = first or result
        done[number] = result["pruning"]
        left *= 1 - done[number]["gone"]
        if not result["finished"]:
            break
        base = str(result["recovered"])
    assert first is not None
    result["perplexity"]["before"] = first["perplexity"]["before"]
    rows = result["pruning"]["layers"]
    now = [{part: row[part][0] for part in ("attention", "mlp")} for row in rows]
    # A rival would be one of the last round alone.
    pruning = {**result["pruning"], "rival": None, "notes": rounds.notes_of_rounds(done, 1 - left)}
    layers = kept_by_layer(first["base_layers"], now)
    return {**result, "base": settings.base_model, "layers": layers, "pruning": pruning}


class _Run:
    """One round, a step a method.

    `whole`: the settings of all rounds together; `first`: the result of the first of them, None while there is none.
    """

    def __init__(
        self,
        settings: PruneSettings,
        say: Callable[[str], None],
        whole: PruneSettings | None = None,
        first: dict[str, Any] | None = None,
    ) -> None:
        self.settings, self.say, self.whole, self.first = settings, say, whole or settings, first
        self.device = choose_device(settings.device)
        self.perplexity: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        settings = self.settings
        model = self._open_base()
        self._eval = self._evaluation_text(model)
        self._windows = self._calibration(model)
        done = self._made_before()
        start = settings.pruned_path
        if settings.method == "none":
            start = self._start_without_pruning(model)
        elif done is None:
            done = self._prune_and_save(model)
        else:
            done = self._go_on_with(model, done)
        del model
        gc.collect()
        result: dict[str, Any] = {
            "base": settings.base_model, "base_layers": self._base_layers, "pruning": done, "finished": True,
            "layers": done["layers"] if done is not None else None,
            "pruned": None if settings.method == "none" else settings.pruned_path, "recovered": None,
            "perplexity": self.perplexity, "protocol": self._protocol,
        }  # fmt: skip
        if settings.finetune:
            result["finished"] = recovery.recover(settings, start, self._tokenizer, self.say)
            if result["finished"]:
                result["recovered"] = settings.recovered_path
                self.perplexity["recovered"] = self._measured_file(settings.recovered_path)
                self._say_perplexity("after recovery", self.perplexity["recovered"])
        return result

    # -- the base ----------------------------------------------------------------------------------------------------

    def _open_base(self) -> GPT:
        settings, name = self.settings, self.settings.base_model
        payload = load_payload(name)
        if is_adapter(payload):
            raise ValueError(
                f"{name}: is an adapter: merge it first (export.py merge {name} merged.pt), then prune that"
            )
        model = build_model(payload, name).to(self.device).eval()
        self._tokenizer: Tokenizer = payload_tokenizer(payload, name)
        self._about = {"tokenizer": self._tokenizer.spec(), "template": payload.get("template")}
        template_from_spec(payload.get("template"))  # a damaged one is told now
        self._masked_here = {} if model.masks else zeros_as_masks(model)
        if self._masked_here:
            self.say(f"{name}: zeros in {len(self._masked_here)} matrices, which no masks explain: taken as pruned")
            model.masks = self._masked_here
        if settings.method != "none" and self.first is None:
            check_model(model, self.whole, name)
        recovery.check_recovery(settings, model)
        self._order = stream_order(payload)
        self._reorders = reorders(settings) and not model.masks  # zeros of before have their places
        self._base_layers = layer_numbers(model)
        self._digest = weights_digest(model.state_dict())
        for note in payload.get("notes", ()):
            self.say(f"{name}: {note}")
        self.say(f"{name}: {model.num_params():,} parameters in {model.config.n_layer} layers")
        return model

    def _length(self, model: GPT, name: str) -> int:
        """A number of tokens, at most the model's context."""
        wanted: int = getattr(self.settings, name)
        if wanted > model.config.block_size:
            self.say(f"--{name} {model.config.block_size}: the model's context")
        return min(wanted, model.config.block_size)

    def _evaluation_text(self, model: GPT) -> Callable[[GPT], dict[str, Any]]:
        settings = self.settings
        length = self._length(model, "eval_seq_len")
        limit = _POOL * settings.eval_samples * length if is_streamed(settings.eval_text) else None
        text = read_text(settings.eval_text, self._tokenizer, VAL, limit or None)
        self._eval_tokens = fingerprint(text.ids)
        self.say(f"Perplexity is measured on {text.name}" + ("; --eval_text names another" * (not settings.eval_text)))
        read = [settings.calibration] * _reads_calibration(settings) + [settings.finetune_data] * settings.finetune
        if settings.eval_text in read and not is_split(settings.eval_text):
            self.say("Note: the same text is read to prune or recover: this perplexity flatters")
        return lambda measured: measure_perplexity(measured, text, settings.eval_samples, length)

    def _measured(self, model: GPT) -> float | None:
        """The perplexity of a model, whose protocol is remembered."""
        found = self._eval(model.to(self.device))
        self._protocol: str = found["protocol"]
        value: float | None = found["perplexity"]
        return value

    def _measured_file(self, path: Path) -> float | None:
        return self._measured(build_model(load_checkpoint(path), path))

    def _say_perplexity(self, when: str, value: float | None) -> None:
        self.say(f"PPL {when}: {show(value)}")

    # -- pruning -----------------------------------------------------------------------------------------------------

    def _made(self) -> dict[str, Any]:
        """What decides the pruned model, as plain values."""
        values = to_dict(self.settings)
        return {
            **{name: values[name] for name in _MAKES},
            "allocation": allocation(self.settings),
            "reorder": self._reorders,
            "calibration_windows": None if self._windows is None else fingerprint(self._windows.numpy()),
            "base": self._digest,
        }

    def _made_before(self) -> dict[str, Any] | None:
        """The entry `pruning` of the pruned model if it is there and these settings made it; ValueError for another."""
        path = self.settings.pruned_path
        if self.settings.method == "none" or not path.exists():
            return None
        entry = load_checkpoint(path).get("pruning")
        made = entry.get("made", {}) if isinstance(entry, dict) else {}
        wanted = self._made()
        if isinstance(entry, dict) and made == wanted:
            return entry
        differing = [f"{name} {made.get(name)} -> {value}" for name, value in wanted.items() if made.get(name) != value]
        why = f", made with other settings ({', '.join(differing[:3])})" if made else ""
        raise ValueError(f"{path}: is there already{why}: choose another --out or --save_ckpt_log_name")

    def _go_on_with(self, model: GPT, done: dict[str, Any]) -> dict[str, Any]:
        """The pruned model is there: its perplexity too, and its rival's, where this run measures in the same way.

        Returns the entry `pruning`, as this run measures.
        """
        path = self.settings.pruned_path
        self.say(f"{path}: was made by these settings, the run goes on from it")
        self.perplexity = dict(done["perplexity"])
        if self.perplexity["measured"] == self._measuring():
            self._protocol = self.perplexity["protocol"]
        else:
            self.perplexity |= {"before": self._measured(model), "after": self._measured_file(path)}
            done = {**done, "rival": self._rival_again(model, done["rival"])}
        self._say_perplexity("before pruning", self.perplexity["before"])
        self._say_perplexity("after pruning", self.perplexity["after"])
        return done

    def _measuring(self) -> dict[str, Any]:
        """What decides the text and the windows of a perplexity, as plain values."""
        names = ("eval_text", "eval_samples", "eval_seq_len")
        return {**{name: getattr(self.settings, name) for name in names}, "tokens": self._eval_tokens}

    def _prune_and_save(self, model: GPT) -> dict[str, Any]:
        settings = self.settings
        before = self._measured(model)
        self._say_perplexity("before pruning", before)
        cache = self._statistics(model)
        outcome = self._pruned(model, cache)
        for note in outcome.notes:
            self.say(note)
        after = self._measured(outcome.model)
        self._say_perplexity("after pruning", after)
        rival = self._rival(model, outcome.model, cache)
        if rival is not None:
            self.say(f"The cheap rival, {rival['note']}: PPL {show(rival['perplexity'])}")
        measured = {"protocol": self._protocol, "measured": self._measuring()}
        self.perplexity = {"before": before, "after": after, **measured}
        entry = {
            "made": self._made(), "base": self._origin(),
            "perplexity": self.perplexity, "notes": outcome.notes, "layers": self._layers(outcome), "rival": rival,
            "order": weights_digest(outcome.model.state_dict()) if self._reorders else self._order,
            "gone": outcome.gone, "removed": outcome.removed, "versions": versions(),
        }  # fmt: skip
        size = save_checkpoint(settings.pruned_path, self._payload(outcome.model, pruning=entry))
        self.say(f"Saved {settings.pruned_path} ({size / 1e6:.1f} MB)")
        return entry

    def _origin(self) -> dict[str, str]:
        """What the model is a pruned form of, also after many rounds: what a later recovery learns from."""
        if self.first is None:
            return {"name": self.settings.base_model, "digest": self._digest}
        origin: dict[str, str] = self.first["pruning"]["base"]
        return origin

    def _pruned(self, model: GPT, cache: StatisticsCache | None) -> Outcome:
        """NothingToPrune where nothing would go, but in the last round after others: it leaves what they made."""
        try:
            return prune_model(model, self.settings, cache)
        except NothingToPrune as nothing:
            if self.first is None or self.settings.pruned_path != self.whole.pruned_path:
                raise
            return unpruned(model, f"nothing is left to prune: {nothing}")

    def _layers(self, outcome: Outcome) -> list[dict[str, Any]]:
        now: list[dict[str, int] | None] = [None] * len(self._base_layers)
        for i, numbers in zip(outcome.layers, layer_numbers(outcome.model)):
            now[i] = numbers
        return kept_by_layer(self._base_layers, now)

    def _calibration(self, model: GPT) -> Tensor | None:
        """Windows (N, T) of the calibration text where the method looks at it; also on a run that goes on from the
        pruned model, which is this run's only if they are the same.
        """
        settings = self.settings
        if not _reads_calibration(settings):
            return None
        length = self._length(model, "importance_seq_len")
        pool = _POOL * settings.importance_samples * length
        text: Text = read_text(settings.calibration, self._tokenizer, TRAIN, pool)
        flags = "--importance_samples or --importance_seq_len"
        windows = text.chosen_windows(settings.importance_samples, length, settings.seed, flags)
        self.say(
            f"Calibration: {len(windows)} windows of {length} tokens from {text.name}"
            + ("; --calibration names another" * (settings.calibration is None))
        )
        return windows

    def _statistics(self, model: GPT) -> StatisticsCache | None:
        """Statistics of the calibration text's windows, and the place where they are kept."""
        settings = self.settings
        if self._windows is None:
            return None
        folder = settings.cache_dir if settings.cache_statistics else None
        # Units are judged and fitted by errors in the stream, which the next norm divides by the stream's size.
        return StatisticsCache(model, self._windows, folder, self.say, weigh=settings.method == "structured")

    def _rival(self, model: GPT, pruned: GPT, cache: StatisticsCache | None) -> dict[str, Any] | None:
        """Whole layers dropped in place of the units, for as many parameters: what a finer method has to beat."""
        settings = self.settings
        if settings.method != "structured" or cache is None or settings.pruning_ratio <= 0:
            return None
        try:
            rival = cheap_rival(model, pruned, settings, cache)
        except ValueError as error:  # less than a layer is to go
            self.say(f"No cheap rival: {error}")
            return None
        found = {"perplexity": self._measured(rival.model), **sizes(rival.model)}
        return {"note": rival.notes[0], "layers": rival.layers, **found}

    def _rival_again(self, model: GPT, rival: dict[str, Any] | None) -> dict[str, Any] | None:
        """The rival of an earlier run, measured as this one measures."""
        if rival is None:
            return None
        smaller = drop_layers(model, [i for i in range(model.config.n_layer) if i not in rival["layers"]])
        return {**rival, "perplexity": self._measured(smaller)}

    def _start_without_pruning(self, model: GPT) -> Path:
        """What recovery starts from: the base, or where its zeros have no masks a copy of it with masks."""
        path = self.settings.folder / "masked.pt"
        there = bool(self._masked_here) and path.exists()
        if there and not holds_weights(path, model):
            raise ValueError(
                f"{path}: is there already and no copy of {self.settings.base_model}: choose another "
                "--save_ckpt_log_name"
            )
        before = self._measured(model)
        self._say_perplexity("before recovery", before)
        self.perplexity = {"before": None, "after": before}
        if not self._masked_here:
            return Path(self.settings.base_model)
        if not there:
            save_checkpoint(path, self._payload(model))
        return path

    def _payload(self, model: GPT, **more: Any) -> dict[str, Any]:
        return model_payload(model, self.settings.compact, **self._about, **more)
