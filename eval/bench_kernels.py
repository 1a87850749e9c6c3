"""Every implementation of the quantised linear against a dense ``F.linear``, in one run, on random weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.errors import RecipeError
from quantkit.eval.harness import compare, copies_past_the_cache
from quantkit.formats.layer import InputOp, LayerFormat, LayerInputs, stored_bytes, to_tensors
from quantkit.formats.quantized import QuantizedWeight
from quantkit.kernels import dispatch
from quantkit.kernels.online import kronecker_split
from quantkit.layers.quant_linear import QuantLinear
from quantkit.recipe import Scheme

_OPS: dict[str, InputOp] = {"kronecker": "kronecker", "hadamard": "hadamard"}
DENSE = "dense"
"""What the product with an unquantised weight is called among the implementations."""


class Case(NamedTuple):
    """What is timed together."""

    out_features: int
    in_features: int
    scheme: str
    rows: int


class Row(NamedTuple):
    """One implementation in one case; the median and two percentiles of seconds per call."""

    case: Case
    name: str
    seconds: float
    p20: float
    p80: float
    speedup: float
    """Seconds of the dense product over those of this one."""
    chosen: bool
    """Is it the one that a model would use?"""


class Wanted(NamedTuple):
    """How linears are stored and run, and by what kind of matrix their input is multiplied."""

    layer: LayerFormat
    op: InputOp = "none"

    def inputs(self, in_features: int, dtype: torch.dtype) -> LayerInputs:
        """What is done to an input of ``in_features`` channels; the matrix is orthogonal, the same each time."""
        op, generator = LayerInputs(), torch.Generator().manual_seed(in_features)
        if self.op == "hadamard":
            op = LayerInputs(signs=torch.randint(2, (in_features,), dtype=torch.int8, generator=generator) * 2 - 1)
        elif self.op == "kronecker":
            sizes = kronecker_split(in_features)
            left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q.to(dtype) for n in sizes)
            op = LayerInputs(left=left, right=right)
        activations = self.layer.activations
        if activations is None or activations.dynamic:
            return op
        zero_point = None if activations.symmetric else torch.zeros(1, dtype=torch.int8)
        step = torch.tensor([8 / 2**activations.bits], dtype=dtype)
        return replace(op, static_scale=step, static_zero_point=zero_point)


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """``4096x14336,512x512``: out_features x in_features.

    Raises:
        RecipeError: cannot be read.
    """
    shapes = [_numbers(part.split("x")) for part in text.split(",")]
    if not all(len(shape) == 2 for shape in shapes):
        raise RecipeError(f"--shapes '{text}' cannot be read: write OUTxIN, for example 4096x14336,512x512.")
    return [(out_features, in_features) for out_features, in_features in shapes]


def parse_rows(text: str) -> list[int]:
    """``1,8,128``.

    Raises:
        RecipeError: cannot be read.
    """
    rows = _numbers(text.split(","))
    if not rows:
        raise RecipeError(f"--rows '{text}' cannot be read: write numbers above 0, for example 1,8,128.")
    return rows


def _numbers(parts: list[str]) -> list[int]:
    """Nothing where one of ``parts`` is no number above 0."""
    return [int(part) for part in parts] if all(part.isdecimal() and int(part) for part in parts) else []


def parse_schemes(text: str) -> dict[str, Wanted]:
    """``W4A16G128,W4A4+kronecker`` -> how a linear is stored and run in each.

    Raises:
        RecipeError: cannot be read, or leaves weights as they are.
    """
    formats = {}
    for name in text.split(","):
        before, plus, op = name.partition("+")
        scheme = Scheme.parse(before)
        if plus and op not in _OPS:
            raise RecipeError(f"--schemes: '{name}': behind + there may be {' or '.join(_OPS)}, not '{op}'.")
        if scheme.weights is None:
            raise RecipeError(f"--schemes: '{name}' does not quantise weights; name schemes like W4A16G128 or W8A8.")
        layer = LayerFormat(weights=scheme.weights, activations=scheme.activations)
        formats[name] = Wanted(layer, _OPS[op] if plus else "none")
    return formats


def bench(
    shapes: Sequence[tuple[int, int]],
    schemes: Mapping[str, Wanted],
    rows: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    rounds: int = 30,
    cache_bytes: int = 64 * 2**20,
    graph_calls: int = 0,
    without_reference: bool = False,
) -> Iterator[list[Row]]:
    """Time each case, one list per case: the dense product first, then what takes the layer.

    Args:
        shapes: (out_features, in_features).
        cache_bytes: of the device; weights are kept in so many copies that no round finds them in it.
        graph_calls: as in ``compare``; at least the number of copies, or not all of them have their turn.
        without_reference: do not time the reference where something else takes the layer.
    """
    for shape in shapes:
        copies = copies_past_the_cache(shape[0] * shape[1] * dtype.itemsize, cache_bytes)
        dense = [torch.randn(shape, dtype=dtype, device=device) for _ in range(copies)]
        for name, wanted in schemes.items():
            copies = copies_past_the_cache(stored_bytes(wanted.layer, *shape, dtype), cache_bytes)
            layers = [random_layer(wanted, *shape, dtype, device) for _ in range(copies)]
            runs = _implementations(layers, device)
            if without_reference and len(runs) > 1:
                del runs[dispatch.IMPLEMENTATIONS[-1].name]
            for count in rows:
                x = torch.randn(count, shape[1], dtype=dtype, device=device)
                candidates = {DENSE: partial(_dense, x, dense)} | {
                    implementation: partial(run, x) for implementation, run in runs.items()
                }
                with torch.inference_mode():
                    timings = compare(candidates, device, rounds=rounds, graph_calls=graph_calls)
                chosen, _ = dispatch.explain(layers[0], device, count)
                base = timings[DENSE].median
                yield [
                    Row(Case(*shape, name, count), which, t.median, t.p20, t.p80, base / t.median, which == chosen.name)
                    for which, t in timings.items()
                ]


def _dense(x: Tensor, weights: list[Tensor], number: int) -> Tensor:
    return F.linear(x, weights[number % len(weights)])


def _run(
    row: dispatch.Implementation, layers: list[QuantLinear], packed: list[Any], x: Tensor, number: int
) -> Tensor:  # fmt: skip
    index = number % len(layers)
    return row.run(x, layers[index], packed[index])


def _implementations(layers: list[QuantLinear], device: torch.device) -> dict[str, partial[Tensor]]:
    """Name -> (x, number of the round) -> y of every implementation that takes ``layers``, each in its own layout."""
    able = [row for row in dispatch.IMPLEMENTATIONS if row.refuses(layers[0], device) is None]
    none: list[Any] = [None] * len(layers)
    packed = {layout: [layout.pack(layer) for layer in layers] for layout in {row.layout for row in able} if layout}
    return {row.name: partial(_run, row, layers, packed[row.layout] if row.layout else none) for row in able}


def random_layer(
    wanted: Wanted, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> QuantLinear:
    """A layer with random codes and without bias; its weights have about the size of a model's."""
    inputs = wanted.inputs(in_features, dtype)
    layer_format = wanted.layer.with_inputs(inputs)
    weights = layer_format.weights
    top, groups = 2**weights.bits, layer_format.groups(in_features)
    codes = torch.randint(0, top, (out_features, in_features), dtype=torch.uint8, device=device)
    scale = torch.rand(out_features, groups, device=device).add(0.5).div(in_features**0.5 * top).to(dtype)
    zero_point = None
    if not weights.symmetric:
        zero_point = torch.randint(0, top, (out_features, groups), dtype=torch.uint8, device=device)
    weight = QuantizedWeight(codes, scale, zero_point, weights.bits, weights.group_size, weights.levels)
    layer = QuantLinear(in_features, out_features, False, layer_format, dtype).to(device)
    layer.load_state_dict(to_tensors(weight, layer_format, inputs))
    return layer


def report(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For a JSON file."""
    return [
        {
            "shape": [row.case.out_features, row.case.in_features],
            "scheme": row.case.scheme,
            "rows": row.case.rows,
            "implementation": row.name,
            "seconds": row.seconds,
            "p20": row.p20,
            "p80": row.p80,
            "speedup": row.speedup,
            "chosen": row.chosen,
        }
        for row in rows
    ]
