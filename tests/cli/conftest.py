"""A tiny model with a tokenizer, as a user would have it on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import save_tiny
from tiny_tokenizer import VOCABULARY, save_tokenizer


@pytest.fixture(scope="session")
def speaking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with 128 positions and a byte-level tokenizer; not to be written to."""
    folder = tmp_path_factory.mktemp("speaking")
    save_tiny("llama", folder, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=None)
    save_tokenizer(folder)
    return folder


@pytest.fixture(params=["bert", "bert_classifier"])
def speechless_model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Folder of a model that does not predict the next token, with a tokenizer."""
    save_tiny(request.param, tmp_path / request.param, vocab_size=VOCABULARY)
    save_tokenizer(tmp_path / request.param)
    return tmp_path / request.param
