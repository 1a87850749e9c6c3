"""The demo model before its training, and its tokenizer: sizes, how both are made, how they are written."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCAB_SIZE = 2048
HIDDEN_SIZE = 256
INTERMEDIATE_SIZE = 640
LAYERS = 5
HEAD_DIM = 64
QUERY_HEADS = 4
KEY_VALUE_HEADS = 2
MAX_POSITIONS = 512


def train_tokenizer(documents: list[str]) -> Any:
    """A byte-level BPE of ``VOCAB_SIZE`` entries, learned from ``documents``; it adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    wrapper: Any = PreTrainedTokenizerFast  # its constructor carries no types
    return wrapper(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files, under the class name that older releases of transformers know as well."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` without special tokens, whatever its length."""
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def token_stream(tokenizer: Any, documents: list[str]) -> torch.Tensor:
    """All documents as one int64 tensor of token ids, each document between the bos and the eos token."""
    ids: list[int] = []
    for document in documents:
        ids += [tokenizer.bos_token_id, *encode(tokenizer, document), tokenizer.eos_token_id]
    return torch.tensor(ids)


def build_model(tokenizer: Any) -> LlamaForCausalLM:
    """The untrained float32 model; embeddings are tied, which at this size leaves more of the bytes to the layers."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def save_weights(model: LlamaForCausalLM, folder: Path) -> None:
    """Write ``config.json``, ``generation_config.json`` and the bf16 weights, each whole or not at all."""
    config = LlamaConfig.from_dict(
        {**model.config.to_dict(), "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    )
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    partial = folder / "model.safetensors.partial"
    partial.write_bytes(save(weights, metadata={"format": "pt"}))
    os.replace(partial, folder / "model.safetensors")
