"""Files of blind votes: the tally, the exact sign test, and one line for every file that is not one."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from report.votes import read_votes, sign_test, votes_report


def a_file(path, choices, **changes):
    votes = [{"row": i, "prompt": "p", "category": "", "shown": [1, 0], "choice": c} for i, c in enumerate(choices)]
    head = {"format": 1, "kind": "votes", "title": "two", "comparison": "abc", "checkpoints": ["base", "tuned"]}
    path.write_text(json.dumps({**head, "rows": 50, "seed": 3, "votes": votes, **changes}))
    return path


def test_the_tally_counts_each_choice(tmp_path):
    report = votes_report([a_file(tmp_path / "v.json", [1] * 9 + [0] + [None] * 2)])
    assert (
        "12 votes" in report
        and "base         1" in report
        and "tuned        9" in report
        and "neither      2" in report
    )
    assert "base 1 : 9 tuned, p = 0.021 (two-sided sign test)" in report  # 2 * (1 + 10) / 1024


def test_several_readers_of_one_page_add_up(tmp_path):
    files = [a_file(tmp_path / "a.json", [1, 1, 0]), a_file(tmp_path / "b.json", [1, None])]
    report = votes_report(files)
    assert "5 votes of 2 files" in report and "base 1 : 3 tuned" in report
    other = a_file(tmp_path / "c.json", [0], comparison="xyz")
    with pytest.raises(ValueError, match=r"c\.json: votes on another page than .*a\.json"):
        votes_report([files[0], other])


def test_pairs_count_only_votes_where_both_were_shown(tmp_path):
    votes = [
        {"row": 0, "shown": [0, 1, 2], "choice": 2},
        {"row": 1, "shown": [0, 1], "choice": 0},
        {"row": 2, "shown": [2, 1], "choice": None},
    ]
    report = votes_report([a_file(tmp_path / "v.json", [], checkpoints=["a", "b", "c"], votes=votes)])
    assert "a 1 : 0 b, p = 1.000" in report and "a 0 : 1 c, p = 1.000" in report and "b 0 : 1 c, p = 1.000" in report


def test_no_votes_are_no_error(tmp_path):
    assert "0 votes" in votes_report([a_file(tmp_path / "v.json", [])])
    assert "no vote for either" in votes_report([a_file(tmp_path / "v.json", [None])])


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_sign_test_is_the_two_sided_binomial(wins, losses):
    n = wins + losses
    distance = abs(wins - n / 2)
    as_uneven = sum(math.comb(n, k) for k in range(n + 1) if abs(k - n / 2) >= distance)
    assert sign_test(wins, losses) == pytest.approx(as_uneven / 2**n) == sign_test(losses, wins)


GOOD = {"row": 0, "shown": [0, 1], "choice": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "answers"}, "is JSON of something else"),
        ({"format": 2}, "votes of format 2"),
        ({"checkpoints": "base"}, "`checkpoints` is 'base', expected list"),
        ({"checkpoints": [1, 2]}, "`checkpoints` holds something other than names"),
        ({"votes": {}}, "`votes` is '{}', expected list"),
        ({"votes": [7]}, "vote 1: is not an object"),
        ({"votes": [{**GOOD, "row": 50}]}, "vote 1: `row` is '50', expected 0 to 49"),
        ({"votes": [{**GOOD, "row": True}]}, "vote 1: `row` is 'True'"),
        ({"votes": [GOOD, GOOD]}, "vote 2: row 0 was voted on before"),
        ({"votes": [{**GOOD, "shown": [0, 0]}]}, "expected different columns, each 0 to 1"),
        ({"votes": [{**GOOD, "shown": [0, [1]]}]}, "expected different columns, each 0 to 1"),
        ({"votes": [{**GOOD, "choice": 2}]}, "`choice` is '2', expected one of"),
        ({"votes": [{**GOOD, "choice": "base"}]}, "`choice` is 'base'"),
    ],
)
def test_what_is_no_vote_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError) as error:
        read_votes(a_file(tmp_path / "v.json", [], **changes))
    assert message in str(error.value) and "v.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"3"])
def test_other_files_cost_one_line(tmp_path, content):
    (tmp_path / "v.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"v\.json: is (not JSON|JSON of something else)"):
        read_votes(tmp_path / "v.json")
    with pytest.raises(FileNotFoundError, match="no such file of votes"):
        read_votes(tmp_path / "none.json")
    with pytest.raises(ValueError, match="no file of votes"):
        votes_report([])
