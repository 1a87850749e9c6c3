import pytest
import torch
from torch import Tensor

from quantkit.tuning.losses import Loss, Objective, channel_units, distribution_loss, moments

DISTRIBUTIONS: tuple[Loss, ...] = ("dist_sq_std", "dist_abs_var")
LOSSES: tuple[Loss, ...] = (*DISTRIBUTIONS, "mse", "kl")


def batch(samples: int = 3, tokens: int = 11, channels: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Output, target and mask with padding in front of some samples; channels of very different size."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-1, 1, channels)
    output, target = (torch.randn(samples, tokens, channels, generator=generator) * size for _ in range(2))
    padding = torch.tensor([0, 4, 1])[:samples, None]
    return output, target, torch.arange(tokens)[None] >= padding


def objective(loss: Loss, channels: int = 5, mse_weight: float = 0.0) -> Objective:
    return Objective(loss, mse_weight, torch.ones(channels), torch.tensor(2.0))


def test_the_worked_example():
    target = torch.tensor([[[1.0, 2, 3], [4, 5, 6]]])
    output = torch.tensor([[[1.0, 9, 3], [8, 5, 6]]])
    mask, unit = torch.ones(1, 2, dtype=torch.bool), torch.ones(3)
    assert distribution_loss("dist_abs_var", output, target, mask, unit).item() == pytest.approx(29 / 3)
    deviations = torch.tensor([24.5, 8, 4.5]).sqrt() - 4.5**0.5
    expected = (2**2 + 3.5**2 + deviations.square().sum().item()) / 3
    assert distribution_loss("dist_sq_std", output, target, mask, unit).item() == pytest.approx(expected)
    # Measured by its own unit, a channel counts the same in whatever unit it comes.
    by, unit = torch.tensor([1.0, 10, 0.1]), torch.tensor([3.0, 30, 0.3])
    for loss in DISTRIBUTIONS:
        found = distribution_loss(loss, output * by, target * by, mask, unit).item()
        assert found == pytest.approx(distribution_loss(loss, output, target, mask, torch.full((3,), 3.0)).item(), 1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_is_lost_between_equal_outputs(loss):
    output, _, mask = batch()
    output.requires_grad_()
    losses = objective(loss, mse_weight=1.0).of(output, output.detach().clone(), mask)
    torch.testing.assert_close(losses, torch.zeros(3), rtol=0, atol=1e-6)
    if loss != "kl":  # a softmax does not add up to 1 exactly
        losses.sum().backward()
        assert output.grad is not None
        assert not output.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_order_and_padding_do_not_count(loss):
    output, target, mask = batch()
    found = objective(loss, mse_weight=0.5).of(output, target, mask)
    assert (found > 0).all()
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    permuted = objective(loss, mse_weight=0.5).of(output[:, order], target[:, order], mask[:, order])
    torch.testing.assert_close(permuted, found)
    for sample, length in enumerate(mask.sum(dim=1).tolist()):
        alone = output[sample, -length:][None], target[sample, -length:][None], mask[sample, -length:][None]
        torch.testing.assert_close(objective(loss, mse_weight=0.5).of(*alone)[0], found[sample])
    output[1, :4] = torch.nan
    torch.testing.assert_close(objective(loss, mse_weight=0.5).of(output, target, mask), found)
    nothing = torch.zeros_like(mask)
    assert not objective(loss).of(target, target + 1, nothing).any()


def test_distributions_ignore_which_token_is_which_and_mse_does_not():
    _, target, mask = batch()
    mixed = target.clone()
    mixed[0] = target[0].flip(0)
    distance, mse = objective("dist_sq_std").measure(mixed, target, mask)[0].tolist()
    assert distance == pytest.approx(0, abs=1e-9)
    assert mse == pytest.approx((mixed[0] - target[0]).square().mean().item() / 2.0)
    assert objective("dist_sq_std", mse_weight=3.0).of(mixed, target, mask)[0].item() == pytest.approx(3 * mse, 1e-5)


def test_a_shifted_channel_costs_its_share():
    _, target, mask = batch()
    shifted = target.clone()
    shifted[..., 2] += 0.75
    loss = distribution_loss("dist_abs_var", shifted, target, mask, torch.ones(5))
    torch.testing.assert_close(loss, torch.full((3,), 0.75 / 5), rtol=1e-4, atol=0)


def test_moments_are_those_of_the_tokens_that_count():
    output, _, mask = batch()
    mean, variance = moments(output, mask)
    torch.testing.assert_close(mean[1], output[1, 4:].mean(dim=0))
    torch.testing.assert_close(variance[1], output[1, 4:].var(dim=0))
    one = torch.zeros_like(mask)
    one[:, 3] = True
    mean, variance = moments(output, one)
    assert torch.equal(mean, output[:, 3])
    assert not variance.any()


def test_units_are_standard_deviations_and_never_nothing():
    _, target, mask = batch()
    target[..., 0] = 7.0  # constant
    unit, variance = channel_units([(target[:2], mask[:2]), (target[2:], mask[2:])])
    expected = torch.stack([target[sample][mask[sample]].var(dim=0) for sample in range(3)]).mean(dim=0)
    torch.testing.assert_close(unit[1:], expected[1:].sqrt(), rtol=0.02, atol=0)
    assert variance.item() == pytest.approx(expected.mean().item(), 1e-5)
    assert 0 < unit[0] < unit[1:].max() / 50
    assert all(torch.isfinite(part).all() for part in channel_units([(torch.zeros(1, 3, 2), mask[:1, :3])]))
