"""Float32Muon takes torch.optim.Muon's steps, up to that one's bfloat16."""

import pytest
import torch

from training.muon import Float32Muon, orthogonalize

COEFFICIENTS = (3.4445, -4.775, 2.0315)


@pytest.mark.parametrize("shape", [(8, 8), (16, 6), (6, 16)])
def test_it_takes_the_steps_of_torch_muon(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    pairs = [(ours, Float32Muon([ours], **options)), (theirs, torch.optim.Muon([theirs], **options))]
    for _ in range(4):
        gradient = torch.randn(shape)
        for parameter, optimizer in pairs:
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.03 * moved
    states = [optimizer.state[parameter] for parameter, optimizer in pairs]
    assert states[0].keys() == states[1].keys()
    torch.testing.assert_close(states[0]["momentum_buffer"], states[1]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(12, 12), (20, 5), (5, 20)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), COEFFICIENTS, 5))
    assert values.min() > 0.3 and values.max() < 1.3
