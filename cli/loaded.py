"""What `eval` and `generate` have in common: the options that say which model to load, and the loading."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from quantkit.errors import QuantkitError, RecipeError


class Dtype(StrEnum):
    """What the unquantised part of the model computes in."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="quantised folder, any model folder, hub id, or 'demo'")
]
DtypeOption = Annotated[Dtype, typer.Option(help="dtype to compute in; auto: as stored")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...; auto: all GPUs, else cpu")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def load_model(model: str, dtype: Dtype, device: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """(model, tokenizer), both there, on the device; the libraries keep quiet about it.

    Raises:
        RecipeError: no such device.
        QuantkitError: no such model, a broken one, or one without a tokenizer.
    """
    from quantkit.cli.console import quiet_libraries
    from quantkit.loading import load

    quiet_libraries()
    loaded, tokenizer = load(
        model, device_map=_device_map(device), dtype=dtype.value, trust_remote_code=trust_remote_code
    )
    if tokenizer is None:
        raise QuantkitError(f"{model} has no tokenizer files; copy tokenizer.json and tokenizer_config.json into it.")
    return loaded, tokenizer


def _device_map(device: str) -> str | None:
    """None is the CPU."""
    import torch

    if device == "auto":
        return "auto" if torch.cuda.is_available() else None
    return None if one_device(device) == "cpu" else device


def one_device(device: str) -> str:
    """The name of the device that ``device`` stands for; auto: the first GPU, else the CPU.

    Raises:
        RecipeError: no such device.
    """
    import torch

    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise RecipeError(f"--device '{device}' is no device; use auto, cpu, cuda or cuda:N.") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"--device {device} is not here: torch sees {torch.cuda.device_count()} GPUs; use cpu.")
    return "cpu" if wanted.type == "cpu" else device
