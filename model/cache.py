"""Keys and values of the positions already seen, so that generation computes each position once."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import GPTConfig


class KVCache:
    """Room for `max_length` positions of `batch_size` rows, allocated once; a layer without attention takes none.

    Row b's position p lies in slot p, whatever the other rows hold: rows of different lengths need no padding on the
    left, and a prompt padded on the right is read with `set_lengths` telling where it really ends. Slots beyond a row's
    length hold leftovers, which are masked until they are overwritten.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if max_length > config.block_size:
            raise ValueError(
                f"a cache of {max_length} positions is longer than the model's context {config.block_size}"
            )
        self.max_length = max_length
        self.device, self.dtype = device, dtype
        self.lengths = [0] * batch_size
        self.layers: list[tuple[Tensor, Tensor] | None] = []
        for i in range(config.n_layer):
            sizes = config.layer(i)
            shape = (batch_size, sizes.n_kv_head, max_length, sizes.head_dim)
            self.layers.append(
                (torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
                if sizes.n_kv_head
                else None
            )
        self._slots: Tensor | None = None  # (B, T) of the forward under way; None while all rows are equally long

    def begin(self, T: int) -> tuple[Tensor, Tensor | None]:
        """Opens a forward over T new positions of every row.

        Returns their positions (B, T) and the attention mask (B, 1, T, S), or None where causal order says it all.
        """
        start, stop = min(self.lengths), max(self.lengths) + T
        if stop > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} positions, asked for {stop}: make it larger")
        lengths = torch.tensor(self.lengths, device=self.device)
        positions = lengths.unsqueeze(1) + torch.arange(T, device=self.device)  # (B, T)
        level = start + T == stop
        self._slots = None if level else positions
        if level and (start == 0 or T == 1):
            return positions, None
        keys = torch.arange(stop, device=self.device)
        return positions, (keys <= positions.unsqueeze(2)).unsqueeze(1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's k and v (B, n_kv_head, T, head_dim); returns all so far, (B, n_kv_head, S, head_dim)."""
        stored = self.layers[layer]
        assert stored is not None, f"layer {layer} has no attention"
        T = k.size(2)
        stop = max(self.lengths) + T
        for buffer, new in zip(stored, (k, v)):
            if self._slots is None:
                buffer[:, :, stop - T : stop] = new
            else:
                rows = torch.arange(k.size(0), device=k.device).unsqueeze(1)  # (B, 1)
                buffer[rows, :, self._slots] = new.transpose(1, 2).to(buffer.dtype)  # (B, T, n_kv_head, head_dim)
        keys, values = stored
        return keys[:, :, :stop], values[:, :, :stop]

    def end(self, T: int) -> None:
        """Closes the forward: every row is T positions longer."""
        self._slots = None
        self.lengths = [length + T for length in self.lengths]

    def set_lengths(self, lengths: list[int]) -> None:
        """Forgets what lies beyond these lengths, one per row: right padding, or words taken back."""
        assert len(lengths) == len(self.lengths) and all(new <= old for new, old in zip(lengths, self.lengths))
        self.lengths = list(lengths)

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these, in this order."""
        index = torch.tensor(rows, device=self.device)
        self.layers = [None if kv is None else (kv[0][index], kv[1][index]) for kv in self.layers]
        self.lengths = [self.lengths[row] for row in rows]

    def put(self, rows: list[int], other: KVCache) -> None:
        """Replaces these rows by the rows of another cache of the same model, e.g. a fresh prefill."""
        index = torch.tensor(rows, device=self.device)
        for mine, theirs in zip(self.layers, other.layers):
            if mine is not None and theirs is not None:
                for buffer, new in zip(mine, theirs):
                    buffer[index, :, : other.max_length] = new
        for row, length in zip(rows, other.lengths):
            self.lengths[row] = length
