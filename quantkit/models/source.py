"""Where a model comes from: ``demo``, a local folder, or the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantkit.demo import model_path
from quantkit.errors import QuantkitError, RecipeError

DEMO = "demo"

_HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "*.py", "LICENSE*")
"""What is fetched from a repository: everything but weights in other formats."""

_TASKS: dict[str, type[Any]] = {
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
}
"""End of a class name in ``architectures`` -> what loads such a model; all others are causal language models."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False, allow_quantized: bool = False
) -> Path:
    """The folder of ``model``, downloaded if need be, with a usable configuration and safetensors weights in it.

    Args:
        model: ``demo``, a local folder, or a hub id.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: allow models whose code comes with them.
        allow_quantized: accept a checkpoint that is quantised already (to evaluate or inspect it).

    Raises:
        RecipeError: the model needs ``trust_remote_code``; a revision was given for a local folder.
        QuantkitError: no such model, no network, no config.json, no safetensors weights, quantised already.
    """
    if model == DEMO:
        folder = model_path()
    elif Path(model).expanduser().exists():
        folder = Path(model).expanduser()
    else:
        return _checked(_download(model, revision), model, trust_remote_code, allow_quantized)
    if revision is not None:
        raise RecipeError(f"revision '{revision}' was given, but {model} is no hub id; leave the revision out.")
    return _checked(folder, model, trust_remote_code, allow_quantized)


def load_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration in ``folder`` as transformers reads it.

    Raises:
        RecipeError: the model needs ``trust_remote_code``.
        QuantkitError: there is no config.json, it cannot be read, or transformers does not know the model.
    """
    data = _read_config(folder)
    kind = data.get("model_type")
    if kind not in CONFIG_MAPPING:
        if "auto_map" not in data:
            raise QuantkitError(
                f"{folder / 'config.json'}: the installed transformers does not know model_type {kind!r}; "
                "upgrade transformers, or check the file."
            )
        if not trust_remote_code:
            raise RecipeError(
                f"{folder}: a model of type '{kind}' runs code that comes with it; read that code, then allow it with "
                "--trust-remote-code (trust_remote_code=True)."
            )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (StrictDataclassError, ValueError, TypeError, KeyError, OSError, ImportError) as error:
        raise QuantkitError(f"{folder / 'config.json'} is not a usable configuration: {_one_line(error)}") from None
    return config


def auto_class(config: PreTrainedConfig) -> type[Any]:
    """transformers' ``AutoModelFor...`` that builds and loads the model of ``config``, by its first architecture."""
    name = (config.architectures or [""])[0]
    return next((loader for end, loader in _TASKS.items() if name.endswith(end)), AutoModelForCausalLM)


def _checked(folder: Path, model: str, trust_remote_code: bool, allow_quantized: bool) -> Path:
    if not folder.is_dir():
        raise QuantkitError(f"{model} is a file; give the folder that it is in.")
    data = _read_config(folder)
    quantized = data.get("quantization_config")
    if quantized is not None and not allow_quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
        raise QuantkitError(
            f"{model} is quantised already (quant_method '{method}' in config.json); start from the original model."
        )
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.safetensors.index.json")):
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise QuantkitError(
                f"{model} has its weights in pickle files only ({pickles[0]}), which can run code when they are read; "
                "convert them where you trust them: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
            )
        raise QuantkitError(
            f"{model} has no safetensors weights; if the repository has them as pickle files (*.bin), convert them "
            "where you trust them: AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(NEW_FOLDER)."
        )
    load_config(folder, trust_remote_code)
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise QuantkitError(
            f"{folder} has no config.json, so it is no model folder; give the one that save_pretrained wrote."
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QuantkitError(f"{file} cannot be read as JSON: {_one_line(error)}") from None
    if not isinstance(data, dict):
        raise QuantkitError(f"{file} must be a JSON object, got {type(data).__name__}; fetch it again.")
    return data


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    here = f"no folder '{model}' either" if "/" in model else f"no folder '{model}' here either"
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_HUB_FILES)))
    except HFValidationError:
        raise QuantkitError(f"'{model}' is neither a folder nor a hub id (owner/name); check the path.") from None
    except LocalEntryNotFoundError:
        raise QuantkitError(
            f"the hub cannot be reached for '{model}' (offline?), it is not in the local cache, and there is {here}; "
            "connect, or give the path of a local folder."
        ) from None
    except GatedRepoError:
        raise QuantkitError(
            f"the hub model '{model}' is gated; ask for access on its page, then log in with 'hf auth login'."
        ) from None
    except RevisionNotFoundError:
        raise QuantkitError(f"the hub model '{model}' has no revision '{revision}'; check the name.") from None
    except RepositoryNotFoundError:
        raise QuantkitError(
            f"the hub has no model '{model}' that you may read, and there is {here}; check the name, or log in."
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise QuantkitError(f"downloading '{model}' failed: {_one_line(error)}; try again, it will resume.") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
