"""Load a checkpoint for use: native and portable ones stay packed in memory, plain float ones load as they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.errors import QuantkitError
from quantkit.formats.config import PORTABLE_METHOD
from quantkit.integrations.transformers import as_native
from quantkit.models.source import auto_class, load_config, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PACKED_SUFFIXES = (
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point",
    "input_scale_vector", "input_shift_vector", "input_scale", "input_zero_point",
    "input_hadamard_signs", "input_kronecker_left", "input_kronecker_right", "input_dense", "input_clip",
    "key_matrix", "key_clip", "value_clip",
)  # fmt: skip
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def load(
    model: str | Path,
    *,
    device_map: str | dict[str, Any] | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model in evaluation mode, and its tokenizer.

    A compressed-tensors checkpoint runs in quantkit's layers, like a native one: plain transformers would decompress
    it at the first forward. ``save_pretrained`` writes it back as the compressed-tensors checkpoint it was.

    Args:
        model: ``demo``, a local folder, or a hub id.
        device_map: as in ``from_pretrained``.
        dtype: dtype of scales, activations and unquantised weights; ``auto``: as stored.
        trust_remote_code: allow models whose code comes with them.

    Returns:
        The model, and the tokenizer or None where the folder has none.

    Raises:
        QuantkitError: no such model; a quantisation that quantkit cannot run; tensors missing, left over, or of
            another shape than config.json says.
    """
    folder = resolve(str(model), trust_remote_code=trust_remote_code, allow_quantized=True)
    config = load_config(folder, trust_remote_code)
    block = getattr(config, "quantization_config", None)
    if isinstance(block, dict) and block.get("quant_method") == PORTABLE_METHOD:
        config.quantization_config = as_native(block)
    loaded: PreTrainedModel
    info: dict[str, Any]
    loaded, info = auto_class(config).from_pretrained(
        folder,
        config=config,
        device_map=device_map,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below in one line instead of a table and a traceback
    )
    _check(info, folder)
    tokenizer = None
    if any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return loaded, tokenizer


def check_writes_text(model: PreTrainedModel, purpose: str) -> None:
    """Only a model that predicts the next token has a perplexity and can continue a text.

    Raises:
        QuantkitError: ``model`` is of another kind (masked language model, classifier); names its class.
    """
    if auto_class(model.config) is not AutoModelForCausalLM:
        raise QuantkitError(
            f"{purpose} needs a causal language model, which predicts the next token; this one is a "
            f"{type(model).__name__}."
        )


def _check(info: dict[str, Any], folder: Path) -> None:
    """Every tensor of the model came from the checkpoint, and every packed tensor of the checkpoint was used.

    Other tensors may be left over: checkpoints carry some that transformers does not load.
    """
    missing = sorted(info["missing_keys"])
    unused = sorted(name for name in info["unexpected_keys"] if name.endswith(_PACKED_SUFFIXES))
    misshapen = sorted(info["mismatched_keys"])
    if missing:
        problem = f"has no tensor '{missing[0]}'{_more(missing)}"
    elif misshapen:
        name, stored, expected = misshapen[0]
        problem = f"has '{name}' as {list(stored)}, config.json says {list(expected)}{_more(misshapen)}"
    elif unused:
        problem = f"has '{unused[0]}'{_more(unused)}, which config.json does not describe"
    else:
        return
    raise QuantkitError(f"{folder} {problem}: the checkpoint is incomplete or damaged; quantise or fetch it again.")


def _more(names: list[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
