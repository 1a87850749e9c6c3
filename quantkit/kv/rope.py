"""Rotary position embedding (Su et al., arXiv 2104.09864), undone and done again on keys in a cache.

    R(p):  (x_a, x_b) -> (x_a cos(p t_j) - x_b sin(p t_j),  x_b cos(p t_j) + x_a sin(p t_j))        pair j, position p

Pairs are (j, j + n / 2) of the n rotated channels, or (2 j, 2 j + 1); channels behind the first n stay. A cache is not
told positions, so the number of a token in it stands for its position: as long as positions grow by one per token the
two differ by a constant, and R of that constant commutes with all that is done here. A factor that comes with the
rotation (YaRN, LongRoPE) is left in.

Frequencies are those of the model's own rotary embedding, and ``Rope`` is compared with what the model's own code does
to keys before it is used. LongRoPE has two sets; the one for short sequences is taken, so the keys of longer ones are
turned by a little less than they should be: what is read back is as exact, what is stored varies more.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

_POSITIONS = (0, 1, 3, 7)
"""Where the model's code is compared with ``Rope``; LongRoPE takes its other frequencies at large ones."""


@dataclass(frozen=True)
class Rope:
    """A rotation for each position."""

    frequencies: tuple[float, ...]
    """t_j in radians per position; one for each pair."""
    interleaved: bool = False
    """Pairs are neighbours."""

    @property
    def rotary_dim(self) -> int:
        """Channels that are rotated: the first ones."""
        return 2 * len(self.frequencies)

    def rotate(self, x: Tensor, slots: Tensor) -> Tensor:
        """R(p) x for every vector of ``x`` [..., tokens, head_dim], float32 or float64.

        Args:
            slots: the position p of each, whole numbers [tokens], or more dimensions of ``x`` in front of that.
        """
        return self._turned(x, *self.table(slots, x.dtype))

    def unrotate(self, x: Tensor, slots: Tensor) -> Tensor:
        """R(p)**-1 x; arguments as for ``rotate``."""
        cos, sin = self.table(slots, x.dtype)
        return self._turned(x, cos, -sin)

    def table(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of p t_j, both [..., tokens, rotary_dim / 2]."""
        # In float32 the angle of position 100 000 would be off by 4e-3.
        angles = slots[..., None].double() * _on(self.frequencies, slots.device)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second channel of every pair of ``x`` [..., head_dim], both [..., rotary_dim / 2]."""
        split = x[..., : self.rotary_dim].unflatten(-1, (-1, 2) if self.interleaved else (2, -1))
        first, second = split.unbind(-1 if self.interleaved else -2)
        return first, second

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = self.pairs(x)
        dim = -1 if self.interleaved else -2
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim).flatten(-2)
        return turned if self.rotary_dim == x.shape[-1] else torch.cat([turned, x[..., self.rotary_dim :]], dim=-1)


def rope_of(model_or_config: nn.Module | PreTrainedConfig, layer: int) -> Rope | None:
    """How layer number ``layer`` rotates its keys; None: it does not, or ``why_not`` says why it cannot be undone."""
    return _find(model_or_config, layer)[0]


def why_not(model_or_config: nn.Module | PreTrainedConfig, layer: int) -> str:
    """Why the rotation of that layer's keys cannot be undone by their number in the cache, in words.

    Empty if it can, and if there is none.
    """
    return _find(model_or_config, layer)[1]


def _find(model_or_config: Any, layer: int) -> tuple[Rope | None, str]:
    full = getattr(model_or_config, "config", model_or_config)
    config = full.get_text_config(decoder=True)
    model_class: Any = type(model_or_config)
    if not isinstance(model_or_config, nn.Module):
        known = MODEL_FOR_CAUSAL_LM_MAPPING
        model_class = known.get(type(full), None) or known.get(type(config), None)
    code = sys.modules.get(model_class.__module__) if model_class is not None else None
    settings = _settings(config, layer)
    skipped = getattr(config, "no_rope_layers", None)  # 0: this layer has none
    if not settings or (skipped and layer < len(skipped) and not skipped[layer]):
        return None, ""
    if "dynamic" in settings.get("rope_type", "default"):
        return None, "its rotary frequencies change with the length of the sequence (dynamic NTK)"
    if "mrope_section" in settings:
        return None, "its keys are rotated by positions on several axes (M-RoPE)"
    embedding = None if code is None else _embedding(code, config)
    if embedding is None or not hasattr(code, "apply_rotary_pos_emb"):
        return None, "its code has no rotary embedding of the usual form"
    try:
        return _proven(code, embedding, config, layer)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # code of another form
        return None, f"its rotary embedding could not be tried out ({type(error).__name__})"


def _settings(config: Any, layer: int) -> dict[str, Any]:
    """``rope_parameters`` of a layer; empty: the family rotates nothing."""
    found = getattr(config, "rope_parameters", None) or {}
    kind = _layer_type(config, layer)
    return (found.get(kind) or {}) if kind in found else found


def _layer_type(config: Any, layer: int) -> str:
    kinds = getattr(config, "layer_types", None) or ()
    return kinds[layer] if layer < len(kinds) else ""


def _embedding(code: Any, config: Any) -> nn.Module | None:
    """The rotary embedding of the modelling file ``code`` for ``config``, on the CPU."""
    for name, kind in vars(code).items():
        if name.endswith("RotaryEmbedding") and isinstance(kind, type) and issubclass(kind, nn.Module):
            with torch.device("cpu"), torch.inference_mode(False):
                return kind(config)
    return None


def _proven(code: Any, embedding: Any, config: Any, layer: int) -> tuple[Rope | None, str]:
    """The ``Rope`` that does to a random key what the modelling file ``code`` does, up to a constant factor."""
    kind = _layer_type(config, layer)
    by_kind = f"{kind}_inv_freq"
    frequencies = getattr(embedding, by_kind) if hasattr(embedding, by_kind) else embedding.inv_freq
    arguments = (kind,) if hasattr(embedding, by_kind) else ()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key = torch.randn(1, 1, len(_POSITIONS), width, generator=torch.Generator().manual_seed(0), device="cpu")
    positions = torch.tensor(_POSITIONS, device="cpu")
    expected = code.apply_rotary_pos_emb(key, key, *embedding(key, positions[None], *arguments))[1]
    for interleaved in (False, True):
        rope = Rope(tuple(frequencies.tolist()), interleaved)
        if rope.rotary_dim > width:
            break
        found = rope.rotate(key, positions)
        rotated = slice(rope.rotary_dim)
        factor = expected[..., rotated].norm() / found[..., rotated].norm()
        found[..., rotated] *= factor
        if torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
            return rope, ""
    return None, "its code rotates keys by neither of the known pairs of channels"


@lru_cache(maxsize=64)
def _on(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(frequencies, dtype=torch.float64, device=device)
