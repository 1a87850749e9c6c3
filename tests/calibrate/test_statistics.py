"""Running statistics over batches equal plain formulas over all rows, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.calibrate import statistics as module
from quantkit.calibrate.statistics import InputStatistics, Want

ALL: tuple[Want, ...] = ("range", "mean", "tokens", "rows", "hessian", "cross")


def rows(count: int = 23, width: int = 7) -> Tensor:
    """Channels of different size and offset, one of them always 0, one row far out."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(-2, 2, width) + torch.linspace(-5, 5, width)
    x[:, 3] = 0
    x[4] *= -300
    return x


def keys(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(1))


def collected(x: Tensor, *, max_rows: int = 512, sizes: tuple[int, ...] = (), **options: Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], ALL, max_rows=max_rows)
    options = {"tokens": torch.arange(len(x)), "keys": keys(len(x)), "drift": torch.zeros_like(x)} | options
    parts = {name: values.split(list(sizes) or len(x)) for name, values in options.items()}
    for number, part in enumerate(x.split(list(sizes) or len(x))):
        statistics.update(part, **{name: values[number] for name, values in parts.items()})
    return statistics


@pytest.mark.parametrize("sizes", [(), (1, 0, 20, 2)], ids=["at once", "in batches"])
def test_equal_the_formulas(sizes: tuple[int, ...]) -> None:
    x = rows()
    drift = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    found = collected(x, sizes=sizes, drift=drift)
    exact = x.double()
    assert found.tokens == 23
    assert torch.equal(found.minimum, x.amin(dim=0))
    assert torch.equal(found.maximum, x.amax(dim=0))
    assert torch.equal(found.absmax, x.abs().amax(dim=0))
    assert torch.equal(found.token_absmax, x.abs().amax(dim=1))
    torch.testing.assert_close(found.mean, exact.mean(dim=0).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.absmean, exact.abs().mean(dim=0).float(), rtol=1e-6, atol=0)
    for matrix, left in (found.hessian, exact), (found.cross, drift.double()):
        expected = 2 / 23 * left.t() @ exact
        assert matrix.dtype == torch.float32
        torch.testing.assert_close(matrix.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_hessian_is_symmetric_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE", 3)  # 7 channels: two whole tiles and a short one
    statistics = collected(rows())
    statistics._hessian += 1e-4 * torch.randn(7, 7)
    uneven = statistics._hessian.clone()
    assert torch.equal(statistics.hessian, statistics.hessian.t())
    torch.testing.assert_close(statistics.hessian, (uneven + uneven.t()) / 2, rtol=1e-6, atol=0)


def test_hessian_goes_on_after_it_was_read() -> None:
    x = rows()
    statistics = InputStatistics(7, {"hessian"})
    for part in x.split(9):
        statistics.update(part, tokens=torch.arange(len(part)), keys=keys(len(part)))
        assert torch.equal(statistics.hessian, statistics.hessian.t())
    torch.testing.assert_close(statistics.hessian, 2 / 23 * x.t() @ x, rtol=1e-5, atol=1e-2)


def test_only_hessian_and_cross_see_what_is_not_body() -> None:
    x = rows()
    body = torch.ones(23, dtype=torch.bool)
    body[4] = False  # the row far out
    found = collected(x, sizes=(5, 18), body=body)
    plain = collected(x[body])
    for name in "minimum", "maximum", "mean", "absmean", "token_absmax":
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), msg=name)
    assert torch.equal(found.rows, plain.rows)
    assert 4 not in found.row_tokens
    assert found.tokens == 23
    assert torch.equal(found.hessian, collected(x, sizes=(5, 18)).hessian)


class TestSample:
    def test_is_all_rows_while_they_fit(self) -> None:
        found = collected(rows(), sizes=(5, 18))
        assert torch.equal(found.rows, rows())
        assert torch.equal(found.row_tokens, torch.arange(23))

    def test_does_not_depend_on_batches(self) -> None:
        tokens = torch.arange(100, 123)
        one = collected(rows(), max_rows=6, tokens=tokens)
        other = collected(rows(), max_rows=6, tokens=tokens, sizes=(3, 4, 16))
        assert torch.equal(one.row_tokens, other.row_tokens)
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.rows, rows()[one.row_tokens - 100])
        assert len(one.rows) == 6

    def test_is_uniform(self) -> None:
        """Every row is as likely as every other, wherever it stands."""
        generator = torch.Generator().manual_seed(0)
        counts = torch.zeros(20)
        for _ in range(2000):
            found = collected(torch.zeros(20, 1), max_rows=5, sizes=(8, 12), keys=torch.rand(20, generator=generator))
            counts[found.row_tokens] += 1
        # Binomial: mean 500, standard deviation 19.4; the largest of 20 stays within 4 of them.
        assert (counts - 500).abs().max() < 78


class TestQuantiles:
    def test_are_nearest_ranks(self) -> None:
        x = rows()
        found = collected(x)
        for q in 0.0, 0.1, 0.5, 0.99, 1.0:
            expected = torch.quantile(x, q, dim=0, interpolation="nearest")
            torch.testing.assert_close(found.channel_quantile(q), expected)
            assert found.token_quantile(q) == torch.quantile(x.abs().amax(dim=1), q, interpolation="nearest")

    def test_one_token_does_not_decide(self) -> None:
        x = rows()
        without = collected(torch.cat((x[:4], x[5:])))
        found = collected(x)
        assert found.absmax.max() > 40 * without.absmax.max()
        assert found.token_quantile(0.95) <= without.token_quantile(1.0)
        torch.testing.assert_close(found.channel_quantile(0.5), without.channel_quantile(0.5), rtol=0.5, atol=5)


def test_what_was_not_wanted_is_not_there() -> None:
    statistics = InputStatistics(7, {"range"})
    statistics.update(rows(), tokens=torch.arange(23), keys=keys(23))
    for name in "mean", "absmean", "token_absmax", "rows", "row_tokens", "hessian", "cross":
        with pytest.raises(LookupError, match=r"was not collected; collected: \['range'\]"):
            getattr(statistics, name)
    assert statistics._hessian is None
    assert statistics._rows.numel() == 0


def test_an_input_that_no_token_reached() -> None:
    statistics = InputStatistics(7, ALL)
    statistics.update(torch.empty(0, 7), tokens=torch.arange(0), keys=keys(0), drift=torch.empty(0, 7))
    assert statistics.tokens == 0
    for name in "minimum", "maximum", "absmax", "mean", "absmean":
        assert torch.equal(getattr(statistics, name), torch.zeros(7))
    assert torch.equal(statistics.hessian, torch.zeros(7, 7))
    assert torch.equal(statistics.channel_quantile(0.5), torch.zeros(7))
    assert statistics.token_quantile(0.99) == 0
    assert statistics.rows.shape == (0, 7)
