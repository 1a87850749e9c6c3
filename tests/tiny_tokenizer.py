"""A byte-level BPE tokenizer for the tiny models: any text can be encoded, and decodes to itself."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "The quick brown fox jumps over the lazy dog. Whoever reads this sentence again has read it before. "
VOCABULARY = 320


def make_tokenizer() -> PreTrainedTokenizerFast:
    """320 tokens: <s>, </s>, the 256 bytes, merges learned from ``TEXT``; adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_tokenizer(folder: Path) -> None:
    make_tokenizer().save_pretrained(folder)
