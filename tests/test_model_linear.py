"""Few rows at a time: another order of the operands, the same product."""

import pytest
import torch
import torch.nn.functional as F

from model import onednn
from model.linear import Linear, is_decoding_step, linear

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.mark.parametrize("rows", [*range(1, 18), 31, 32, 33, 64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out", [80, 32])
@pytest.mark.parametrize(
    "by_onednn", [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_ONEDNN, reason="none"))]
)
def test_few_rows_give_the_product_of_many(
    rows: int, bias: bool, out: int, by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "pays_here", lambda: by_onednn)
    monkeypatch.setattr(onednn, "_after_bags", True)
    torch.manual_seed(rows)
    layer = Linear(48, out, bias=bias)
    x = torch.randn(rows, 48)
    expected = F.linear(x, layer.weight, layer.bias)
    for shaped in (x, x.unsqueeze(1), x.unsqueeze(0), x.repeat(1, 2)[:, :48]):  # the last is not contiguous
        with torch.inference_mode():
            found = layer(shaped)
        assert found.shape == (*shaped.shape[:-1], out)
        torch.testing.assert_close(found.reshape(rows, out), expected.detach(), atol=1e-5, rtol=1e-5)


def test_training_keeps_its_kernel_bit_for_bit() -> None:
    layer, x = Linear(48, 80), torch.randn(3, 48)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_only_few_plain_fp32_rows_on_a_cpu_are_a_decoding_step() -> None:
    assert not is_decoding_step(torch.zeros(2, 16, 4)), "outside inference mode"
    with torch.inference_mode():
        assert is_decoding_step(torch.zeros(2, 16, 4))
        assert not is_decoding_step(torch.zeros(2, 17, 4))
        assert not is_decoding_step(torch.zeros(1, 4, dtype=torch.bfloat16))
        assert not is_decoding_step(torch.zeros(1, 4, device="meta"))


@pytest.mark.parametrize("bags", [False, True])
def test_where_onednn_pays_it_takes_many_rows_and_after_bags_the_one_that_makes_a_longer_one(
    bags: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "pays_here", lambda: True)
    monkeypatch.setattr(onednn, "_after_bags", bags)
    sizes = [(out, rows) for out in (32, 64, 96) for rows in range(33)]
    taken = {(out, rows) for out, rows in sizes if onednn.takes_few(torch.zeros(rows, 64), torch.zeros(out, 64))}
    assert taken == {(out, rows) for out, rows in sizes if rows >= 5} | ({(96, 1)} if bags else set())
    monkeypatch.setattr(onednn, "pays_here", lambda: False)
    assert not onednn.takes_few(torch.zeros(8, 64), torch.zeros(64, 64))


def test_an_empty_batch_has_an_empty_product() -> None:
    with torch.inference_mode():
        assert linear(torch.zeros(0, 4), torch.zeros(8, 4)).shape == (0, 8)
