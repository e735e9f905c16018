"""Few rows at a time: another order of the operands, the same product."""

import pytest
import torch
import torch.nn.functional as F

from model.linear import Linear, is_decoding_step, linear


@pytest.mark.parametrize("rows", [*range(1, 18), 31, 32, 33, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_give_the_product_of_many(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    layer = Linear(48, 80, bias=bias)
    x = torch.randn(rows, 48)
    expected = F.linear(x, layer.weight, layer.bias)
    for shaped in (x, x.unsqueeze(1), x.unsqueeze(0), x.repeat(1, 2)[:, :48]):  # the last is not contiguous
        with torch.inference_mode():
            found = layer(shaped)
        assert found.shape == (*shaped.shape[:-1], 80)
        torch.testing.assert_close(found.reshape(rows, 80), expected.detach(), atol=1e-5, rtol=1e-5)


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


def test_an_empty_batch_has_an_empty_product() -> None:
    with torch.inference_mode():
        assert linear(torch.zeros(0, 4), torch.zeros(8, 4)).shape == (0, 8)
