"""Statistics of a calibration text on disk, so that the next run on the same model and text need not make them again.

    CACHE_DIR/KEY/layer_00007.safetensors     a block's second moments, means and influence
    CACHE_DIR/KEY/gradients-8.safetensors     gradients over the first 8 windows

KEY is a digest of the weights and the windows. A file appears whole or not at all, so that a run that was interrupted
goes on with the layers that are there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from formats.adapter import weights_digest
from formats.checkpoint import write_durably
from model.gpt import GPT
from model.pruning.statistics import SITES, Gradients, LayerStatistics, Site, collect, gradients

_VERSION = 1  # of what is stored and how it is made; a larger one makes all anew
Say = Callable[[str], None]


class StatisticsCache:
    """Statistics of one model, as it stands, on `windows` (N, T); made on the first wish for them, layer after layer.

    `folder` None: nothing is kept on disk, and all layers are held in memory. `weigh` as `collect` has it.
    """

    def __init__(
        self, model: GPT, windows: Tensor, folder: str | Path | None, say: Say, *, weigh: bool = False
    ) -> None:
        self.model, self.windows, self.say, self.weigh = model, windows, say, weigh
        self._held: dict[int, LayerStatistics] = {}
        self.folder: Path | None = None
        if folder is not None:
            digest = hashlib.sha256(f"{_VERSION} {weights_digest(model.state_dict())}".encode())
            digest.update(f"{model.config.to_dict()} {tuple(windows.shape)} {weigh}".encode())
            digest.update(windows.numpy().data)
            self.folder = Path(folder) / digest.hexdigest()[:16]

    def layer(self, number: int) -> LayerStatistics:
        """Block `number`'s statistics, of the dense model. The first call makes those of all blocks."""
        if self.folder is None:
            if not self._held:
                self._held = dict(self._collected())
            return self._held[number]
        if any(not self._layer_path(i).exists() for i in range(self.model.config.n_layer)):
            for i, found in self._collected():
                _save(self._layer_path(i), _layer_tensors(found))
        return _layer_from(_load(self._layer_path(number)), self.model.wte.weight.device)

    def gradients(self, count: int) -> Gradients:
        """Gradients over the first `count` windows, at most all of them."""
        count = min(count, len(self.windows))
        path = None if self.folder is None else self.folder / f"gradients-{count}.safetensors"
        device = self.model.wte.weight.device
        if path is not None and path.exists():
            stored = {name: tensor.to(device) for name, tensor in _load(path).items()}
            return Gradients(
                *({n[len(k) :]: t for n, t in stored.items() if n.startswith(k)} for k in ("output.", "gate."))
            )
        self.say(f"Gradients on {count} windows of calibration text")
        found = gradients(self.model, self.windows[:count])
        if path is not None:
            parts = {"output.": found.output, "gate.": found.gate}
            _save(path, {k + name: tensor for k, part in parts.items() for name, tensor in part.items()})
        return found

    def _collected(self) -> Iterator[tuple[int, LayerStatistics]]:
        where = "" if self.folder is None else f", kept in {self.folder}"
        count, length = self.windows.shape
        self.say(f"Statistics of {count} x {length} tokens, layer by layer{where}")
        yield from collect(self.model, self.windows, weigh=self.weigh, frozen=True)

    def _layer_path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"layer_{number:05d}.safetensors"


def _layer_tensors(layer: LayerStatistics) -> dict[str, Tensor]:
    tensors = {"influence": torch.tensor(layer.influence, dtype=torch.float64)}
    for site in SITES:
        found: Site | None = getattr(layer, site)
        if found is not None:
            tensors |= {f"{site}.second": found.second, f"{site}.mean": found.mean}
            tensors[f"{site}.tokens"] = torch.tensor(found.tokens)
    return tensors


def _layer_from(tensors: dict[str, Tensor], device: torch.device) -> LayerStatistics:
    sites: dict[str, Site | None] = dict.fromkeys(SITES)
    for site in SITES:
        if f"{site}.second" in tensors:
            second, mean = (tensors[f"{site}.{name}"].to(device) for name in ("second", "mean"))
            sites[site] = Site(second, mean, int(tensors[f"{site}.tokens"]))
    return LayerStatistics(**sites, influence=float(tensors["influence"]))


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    write_durably(path, lambda file: file.writelines([data]))


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; ValueError, with the remedy, for one that is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: is damaged ({error}); delete it to have it made again") from None


__all__ = ["StatisticsCache"]
