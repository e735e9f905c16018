"""The embedded sums: all of them, once, right, and mixed."""

import itertools

from data.arithmetic import arithmetic_records


def test_every_sum_is_there_once_and_right_and_neighbours_differ():
    records = list(arithmetic_records())
    assert len(records) == len({record["instruction"] for record in records}) == 1000
    pairs = []
    for record in records:
        one, two = map(int, record["instruction"].removeprefix("What is ").removesuffix("?").split(" + "))
        assert 0 <= one < 100 and 0 <= two < 10 and int(record["response"]) == one + two
        pairs.append((one, two))
    assert all(abs(a - b) > 1 for (a, _), (b, _) in itertools.pairwise(pairs))
    assert pairs == [divmod(number * 383 % 1000, 10) for number in range(1000)], "prepared sets depend on the order"
