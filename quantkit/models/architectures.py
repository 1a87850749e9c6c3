"""What is known about each model family, said once for all methods: which modules feed which.

To add a family: write one ``Architecture`` (or use an existing one) and add a line per class name to ``ARCHITECTURES``;
the shared tests find it by themselves once ``tests/tiny_models.py`` has a small configuration of it. Paths are module
paths inside one block; ``*`` stands for the number of an expert. A path that a block does not have (dense layers of a
mixture, shared experts) is left out there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantkit.models.block import QueryKey, Site

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


def expert_shapes(arch: Architecture, block: nn.Module) -> dict[str, tuple[int, int]]:
    """Module path -> (out_features, in_features) of every expert's linears in ``block``; empty for a dense block."""
    names = arch.experts
    fused = dict(block.named_parameters()).get(f"{names.path}.down_proj") if names else None
    if names is None or fused is None:
        return {}
    experts, hidden, width = fused.shape
    return {
        f"{names.path}.{expert}.{leaf}": shape
        for expert in range(experts)
        for leaf, shape in ((names.gate, (width, hidden)), (names.up, (width, hidden)), (names.down, (hidden, width)))
    }


def sites(arch: Architecture, config: Any, block: nn.Module) -> tuple[Site, ...]:
    """The sites of one block.

    Where the configuration or the table rules a fold into a norm out, the norm's consumers are a site of kind none; a
    link that is ruled out is left out.

    Args:
        arch: the family's table.
        config: the model's (text) configuration.
        block: the block's module; only its structure and shapes are looked at, so it may be on the meta device.
    """
    experts = expert_shapes(arch, block)
    shapes = {path: tuple(m.weight.shape) for path, m in block.named_modules() if isinstance(m, nn.Linear)} | experts
    present = {path for path, _ in block.named_modules()} | set(experts)
    count = len(experts) // 3
    refused = {site for site, _ in refusals(arch, config)}
    found = []
    for group in arch.norm_groups:
        consumers = tuple(path for pattern in group.consumers for path in _expand(pattern, count) if path in present)
        if group.norm is None or group.site in refused:
            found.append(Site(group.site, "none", "", consumers))
        else:
            found.append(Site(group.site, "norm", group.norm, consumers, norm_offset=arch.norm_offset))
    for link in arch.links:
        if link.site in refused:
            continue
        names = zip(
            _expand(link.site, count), _expand(link.producer, count), _expand(link.consumer, count), strict=True
        )
        for name, producer, consumer in names:
            if producer not in present:
                continue
            head_dim, repeats = _heads(config) if link.heads else (0, 1)
            width = shapes[consumer][1] // repeats
            rows = _rows(link.rows, "value", shapes[producer][0], width, head_dim)
            found.append(Site(name, "linear", producer, (consumer,), rows, repeats=repeats, head_dim=head_dim))
    return tuple(found)


def writers(arch: Architecture, block: nn.Module) -> tuple[str, ...]:
    """Paths of the linears of ``block`` (meta device will do) that write into the residual stream; experts one by one.

    None where the table says that the stream cannot be changed as a whole.
    """
    if isinstance(arch.residual, str):
        return ()
    experts = expert_shapes(arch, block)
    present = {path for path, _ in block.named_modules()} | set(experts)
    patterns = arch.residual.writers
    return tuple(path for pattern in patterns for path in _expand(pattern, len(experts) // 3) if path in present)


def query_key(arch: Architecture, config: Any, block: nn.Module) -> QueryKey:
    """Where the queries and keys of one block can be scaled; arguments as for ``sites``."""
    attention = arch.attention
    modules = dict(block.named_modules())
    head_dim, repeats = _heads(config)
    tie = _rotary_tie(attention, config, head_dim)
    if attention.query_norm in modules:
        return QueryKey("norm", attention.query_norm, attention.key_norm, tie, head_dim, norm_offset=arch.norm_offset)
    heads = config.num_attention_heads // repeats
    rows = int(modules[attention.key].weight.shape[0])
    query_rows, key_rows = (_rows(attention.rows, part, rows, heads * head_dim, head_dim) for part in ("query", "key"))
    per_head = int(tie.max()) + 1
    ties = (torch.arange(heads)[:, None] * per_head + tie).flatten()
    return QueryKey("linear", attention.query, attention.key, ties, head_dim, repeats, query_rows, key_rows)


def refusals(arch: Architecture, config: Any) -> Iterator[tuple[str, str]]:
    """(site, reason) of every site of the table that cannot be folded, in general or with this configuration."""
    for group in arch.norm_groups:
        if group.norm is None:
            yield group.site, "the residual reads the norm's output, too"
    for condition in arch.conditions:
        if getattr(config, condition.key) != condition.value:
            yield from ((site, condition.why) for site in condition.sites)


def _expand(pattern: str, experts: int) -> list[str]:
    return [pattern.replace("*", str(expert)) for expert in range(experts)] if "*" in pattern else [pattern]


def _heads(config: Any) -> tuple[int, int]:
    """(head_dim, query heads per key/value head)."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return head_dim, heads // (getattr(config, "num_key_value_heads", None) or heads)


def _rows(layout: Rows, part: Literal["query", "key", "value"], rows: int, width: int, head_dim: int) -> Tensor | None:
    """Which of the ``rows`` of a projection make ``part``, or in [gate | up] the up half; None: all of them.

    Args:
        width: of the keys, the values, or the up half.
        head_dim: for [heads, 3, head_dim].
    """
    number = ("query", "key", "value").index(part)
    if layout == "qkv":
        return torch.arange(rows).split([rows - 2 * width, width, width])[number]
    if layout == "heads_qkv":
        return torch.arange(rows).view(-1, 3, head_dim)[:, number].flatten()
    return torch.arange(width, rows) if layout == "gate_up" else None


def _rotary_tie(attention: Attention, config: Any, head_dim: int) -> Tensor:
    """int64 [head_dim]: channels of one head that are rotated into each other have the same number."""
    if attention.rotary == "none":
        return torch.arange(head_dim)
    share = config.rope_parameters["partial_rotary_factor"] if attention.rotary == "partial" else 1.0
    half = -(-int(head_dim * share) // 2)
    return torch.cat([torch.arange(half), torch.arange(half), torch.arange(half, head_dim - half)])
