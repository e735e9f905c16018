"""Trained context in front of every text: prefix tuning (Li & Liang 2021) and P-tuning (Liu et al. 2021).

Both come down to keys and values, one set per layer, that every token may attend to: prefix tuning learns them,
P-tuning learns embeddings of virtual tokens and reads them through the network. Virtual tokens come first and so see
nothing but each other: their keys and values are the same before every text, in every row and before every record of a
packed row. They are worked out once, for a batch of one, and the text keeps its B x T shape, its cache and its logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import AttentionInputs
from model.cache import KeyValues, KVCache
from model.gpt import GPT

ENCODERS = ("mlp", "lstm", "none")


@dataclass(frozen=True, kw_only=True)
class PrefixSettings:
    """Size of the prefix and of the network that re-parametrises it; ValueError if out of range."""

    length: int = 20
    hidden: int = 512  # width of the MLP whose outputs are the prefix; 0 = the keys and values are trained themselves
    takes_positions: bool = False  # the text begins at position `length`, as in PEFT, not at 0

    def __post_init__(self) -> None:
        _check_count("prefix length", self.length, 1)
        _check_count("prefix hidden", self.hidden, 0)


@dataclass(frozen=True, kw_only=True)
class PTuningSettings:
    """Number of the virtual tokens and the network that makes them; ValueError if out of range."""

    length: int = 20
    encoder: str = "mlp"  # "lstm": both ways over the tokens, then an MLP, as in the paper; "none": no network
    hidden: int = 512

    def __post_init__(self) -> None:
        _check_count("p_tuning length", self.length, 1)
        _check_count("p_tuning hidden", self.hidden, 1)
        if self.encoder not in ENCODERS:
            raise ValueError(f"p_tuning encoder is {self.encoder!r}: choose one of {', '.join(ENCODERS)}")


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}")


Layers = dict[int, tuple[Tensor, Tensor]]  # layer: keys and values, (1, n_kv_head, P, head_dim) each


class Prompt(nn.Module):
    """What `GPT.prompt` holds: it puts `length` keys and values in front of each layer's own."""

    def __init__(self, length: int, positions: int) -> None:
        super().__init__()
        self.enabled = True
        self.length = length
        self.positions = positions  # of the context that it takes: `length`, or none

    def layers(self, model: GPT) -> Layers:
        """The keys and values of each layer that has attention."""
        raise NotImplementedError

    def folded(self) -> dict[str, Tensor]:
        """The tensors that are left when the network that makes them is folded away, by name within this module."""
        raise NotImplementedError

    def fold(self) -> None:
        """Folds that network away, in place: what it makes becomes the parameters, which train as before."""
        raise NotImplementedError

    def forward(
        self, model: GPT, idx: Tensor, positions: Tensor | None, mask: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor | None, Tensor | None, KeyValues | None]:
        """The positions, mask and store with which `model` reads idx (B, T); arguments as it would have used them."""
        if not self.enabled:
            return positions, mask, cache
        T = idx.size(1)
        if self.positions:
            positions = torch.arange(T, device=idx.device) if positions is None else positions
            positions = positions + self.positions
        if cache is None:
            layers = self.layers(model)
        else:  # its rows all begin with the same prompt
            cache.prompt = self.layers(model) if cache.prompt is None else cache.prompt
            layers = cache.prompt
        return positions, self._widened(mask, T, idx.device), Prompted(layers, cache)

    def _widened(self, mask: Tensor | None, T: int, device: torch.device) -> Tensor | None:
        """`mask` (B, 1, T, S) with the prompt, which all see, in front: (B, 1, T, P + S)."""
        if mask is None and T == 1:
            return None  # one query that sees all
        if mask is None:
            mask = torch.ones(T, T, dtype=torch.bool, device=device).tril().view(1, 1, T, T)
        return F.pad(mask, (self.length, 0), value=True)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """All that is needed to train on, by name within this module."""
        return dict(self.named_parameters())


class Prompted:
    """A store of keys and values, or none, behind those of a prompt."""

    def __init__(self, layers: Layers, cache: KVCache | None) -> None:
        self.layers, self.cache = layers, cache

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.append`: (B, n_kv_head, P + S, head_dim) each."""
        if self.cache is not None:
            k, v = self.cache.append(layer, k, v)
        keys, values = (x.to(k.dtype).expand(k.size(0), -1, -1, -1) for x in self.layers[layer])
        return torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)


class Recorder:
    """A store that keeps what it is given and gives it back: one forward from the first position on."""

    def __init__(self) -> None:
        self.layers: Layers = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVCache.append`."""
        self.layers[layer] = k, v
        return k, v


class Prefix(Prompt):
    """Prefix tuning: learnt keys and values, which have no position and are not turned by RoPE.

    Trained directly they are unstable, so they are made from an embedding by an MLP (section 4.3 of the paper): its
    first layer is shared, its last has a part for each layer of the model, which may differ in their number of heads.
    """

    def __init__(self, model: GPT, settings: PrefixSettings) -> None:
        super().__init__(settings.length, positions=settings.length if settings.takes_positions else 0)
        sizes = {layer: model.config.layer(layer) for layer in range(model.config.n_layer)}
        # Keys and values together, as (2, n_kv_head, P, head_dim).
        self.shapes = {i: (2, s.n_kv_head, settings.length, s.head_dim) for i, s in sizes.items() if s.n_head}
        device, width = model.wte.weight.device, model.config.n_embd
        self.final: nn.ParameterDict | None = None
        self.embedding: nn.Embedding | None = None
        if settings.hidden == 0:
            direct = {i: 0.02 * torch.randn(shape, device=device) for i, shape in self.shapes.items()}
            self.final = nn.ParameterDict({str(i): nn.Parameter(value) for i, value in direct.items()})
            return
        self.embedding = nn.Embedding(settings.length, width, device=device)
        self.inner = nn.Linear(width, settings.hidden, device=device)
        self.outputs = nn.ModuleDict()
        for i, (two, heads, _, head_dim) in self.shapes.items():
            last = nn.Linear(settings.hidden, two * heads * head_dim, device=device)
            # Near zero: at first the prefix takes a share of each query's attention, but adds next to nothing.
            nn.init.normal_(last.weight, std=0.02)
            nn.init.zeros_(last.bias)
            self.outputs[str(i)] = last

    def folded(self) -> dict[str, Tensor]:
        """`final.N`: keys and values of layer N, (2, n_kv_head, P, head_dim)."""
        if self.embedding is None:
            return self.adapter_tensors()
        inner = torch.tanh(self.inner(self.embedding.weight))  # (P, hidden)
        made = {}
        for i, (_, heads, length, head_dim) in self.shapes.items():
            flat = self.outputs[str(i)](inner).view(length, 2, heads, head_dim)
            made[f"final.{i}"] = flat.permute(1, 2, 0, 3)  # (2, n_kv_head, P, head_dim)
        return made

    def layers(self, model: GPT) -> Layers:
        """The prefix of each layer that has attention."""
        return {int(name.removeprefix("final.")): (kv[:1], kv[1:]) for name, kv in self.folded().items()}

    def fold(self) -> None:
        """The keys and values become the parameters."""
        if self.embedding is not None:
            made = {name.removeprefix("final."): value.detach().clone() for name, value in self.folded().items()}
            self.final = nn.ParameterDict({name: nn.Parameter(value) for name, value in made.items()})
            self.embedding = None
            del self.inner, self.outputs


class VirtualTokens(Prompt):
    """P-tuning: embeddings of tokens that stand before the text and take positions 0..P-1."""

    def __init__(self, model: GPT, settings: PTuningSettings) -> None:
        super().__init__(settings.length, positions=settings.length)
        device, width = model.wte.weight.device, model.config.n_embd
        self.embedding = nn.Embedding(settings.length, width, device=device)
        self.encoder = None if settings.encoder == "none" else PromptEncoder(width, settings).to(device)

    def folded(self) -> dict[str, Tensor]:
        """`embedding.weight`: what stands in place of the text's embeddings, (P, n_embd)."""
        tokens = self.embedding.weight
        return {"embedding.weight": tokens if self.encoder is None else self.encoder(tokens)}

    def layers(self, model: GPT) -> Layers:
        """The keys and values that the model itself computes for the virtual tokens."""
        x = self.folded()["embedding.weight"].unsqueeze(0)  # (1, P, C)
        positions = torch.arange(self.length, device=x.device)
        if model.wpe is not None:
            x = x + model.wpe(positions)
        x = F.dropout(x, model.config.dropout, self.training)
        recorder = Recorder()
        shared = AttentionInputs(rope=model._rope_tables(positions, positions), cache=recorder)
        for block in model.h:
            x = block(x, shared)
        return recorder.layers

    def fold(self) -> None:
        """The encoder's outputs become the parameters."""
        if self.encoder is not None:
            final = self.folded()["embedding.weight"].detach().clone()
            self.embedding = nn.Embedding.from_pretrained(final, freeze=False)
            self.encoder = None


class PromptEncoder(nn.Module):
    """Virtual tokens (P, C) made from their embeddings (P, C), so that they depend on one another as words do."""

    def __init__(self, width: int, settings: PTuningSettings) -> None:
        super().__init__()
        hidden = settings.hidden
        self.lstm: nn.LSTM | None = None
        if settings.encoder == "lstm":
            self.lstm = nn.LSTM(width, hidden, num_layers=2, bidirectional=True)
            self.mlp = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
        else:
            sizes = (width, hidden, hidden)
            layers = [layer for n in (0, 1) for layer in (nn.Linear(sizes[n], sizes[n + 1]), nn.ReLU())]
            self.mlp = nn.Sequential(*layers, nn.Linear(hidden, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(P, C) -> (P, C)."""
        return self.mlp(tokens if self.lstm is None else self.lstm(tokens)[0])


def apply_prefix(model: GPT, settings: PrefixSettings) -> GPT:
    """Puts a trained prefix before every layer's keys, in place, and freezes all else; returns the model.

    ValueError if it takes all of the text's positions.
    """
    return _put_in_front(model, Prefix(model, settings))


def apply_p_tuning(model: GPT, settings: PTuningSettings) -> GPT:
    """Puts trained virtual tokens before every text, in place, and freezes all else; returns the model.

    The text's context is shorter by as many: see `GPT.context_length`. ValueError if nothing is left of it.
    """
    return _put_in_front(model, VirtualTokens(model, settings))


def _put_in_front(model: GPT, prompt: Prompt) -> GPT:
    if model.prompt is not None:
        raise ValueError("this model has a prefix or virtual tokens already: start from its base")
    if prompt.positions >= model.config.block_size:
        raise ValueError(
            f"{prompt.length} positions before the text leave nothing of the model's context of "
            f"{model.config.block_size}: make the length of prefix or p_tuning smaller"
        )
    model.requires_grad_(False)
    model.prompt = prompt.train(model.training)
    model.context_length = model.config.block_size - prompt.positions
    return model
