"""Which order of hidden units makes blocks that are nearly all important, or nearly all not.

A unit is a residual channel, an MLP channel or a value dimension; it crosses several matrices, each cut into blocks on
its other side too. Units that stand in one group share their blocks. A block costs what all its weights cost when it
goes, and its price, that of the block at the threshold, when it stays in another's place. Orders start from the units'
total importance and are improved by swaps between groups, in turn for each kind of unit, as each order makes the other
kinds' blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import GPTConfig
from model.pruning.permute import Orders, natural_orders


def by_importance(mass: Tensor) -> Tensor:
    """The units of mass (units, blocks on the other side) by their total, the largest first: (units,)."""
    return mass.sum(dim=1).sort(descending=True, stable=True).indices


def objective(mass: Tensor, order: Tensor, size: int, price: Tensor) -> float:
    """What the blocks that `order` makes are expected to lose."""
    return float(_loss(group_sums(mass[order], size), price).sum(dtype=torch.float64))


def _loss(costs: Tensor, price: Tensor) -> Tensor:
    """Summed over the last dimension of the blocks' costs: cost where it is far below the price, price far above it.

    min(cost, price) would be it for a known threshold, but is flat or linear nearly everywhere: no single swap changes
    it, and the search stops where it begins. This is strictly concave, so to concentrate costs always pays.
    """
    return (costs * price / (costs + price)).sum(dim=-1)


def group_sums(mass: Tensor, size: int) -> Tensor:
    """Sums of `size` neighbouring rows of mass (units, K), the last of what is left: (groups, K)."""
    padded = F.pad(mass, (0, 0, 0, -len(mass) % size))
    return padded.view(-1, size, mass.size(1)).sum(dim=1)


def improve(mass: Tensor, order: Tensor, size: int, price: Tensor, sweeps: int, memory: int = 2**18) -> Tensor:
    """`order` (units,) after swaps of two units of different groups, each of which lowers `objective`.

    mass (units, K) is what a unit costs in each of the blocks that it may share. In a sweep each pair of groups is met
    once and makes its best swap; disjoint pairs go together, as in a tournament. A partial last group stays as it is.
    `memory`: numbers made at once.
    """
    groups = len(order) // size
    if groups < 2:
        return order
    device, order = mass.device, order.to(mass.device)
    members = order[: groups * size].clone().view(groups, size)
    sums = mass[members].sum(dim=1)  # (groups, K)
    for _ in range(sweeps):
        swapped = 0
        for left, right in _rounds(groups):
            step = max(1, memory // (size * size * mass.size(1)))
            for some in range(0, len(left), step):
                pairs = left[some : some + step].to(device), right[some : some + step].to(device)
                swapped += _swap_best_(mass, members, sums, *pairs, price)
        if not swapped:
            break
    return torch.cat((members.flatten(), order[groups * size :]))


def _swap_best_(mass: Tensor, members: Tensor, sums: Tensor, left: Tensor, right: Tensor, price: Tensor) -> int:
    """Swaps, for each pair of groups, the two units that gain most; returns in how many pairs there was a gain."""
    a, b = members[left], members[right]  # (P, size)
    change = mass[b].unsqueeze(1) - mass[a].unsqueeze(2)  # (P, size of a, size of b, K): what the left group gains
    after = _loss(sums[left][:, None, None] + change, price)
    after += _loss(sums[right][:, None, None] - change, price)
    before = _loss(sums[left], price) + _loss(sums[right], price)  # (P,)
    best, where = after.flatten(1).min(dim=1)
    pairs = (best < before * (1 - 1e-6)).nonzero().squeeze(1)
    if not len(pairs):
        return 0
    i, j = where[pairs] // b.size(1), where[pairs] % b.size(1)
    moved = mass[b[pairs, j]] - mass[a[pairs, i]]
    sums[left[pairs]] += moved
    sums[right[pairs]] -= moved
    members[left[pairs], i], members[right[pairs], j] = b[pairs, j], a[pairs, i]
    return len(pairs)


def _rounds(groups: int) -> list[tuple[Tensor, Tensor]]:
    """Every pair of groups once, in rounds of disjoint pairs: one group sits still, the others go round it."""
    ring = list(range(groups + groups % 2))  # an odd number gets a partner that does not exist
    rounds = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        pairs = [(a, b) for a, b in zip(ring[:half], reversed(ring[half:])) if max(a, b) < groups]
        rounds.append((torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs])))
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds


Squares = Callable[[int], dict[str, Tensor]]  # layer -> what each weight costs, (out, in) by "attn.q_proj", ...


@torch.no_grad()
def find_orders(
    config: GPTConfig, squares: Squares, size: int, sparsity: float, sweeps: int = 2, turns: int = 2
) -> Orders:
    """Orders of all units of a network for blocks of size x size, of which a share `sparsity` is to go."""
    orders = _sorted_orders(config, squares)
    for _ in range(turns if sweeps else 0):
        price = _price(config, squares, orders, size, sparsity)
        residual = _residual_mass(config, squares, orders, size)
        orders.residual = improve(residual, orders.residual, size, price, sweeps)
        for layer in range(config.n_layer):
            own = squares(layer)
            if len(orders.channels[layer]):
                mass = _channel_mass(own, orders, size)
                orders.channels[layer] = improve(mass, orders.channels[layer], size, price, sweeps)
            for head in range(len(orders.values[layer])):
                mass = _value_mass(own, head, config, layer, orders, size)
                orders.values[layer][head] = improve(mass, orders.values[layer][head], size, price, sweeps)
    return orders


def _sorted_orders(config: GPTConfig, squares: Squares) -> Orders:
    orders = natural_orders(config)
    residual = torch.zeros(config.n_embd)
    for layer in range(config.n_layer):
        own = squares(layer)
        for name, mass in own.items():
            residual += mass.sum(dim=_other_side(name)).cpu()
        if len(orders.channels[layer]):
            orders.channels[layer] = by_importance(_channel_mass(own, orders, 1))
        for head in range(len(orders.values[layer])):
            orders.values[layer][head] = by_importance(_value_mass(own, head, config, layer, orders, 1))
    orders.residual = residual.sort(descending=True, stable=True).indices
    return orders


def _other_side(name: str) -> int:
    """The dimension of a matrix that is not the residual stream's."""
    return 1 if name in ("attn.o_proj", "mlp.down_proj") else 0


def _placed(own: dict[str, Tensor], name: str, layer: int, config: GPTConfig, orders: Orders) -> Tensor:
    """The costs of a matrix as (residual channels in their old order, other units in their new one)."""
    mass = own[name] if _other_side(name) == 1 else own[name].t()
    if name in ("attn.q_proj", "attn.k_proj"):
        return mass
    if name == "attn.v_proj":
        return mass[:, orders.value_rows(layer)]
    if name == "attn.o_proj":
        return mass[:, orders.value_columns(layer, config)]
    return mass[:, orders.channels[layer]]


def _residual_mass(config: GPTConfig, squares: Squares, orders: Orders, size: int) -> Tensor:
    """(C, blocks of all matrices)."""
    parts = []
    for layer in range(config.n_layer):
        own = squares(layer)
        parts += [group_sums(_placed(own, name, layer, config, orders).t(), size).t() for name in own]
    return torch.cat(parts, dim=1)


def _price(config: GPTConfig, squares: Squares, orders: Orders, size: int, sparsity: float) -> Tensor:
    """What the block at the threshold costs."""
    blocks = group_sums(_residual_mass(config, squares, orders, size)[orders.residual], size)
    return blocks.flatten().sort().values[int(sparsity * blocks.numel())]


def _channel_mass(own: dict[str, Tensor], orders: Orders, size: int) -> Tensor:
    """(mlp_dim, blocks of gate, up and down)."""
    names = [name for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj") if name in own]
    both = [own[name] if _other_side(name) == 1 else own[name].t() for name in names]  # (C, mlp_dim) each
    return torch.cat([group_sums(mass[orders.residual], size) for mass in both]).t()


def _value_mass(own: dict[str, Tensor], head: int, config: GPTConfig, layer: int, orders: Orders, size: int) -> Tensor:
    """(head_dim, blocks of v and of the columns of o in each query head that reads it)."""
    sizes = config.layer(layer)
    groups, dim = sizes.n_head // sizes.n_kv_head, sizes.head_dim
    v = own["attn.v_proj"].t()[:, head * dim : (head + 1) * dim]  # (C, head_dim)
    o = own["attn.o_proj"].split(dim, dim=1)[head * groups : (head + 1) * groups]
    return torch.cat([group_sums(mass[orders.residual], size) for mass in (v, *o)]).t()
