"""What is known about one input of linears: a running summary of the rows that entered, float32 [tokens, width].

    hessian = 2/N sum x^T x                          GPTQ (Frantar et al., arXiv 2210.17323)
    cross   = 2/N sum (x_float - x)^T x              GPTAQ (Li et al., arXiv 2504.02692), same N as the Hessian

Only what is wanted is collected. Maxima alone are decided by single tokens with massive activations, so there are
quantiles over tokens beside them: of the tokens' own maxima (all of them are kept: 4 bytes each), and per channel,
from a bounded random sample of rows.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

Want = Literal["range", "mean", "tokens", "rows", "hessian", "cross"]
"""range: minimum, maximum, absmax. mean: mean, absmean. tokens: token_absmax. rows: rows, channel_quantile."""

_TILE = 1024
"""Rows of a Hessian that are made symmetric at a time: no second matrix in memory."""


class InputStatistics:
    """Statistics of one input. Values of an input that no token reached (an expert never chosen) are zeros."""

    def __init__(self, width: int, want: Collection[Want], *, max_rows: int = 512) -> None:
        """
        Args:
            width: K, channels of the input.
            want: what to collect; reading anything else is a ``LookupError``.
            max_rows: size of the sample of rows.
        """
        self.width = width
        self.want = frozenset(want)
        self.tokens = 0
        """Rows seen: of an expert, those routed to it."""
        self._max_rows = max_rows
        self._body_tokens = 0
        self._range: tuple[Tensor, Tensor] | None = None
        self._sums = torch.zeros(2, width, dtype=torch.float64) if "mean" in self.want else None
        self._token_absmax: list[Tensor] = []
        self._rows = torch.empty(0, width)
        self._row_tokens = torch.empty(0, dtype=torch.int64)
        self._row_keys = torch.empty(0)
        self._hessian: Tensor | None = None
        self._cross: Tensor | None = None
        self._symmetric = True

    def update(
        self, x: Tensor, *, tokens: Tensor, keys: Tensor, body: Tensor | None = None, drift: Tensor | None = None
    ) -> None:
        """Take in the rows of one batch.

        Args:
            x: [n, K] float32, finite.
            tokens: [n] int64, which token of the calibration set a row is (sample * tokens per sample + position).
            keys: [n] random; the rows with the largest are the sample of rows.
            body: [n] bool, False for rows that only ``hessian`` and ``cross`` shall see; None: all True.
            drift: [n, K] float32, x_float - x; for ``cross``, which is only right if every batch comes with one.
        """
        if not len(x):
            return
        before, self.tokens = self.tokens, self.tokens + len(x)
        if "hessian" in self.want:
            self._hessian = self._second_moment(self._hessian, x, x, before)
            self._symmetric = False
        if "cross" in self.want and drift is not None:
            self._cross = self._second_moment(self._cross, drift, x, before)
        if body is not None and not body.all():
            x, tokens, keys = x[body], tokens[body], keys[body]
        if not len(x) or not self.want & {"range", "mean", "tokens", "rows"}:
            return
        self._body_tokens += len(x)
        if "range" in self.want:
            low, high = x.amin(dim=0), x.amax(dim=0)
            if self._range is not None:
                low, high = torch.minimum(low, self._range[0]), torch.maximum(high, self._range[1])
            self._range = low, high
        if self._sums is not None:
            self._sums += torch.stack((x.sum(dim=0), x.abs().sum(dim=0)))
        if "tokens" in self.want:
            self._token_absmax.append(torch.linalg.vector_norm(x, torch.inf, dim=1))
        if "rows" in self.want:
            self._sample(x, tokens, keys)

    def _second_moment(self, moment: Tensor | None, left: Tensor, right: Tensor, before: int) -> Tensor:
        """Running mean of 2 left^T right, in place."""
        if moment is None:
            moment = torch.zeros(self.width, self.width)
        return moment.addmm_(left.t(), right, beta=before / self.tokens, alpha=2 / self.tokens)

    def _sample(self, x: Tensor, tokens: Tensor, keys: Tensor) -> None:
        kept = len(self._row_keys)
        merged = torch.cat((self._row_keys, keys))
        chosen = merged.topk(min(self._max_rows, len(merged)), sorted=False).indices
        old, new = chosen[chosen < kept], chosen[chosen >= kept] - kept
        self._row_keys = torch.cat((self._row_keys[old], keys[new]))
        self._row_tokens = torch.cat((self._row_tokens[old], tokens[new]))
        self._rows = torch.cat((self._rows[old], x[new]))

    # --- results -----------------------------------------------------------------------------------------------------

    @property
    def minimum(self) -> Tensor:
        """[K]"""
        self._asked("range")
        return torch.zeros(self.width) if self._range is None else self._range[0]

    @property
    def maximum(self) -> Tensor:
        """[K]"""
        self._asked("range")
        return torch.zeros(self.width) if self._range is None else self._range[1]

    @property
    def absmax(self) -> Tensor:
        """[K], max |x|."""
        return torch.maximum(self.maximum, -self.minimum)

    @property
    def mean(self) -> Tensor:
        """[K]"""
        return self._mean(0)

    @property
    def absmean(self) -> Tensor:
        """[K], mean |x|."""
        return self._mean(1)

    @property
    def token_absmax(self) -> Tensor:
        """[tokens], max over channels of |x|, in the order in which the tokens came."""
        self._asked("tokens")
        return torch.cat(self._token_absmax) if self._token_absmax else torch.zeros(1)

    def token_quantile(self, q: float) -> float:
        """The absolute maximum that a share ``q`` of the tokens does not pass (nearest rank)."""
        return float(_quantile(self.token_absmax, q))

    @property
    def rows(self) -> Tensor:
        """[at most max_rows, K], a uniform sample of the rows without replacement, in the order of the tokens.

        Inputs of one ``observe`` sample the same tokens, where all of them saw all tokens.
        """
        self._asked("rows")
        return self._rows[self._row_tokens.argsort()]

    @property
    def row_tokens(self) -> Tensor:
        """[at most max_rows] int64: sample * tokens per sample + position of each of ``rows``."""
        self._asked("rows")
        return self._row_tokens.sort().values

    def channel_quantile(self, q: float) -> Tensor:
        """[K], the value that a share ``q`` of the sampled rows does not pass (nearest rank); 0.5: the median."""
        self._asked("rows")
        return _quantile(self._rows, q) if len(self._rows) else torch.zeros(self.width)

    @property
    def hessian(self) -> Tensor:
        """[K, K], symmetric; shared by all readers, not to be changed."""
        self._asked("hessian")
        if self._hessian is None:
            return torch.zeros(self.width, self.width)
        if not self._symmetric:
            _make_symmetric(self._hessian)
            self._symmetric = True
        return self._hessian

    @property
    def cross(self) -> Tensor:
        """[K, K]; rows index the channels of x_float - x, columns those of x."""
        self._asked("cross")
        return torch.zeros(self.width, self.width) if self._cross is None else self._cross

    def _mean(self, index: int) -> Tensor:
        self._asked("mean")
        assert self._sums is not None
        return (self._sums[index] / max(self._body_tokens, 1)).float()

    def _asked(self, kind: Want) -> None:
        if kind not in self.want:
            raise LookupError(f"'{kind}' of this input was not collected; collected: {sorted(self.want)}")


def _quantile(values: Tensor, q: float) -> Tensor:
    """Nearest rank along dim 0; unlike torch.quantile for any number of values."""
    return values.kthvalue(1 + round(q * (len(values) - 1)), dim=0).values


def _make_symmetric(matrix: Tensor) -> None:
    """In place: the two halves of a product x^T x differ by rounding."""
    for start in range(0, len(matrix), _TILE):
        rows = slice(start, start + _TILE)
        part = (matrix[rows, start:] + matrix[start:, rows].t()) / 2
        matrix[rows, start:] = part
        matrix[start:, rows] = part.t()
