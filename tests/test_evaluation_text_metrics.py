"""BLEU, chrF and ROUGE are the libraries' own; exact match and F1 are SQuAD's."""

from __future__ import annotations

import re
import string
import sys
from collections import Counter
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.text_metrics import NAMES, check_installed, exact_match, f1, score_answers, squad_tokens

ENGLISH = (
    ["The cat sat on the mat.", "A list holds any number of items, in order.", "", "Forty-two"],
    ["A cat sat on a mat.", "A list is a sequence of items.", "Nothing was said here at all", "42"],
)
CHINESE = (["今天天气很好。", "猫坐在垫子上"], ["今天的天气不错。", "一只猫坐在垫子上。"])


def test_bleu_and_chrf_are_sacrebleus_with_its_signature() -> None:
    import sacrebleu

    predictions, references = ENGLISH
    found = score_answers(predictions, references, ["bleu", "chrf"])
    assert found.values["bleu"] == sacrebleu.corpus_bleu(predictions, [references]).score > 0
    assert found.values["chrf"] == sacrebleu.corpus_chrf(predictions, [references]).score > 0
    assert found.signatures["bleu"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert found.signatures["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|")


def test_rouge_is_the_mean_of_rouge_scores_f_measures() -> None:
    from rouge_score import rouge_scorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge_scorer.RougeScorer(kinds)
    found = score_answers(*ENGLISH, ["rouge"])
    for kind in kinds:
        each = [scorer.score(reference, prediction)[kind].fmeasure for prediction, reference in zip(*ENGLISH)]
        assert found.values[kind] == pytest.approx(100 * sum(each) / len(each), rel=1e-12)
    assert 0 < found.values["rouge2"] < found.values["rouge1"] < 100
    assert "tokens:words" in found.signatures["rouge"]


def test_chinese_counts_by_the_character() -> None:
    import sacrebleu

    found = score_answers(*CHINESE, NAMES)
    assert found.values["bleu"] == sacrebleu.corpus_bleu(CHINESE[0], [CHINESE[1]], tokenize="zh").score > 0
    assert "tok:zh" in found.signatures["bleu"] and "tokens:signs" in found.signatures["rouge"]
    # 今天天气很好 and 今天的天气不错 share 今 天 天 气: 2 * 4 / (6 + 7); the others 猫坐在垫子上: 2 * 6 / (6 + 8).
    expected = 100 * (8 / 13 + 12 / 14) / 2
    assert found.values["f1"] == pytest.approx(expected) == found.values["rouge1"]
    assert exact_match("今天，天气很好！", "今天天气很好") and not exact_match("今天", "明天")


def test_squads_normalisation() -> None:
    assert squad_tokens("The  Eiffel-Tower, (in) Paris!") == ["eiffeltower", "in", "paris"]
    assert squad_tokens("a cat and an owl\nthe end") == ["cat", "and", "owl", "end"]
    assert squad_tokens("“Then”…") == ["then"] and squad_tokens("用 Python 3") == ["用", "python", "3"]
    assert exact_match("The answer.", "answer") and not exact_match("answers", "answer")
    assert f1("the cat sat", "a cat sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert f1("cat cat", "cat") == pytest.approx(2 * 1 / (2 + 1)), "a bag, not a set"
    assert (f1("", ""), f1("...", "the"), f1("", "cat")) == (1.0, 1.0, 0.0)


def published(prediction: str, reference: str) -> tuple[bool, float]:
    """Exact match and F1 as the script of SQuAD 2.0 has them, restated."""

    def tokens(text: str) -> list[str]:
        text = "".join(sign for sign in text.lower() if sign not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    ours, theirs = tokens(prediction), tokens(reference)
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not ours or not theirs:
        return ours == theirs, float(ours == theirs)
    precision, recall = common / len(ours), common / len(theirs)
    return ours == theirs, 2 * precision * recall / (precision + recall) if common else 0.0


ASCII = st.lists(st.sampled_from(["a", "The", "cat", "cat's", "sat", "an", "owl", "$5", "x=y", "~", "", "(4.2)"]))


@settings(derandomize=True, deadline=None)
@given(ASCII.map(" ".join), ASCII.map(" ".join))
def test_in_plain_english_they_are_squads(prediction: str, reference: str) -> None:
    exact, score = published(prediction, reference)
    assert exact_match(prediction, reference) == exact
    assert f1(prediction, reference) == pytest.approx(score)


def test_the_values_are_means_over_all_answers() -> None:
    found = score_answers(["cat", "dog", "owl"], ["cat", "a dog", "ant"], ["exact_match", "f1"])
    assert found.values == pytest.approx({"exact_match": 200 / 3, "f1": 200 / 3})


@pytest.mark.parametrize(
    ("metric", "module", "package"),
    [("bleu", "sacrebleu", "sacrebleu"), ("chrf", "sacrebleu", "sacrebleu"), ("rouge", "rouge_score", "rouge-score")],
)
def test_a_missing_package_is_named(metric: str, module: str, package: str) -> None:
    check_installed(NAMES)
    absent = mock.patch("importlib.util.find_spec", lambda name: None if name == module else object())
    loaded = {name: value for name, value in sys.modules.items() if name.partition(".")[0] != module}
    with absent, mock.patch.dict(sys.modules, loaded, clear=True):
        check_installed(["f1", "exact_match"])
        with pytest.raises(ValueError, match=f"--metrics {metric} needs the package {package}: pip install {package}"):
            check_installed(["f1", metric])
