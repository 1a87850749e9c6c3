"""What `eval` and `generate` have in common: the options that say which model to load, and the loading."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.errors import QuantkitError, RecipeError

if TYPE_CHECKING:
    from quantkit.kv.cache import KVCache


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
FirstDeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...; auto: the first GPU, else cpu")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")]
KVOption = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="NAME",
        help="how keys and values are kept: kivi-2bit, rotation-3bit, int8, kv4 ... (`quantkit methods` has them all), "
        "none: in full precision  [default: as the checkpoint says]",
    ),
]
KVStreamOption = Annotated[
    bool,
    typer.Option(
        "--kv-stream/--no-kv-stream",
        help="let each token read quantised keys and values as they are held when it comes, as while text is "
        "generated: a call for every packed chunk (kivi: for every token); no: in one pass, as they are held at the "
        "end of a window or question",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def load_model(
    model: str, dtype: Dtype, device: str, trust_remote_code: bool, kv: str | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer), both there, on the device; the libraries keep quiet about it.

    Args:
        kv: of ``KVOption``.

    Raises:
        RecipeError: no such device, or no such cache.
        QuantkitError: no such model, a broken one, one without a tokenizer, or one that cannot have such a cache.
    """
    from quantkit.cli.console import quiet_libraries
    from quantkit.formats.kv import kv_of
    from quantkit.kv.attach import set_kv
    from quantkit.loading import load

    quiet_libraries()
    wanted = None if kv is None else kv_of(kv)  # before the model: a typing error shows at once
    loaded, tokenizer = load(
        model, device_map=_device_map(device), dtype=dtype.value, trust_remote_code=trust_remote_code
    )
    if tokenizer is None:
        raise QuantkitError(f"{model} has no tokenizer files; copy tokenizer.json and tokenizer_config.json into it.")
    if kv is not None:
        set_kv(loaded, wanted)
    return loaded, tokenizer


def cache_as_json(cache: KVCache | None) -> dict[str, Any]:
    """``kv_cache`` of a result: how keys and values were kept, and what that took; without a cache nothing."""
    if cache is None:
        return {}
    form = None if cache.kv is None else cache.kv.model_dump(mode="json")
    return {"kv_cache": {"format": form, **cache.memory_report().describe()}}


def cache_in_words(cache: KVCache) -> str:
    from quantkit.cli.console import size

    memory = cache.memory_report()
    text = f"keys and values: {size(memory.bytes)}, {memory.bits_per_element:.2f} bits per element"
    return text if cache.kv is None else f"{text}; {cache.kv.describe()}"


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
