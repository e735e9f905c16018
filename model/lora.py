"""Low-rank updates of linear layers: LoRA (Hu et al. 2021) with rsLoRA, DoRA, PiSSA and LoRA+."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.gpt import GPT
from model.linear import Linear, linear
from model.quantize import QuantizedLinear

STARTS = ("default", "pissa")
# What GPT-2's own code calls these layers. Its fused c_attn is three layers here, and each gets an A and B of its own.
ALIASES = {
    "c_attn": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "attn.c_attn": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "attn.c_proj": ("attn.o_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
    "c_proj": ("attn.o_proj", "mlp.down_proj"),
    "c_fc": ("mlp.up_proj",),
    "mlp.c_fc": ("mlp.up_proj",),
}
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """W + scale * B A, with A (rank, in) and B (out, rank); ValueError if out of range.

    `targets` are layers by the end of their name (`q_proj`, `attn.q_proj`, `h.0.attn.q_proj`), GPT-2's names for them,
    or `all-linear`, which is all of the blocks' layers.
    """

    rank: int = 8
    alpha: float = 16.0  # scale = alpha / rank
    dropout: float = 0.05  # on the input of A
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rslora: bool = False  # scale = alpha / sqrt(rank), which keeps large ranks learning (Kalajdzievski 2023)
    dora: bool = False  # the length of each output row is learnt apart from its direction (Liu et al. 2024)
    start: str = "default"  # "pissa": A and B begin as the weight's largest singular parts (Meng et al. 2024)
    lr_ratio: float = 1.0  # learning rate of B over that of A: LoRA+ (Hayou et al. 2024) advises 16
    masked: bool = True  # what a pruning mask holds at zero stays zero; False can not be merged

    def __post_init__(self) -> None:
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", targets)
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"LoRA rank is {self.rank!r}: give a whole number of at least 1")
        for name in ("alpha", "lr_ratio"):
            if not _is_number(getattr(self, name)) or not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"LoRA {name} is {getattr(self, name)!r}: give a number above 0")
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA dropout is {self.dropout!r}: give a probability from 0 to below 1")
        if self.start not in STARTS:
            raise ValueError(f"LoRA start is {self.start!r}: choose one of {', '.join(STARTS)}")
        if not self.targets:
            raise ValueError("LoRA has no targets: name at least one layer, such as q_proj")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraLayer(nn.Module):
    """What a linear layer gains by LoRA; mixed into the class of the layer itself.

    The layer takes over everything of the one it replaces, the same Parameter objects under the same names, and
    `lora_A` (rank, in), `lora_B` (out, rank) join them, in fp32. With DoRA so does `lora_magnitude` (out,).

    PiSSA's start is kept in `lora_A_start` and `lora_B_start`, and the layer computes W + scale (B A - B0 A0) where the
    paper moves B0 A0 out of the weight and computes (W - scale B0 A0) + scale B A. It is the same function with the
    same gradients, but the base stays the base, bit for bit: it can be switched back to, another adapter fits on it,
    and the saved adapter (both pairs) needs no weights but the published ones. It costs a second pair of thin matmuls.
    """

    in_features: int
    out_features: int
    mask: Tensor | None
    base_copy: Tensor | None  # the base weight while merged
    lora_A_start: Tensor | None
    lora_B_start: Tensor | None
    lora_magnitude: nn.Parameter | None

    def __init__(self, base: nn.Module, settings: LoraSettings, mask: Tensor | None = None) -> None:
        # In place of super().__init__(), which would make a weight of its own: also mode, hooks and buffers stay.
        self.__dict__.update(base.__dict__)
        self.enabled = True
        self.scale, self.dropout = settings.scale, settings.dropout
        self.breaks_mask = mask is not None and not settings.masked
        self.register_buffer("mask", None if self.breaks_mask else mask, persistent=False)
        self.register_buffer("base_copy", None, persistent=False)
        device = self.dense_weight().device
        self.lora_A = nn.Parameter(torch.empty(settings.rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, settings.rank, device=device))
        magnitude = nn.Parameter(self.dense_weight().float().norm(dim=1)) if settings.dora else None
        self.register_parameter("lora_magnitude", magnitude)
        for name, like in (("lora_A_start", self.lora_A), ("lora_B_start", self.lora_B)):
            self.register_buffer(name, torch.zeros_like(like) if settings.start == "pissa" else None)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The base's weight (out, in)."""
        raise NotImplementedError

    def start_pissa(self) -> None:
        """A and B become the weight's `rank` largest singular parts, each with the square root of their sizes."""
        rank = self.lora_A.size(0)
        weight = self.dense_weight().detach()
        if rank > min(weight.shape):
            raise ValueError(f"LoRA rank {rank} exceeds a weight of {tuple(weight.shape)}: PiSSA can not start so")
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        root = (S[:rank] / self.scale).sqrt()
        assert self.lora_A_start is not None and self.lora_B_start is not None
        for start in (self.lora_A_start, self.lora_A.data):
            start.copy_(root.unsqueeze(1) * Vh[:rank])
        for start in (self.lora_B_start, self.lora_B.data):
            start.copy_(U[:, :rank] * root)

    def delta(self) -> Tensor:
        """What is added to the base's weight before DoRA's lengths: fp32 (out, in), zero where the mask is."""
        return _delta(self.lora_A, self.lora_B, self.lora_A_start, self.lora_B_start, self.mask, self.scale)

    def _ratio(self) -> Tensor:
        """DoRA's factor of each output row, fp32 (out,): its length over that of the row it scales.

        That row's length is taken as a constant in backward (section 4.3 of the paper). A row of zeros has factor 1.
        """
        assert self.lora_magnitude is not None
        with torch.no_grad():
            length = (self.dense_weight() + self.delta()).norm(dim=1)
        return torch.where(length > 0, self.lora_magnitude / length.clamp_min(1e-12), 1.0)

    def effective_weight(self) -> Tensor:
        """The one fp32 weight (out, in) that does what base and adapter do together, without dropout."""
        weight = self.dense_weight() + self.delta()
        return weight if self.lora_magnitude is None else self._ratio().unsqueeze(1) * weight

    def _update(self, x: Tensor) -> Tensor:
        """x (..., in) through the delta, (..., out), with dropout on x."""
        lean = self.mask is None and self.lora_A_start is None and not torch.compiler.is_compiling()
        if lean and self.training and self.dropout > 0.0:
            low = _DroppedLinear.apply(x, self.lora_A.to(x.dtype), self.dropout)  # (..., rank)
            return F.linear(self.scale * low, self.lora_B.to(x.dtype))
        x = F.dropout(x, self.dropout, self.training)
        if self.mask is not None and torch.compiler.is_compiling():
            return F.linear(x, self.delta().to(x.dtype))
        if self.mask is not None:
            pairs = self.lora_A, self.lora_B, self.lora_A_start, self.lora_B_start
            return _MaskedLinear.apply(x, *pairs, self.mask, self.scale)
        update = self._thin(x, self.lora_A, self.lora_B)
        if self.lora_A_start is not None and self.lora_B_start is not None:
            # Apart, not as one pair of rank 2r: at the start the difference is then exactly 0.
            update = update - self._thin(x, self.lora_A_start, self.lora_B_start)
        return update

    def _thin(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(self.scale * F.linear(x, A.to(x.dtype)), B.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if not self.enabled or self.base_copy is not None:
            return super().forward(x)
        if self.mask is not None and not self.training and not torch.is_grad_enabled():
            # As merged, to the bit, and one product, not two: under a mask the update is as large as the weight.
            return linear(x, self.effective_weight().to(x.dtype), self._parameters["bias"])
        # Before the base's matmul: where x is recomputed in backward, recomputation stops short of the last matmul.
        update = self._update(x)
        out = super().forward(x) + update
        if self.lora_magnitude is None:
            return out
        # ratio * out, but for the bias; written as a change of `out`, which is none at the start, to the bit.
        bias = self._parameters["bias"]
        scaled = out if bias is None else out - bias
        return out + (self._ratio() - 1.0).to(out.dtype) * scaled

    @torch.no_grad()
    def plain_pair(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) with delta = scale * B A on the base itself, for files that know no start.

        r is the rank, but twice that after PiSSA's start: [A; A0] and [B, -B0]. A mask is not in them.
        """
        if self.lora_A_start is None or self.lora_B_start is None:
            return self.lora_A.detach(), self.lora_B.detach()
        return torch.cat((self.lora_A, self.lora_A_start)), torch.cat((self.lora_B, -self.lora_B_start), dim=1)

    @property
    def merge_refusal(self) -> str | None:
        """Why the weights can not be merged; None if they can."""
        if not self.breaks_mask:
            return None
        return (
            "this LoRA was trained with --lora_mask off and writes where the base is pruned: merging would lose "
            "the mask: keep it beside its base, or train it with --lora_mask on"
        )

    def adapter_tensors(self) -> dict[str, Tensor]:
        """What LoRA added and a file must hold, by name within this layer."""
        names = ("lora_A", "lora_B", "lora_magnitude", "lora_A_start", "lora_B_start")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class _DroppedLinear(torch.autograd.Function):
    """dropout(x) @ A.T, keeping x and a mask of one byte an element.

    Layers with one input (q, k and v; gate and up) keep the same x. Autograd left alone keeps a dropped copy of it for
    each, and on a CPU the mask as fp32: 16 bytes an element for q and v, not 6.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, p: float) -> Tensor:
        dropped, mask = torch.native_dropout(x, p, True)
        ctx.save_for_backward(x, A, mask)
        ctx.factor = 1.0 / (1.0 - p)
        return F.linear(dropped, A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, A, mask = ctx.saved_tensors
        grad = grad * ctx.factor  # thin: (..., rank)
        dropped = (x * mask).to(grad.dtype)  # under autocast, grad has its type and x may be fp32
        grad_A = grad.flatten(0, -2).t() @ dropped.flatten(0, -2)
        grad_x = (grad @ A.to(grad.dtype)).mul_(mask).to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_A.to(A.dtype), None


def _delta(
    A: Tensor, B: Tensor, A_start: Tensor | None, B_start: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    delta = B @ A
    if A_start is not None and B_start is not None:
        delta = delta - B_start @ A_start
    delta = scale * delta
    return delta if mask is None else delta * mask


class _MaskedLinear(torch.autograd.Function):
    """x @ delta.T for a delta under a mask, which is made again in backward from its thin factors.

    Under a mask the two thin matmuls are no longer one update, so it is (out, in). Autograd left alone would keep it:
    as many bytes as the base's weights, for every layer until its backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.rest = rest  # PiSSA's start, mask and scale, which have no gradient
        return F.linear(x, _delta(A, B, *rest).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        *_, mask, scale = ctx.rest
        grad_x = grad @ _delta(A, B, *ctx.rest).to(grad.dtype) if ctx.needs_input_grad[0] else None
        full = grad.flatten(0, -2).t() @ x.flatten(0, -2).to(grad.dtype)  # (out, in)
        full = scale * full.to(A.dtype) * mask
        return None if grad_x is None else grad_x.to(x.dtype), B.t() @ full, full @ A.t(), None, None, None, None


class LoraLinear(LoraLayer, Linear):
    """LoRA on a dense layer, which can take it into its weight and give it back."""

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The base's weight (out, in)."""
        return self.weight.to(dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Puts the effective weight, worked out in fp32, in the base's place, and keeps the base's beside it."""
        assert self.base_copy is None and self.merge_refusal is None
        base = self.weight.detach().clone()
        self.weight.copy_(self.effective_weight())
        self.base_copy = base

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the base's weight back, bit for bit: it was kept, since (W + d) - d is not W in floating point."""
        assert self.base_copy is not None
        self.weight.copy_(self.base_copy)
        self.base_copy = None


class LoraQuantizedLinear(LoraLayer, QuantizedLinear):
    """LoRA on a layer kept in four or eight bits: QLoRA."""

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The base's weight (out, in), read from its codes."""
        return QuantizedLinear.dense_weight(self, dtype)

    @property
    def merge_refusal(self) -> str | None:
        """Why the weights can not be merged."""
        return "the base is quantised: merge into the unquantised one, by applying the adapter to that"


def apply_lora(
    model: GPT,
    settings: LoraSettings,
    *,
    generator: torch.Generator | None = None,
    fresh: bool = True,
) -> GPT:
    """Adds LoRA to the targets, in place, and freezes all else; returns the model, whose function is unchanged.

    Where `model.masks` says that a weight is pruned it adds nothing, unless `settings.masked` is off. fresh=False
    leaves A to whatever loads it: PiSSA's start costs a singular value decomposition of each weight. ValueError for a
    target that matches nothing or can not be adapted.
    """
    names = target_names(model, settings.targets)
    model.requires_grad_(False)
    for name in names:
        parent, _, last = name.rpartition(".")
        base = model.get_submodule(name)
        mask = model.masks.get(f"{name}.weight")
        kind = LoraQuantizedLinear if isinstance(base, QuantizedLinear) else LoraLinear
        layer = kind(base, settings, None if mask is None else mask.dense())
        # As nn.Linear starts its weights: uniform within 1 / sqrt(in).
        nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5), generator=generator)
        if settings.start == "pissa" and fresh:
            layer.start_pissa()
        setattr(model.get_submodule(parent), last, layer)
    return model


def target_names(model: GPT, targets: Iterable[str]) -> list[str]:
    """The layers `h.N.attn.*_proj` and `h.N.mlp.*_proj` that any of `targets` means, in the model's order."""
    layers = {name: module for name, module in model.named_modules() if _is_block_layer(name)}
    if any(isinstance(module, LoraLayer) for module in layers.values()):
        raise ValueError("this model has LoRA already: merge it first, or start from the base")
    chosen: set[str] = set()
    for target in targets:
        found = {name for name in layers if any(_ends_with(name, end) for end in ALIASES.get(target, (target,)))}
        if target == ALL_LINEAR:
            found = set(layers)
        if not found:
            raise ValueError(_no_target(model, target, layers))
        chosen |= found
    return [name for name in layers if name in chosen]


def _is_block_layer(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 4 and parts[0] == "h" and parts[2] in ("attn", "mlp") and parts[3].endswith("_proj")


def _ends_with(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _no_target(model: GPT, target: str, layers: Iterable[str]) -> str:
    if target in ("wte", "wpe", "embed_tokens"):
        return f"LoRA target {target!r} is an embedding, a table without a matmul to add to: leave it out"
    if target == "lm_head" and model.lm_head is None:
        return "LoRA target 'lm_head' is tied to the embedding: merging would change that too, so leave it out"
    if target == "lm_head":
        return "LoRA target 'lm_head' is applied inside the loss, which knows the plain matrix only: leave it out"
    own = sorted({name.rpartition(".")[2] for name in layers})
    near = difflib.get_close_matches(target, [*own, ALL_LINEAR], n=1, cutoff=0.0)
    return (
        f"LoRA target {target!r} matches no layer: did you mean {near[0]!r}? "
        f"This model has {', '.join(own)}; {ALL_LINEAR} means all of them"
    )


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """The layers that have LoRA, in the model's order."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def lr_multipliers(model: nn.Module, settings: LoraSettings) -> dict[str, float]:
    """For each parameter that trains, the multiplier of its learning rate: `lr_ratio` for each B (LoRA+), else 1."""
    return {
        name: settings.lr_ratio if name.endswith(".lora_B") else 1.0
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
