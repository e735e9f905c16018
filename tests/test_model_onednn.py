"""oneDNN's products and gradients against F.linear's, on whatever CPU this is; and where they are used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import onednn
from model.linear import Linear, linear
from model.loss import linear_cross_entropy_sum, linear_distillation_sum
from model.onednn import LEAST_ROWS, pays_here, takes

if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
    pytest.skip("this torch has no oneDNN", allow_module_level=True)

Switch = Callable[[bool], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Switch:
    """use(True): as on a machine where it pays."""
    return lambda yes: monkeypatch.setattr(onednn, "pays_here", lambda: yes)


def both(use: Switch, work: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    use(True)
    ours = work()
    use(False)
    return ours, work()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(16,), (2, 33), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("frozen", ["nothing", "weight", "input"])
def test_values_and_gradients_are_those_of_f_linear(
    use: Switch, shape: tuple[int, ...], bias: bool, frozen: str
) -> None:
    torch.manual_seed(0)
    layer, x, towards = Linear(48, 80, bias=bias), torch.randn(*shape, 48), torch.randn(*shape, 80)
    layer.weight.requires_grad_(frozen != "weight")

    def work() -> list[Tensor]:
        own = x.clone().requires_grad_(frozen != "input")
        layer.zero_grad()
        y = layer(own)
        (y * towards).sum().backward()
        return [y, *(t.grad for t in (own, *layer.parameters()) if t.requires_grad)]  # type: ignore[misc]

    ours, theirs = both(use, work)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_strides_do_not_matter_and_the_bits_repeat(use: Switch) -> None:
    use(True)
    torch.manual_seed(1)
    x, weight = torch.randn(60, 40)[:, ::2], torch.randn(20, 30).t()
    torch.testing.assert_close(linear(x, weight), x @ weight.t(), atol=2e-5, rtol=1e-5)
    assert torch.equal(linear(x, weight), linear(x.contiguous(), weight)) and not x.is_contiguous()


@pytest.mark.parametrize("teacher", [False, True])
def test_the_head_and_its_loss_in_pieces(use: Switch, teacher: bool) -> None:
    torch.manual_seed(2)
    hidden, weight, other = torch.randn(70, 24), torch.randn(128, 24), torch.randn(128, 24)
    targets = torch.randint(120, (70,)).masked_fill(torch.arange(70) % 9 == 0, -100)

    def work() -> list[Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if teacher:
            loss, *_ = linear_distillation_sum(h, w, hidden, other, targets, 120, 0.3, chunk=20)
        else:
            loss = linear_cross_entropy_sum(h, w, targets, 120, chunk=20)
        loss.backward()
        assert h.grad is not None and w.grad is not None
        return [loss.detach(), h.grad, w.grad]

    for one, another in zip(*both(use, work)):
        torch.testing.assert_close(one, another, atol=2e-4, rtol=1e-5)


def test_everything_else_goes_the_old_way(use: Switch) -> None:
    x, weight = torch.zeros(2, LEAST_ROWS // 2, 4), torch.zeros(8, 4)
    use(False)
    assert not takes(x, weight)
    use(True)
    assert takes(x, weight) and takes(x, nn.Parameter(weight))
    assert not takes(x[:, 1:], weight), "few rows"
    assert not takes(torch.zeros(0, 4), weight) and not takes(torch.zeros(16, 0), torch.zeros(8, 0))
    assert not takes(x.double(), weight.double()) and not takes(x.bfloat16(), weight.bfloat16())
    assert not takes(x.bfloat16(), weight) and not takes(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes(x, weight) and linear(x, weight).dtype == torch.bfloat16

    class Shared(Tensor):
        """As what FSDP2 makes of a parameter."""

    assert not takes(x, weight.as_subclass(Shared))
    assert torch.compile(takes, fullgraph=True, backend="eager")(x, weight) is False


@pytest.mark.parametrize(
    ("vendor", "capability", "pays"),
    [
        ("vendor_id\t: AuthenticAMD\n", "AVX512", True),
        ("vendor_id\t: AuthenticAMD\n", "AVX512_VNNI", True),
        ("vendor_id\t: AuthenticAMD\n", "AVX2", False),
        ("vendor_id\t: GenuineIntel\n", "AVX512", False),
        ("", "DEFAULT", False),
    ],
)
def test_it_pays_where_mkl_leaves_the_wide_vectors_alone(
    monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str, pays: bool
) -> None:
    monkeypatch.setattr(onednn, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    pays_here.cache_clear()
    assert pays_here() is pays
    monkeypatch.undo()
    pays_here.cache_clear()


def test_few_rows_in_grad_mode_are_f_linear_to_the_bit(use: Switch) -> None:
    use(True)
    layer, x = Linear(48, 80), torch.randn(LEAST_ROWS - 1, 48)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_what_comes_out_may_be_written_to(use: Switch) -> None:
    """As the logits of ids that do not exist are: a view from inside an autograd function would refuse it."""
    use(True)
    layer, x = Linear(8, 6), torch.randn(2, LEAST_ROWS, 8)
    y = layer(x)
    y[..., 4:] = 0.0
    y.sum().backward()
    assert layer.weight.grad is not None and not layer.weight.grad[4:].any() and layer.weight.grad[:4].any()
