"""A small language model that ships with the package, so that every command can be tried offline.

The model is a byte-level-BPE Llama trained on the Python standard library by ``python -m quantkit.demo.train``; the
card in ``model/README.md`` gives its data, its settings and its measured perplexities.
"""

from pathlib import Path

__all__ = ["calibration_text_path", "heldout_text_path", "model_path"]

_FOLDER = Path(__file__).resolve().parent


def model_path() -> Path:
    """The model folder, as ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` take it."""
    return _FOLDER / "model"


def heldout_text_path() -> Path:
    """UTF-8 text of standard-library files that neither the model nor its tokenizer saw in training."""
    return _FOLDER / "heldout.txt"


def calibration_text_path() -> Path:
    """UTF-8 excerpts of the training text, for calibrating a quantised model without a download."""
    return _FOLDER / "calibration.txt"
