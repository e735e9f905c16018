"""What goes into a token set: the documents or samples of a source, each with its split, as often as asked for."""

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from data.augment import Augmenter
from data.clean import Cleaner
from data.encode import DAMAGED, SKIP_REMEDY, Item
from data.records import Unusable, sample_of
from data.settings import PrepareSettings
from data.sources import documents, record_rows

logger = logging.getLogger(__name__)

TRAIN, VAL = "train", "val"


class ItemStream:
    """The items of a source with their splits, as often as they are asked for; counts what it had to leave out."""

    def __init__(self, settings: PrepareSettings, format: str, val_fraction: float) -> None:
        self.settings, self.format, self.val_fraction = settings, format, val_fraction
        self.what = "documents" if format == "text" else "records"
        self.left_out: Counter[str] = Counter()  # why -> how many
        self.cleaner: Cleaner | None = None
        self.augmented = 0  # copies that were added
        self._augmenter = None
        if settings.augment_ratio:
            if format == "text":
                raise ValueError("--augment_ratio changes the questions of records, and this is text")
            self._augmenter = Augmenter(settings.augment_ratio, settings.thesaurus, settings.seed)

    def __iter__(self) -> Iterator[Item]:
        self.left_out, self.augmented = Counter(), 0
        self.cleaner = Cleaner(self.settings) if self.settings.clean else None
        return self._pieces() if self.format == "text" else self._samples()

    def report(self, splits: dict[str, Any]) -> None:
        """Complain about an empty training split, and mention what was left out."""
        where = ", ".join(self.settings.input) or self.settings.source
        for why, count in self.left_out.items():
            logger.warning("left out %s %s %s", f"{count:,}", self.what, why)
        for what, count in (self.cleaner.changed if self.cleaner else {}).items():
            logger.warning("%s %s %s", f"{count:,}", self.what, what)
        if not splits[TRAIN]["documents"]:
            validates = splits[VAL]["documents"]
            hint = f", only {validates} for validation; try --val_fraction 0" if validates else ""
            raise ValueError(f"{where}: holds no {self.what} to train on{hint}")
        if self.val_fraction and not splits[VAL]["documents"]:
            text = "%d %s: too few for --val_fraction %g, no validation split"
            logger.warning(text, splits[TRAIN]["documents"], self.what, self.val_fraction)

    def _is_val(self, index: int) -> bool:
        return in_validation(index, self.val_fraction, self.settings.seed)

    def _samples(self) -> Iterator[Item]:
        index = 0
        for where, row in record_rows(self.settings.source, self.settings.input):
            try:
                sample = sample_of(row, self.format, where)
                if self.cleaner is not None:
                    sample = self.cleaner.sample(sample)
            except Unusable as reason:
                self.left_out[reason.why] += 1
                continue
            except ValueError as error:
                if self.settings.bad_records == "error":
                    raise ValueError(f"{error}; {SKIP_REMEDY}") from None
                self.left_out[DAMAGED] += 1
                continue
            if index == self.settings.max_documents:
                return
            split = VAL if self._is_val(index) else TRAIN
            yield Item(split, sample)
            copy = self._augmenter.copy(sample, index) if self._augmenter and split == TRAIN else None
            if copy is not None:
                self.augmented += 1
                yield Item(TRAIN, copy)
            index += 1

    def _pieces(self) -> Iterator[Item]:
        """Neighbouring pieces of a document stay one document in the same split, and part where the split changes."""
        started, before = 0, False
        index = itertools.count()
        is_val = self._is_val(next(index))
        for piece in documents(self.settings.source, self.settings.input, val_fraction=self.val_fraction):
            if piece.begins and piece.ends and (not piece.text or piece.text.isspace()):
                self.left_out["without text"] += 1
                continue
            text = piece.text
            if self.cleaner is not None:
                try:
                    text = self.cleaner.document(text, is_whole=piece.begins and piece.ends)
                except Unusable as reason:
                    self.left_out[reason.why] += 1
                    continue
            started += piece.begins
            if self.settings.max_documents and started > self.settings.max_documents:
                return
            after = self._is_val(next(index))
            begins, ends = piece.begins or before != is_val, piece.ends or after != is_val
            yield Item(VAL if is_val else TRAIN, text, begins, ends)
            before, is_val = is_val, after


def in_validation(index: int, val_fraction: float, seed: int) -> bool:
    """Whether document `index` goes to validation: one of each run of 1 / val_fraction documents, at a seeded place.

    Stratified, so that both splits cover the whole source, and a function of the index alone, so that the number of
    documents need not be known. The very first document trains, so that a single one does.
    """
    share = Fraction(val_fraction).limit_denominator(1_000_000)
    if not share:
        return False
    run = index * share.numerator // share.denominator
    first = -(-run * share.denominator // share.numerator)
    following = -(-(run + 1) * share.denominator // share.numerator)
    if run == 0 and following > 1:
        first = 1
    place = hashlib.blake2b(f"{seed}/{run}".encode(), digest_size=8).digest()
    return index - first == int.from_bytes(place, "big") % (following - first)
