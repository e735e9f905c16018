"""Keys and values of the positions already seen, so that generation computes each position once."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class KeyValues(Protocol):
    """What stands between a layer's own keys and values and those that its queries see."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Takes k and v (B, n_kv_head, T, head_dim); returns all to attend to, (B, n_kv_head, S, head_dim)."""


class KVCache:
    """Room for `max_length` positions of `batch_size` rows.

    Row b's position p lies in slot p, whatever the other rows hold: rows of different lengths need no padding on the
    left. A batch padded on the right is read as it is, and `set_lengths` then tells where each row really ends. Slots
    beyond a row's length hold leftovers, which are masked until they are overwritten.

    Each layer's arrays are allocated once, when it first stores something, with its own number of heads and dtype.
    """

    def __init__(self, batch_size: int, max_length: int) -> None:
        self.max_length = max_length
        self.lengths = [0] * batch_size
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.prompt: dict[int, tuple[Tensor, Tensor]] | None = None  # what GPT.prompt puts before every row, once made
        self._slots: Tensor | None = None  # (B, T) of the forward under way; None while all rows are equally long

    def begin(self, T: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Opens a forward over T new positions of every row.

        Returns their positions (B, T) and the attention mask (B, 1, T, S), or None where causal order says it all.
        """
        start, stop = min(self.lengths), max(self.lengths) + T
        if stop > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} positions, asked for {stop}: make it larger")
        lengths = torch.tensor(self.lengths, device=device)
        positions = lengths.unsqueeze(1) + torch.arange(T, device=device)  # (B, T)
        level = start + T == stop
        self._slots = None if level else positions
        if level and (start == 0 or T == 1):
            return positions, None
        slots = torch.arange(stop, device=device)  # (S,)
        return positions, (slots <= positions.unsqueeze(2)).unsqueeze(1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's k and v (B, n_kv_head, T, head_dim); returns all so far, (B, n_kv_head, S, head_dim)."""
        if layer not in self.layers:
            B, n_kv_head, _, head_dim = k.shape
            shape = (B, n_kv_head, self.max_length, head_dim)
            self.layers[layer] = k.new_zeros(shape), v.new_zeros(shape)
        keys, values = self.layers[layer]
        T = k.size(2)
        stop = max(self.lengths) + T
        if self._slots is None:
            keys.narrow(2, stop - T, T).copy_(k)  # a third of the time of writing it as an index
            values.narrow(2, stop - T, T).copy_(v)
        else:
            rows = torch.arange(k.size(0), device=k.device).unsqueeze(1)  # (B, 1)
            keys[rows, :, self._slots] = k.transpose(1, 2)  # (B, T, n_kv_head, head_dim)
            values[rows, :, self._slots] = v.transpose(1, 2)
        return keys.narrow(2, 0, stop), values.narrow(2, 0, stop)

    def end(self, T: int) -> None:
        """Closes the forward: every row is T positions longer."""
        self._slots = None
        self.lengths = [length + T for length in self.lengths]

    def set_lengths(self, lengths: list[int]) -> None:
        """Forgets what lies beyond these lengths, one per row: padding on the right, or tokens taken back."""
        assert len(lengths) == len(self.lengths) and all(new <= old for new, old in zip(lengths, self.lengths))
        self.lengths = list(lengths)

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        for layer, (keys, values) in self.layers.items():
            self.layers[layer] = keys[rows], values[rows]
        self.lengths = [self.lengths[row] for row in rows]

    def put(self, rows: list[int], other: KVCache) -> None:
        """Replaces these rows by those of another cache of the same model, such as one just filled for them."""
        for layer, (keys, values) in other.layers.items():
            self.layers[layer][0][rows, :, : other.max_length] = keys
            self.layers[layer][1][rows, :, : other.max_length] = values
        for row, length in zip(rows, other.lengths):
            self.lengths[row] = length
