"""What calibration text says about a network: second moments of its layers' inputs, and gradients of the loss.

    x --ln_1--> attn_in --q,k,v, attention--> attn_out --o_proj--> + --ln_2--> mlp_in --gate,up--> mlp_out --down--> +

Four sites a block, each the input of one to three matrices. Both passes go block by block, so that what they need
beside the model is the text's hidden states and one block's statistics, however deep the network is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import AttentionInputs
from model.gpt import GPT, Block
from model.loss import IGNORE_INDEX, linear_cross_entropy_sum

SITES = ("attn_in", "attn_out", "mlp_in", "mlp_out")
SITE_OF = {
    "attn.q_proj": "attn_in",
    "attn.k_proj": "attn_in",
    "attn.v_proj": "attn_in",
    "attn.o_proj": "attn_out",
    "mlp.gate_proj": "mlp_in",
    "mlp.up_proj": "mlp_in",
    "mlp.down_proj": "mlp_out",
}
_READER = {"attn_in": "attn", "attn_out": "attn.o_proj", "mlp_in": "mlp", "mlp_out": "mlp.down_proj"}


@dataclass
class Site:
    """The moments of one input x over `tokens` tokens; the model's device, fp32."""

    second: Tensor  # (d, d), mean of x x^T
    mean: Tensor  # (d,)
    tokens: int

    @property
    def norms(self) -> Tensor:
        """(d,) root mean square of each input: Wanda's norm over the tokens, divided by sqrt(tokens)."""
        return self.second.diagonal().clamp_min(0).sqrt()


@dataclass
class LayerStatistics:
    """The sites of one block, None where a sub-layer is absent."""

    attn_in: Site | None  # read by q_proj, k_proj, v_proj
    attn_out: Site | None  # read by o_proj
    mlp_in: Site | None  # read by gate_proj, up_proj
    mlp_out: Site | None  # read by down_proj
    influence: float  # 1 - mean cosine of the stream before and after the block (ShortGPT, Men et al. 2024)

    def of(self, linear: str) -> Site:
        """The input of a linear layer by its name in the block, such as "attn.q_proj"."""
        site: Site | None = getattr(self, SITE_OF[linear])
        assert site is not None, f"{linear} is in a sub-layer that is absent"
        return site


def collect(
    model: GPT, windows: Tensor, *, batch_size: int = 8, weigh: bool = False, frozen: bool = False
) -> Iterator[tuple[int, LayerStatistics]]:
    """Each layer's statistics in turn, of windows (N, T) int64: all go through block 0, then through block 1, ...

    Whoever changes block i (or puts another in its place) before asking for the next gets the statistics of the later
    ones as the changed network makes them, as Wanda and SparseGPT do. That costs a second run of each block; `frozen`
    saves it where nothing is changed. `weigh`: a token counts by 1 / mean square of the stream that the sub-layer's
    output is added to, which is how much the next norm lets through of an error there: otherwise the few tokens with
    massive activations outvote the text. Hidden states, N x T x C in fp32, stay on the device of `windows`.
    Raises ValueError for windows that do not fit.
    """
    check_windows(model, windows)
    states, shared = first_states(model, windows, batch_size)
    for layer in range(model.config.n_layer):
        yield layer, _observe(model.h[layer], states, shared, batch_size, weigh=weigh, advance=frozen)
        if not frozen:
            _advance(model.h[layer], states, shared, batch_size)


@torch.no_grad()
def first_states(model: GPT, windows: Tensor, batch_size: int) -> tuple[Tensor, AttentionInputs]:
    """The embedded windows (N, T, C), and what all blocks share: plain causal order at positions 0..T-1."""
    device = model.wte.weight.device
    with evaluating(model):
        rows = [model._embed(rows.to(device), None)[0].float().to(windows.device) for rows in windows.split(batch_size)]
    return torch.cat(rows), AttentionInputs(model._rope_tables(windows[:1].to(device), None))


@torch.no_grad()
def _observe(
    block: nn.Module, states: Tensor, shared: AttentionInputs, batch_size: int, *, weigh: bool, advance: bool
) -> LayerStatistics:
    """Runs every state (N, T, C) through the block and sums up its inputs; `advance`: states become its outputs."""
    assert isinstance(block, Block)
    sums: dict[str, _Moments] = {}
    seen: dict[str, Tensor] = {}
    cosines = 0.0
    with contextlib.ExitStack() as handles, evaluating(block):
        for name in ("ln_2", *(_READER[site] for site in SITES)):
            if getattr(block, name.partition(".")[0]) is not None:
                module = block.get_submodule(name)
                handles.callback(module.register_forward_pre_hook(_keep_input(seen, name)).remove)
        for rows in states.split(batch_size):  # views: writing to them changes `states`
            before = _to_block(block, rows)
            after = block(before, shared)
            cosines += float(F.cosine_similarity(before.float(), after.float(), dim=-1).sum())
            middle = seen.pop("ln_2", after)  # the stream behind the attention
            for site in SITES:
                if _READER[site] in seen:
                    behind = middle if site.startswith("attn") else after
                    sums.setdefault(site, _Moments()).add(seen.pop(_READER[site]), behind if weigh else None)
            if advance:
                rows.copy_(after)
    influence = 1 - cosines / states[..., 0].numel()
    found = {site: sums[site].finish() if site in sums else None for site in SITES}
    return LayerStatistics(**found, influence=influence)


@torch.no_grad()
def _advance(block: nn.Module, states: Tensor, shared: AttentionInputs, batch_size: int) -> None:
    """Replaces states (N, T, C) by the block's outputs."""
    with evaluating(block):
        for rows in states.split(batch_size):
            rows.copy_(block(_to_block(block, rows), shared))


def _keep_input(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0]

    return hook


class _Moments:
    """Sums of x and x x^T. A batch's products are added in place, in fp32: no second (d, d) array is made.

    The sums of squares have one sign, and every entry is summed in blocks by BLAS and then over batches, so that the
    relative error stays near 1e-6 (measured against fp64 in the tests); least squares damps by 1e-2.
    """

    def __init__(self) -> None:
        self.second: Tensor | None = None
        self.first: Tensor | None = None
        self.weight = 0.0
        self.tokens = 0

    def add(self, x: Tensor, behind: Tensor | None = None) -> None:
        """x (B, T, d); a token counts by 1 / mean square of the stream `behind` (B, T, C), or each the same."""
        x = x.flatten(0, -2).float()  # (B T, d)
        scaled, weights = x, x.new_ones(len(x), 1)
        if behind is not None:
            weights = 1 / behind.flatten(0, -2).float().square().mean(dim=1, keepdim=True).clamp_min(1e-12)
            scaled = x * weights
        if self.second is None or self.first is None:
            self.second, self.first = x.new_zeros(x.size(1), x.size(1)), x.new_zeros(x.size(1))
        self.second.addmm_(scaled.t(), x)
        self.first += scaled.sum(dim=0)
        self.weight += float(weights.sum())
        self.tokens += len(x)

    def finish(self) -> Site:
        """The moments as means over all that was added; the sums become the means, nothing can be added after."""
        assert self.second is not None and self.first is not None
        return Site(self.second.div_(self.weight), self.first / self.weight, self.tokens)


@dataclass
class Gradients:
    """Second moments of the loss's gradient, at the outputs of linear layers and at gates on their inputs.

    A gate multiplies one input column c of o_proj or down_proj by 1 in every token; its gradient in a window is
    sum over the window's tokens of a_c dL/da_c. |sum over windows| is the first-order (Taylor) change of the loss when
    the column goes, the sum over windows of squares the diagonal of its Fisher matrix.
    """

    output: dict[str, Tensor] = field(default_factory=dict)  # "h.0.attn.q_proj": (out,), mean of (dL/dy)^2 over tokens
    gate: dict[str, Tensor] = field(default_factory=dict)  # "h.0.attn_out", "h.0.mlp_out": (windows, in)


def gradients(model: GPT, windows: Tensor, *, batch_size: int = 1) -> Gradients:
    """Gradients of L, the summed cross entropy of the next tokens in windows (N, T) int64. Model and its grads stay.

    Forward keeps the inputs of the blocks only (n_layer x B x T x C), backward runs one block at a time; the gradient
    of no weight is ever made, let alone kept (LLM-Pruner keeps them all, and runs out of 40 GB with 7B).
    The batch size changes the result by rounding only. Raises ValueError for windows that do not fit.
    """
    check_windows(model, windows)
    found = Gradients()
    gates: dict[str, list[Tensor]] = {}
    device = model.wte.weight.device
    with evaluating(model):
        for rows in windows.split(batch_size):
            inputs, shared = _block_inputs(model, rows.to(device))
            grad = _grad_of_last(model, inputs.pop(), rows.to(device))
            for i in reversed(range(model.config.n_layer)):
                grad = _through_block(model.h[i], f"h.{i}.", inputs.pop(), grad, shared, found.output, gates)
    for square_sum in found.output.values():
        square_sum /= windows.numel()
    found.gate = {site: torch.cat(parts) for site, parts in gates.items()}
    return found


@torch.no_grad()
def _block_inputs(model: GPT, idx: Tensor) -> tuple[list[Tensor], AttentionInputs]:
    """The stream (B, T, C) before each block, and after the last."""
    states = [model._embed(idx, None)[0]]
    shared = AttentionInputs(model._rope_tables(idx, None))
    for block in model.h:
        states.append(block(states[-1], shared))
    return states, shared


def _grad_of_last(model: GPT, state: Tensor, idx: Tensor) -> Tensor:
    """dL / d(stream after the last block), (B, T, C), for idx (B, T)."""
    targets = F.pad(idx[:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, T)
    with torch.enable_grad():
        state = state.detach().requires_grad_()
        hidden = model.ln_f(state).flatten(0, 1)  # (B T, C)
        loss = linear_cross_entropy_sum(hidden, model.head_weight.detach(), targets.flatten(), model.config.vocab_size)
        return torch.autograd.grad(loss, state)[0]


def _through_block(
    block: nn.Module,
    prefix: str,
    state: Tensor,
    grad: Tensor,
    shared: AttentionInputs,
    output: dict[str, Tensor],
    gates: dict[str, list[Tensor]],
) -> Tensor:
    """dL / d(input) of a block from dL / d(output), both (B, T, C); adds to `output` and `gates` on the way."""
    seen: dict[str, Tensor] = {}
    with contextlib.ExitStack() as handles, torch.enable_grad():
        for name, module in block.named_modules():
            if name in SITE_OF:
                handles.callback(module.register_forward_hook(_remember(seen, name)).remove)
        state = state.detach().requires_grad_()
        y = block(state, shared)
    names = list(seen)
    # Asked for by name: autograd then makes these gradients and no weight's.
    grads = torch.autograd.grad(y, [state, *(seen[name] for name in names)], grad)
    for name, d in zip(names, grads[1:]):
        if name in SITE_OF:
            total = d.float().square().sum(dim=(0, 1))  # (out,)
            output[prefix + name] = output.get(prefix + name, 0) + total
        else:
            product = (seen[name].detach().float() * d.float()).sum(dim=1)  # (B, in)
            gates.setdefault(prefix + name, []).append(product)
    return grads[0]


def _remember(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A forward hook that keeps a layer's output, and the input of o_proj and down_proj under the site's name."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = output
        if SITE_OF[name].endswith("_out"):
            seen[SITE_OF[name]] = args[0]

    return hook


def check_windows(model: GPT, windows: Tensor) -> None:
    """ValueError where windows (N, T) do not fit the model."""
    if model.prompt is not None:
        raise ValueError("the model has a trained prompt in front of its texts: prune it without, then train one")
    if windows.dim() != 2 or not len(windows) or not 2 <= windows.size(1) <= model.config.block_size:
        raise ValueError(
            f"calibration windows are {tuple(windows.shape)}: give (N, T) with N >= 1 and T from 2 to "
            f"{model.config.block_size}, the model's context"
        )


def _to_block(block: nn.Module, rows: Tensor) -> Tensor:
    """rows (B, T, C) on the block's device, in its dtype; a block without parameters takes them as they are."""
    like = next(block.parameters(), rows)
    return rows.to(like.device, like.dtype)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout); the mode before is put back."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
