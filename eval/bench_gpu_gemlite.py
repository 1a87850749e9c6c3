"""gemlite (github.com/mobiusml/gemlite, Triton kernels by the authors of HQQ) on layers of the same sizes and schemes.

It is no requirement of anything here: where it is not installed, one row says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.eval.bench_kernels import DENSE, parse_schemes, random_layer
from quantkit.eval.harness import compare, copies_past_the_cache
from quantkit.formats.layer import stored_bytes
from quantkit.kernels import dispatch

SCHEMES = ("W4A16G128", "W8A16", "W2A16G128", "W8A8")
ROWS = (1, 4, 16, 64, 256, 1024)
NAME = "gemlite"
OURS = "quantkit"
_CALLS = 40


def rows(
    device: torch.device, shapes: Sequence[tuple[int, int]], cache_bytes: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Medians of gemlite, of what a model of ours would run, and of the dense product, all in one run.

    Args:
        shapes: (out_features, in_features).
        cache_bytes: of the device, which weights are kept out of.
        seconds: nothing begins after them.
    """
    if importlib.util.find_spec(NAME) is None:
        yield {"note": "gemlite is not installed: pip install gemlite"}
        return
    end = time.monotonic() + seconds
    helper = _load(device)
    for shape in shapes:
        for scheme in SCHEMES:
            (wanted,) = parse_schemes(scheme).values()
            copies = copies_past_the_cache(stored_bytes(wanted.layer, *shape, torch.bfloat16), cache_bytes)
            theirs = [_layer(helper, scheme, shape, device) for _ in range(copies)]
            ours = [random_layer(wanted, *shape, torch.bfloat16, device) for _ in range(copies)]
            for layer in ours:
                dispatch.prepare(layer)
            copies = copies_past_the_cache(2 * shape[0] * shape[1], cache_bytes)
            dense = [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(copies)]
            for count in ROWS:
                x = torch.randn(count, shape[1], dtype=torch.bfloat16, device=device)
                candidates = {
                    DENSE: _in_turn([partial(F.linear, weight=weight) for weight in dense], x),
                    NAME: _in_turn(theirs, x),
                    OURS: _in_turn(ours, x),
                }
                with torch.inference_mode():
                    times = compare(candidates, device, rounds=10, graph_calls=max(_CALLS, len(theirs)))
                for name, timing in times.items():
                    speedup = times[DENSE].median / timing.median
                    yield {"shape": shape, "scheme": scheme, "rows": count, "implementation": name,
                           "seconds": timing.median, "speedup": speedup}  # fmt: skip
                if time.monotonic() > end:
                    return


def _in_turn(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Callable[[int], Tensor]:
    return lambda number: layers[number % len(layers)](x)


def _load(device: torch.device) -> Any:
    """gemlite's helpers. Its tables of tiles are found by the name of the GPU, and there is none for an H200, which an
    H100's suits."""
    module = importlib.import_module(NAME)
    table = Path(str(module.__file__)).parent / "configs" / "h100.json"
    if "H200" in torch.cuda.get_device_name(device) and table.exists():
        module.load_config(str(table))
    return importlib.import_module(f"{NAME}.helper")


def _layer(helper: Any, scheme: str, shape: tuple[int, int], device: torch.device) -> Callable[[Tensor], Tensor]:
    """A layer [out_features, in_features] of gemlite with random codes."""
    settings = {"device": str(device), "dtype": torch.bfloat16}
    layer: Callable[[Tensor], Tensor]
    if scheme in ("W8A16", "W8A8"):
        kind = helper.A16W8_INT8 if scheme == "W8A16" else helper.A8W8_int8_dynamic
        codes = torch.randint(-128, 128, shape, dtype=torch.int8, device=device)
        scale = torch.full((shape[0], 1), 1e-3, dtype=torch.bfloat16, device=device)
        layer = kind(**settings).from_weights(codes, scales=scale)
    else:
        kind, bits = (helper.A16W4_HQQ_INT, 4) if scheme == "W4A16G128" else (helper.A16W2_HQQ_INT, 2)
        codes = torch.randint(2**bits, shape, dtype=torch.uint8, device=device)
        scale = torch.full((shape[0], shape[1] // 128), 1e-3, dtype=torch.bfloat16, device=device)
        layer = kind(**settings).from_weights(codes, scale, torch.full_like(scale, 2 ** (bits - 1)))
    return layer
