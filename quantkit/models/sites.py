"""What the tables of ``architectures.py`` mean for one block of a model: its sites, and where queries and keys are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantkit.models.architectures import Architecture, Attention, Rows
from quantkit.models.block import QueryKey, Site


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
