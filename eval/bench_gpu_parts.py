"""What ``bench_gpu`` measures: every part yields its rows as it finds them.

    python -m quantkit.eval.bench_gpu_parts PART WHICH DEVICE SECONDS FILE

writes them to FILE, a line of JSON each.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.eval import bench_decode, bench_gpu_gemlite, bench_gpu_inputs, bench_kernels, bench_kv_gpu
from quantkit.eval.bench_kernels import parse_schemes, parse_shapes, random_layer
from quantkit.eval.harness import Candidate, compare, copies_past_the_cache
from quantkit.formats.layer import LayerInputs, stored_bytes
from quantkit.kernels import dispatch
from quantkit.kernels.triton import fused, heads, integer
from quantkit.layers.quant_linear import QuantLinear
from quantkit.recipe import ActivationScheme

Rows = Iterator[dict[str, Any]]
Kernel = Callable[[Tensor], object]

SHAPES = {
    "Llama-3-8B": "28672x4096,4096x4096,6144x4096,4096x14336",
    "Qwen3-0.6B": "4096x1024,1024x2048,6144x1024,1024x3072",
    "Llama-3-70B": "57344x8192,10240x8192,8192x8192,8192x28672",
}
"""Gate and up together; q, k and v together; o; down. Of the first model those that targets are about come first."""
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
INTEGER_ROWS = (1, 16, 64, 256, 512, 1024, 4096)
SCHEMES = "W4A16G128,W8A16,W2A16G128,W8A8,W4A8,W4A8G128,W3A16G128,WNF4A16G64,W3A8,W4A4"
CHANGED = "W8A8+kronecker,W4A16G128+hadamard"
"""Inputs are multiplied by a matrix first: only errors of these are measured, by kernels of their own."""
_INPUTS = "inputs"
FEW_SCHEMES = "W4A16G128,W8A8"
"""Of all models but the first."""
MODEL_SHAPES = "4096x4096,1024x4096,14336x4096,4096x14336"
MODEL_ROWS = (1, 127, 2048)
"""Of the linears that ``models`` runs."""
AWKWARD = ((300, 520), (1000, 1048))
AWKWARD_ROWS = (1, 5, 16, 33, 65, 300)
TOLERANCE = 2e-2
"""Of bfloat16 outputs, relative to the norm."""
COPIED = 2**30
"""Bytes of the copy that bandwidth is measured by."""
TOKENS = (2048, 1)
"""Of a prompt and of a decoding step, where kernels of activations are timed."""
WIDTHS = (4096, 14336)
PROMPT, STEPS = 2048, 32
"""Tokens that ``models`` reads at once, and makes one after another."""
_ROUNDS = 10
_CALLS = 40
"""Of a CUDA graph, at least: what starting it takes is divided among them."""
_MOST_COPIES = 32
"""Of an input that is small: in a model, too, the kernel before has left it in a cache."""
_DTYPE = torch.bfloat16
_HEAD = 128
"""Numbers of a head."""


class Part(NamedTuple):
    """One kind of figures."""

    run: Callable[[torch.device, str, float], Rows]
    """(device, one of ``over``, seconds after which it should begin nothing new)"""
    share: float
    """Of the time of all parts."""
    over: tuple[str, ...] = ("",)
    """What it is run for, in processes side by side."""


def bandwidth(device: torch.device, which: str, seconds: float) -> Rows:
    """Bytes per second that a large copy reads and writes."""
    yield {"bytes_per_second": _bandwidth(device)}


def _bandwidth(device: torch.device) -> float:
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / compare({"copy": lambda _: target.copy_(source)}, device)["copy"].median


def attempt(device: torch.device, what: str, rows: Rows) -> Rows:
    """``rows``; where making them fails, a row that says so ends them, and what comes behind goes on."""
    try:
        yield from rows
    except Exception as error:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a GPU whose state is broken fails here again, and the process ends
        yield {"failed": what, "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def errors(device: torch.device, scheme: str, seconds: float) -> Rows:
    """Relative errors, Frobenius norm, of every kernel that takes a layer of ``scheme``.

    Then all that the other parts will launch for it is launched once: Triton compiles on one core, here on many.

    ``inputs`` in the place of a scheme: the kernels of ``bench_gpu_inputs``.
    """
    if scheme == _INPUTS:
        for name, shape, find in bench_gpu_inputs.errors(device):
            yield from attempt(device, f"{name} {shape}", _input_error(name, shape, find))
        return
    for shape in AWKWARD:
        for row in dispatch.IMPLEMENTATIONS:
            yield from attempt(device, f"{scheme} {shape} {row.name}", _errors(device, scheme, shape, row))
    linears_of_models = [_Case("", shape, scheme, MODEL_ROWS) for shape in parse_shapes(MODEL_SHAPES)]
    for case in (case for case in (*_cases(), *linears_of_models) if case.scheme == scheme):
        yield from attempt(device, f"first call of {scheme} {case.shape}", _launched(device, case))


def _input_error(name: str, shape: tuple[int, ...], find: Callable[[], float]) -> Rows:
    error = find()
    yield {"scheme": _INPUTS, "shape": shape, "implementation": name, "error": error, "right": error < TOLERANCE}


def _errors(device: torch.device, scheme: str, shape: tuple[int, int], row: dispatch.Implementation) -> Rows:
    layer = _layer(scheme, shape, device)
    if row.refuses(layer, device) is not None:
        return
    weight = layer.double().dequantize()
    layer = layer.to(_DTYPE)
    packed = row.layout.pack(layer) if row.layout else None
    for count in (count for count in AWKWARD_ROWS if count in row.rows):
        x = torch.randn(count, shape[1], dtype=_DTYPE, device=device)
        want = F.linear(layer.changed_input(x).double(), weight)
        error = float((row.run(x, layer, packed).double() - want).norm() / want.norm())
        yield {
            "scheme": scheme,
            "shape": shape,
            "rows": count,
            "implementation": row.name,
            "error": error,
            "right": error < TOLERANCE,
        }


@torch.inference_mode()
def _launched(device: torch.device, case: _Case) -> Rows:
    """No rows: every kernel in a layout of its own, once."""
    layer = _layer(case.scheme, case.shape, device)
    for row in dispatch.IMPLEMENTATIONS:
        if row.layout is not None and row.refuses(layer, device) is None:
            packed = row.layout.pack(layer)
            for count in (count for count in case.rows if count in row.rows):
                row.run(torch.zeros(count, case.shape[1], dtype=_DTYPE, device=device), layer, packed)
    return iter(())


class _Case(NamedTuple):
    model: str
    shape: tuple[int, int]
    scheme: str
    rows: tuple[int, ...]


def _cases() -> Iterator[_Case]:
    """What ``linears`` times, what matters most first: there may not be time for all."""
    first, *others = SHAPES
    for model, schemes in ((first, SCHEMES), *((model, FEW_SCHEMES) for model in others)):
        for shape in parse_shapes(SHAPES[model]):
            for scheme, wanted in parse_schemes(schemes).items():
                yield _Case(model, shape, scheme, INTEGER_ROWS if wanted.layer.activations else ROWS)


def linears(device: torch.device, which: str, seconds: float) -> Rows:
    """Medians, speed against the dense product, and the share of the bandwidth."""
    end, speed = time.monotonic() + seconds, _bandwidth(device)
    for case in _cases():
        for line in attempt(device, f"{case.model} {case.shape} {case.scheme}", _linear(device, case, speed)):
            yield line
            if time.monotonic() > end:
                return


def _linear(device: torch.device, case: _Case, speed: float) -> Rows:
    wanted, cache = parse_schemes(case.scheme), cache_bytes(device)
    nbytes = stored_bytes(wanted[case.scheme].layer, *case.shape, _DTYPE)
    found = bench_kernels.bench(
        [case.shape], wanted, case.rows, _DTYPE, device,
        rounds=_ROUNDS, cache_bytes=cache, graph_calls=max(_CALLS, copies_past_the_cache(nbytes, cache)),
        without_reference=True,
    )  # fmt: skip
    for line in (line for rows in found for line in bench_kernels.report(rows)):
        read = 2 * case.shape[0] * case.shape[1] if line["implementation"] == bench_kernels.DENSE else nbytes
        yield {"model": case.model, **line, "percent": 100 * read / line["seconds"] / speed}


def activations(device: torch.device, which: str, seconds: float) -> Rows:
    """What is done to inputs; ``ratio``: its time over that of what it is measured against."""
    for shape in parse_shapes(SHAPES["Llama-3-8B"]):
        yield from attempt(device, f"product {shape}", _against_product(TOKENS[0], shape, device))
    for rows in TOKENS:
        for columns in WIDTHS:
            for kernel in _KERNELS:
                what = f"{kernel}, {rows} x {columns}"
                yield from attempt(device, what, _against_copy(kernel, rows, columns, device))


@torch.inference_mode()
def _against_product(rows: int, shape: tuple[int, int], device: torch.device) -> Rows:
    """The Kronecker product in front of a linear against the product of its codes with the weight."""
    x, first = _inputs(rows, shape[1], device), _layer("W4A4+kronecker", shape, device)
    codes = first.input_codes(x[0])
    copies = copies_past_the_cache(stored_bytes(first.format, *shape, _DTYPE), cache_bytes(device))
    packed = [integer.pack(first), *(integer.pack(_layer("W4A4", shape, device)) for _ in range(copies - 1))]

    def product(number: int) -> Tensor:
        weight = packed[number % len(packed)]
        assert weight is not None
        return integer.multiply(codes, weight, None, _DTYPE)

    row = {"kernel": "kronecker + quantise", "rows": rows, "columns": shape[1]}
    yield row | _ratio(partial(_called, first.input_codes, x), f"product {shape[0]}x{shape[1]}", product, device)


@torch.inference_mode()
def _against_copy(kernel: str, rows: int, columns: int, device: torch.device) -> Rows:
    """A kernel of inputs [rows, columns] against a copy that reads and writes as many bytes."""
    x = _inputs(rows, columns, device)
    make, moved = _KERNELS[kernel]
    copy = _copy(int(moved * x[0].nbytes), device)
    row = {"kernel": kernel, "rows": rows, "columns": columns}
    yield row | _ratio(partial(_called, make(columns, device), x), "copy", copy, device)


def _quantise(columns: int, device: torch.device) -> Kernel:
    return _layer("W8A8", (16, columns), device).input_codes


def _kronecker(columns: int, device: torch.device) -> Kernel:
    return _layer("W4A4+kronecker", (16, columns), device).input_codes


def _hadamard(columns: int, device: torch.device) -> Kernel:
    return partial(_layer("W4A16G128+hadamard", (16, columns), device).changed_input, kernels=device.type == "cuda")


def _norm(columns: int, device: torch.device) -> Kernel:
    norm = fused.Norm("llama", torch.ones(columns, dtype=_DTYPE, device=device), None, 1e-6)
    return lambda x: fused.norm_quantize(x, norm, LayerInputs(), ActivationScheme(bits=8))


def _gated(columns: int, device: torch.device) -> Kernel:
    return lambda x: fused.gated_quantize(x, x, "silu", LayerInputs(), ActivationScheme(bits=8))


def _turned(columns: int, device: torch.device) -> Kernel:
    matrix = heads.matrix_of(torch.eye(_HEAD, dtype=torch.float64, device=device), _DTYPE)
    return lambda x: heads.multiply(_heads(x), matrix)


def _encoded(columns: int, device: torch.device) -> Kernel:
    return lambda x: heads.encode(_heads(x), 4, False, 1.0, 1.0)


def _heads(x: Tensor) -> Tensor:
    """[1, heads, rows, _HEAD] as attention hands keys to a cache."""
    return x.view(1, len(x), -1, _HEAD).transpose(1, 2)


_KERNELS: dict[str, tuple[Callable[[int, torch.device], Kernel], float]] = {
    "quantise": (_quantise, 1.5),
    "hadamard": (_hadamard, 2.0),
    "kronecker + quantise": (_kronecker, 1.5),
    "norm + quantise": (_norm, 1.5),
    "silu(x) * x + quantise": (_gated, 1.5),
    "heads @ matrix": (_turned, 2.0),
    "heads to 4 bits": (_encoded, 1.27),
}
"""Name -> what makes the kernel for inputs of some width; bytes that it moves, of those of its input: this is read, and
codes, or as much again, are written."""


def _ratio(run: Candidate, other: str, against: Candidate, device: torch.device) -> dict[str, Any]:
    timings = compare({"": run, other: against}, device, rounds=_ROUNDS, graph_calls=_CALLS)
    mine, its = timings[""].median, timings[other].median
    return {"seconds": mine, "against": other, "its seconds": its, "ratio": mine / its}


def _layer(scheme: str, shape: tuple[int, int], device: torch.device) -> QuantLinear:
    (wanted,) = parse_schemes(scheme).values()
    return random_layer(wanted, *shape, _DTYPE, device)


def _inputs(rows: int, columns: int, device: torch.device) -> list[Tensor]:
    shape = (_copies(rows * columns * _DTYPE.itemsize, device), rows, columns)
    return list(torch.randn(shape, dtype=_DTYPE, device=device))


def _copy(nbytes: int, device: torch.device) -> Candidate:
    """A copy that reads and writes ``nbytes`` together, from another place each time, as ``_inputs`` are."""
    sources = torch.empty(_copies(nbytes // 2, device), nbytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(sources[0])
    return lambda number: target.copy_(sources[number % len(sources)])


def _copies(nbytes: int, device: torch.device) -> int:
    return min(_MOST_COPIES, copies_past_the_cache(nbytes, cache_bytes(device)))


def _called(make: Kernel, x: list[Tensor], number: int) -> object:
    return make(x[number % len(x)])


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before the memory."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def models(device: torch.device, which: str, seconds: float) -> Rows:
    """Decoding at batch 1, and a prompt."""
    end = time.monotonic() + seconds
    for scheme in ("W4A16G128", "W8A8", "W4A4+kronecker"):  # two models in memory at a time
        yield from attempt(device, scheme, _model(device, scheme))
        if time.monotonic() > end:
            return
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _model(device: torch.device, scheme: str) -> Rows:
    rows = bench_decode.bench(
        "llama-3-8b", parse_schemes(scheme), _DTYPE, device, prompt=128, tokens=STEPS, prefill=PROMPT, rounds=5
    )
    return (line | {"against": scheme} for line in bench_decode.report(rows, 1))


def attention(device: torch.device, which: str, seconds: float) -> Rows:
    """Decoding steps that read a quantised cache."""
    yield from attempt(device, "attention", bench_kv_gpu.attention(device))


def gemlite(device: torch.device, which: str, seconds: float) -> Rows:
    """What ``bench_gpu_gemlite`` finds, on layers of Llama-3-8B."""
    yield from bench_gpu_gemlite.rows(device, parse_shapes(SHAPES["Llama-3-8B"])[:2], cache_bytes(device), seconds)


PARTS: dict[str, Part] = {
    "bandwidth": Part(bandwidth, 15),
    "errors": Part(errors, 130, (*SCHEMES.split(","), *CHANGED.split(","), _INPUTS)),
    "linears": Part(linears, 170),
    "activations": Part(activations, 30),
    "attention": Part(attention, 50),
    "models": Part(models, 80),
    "gemlite": Part(gemlite, 40),
}
"""In the order in which they are measured."""


def main(part: str, which: str, device: str, seconds: str, file: str) -> None:
    """Write the rows of a part to ``file``, each as soon as it is there."""
    with Path(file).open("w", encoding="utf-8") as lines:
        for row in PARTS[part].run(torch.device(device), which, float(seconds)):
            lines.write(json.dumps(row) + "\n")
            lines.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
