"""Small random models of every supported architecture, awkward on purpose where the family allows it.

Grouped heads, head_dim that is not hidden / heads, widths that are no multiple of 64, tied heads, biases, windows
shorter than the text, dense layers inside mixtures. Weights are drawn so that every part moves the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 199
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}


def _maker(kind: type[PreTrainedConfig], **settings: Any) -> Callable[..., PreTrainedConfig]:
    def make(**changes: Any) -> PreTrainedConfig:
        return kind(**(_TOKENS | _SHAPE | settings | changes))

    return make


TINY: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": _maker(LlamaConfig, num_key_value_heads=2, intermediate_size=104, attention_bias=True),
    "mistral": _maker(MistralConfig, num_key_value_heads=1, intermediate_size=136, sliding_window=5, head_dim=24),
    "qwen2": _maker(Qwen2Config, num_key_value_heads=2, intermediate_size=88, tie_word_embeddings=True),
    "qwen3": _maker(Qwen3Config, num_key_value_heads=2, intermediate_size=96, head_dim=32, tie_word_embeddings=True),
    "gemma2": _maker(
        Gemma2Config, num_key_value_heads=2, intermediate_size=104, head_dim=8, sliding_window=4,
        query_pre_attn_scalar=16, attn_logit_softcapping=5.0, final_logit_softcapping=10.0,
    ),
    "gemma3": _maker(
        Gemma3TextConfig, num_key_value_heads=1, intermediate_size=120, head_dim=24, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": _maker(Phi3Config, num_key_value_heads=2, intermediate_size=72, sliding_window=6),
    "opt": _maker(OPTConfig, ffn_dim=112, word_embed_proj_dim=40),
    "bloom": _maker(BloomConfig, n_head=4, n_layer=2),
    "gpt_neox": _maker(GPTNeoXConfig, intermediate_size=152, rotary_pct=0.5),
    "mixtral": _maker(MixtralConfig, num_key_value_heads=2, intermediate_size=40, num_local_experts=5),
    "qwen2_moe": _maker(
        Qwen2MoeConfig, num_key_value_heads=2, intermediate_size=80, moe_intermediate_size=40, num_experts=6,
        num_experts_per_tok=2, shared_expert_intermediate_size=56, mlp_only_layers=[0],
    ),
    "qwen3_moe": _maker(
        Qwen3MoeConfig, num_key_value_heads=2, intermediate_size=80, moe_intermediate_size=24, num_experts=6,
        num_experts_per_tok=3, head_dim=32, norm_topk_prob=True,
    ),
    "bert": _maker(BertConfig, intermediate_size=104, architectures=["BertForMaskedLM"]),
    "bert_classifier": _maker(
        BertConfig, intermediate_size=88, num_labels=5, architectures=["BertForSequenceClassification"]
    ),
}  # fmt: skip
"""Name -> function that makes the configuration; keyword arguments change single settings."""


CAUSAL = tuple(name for name in TINY if not name.startswith("bert"))
"""The models that predict the next token."""


def randomise(model: PreTrainedModel, seed: int = 0) -> None:
    """Draw every weight anew, in float32 arithmetic; norms stay near their neutral value, biases are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                neutral = 0.0 if "gemma" in model.config.model_type or name.endswith("bias") else 1.0
                parameter.copy_(neutral + 0.3 * noise)
            else:
                fan_in = 1.0 if "embed" in name else parameter.shape[-1]
                parameter.copy_(1.5 * noise * fan_in**-0.5)


def make_tiny(config: PreTrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of ``config`` in eval mode; a causal language model unless the configuration says otherwise."""
    names = config.architectures
    maker = getattr(transformers, names[0])._from_config if names else transformers.AutoModelForCausalLM.from_config
    model: PreTrainedModel = maker(config, dtype=dtype)
    randomise(model, seed)
    return model.eval()


def load_tiny(folder: Path, **settings: Any) -> Any:
    """What ``from_pretrained`` of the class that the model in ``folder`` was saved as returns."""
    (name,) = AutoConfig.from_pretrained(folder).architectures
    return getattr(transformers, name).from_pretrained(folder, **settings)


def save_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Save the tiny model ``name`` (with ``changes`` to its configuration) into ``folder`` and return it."""
    model = make_tiny(TINY[name](**changes), dtype)
    model.save_pretrained(folder)
    return model
