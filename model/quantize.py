"""Frozen weights in four or eight bits: the base that QLoRA trains on (Dettmers et al. 2023)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.linear import Linear, is_decoding_step

# NF4: quantiles of N(0, 1), scaled to [-1, 1], eight above and seven below an exact 0 (appendix E of the paper).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCK = 64  # weights that share one absmax
SCALE_BLOCK = 256  # absmaxes that share one scale: 0.5 bytes a weight + 1/64 + 4/(64 x 256) = 0.516
KINDS = ("nf4", "int8")


def quantize_nf4(weight: Tensor) -> tuple[Tensor, ...]:
    """`weight` in NF4: its codes, two to a byte, and the absmax of each block of 64, itself in eight bits.

    Returns codes uint8 (n / 2,), absmax codes int8 (m / 256, 256), absmax scales fp32 (m / 256, 1), the absmaxes' mean,
    a scalar, and the two values that each byte of codes stands for, fp32 (256, 2); for n weights in m blocks, both
    rounded up. Each absmax is stored as its distance from the mean.
    """
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)  # (m, 64)
    absmax = blocks.abs().amax(dim=1)  # (m,)
    mean = absmax.mean()
    rows = F.pad(absmax - mean, (0, -absmax.numel() % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    scale_codes, scales = quantize_int8(rows)
    # Rounded against the absmax that will be read back, not the true one, so that both errors do not add up.
    restored = _restore_absmax(scale_codes, scales, mean)[: absmax.numel()].unsqueeze(1)
    table = torch.tensor(NF4, device=flat.device)
    borders = (table[1:] + table[:-1]) / 2
    scaled = blocks / restored.clamp_min(torch.finfo(torch.float32).tiny)
    codes = torch.bucketize(scaled, borders, out_int32=True).to(torch.uint8).view(-1, 2)
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1)  # row 16 a + b: the values of a and b
    return codes[:, 0] << 4 | codes[:, 1], scale_codes, scales, mean, pairs


def dequantize_nf4(shape: tuple[int, int], dtype: torch.dtype, *stored: Tensor) -> Tensor:
    """The weight of this shape from what `quantize_nf4` returned."""
    codes, scale_codes, scales, mean, pairs = stored
    blocks = F.embedding(codes.int(), pairs).view(-1, BLOCK)  # (m, 64)
    absmax = _restore_absmax(scale_codes, scales, mean)[: blocks.size(0)]
    weight = blocks.mul_(absmax.unsqueeze(1)).flatten()
    return weight[: shape[0] * shape[1]].view(shape).to(dtype)


def _restore_absmax(codes: Tensor, scales: Tensor, mean: Tensor) -> Tensor:
    # An absmax is never negative; one of 0 (a block of zeros) would come back slightly off and stays harmless, since
    # every weight of such a block has the code of 0.
    return (codes.float() * scales + mean).flatten().clamp_min(0.0)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` (N, K) as codes int8 (N, K) in -127..127 and the scale of each row (N, 1): absmax / 127.

    The scales are rounded up to bf16 before the codes are taken (at most 0.8% coarser steps), so that a kernel which
    wants them so computes with the very weights that are read back; they are returned in fp32.
    """
    weight = weight.detach().float()
    scales = (weight.abs().amax(dim=1, keepdim=True) / 127 * (1 + 2**-8)).bfloat16().float()
    codes = (weight / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-127, 127).to(torch.int8)
    return codes, scales


def dequantize_int8(shape: tuple[int, int], dtype: torch.dtype, *stored: Tensor) -> Tensor:
    """The weight of this shape from what `quantize_int8` returned."""
    codes, scales = stored
    assert codes.shape == shape
    return (codes.float() * scales).to(dtype)


Dequantize = Callable[..., Tensor]
_STORES: dict[str, tuple[Callable[[Tensor], tuple[Tensor, ...]], Dequantize]] = {
    "nf4": (quantize_nf4, dequantize_nf4),
    "int8": (quantize_int8, dequantize_int8),
}

# torch's int8 kernel takes this many inputs at a time and reads past the end of its buffers where they are no multiple
# of it, as after structured pruning: wrong numbers, or a segmentation fault (1,153 inputs, torch 2.13).
_KERNEL_INPUTS = 16


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    asked = (getattr(torch.cpu, f"_is_{kind}_supported", None) for kind in ("avx512_bf16", "amx_tile"))
    return any(ask is not None and ask() for ask in asked)


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is kept in `kind` and read back for each use.

    The weight's buffers are not part of the state dict: a base comes from its own file, a checkpoint holds what was
    trained on it. The buffers are scales and codes, not weights, so a model of these must not be cast as a whole
    (`model.to(torch.bfloat16)`); autocast is the way to compute in bf16.
    """

    bias: nn.Parameter | None

    def __init__(self, base: nn.Linear, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = base.in_features, base.out_features, kind
        self.register_parameter("bias", base.bias)
        quantize, self._dequantize = _STORES[kind]
        stored = quantize(base.weight)
        # int8 in a model that only generates: quicker than reading the weight back, but with x in bf16.
        self.reads_codes = False
        self._codes_and_scales: tuple[Tensor, Tensor] | None = None  # of int8, as the kernel takes them
        self._names = [f"stored_{i}" for i in range(len(stored))]
        for name, tensor in zip(self._names, stored):
            self.register_buffer(name, tensor, persistent=False)

    def stored(self) -> list[Tensor]:
        """The tensors that hold the weight."""
        return [getattr(self, name) for name in self._names]

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out_features, in_features) as it is used."""
        return self._dequantize((self.out_features, self.in_features), dtype, *self.stored())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), in autocast's type or that of x."""
        if self.reads_codes and is_decoding_step(x):
            return self.few_rows(x.reshape(-1, x.size(-1))).view(*x.shape[:-1], self.out_features).to(x.dtype)
        if self.reads_codes and not torch.is_grad_enabled() and x.dtype == torch.float32:
            return self._many_rows(x)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        shape = (self.out_features, self.in_features)
        return _FrozenLinear.apply(x.to(dtype), self.bias, self._dequantize, shape, *self.stored())

    def few_rows(self, x: Tensor) -> Tensor:
        """x (R, in) times the codes, a quarter of the bytes of fp32, which are what a decoding step waits for.

        torch's kernel takes x and scales in bf16, and gives bf16 (R, out): that rounds x by up to 0.4%; the scales are
        bf16 already.
        """
        if self._codes_and_scales is None:
            codes, scales = self.stored()
            codes = F.pad(codes, (0, -self.in_features % _KERNEL_INPUTS))
            self.stored_0 = codes[:, : self.in_features]  # the same memory, not a second copy
            self._codes_and_scales = codes, scales.flatten().bfloat16()
        codes, scales = self._codes_and_scales
        x = x.bfloat16()
        if codes.size(1) > self.in_features:
            x = F.pad(x, (0, codes.size(1) - self.in_features))
        y = torch._weight_int8pack_mm(x, codes, scales)
        bias = self._parameters["bias"]  # by its own name it costs a search, 120 times a step
        return y if bias is None else y + bias

    def _many_rows(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), a prompt's rows, which are scaled and not the weight: there are fewer of them.

        In bf16, which holds each code exactly, where the CPU multiplies it: 64 rows times 3,072 x 576 then take 0.6 ms
        and not 1.6. Elsewhere it would be a hundred times slower than fp32.
        """
        codes, scales = self.stored()
        dtype = torch.bfloat16 if x.is_cpu and _cpu_multiplies_bf16() else torch.float32
        y = F.linear(x.to(dtype), codes.to(dtype)).float().mul_(scales.flatten())
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class _FrozenLinear(torch.autograd.Function):
    """x @ weight.T + bias, whose backward reads the weight from its codes again.

    Autograd left alone would keep the dense weight of every layer until backward, which is all that was to be saved.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, dequantize: Dequantize, shape: tuple[int, int], *stored: Tensor
    ) -> Tensor:
        # Not save_for_backward, which would make activation checkpointing run this matmul again for what never changes.
        ctx.dequantize, ctx.shape, ctx.stored = dequantize, shape, stored
        weight = dequantize(shape, x.dtype, *stored)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.dequantize(ctx.shape, grad.dtype, *ctx.stored)
        return grad @ weight, None, None, None, *(None for _ in ctx.stored)


def quantize_blocks(model: nn.Module, kind: str = "nf4") -> None:
    """Replaces, in place and one after the other, the linear layers of `model.h` by stores of `kind`.

    Embeddings, norms, biases and the head stay as they are. ValueError for an unknown kind, or where nothing is left
    to quantise.
    """
    if kind not in KINDS:
        raise ValueError(f"quantisation is {kind!r}: choose one of {', '.join(KINDS)}")
    blocks = model.get_submodule("h")
    found = [name for name, module in blocks.named_modules() if type(module) in (nn.Linear, Linear)]
    if not found:
        raise ValueError("this model has no plain linear layers to quantise: quantise before anything is added to it")
    for name in found:
        parent, _, last = name.rpartition(".")
        linear = blocks.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(blocks.get_submodule(parent), last, QuantizedLinear(linear, kind))


def quantized_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the quantised weights as they are stored, and what the same weights take in fp32."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    held = sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in layer.stored())
    return held, sum(4 * layer.in_features * layer.out_features for layer in layers)
