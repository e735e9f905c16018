"""Answers against references: BLEU, chrF, ROUGE, exact match and F1, all from 0 to 100.

BLEU (Papineni et al. 2002) and chrF (Popovic 2015) are sacrebleu's, with the signature that makes them comparable
(Post 2018); ROUGE (Lin 2004) is rouge-score's F-measure, its mean over the answers. Exact match and F1 follow SQuAD
(Rajpurkar et al. 2016): lower case, no punctuation, no English articles. Chinese and Japanese, which write no spaces,
count by the character, as in CMRC 2018 (Cui et al. 2019); sacrebleu does so in its `zh` tokenizer.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

NAMES = ("bleu", "chrf", "rouge", "exact_match", "f1")
_LIBRARIES = {"bleu": ("sacrebleu", "sacrebleu"), "chrf": ("sacrebleu", "sacrebleu")}
_LIBRARIES |= {"rouge": ("rouge_score", "rouge-score")}
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")

_NO_SPACES = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]"  # ideographs and kana
_SIGN = re.compile(_NO_SPACES)
_ROUGE_TOKEN = re.compile(f"[a-z0-9]+|{_NO_SPACES}")
_ARTICLE = re.compile(r"\b(a|an|the)\b")


class TextScores(NamedTuple):
    """The values by name, and what tells exactly how each was made."""

    values: dict[str, float]
    signatures: dict[str, str]


def check_installed(metrics: Iterable[str]) -> None:
    """Raises ValueError naming the package that one of the metrics needs and that is not there."""
    for metric in metrics:
        module, package = _LIBRARIES.get(metric, ("", ""))
        if module and module not in sys.modules and importlib.util.find_spec(module) is None:
            raise ValueError(f"--metrics {metric} needs the package {package}: pip install {package}")


def score_answers(predictions: Sequence[str], references: Sequence[str], metrics: Sequence[str]) -> TextScores:
    """The metrics, some of NAMES, of predictions against one reference each, over all of them, at least one."""
    assert len(predictions) == len(references) > 0, f"{len(predictions)} answers, {len(references)} references"
    by_sign = writes_no_spaces(references)
    scores = TextScores({}, {})
    for metric in metrics:
        values, signature = _METRICS[metric](predictions, references, by_sign)
        scores.values.update(values)
        scores.signatures[metric] = signature
    return scores


def writes_no_spaces(texts: Sequence[str]) -> bool:
    """Whether more than half of the texts hold Chinese or Japanese, so that n-grams of words mean nothing."""
    return sum(bool(_SIGN.search(text)) for text in texts) * 2 > len(texts)


def exact_match(prediction: str, reference: str) -> bool:
    """Whether they are equal after SQuAD's normalisation."""
    return squad_tokens(prediction) == squad_tokens(reference)


def f1(prediction: str, reference: str) -> float:
    """The harmonic mean of precision and recall over the bag of tokens, 0 to 1; of two empty ones 1."""
    ours, theirs = squad_tokens(prediction), squad_tokens(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def squad_tokens(text: str) -> list[str]:
    """Words of a text in lower case without punctuation and articles; ideographs and kana are a word each.

    SQuAD's script drops ASCII punctuation only; here, as in MLQA (Lewis et al. 2020), that of every script goes.
    """
    kept = "".join(sign for sign in text.lower() if not _is_punctuation(sign))
    return _SIGN.sub(r" \g<0> ", _ARTICLE.sub(" ", kept)).split()


def _is_punctuation(sign: str) -> bool:
    return sign in "$+<=>^`|~" or unicodedata.category(sign).startswith("P")


# ---- one function a metric: the values, and the signature


def _bleu(predictions: Sequence[str], references: Sequence[str], by_sign: bool) -> tuple[dict[str, float], str]:
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(tokenize="zh" if by_sign else "13a", force=True)  # force: no warning about text that was tokenised
    return {"bleu": bleu.corpus_score(predictions, [references]).score}, str(bleu.get_signature())


def _chrf(predictions: Sequence[str], references: Sequence[str], _: bool) -> tuple[dict[str, float], str]:
    from sacrebleu.metrics.chrf import CHRF

    chrf = CHRF()
    return {"chrf": chrf.corpus_score(predictions, [references]).score}, str(chrf.get_signature())


def _rouge(predictions: Sequence[str], references: Sequence[str], by_sign: bool) -> tuple[dict[str, float], str]:
    from importlib.metadata import version

    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE_TYPES), tokenizer=_SignTokenizer() if by_sign else None)
    scores = [scorer.score(reference, prediction) for prediction, reference in zip(predictions, references)]
    values = {kind: _percent([score[kind].fmeasure for score in scores]) for kind in ROUGE_TYPES}
    words = "signs" if by_sign else "words"
    return values, f"rouge_score:{version('rouge-score')}|F-measure|stemmer:no|tokens:{words}"


def _exact_match(predictions: Sequence[str], references: Sequence[str], _: bool) -> tuple[dict[str, float], str]:
    return {"exact_match": _percent([float(exact_match(*both)) for both in zip(predictions, references)])}, "squad"


def _f1(predictions: Sequence[str], references: Sequence[str], _: bool) -> tuple[dict[str, float], str]:
    return {"f1": _percent([f1(*both) for both in zip(predictions, references)])}, "squad"


_METRICS: dict[str, Callable[[Sequence[str], Sequence[str], bool], tuple[dict[str, float], str]]] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge": _rouge,
    "exact_match": _exact_match,
    "f1": _f1,
}


class _SignTokenizer:
    """rouge-score's words, and each ideograph as a word of its own."""

    def tokenize(self, text: str) -> list[Any]:
        return _ROUGE_TOKEN.findall(text.lower())


def _percent(values: Sequence[float]) -> float:
    return 100 * math.fsum(values) / len(values)
