"""The interval of a perplexity ratio: what windows share cancels."""

import pytest
import torch

from quantkit.eval.paired import perplexity_ratio


def test_a_constant_difference_has_no_interval():
    nll = torch.rand(20, generator=torch.Generator().manual_seed(0)) * 5
    ratio = perplexity_ratio(nll + 0.1, nll)
    assert ratio.value == pytest.approx(torch.tensor(0.1).exp().item(), rel=1e-6)
    assert ratio.low == pytest.approx(ratio.high, rel=1e-6)
    assert ratio.differs


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(100):
        hard = torch.randn(64, generator=generator) * 2  # differences between windows, far larger than the effect
        covered += perplexity_ratio(hard + 0.02 * torch.randn(64, generator=generator), hard).differs is False
    assert 85 <= covered <= 100


def test_the_same_seed_gives_the_same_interval():
    a, b = torch.randn(2, 30, generator=torch.Generator().manual_seed(2))
    assert perplexity_ratio(a, b) == perplexity_ratio(a, b)
    assert perplexity_ratio(a, b, seed=1) != perplexity_ratio(a, b)


def test_other_windows_are_refused():
    with pytest.raises(ValueError, match="3 and 4 windows"):
        perplexity_ratio(torch.zeros(3), torch.zeros(4))
