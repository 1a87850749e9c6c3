"""Multiplication by a Walsh-Hadamard matrix of any size.

    H @ H.T = n I        H [n, n], entries +-1

n is split into base * 2**b. Sylvester's doubling [[H, H], [H, -H]] makes the power of two, so that H is the Kronecker
product of the base's matrix and b factors [[1, 1], [1, -1]], which are applied a few at a time. The base is 1 or a
multiple of 4, made from the quadratic character chi of a finite field of q elements (Paley 1933):

    I,  q = 3 mod 4, order q + 1:         I + [[0, 1], [-1, Q]]                                    Q_ij = chi(a_i - a_j)
    II, q = 1 mod 4, order 2 * (q + 1):   C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]      C = [[0, 1], [1, Q]]

Where neither gives a base, the odd part of n gets the Hartley matrix cos(2 pi jk / m) + sin(2 pi jk / m): orthogonal
for every size, its largest entry sqrt(2) instead of 1.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_FACTOR_BITS = 5
"""Factors [[1, 1], [1, -1]] that are applied together as one matrix product. It takes more operations than additions
one by one and less time (128 tokens of 4096 on one core: 1.1 ms against 35): those pass over memory each time."""
_LARGEST_BASE = 1024
"""Of a Paley matrix, which is applied as it stands; sizes without a smaller one get the Hartley matrix."""


class Split(NamedTuple):
    """n = base * power."""

    base: int
    kind: Literal["one", "paley", "hartley"]
    """The matrix of the base."""
    power: int
    """2**b."""

    @property
    def operations(self) -> int:
        """Additions and multiplications of one transform, if powers of two are done by additions alone."""
        size = self.base * self.power
        doubling = size * (self.power.bit_length() - 1)
        if self.kind == "hartley":  # by a fast Fourier transform of complex numbers
            return doubling + 5 * size * self.base.bit_length()
        return doubling + (2 * size * self.base if self.kind == "paley" else 0)


@lru_cache(maxsize=256)
def split(size: int) -> Split:
    """The smallest base for ``size`` >= 1."""
    power = size & -size
    odd = size // power
    if odd == 1:
        return Split(1, "one", power)
    order = 4 * odd
    while size % order == 0 and order <= _LARGEST_BASE:
        if _field_of(order):
            return Split(order, "paley", size // order)
        order *= 2
    return Split(odd, "hartley", power)


def multiply(x: Tensor, transpose: bool = False) -> Tensor:
    """H @ v for every vector v of the last dimension of ``x`` [..., n], in the dtype of ``x``; exact for integers.

    Args:
        x: float32 or float64.
        transpose: H.T @ v instead, which undoes it up to the factor n.
    """
    found = split(x.shape[-1])
    y = _doubled(x.unflatten(-1, (found.base, found.power)))
    if found.kind == "paley":
        base = _matrix(found.base, x.dtype, x.device)
        y = (base.mT if transpose else base) @ y
    elif found.kind == "hartley":  # symmetric
        spectrum = torch.fft.fft(y, dim=-2)
        y = spectrum.real - spectrum.imag
    return y.flatten(-2)


def _doubled(x: Tensor) -> Tensor:
    """Sylvester's matrix times the last dimension [..., 2**b]; it is symmetric."""
    shape, after = x.shape, x.shape[-1]
    bits = after.bit_length() - 1
    steps = -(-bits // _FACTOR_BITS)
    for step in range(steps):
        width = 2 ** ((bits + step) // steps)
        after //= width
        factor = _matrix(width, x.dtype, x.device)
        if after == 1:
            x = (x.unflatten(-1, (-1, width)) @ factor).reshape(shape)
        else:
            x = (factor @ x.unflatten(-1, (-1, width, after))).reshape(shape)
    return x


@torch.compiler.assume_constant_result  # else the construction becomes a part of what is compiled
def _matrix(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _made(order, dtype, device)


@lru_cache(maxsize=64)
def _made(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Not an inference tensor: gradients are taken through products with it.
    with torch.inference_mode(False):
        return (paley(order) if order & (order - 1) else sylvester(order)).to(device, dtype)


def sylvester(order: int) -> Tensor:
    """The Hadamard matrix int8 [order, order] of a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def paley(order: int) -> Tensor:
    """The Hadamard matrix int8 [order, order] of Paley's constructions.

    Raises:
        ValueError: neither gives this order.
    """
    field = _field_of(order)
    if field is None:
        raise ValueError(f"Paley's constructions give no Hadamard matrix of order {order}")
    character = _quadratic_character(*field)
    count = len(character) + 1
    bordered = torch.ones(count, count, dtype=torch.int8)
    bordered[0, 0] = 0
    bordered[1:, 1:] = character
    identity = torch.eye(count, dtype=torch.int8)
    if count == order:
        bordered[1:, 0] = -1
        return bordered + identity
    two = torch.ones(2, 2, dtype=torch.int8)
    off, on = two.clone(), -two
    off[1, 1], on[0, 0] = -1, 1
    return torch.kron(bordered, off) + torch.kron(identity, on)


def _field_of(order: int) -> tuple[int, int] | None:
    """(p, k) of the field of p**k elements that gives a Hadamard matrix of ``order``."""
    for size, rest in ((order - 1, 3), (order // 2 - 1, 1)):
        field = _prime_power(size)
        if field and order % 4 == 0 and size % 4 == rest:
            return field
    return None


def _prime_power(number: int) -> tuple[int, int] | None:
    """(p, k) with p**k = ``number``, p an odd prime."""
    prime = next((p for p in range(2, number + 1) if number % p == 0), 2)
    power = 0
    while number % prime == 0 and number > 1:
        number, power = number // prime, power + 1
    return (prime, power) if number == 1 and power and prime > 2 else None


def _quadratic_character(p: int, k: int) -> Tensor:
    """int8 [q, q]: chi(a_i - a_j) in the field of q = p**k elements; 1 for squares, -1 for others, 0 for 0.

    Elements are polynomials of degree < k over the integers modulo p, modulo an irreducible one of degree k.
    """
    place = p ** torch.arange(k)
    digits = torch.arange(p**k)[:, None] // place % p  # [q, k], the coefficient of 1 first
    for lower in product(range(p), repeat=k):
        squares = (_squared(digits, torch.tensor(lower), p) * place).sum(1)
        values = torch.full((p**k,), -1, dtype=torch.int8)
        values[squares] = 1
        values[0] = 0
        # Half of a field's elements are squares and nothing but 0 has the square 0; modulo a polynomial with factors
        # a square has more roots than two.
        if (values == 1).sum() == p**k // 2:
            break
    differences = (digits[:, None] - digits[None]) % p
    return values[(differences * place).sum(-1)]


def _squared(digits: Tensor, lower: Tensor, p: int) -> Tensor:
    """Squares of polynomials ``digits`` [q, k] modulo x**k + sum of ``lower`` [k] * x**i."""
    count, k = digits.shape
    result = digits.new_zeros(count, 2 * k - 1)
    for i in range(k):
        result[:, i : i + k] += digits[:, i : i + 1] * digits
    for i in range(2 * k - 2, k - 1, -1):
        result[:, i - k : i] -= result[:, i : i + 1] % p * lower
    return result[:, :k] % p
