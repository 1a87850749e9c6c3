"""What is known about each model family, said once for all methods: which modules feed which.

To add a family: write one ``Architecture`` (or use an existing one) and add a line per class name to ``ARCHITECTURES``;
the shared tests find it by themselves once ``tests/tiny_models.py`` has a small configuration of it. Paths are module
paths inside one block; ``*`` stands for the number of an expert. A path that a block does not have (dense layers of a
mixture, shared experts) is left out there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Rows = Literal["all", "qkv", "heads_qkv", "gate_up"]
"""What the rows of a projection are: one thing; [q | k | v]; [heads, 3, head_dim]; [gate | up]."""


@dataclass(frozen=True)
class NormGroup:
    """A norm and every module that reads its output."""

    site: str
    norm: str | None
    """None: the residual reads the norm's output, too, so nothing can be folded into it."""
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Link:
    """A linear whose output reaches another linear by operations that commute with a positive scale per channel."""

    site: str
    producer: str
    consumer: str
    rows: Rows = "all"
    heads: bool = False
    """v -> o: each key/value head is read by ``repeats`` query heads."""


@dataclass(frozen=True)
class Attention:
    """Where the queries and keys of a block are made."""

    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    query_norm: str = "self_attn.q_norm"
    """A norm over head_dim, where the block has it."""
    key_norm: str = "self_attn.k_norm"
    rows: Rows = "all"
    rotary: Literal["none", "whole", "partial"] = "whole"
    """Rotary embedding that turns channels i and i + dim / 2 into each other; partial: dim is the configuration's share
    of head_dim."""


@dataclass(frozen=True)
class Condition:
    """``sites`` can be folded only where the configuration's ``key`` is ``value``."""

    sites: tuple[str, ...]
    key: str
    value: Any
    why: str


@dataclass(frozen=True)
class Experts:
    """How a checkpoint names the experts that transformers keeps as ``gate_up_proj`` [experts, 2 * width, hidden]
    (gate first) and ``down_proj`` [experts, hidden, width] in the module ``path``."""

    path: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class Residual:
    """What adds to the residual stream, and what reads it behind the last block. Inside a block, ``norm_groups`` say
    what reads it."""

    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    """Linears inside a block whose output is added to it, nothing in between."""
    embedding: str = "model.embed_tokens"
    """Module path in the model, as all that follow."""
    positions: str = ""
    """Learned position embeddings; empty: there are none."""
    norm: str = "model.norm"
    """Behind the last block."""
    head: str = "lm_head"
    """The linear that reads ``norm``, and whose weight may be that of ``embedding``."""
    project_in: str = ""
    """A linear between ``embedding`` and the stream, where the model has it."""
    project_out: str = ""
    """A linear between ``norm`` and ``head``, where the model has it."""
    centred: bool = False
    """The norms subtract the mean over the channels."""
    conditions: tuple[Condition, ...] = ()
    """Where one does not hold, the stream cannot be changed as a whole."""


@dataclass(frozen=True)
class Architecture:
    """One family: facts only; ``sites`` expands them for a block."""

    blocks: str
    norm_groups: tuple[NormGroup, ...]
    links: tuple[Link, ...] = ()
    attention: Attention = Attention()
    conditions: tuple[Condition, ...] = ()
    experts: Experts | None = None
    norm_offset: float = 0.0
    never_quantised: tuple[str, ...] = ()
    residual: Residual | str = "its table does not say what writes into the residual stream"
    """A text says why the stream cannot be changed as a whole."""


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION_INPUT = NormGroup("attention.input", "input_layernorm", _QKV)
_VALUE = Link("attention.value", "self_attn.v_proj", "self_attn.o_proj", heads=True)
_GATED_HIDDEN = Link("mlp.hidden", "mlp.up_proj", "mlp.down_proj")  # act(gate) * up is linear in up

LLAMA = Architecture(
    blocks="model.layers",
    norm_groups=(
        _ATTENTION_INPUT,
        NormGroup("mlp.input", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ),
    links=(_VALUE, _GATED_HIDDEN),
    residual=Residual(),
)

GEMMA = Architecture(
    blocks="model.layers",
    norm_groups=(  # the norms behind attention and MLP feed the residual, not a linear
        _ATTENTION_INPUT,
        NormGroup("mlp.input", "pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ),
    links=(_VALUE, _GATED_HIDDEN),
    norm_offset=1.0,  # Gemma multiplies by (1 + weight)
    residual="attention and MLP end in norms whose weights multiply single channels of it",
)

PHI3 = Architecture(
    blocks="model.layers",
    norm_groups=(
        NormGroup("attention.input", "input_layernorm", ("self_attn.qkv_proj",)),
        NormGroup("mlp.input", "post_attention_layernorm", ("mlp.gate_up_proj",)),
    ),
    links=(
        Link("attention.value", "self_attn.qkv_proj", "self_attn.o_proj", rows="qkv", heads=True),
        Link("mlp.hidden", "mlp.gate_up_proj", "mlp.down_proj", rows="gate_up"),
    ),
    attention=Attention("self_attn.qkv_proj", "self_attn.qkv_proj", rows="qkv", rotary="partial"),
    residual=Residual(),
)

OPT = Architecture(
    blocks="model.decoder.layers",
    norm_groups=(
        NormGroup("attention.input", "self_attn_layer_norm", _QKV),
        NormGroup("mlp.input", "final_layer_norm", ("fc1",)),
    ),
    links=(
        Link("attention.value", "self_attn.v_proj", "self_attn.out_proj", heads=True),
        Link("mlp.hidden", "fc1", "fc2"),
    ),
    attention=Attention(rotary="none"),
    conditions=(
        Condition(
            ("attention.input", "mlp.input"), "do_layer_norm_before", True, "the norm stands behind the residual sum"
        ),
        Condition(("attention.input", "mlp.input"), "layer_norm_elementwise_affine", True, "the norm has no weight"),
        Condition(("mlp.hidden",), "activation_function", "relu", "only ReLU commutes with a positive scale"),
    ),
    residual=Residual(
        writers=("self_attn.out_proj", "fc2"),
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        norm="model.decoder.final_layer_norm",
        project_in="model.decoder.project_in",
        project_out="model.decoder.project_out",
        centred=True,
        conditions=(Condition((), "do_layer_norm_before", True, "the norms stand behind its sums"),),
    ),
)

BLOOM = Architecture(
    blocks="transformer.h",
    norm_groups=(
        NormGroup("attention.input", "input_layernorm", ("self_attention.query_key_value",)),
        NormGroup("mlp.input", "post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    ),
    links=(  # none into the MLP's second linear: GELU does not commute with a scale
        Link("attention.value", "self_attention.query_key_value", "self_attention.dense", rows="heads_qkv", heads=True),
    ),
    attention=Attention(
        "self_attention.query_key_value", "self_attention.query_key_value", rows="heads_qkv", rotary="none"
    ),
    conditions=(
        Condition(
            ("attention.input", "mlp.input"), "apply_residual_connection_post_layernorm", False,
            "the residual is taken behind the norm",
        ),
    ),
    residual="a norm whose weight multiplies single channels of it stands behind the embeddings",
)  # fmt: skip

GPT_NEOX = Architecture(
    blocks="gpt_neox.layers",
    norm_groups=(  # also with the parallel residual: attention and MLP have a norm each
        NormGroup("attention.input", "input_layernorm", ("attention.query_key_value",)),
        NormGroup("mlp.input", "post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    ),
    links=(Link("attention.value", "attention.query_key_value", "attention.dense", rows="heads_qkv", heads=True),),
    attention=Attention("attention.query_key_value", "attention.query_key_value", rows="heads_qkv", rotary="partial"),
    residual=Residual(
        writers=("attention.dense", "mlp.dense_4h_to_h"),
        embedding="gpt_neox.embed_in",
        norm="gpt_neox.final_layer_norm",
        centred=True,
    ),
)

MIXTRAL = Architecture(
    blocks="model.layers",
    norm_groups=(
        _ATTENTION_INPUT,
        NormGroup("mlp.input", "post_attention_layernorm", ("mlp.gate", "mlp.experts.*.w1", "mlp.experts.*.w3")),
    ),
    links=(_VALUE, Link("mlp.experts.*.hidden", "mlp.experts.*.w3", "mlp.experts.*.w2")),
    experts=Experts("mlp.experts", gate="w1", up="w3", down="w2"),
    residual=Residual(writers=("self_attn.o_proj", "mlp.experts.*.w2")),
)

QWEN_MOE = Architecture(
    blocks="model.layers",
    norm_groups=(
        _ATTENTION_INPUT,
        NormGroup(
            "mlp.input",
            "post_attention_layernorm",
            (
                "mlp.gate_proj", "mlp.up_proj",  # dense layers
                "mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj",
                "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate",
            ),
        ),
    ),
    links=(
        _VALUE,
        _GATED_HIDDEN,
        Link("mlp.experts.*.hidden", "mlp.experts.*.up_proj", "mlp.experts.*.down_proj"),
        Link("mlp.shared_expert.hidden", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"),
    ),
    experts=Experts("mlp.experts"),
    never_quantised=("mlp.shared_expert_gate",),  # one output row that decides about a whole expert
    residual=Residual(
        writers=("self_attn.o_proj", "mlp.down_proj", "mlp.experts.*.down_proj", "mlp.shared_expert.down_proj")
    ),
)  # fmt: skip

BERT = Architecture(
    blocks="bert.encoder.layer",
    norm_groups=(
        NormGroup("attention.input", None, ("attention.self.query", "attention.self.key", "attention.self.value")),
        NormGroup("mlp.input", None, ("intermediate.dense",)),
    ),
    links=(Link("attention.value", "attention.self.value", "attention.output.dense", heads=True),),
    attention=Attention("attention.self.query", "attention.self.key", rotary="none"),
    residual="the norms stand behind its sums",
)

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,
    "Gemma2ForCausalLM": GEMMA,
    "Gemma3ForCausalLM": GEMMA,
    "Phi3ForCausalLM": PHI3,
    "OPTForCausalLM": OPT,
    "BloomForCausalLM": BLOOM,
    "GPTNeoXForCausalLM": GPT_NEOX,
    "MixtralForCausalLM": MIXTRAL,
    "Qwen2MoeForCausalLM": QWEN_MOE,
    "Qwen3MoeForCausalLM": QWEN_MOE,
    "BertForMaskedLM": BERT,
    "BertForSequenceClassification": BERT,
}
"""transformers class name -> table."""
