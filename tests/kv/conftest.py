"""A tiny model that reads text."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import TINY, make_tiny
from tiny_tokenizer import TEXT, VOCABULARY, make_tokenizer


@pytest.fixture
def speaking() -> tuple[Any, Any, str]:
    """(a random Llama, its tokenizer, some text)"""
    return make_tiny(TINY["llama"](vocab_size=VOCABULARY)), make_tokenizer(), TEXT * 8
