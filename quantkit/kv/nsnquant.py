"""NSNQuant: keys and values in 1 or 2 bits by vector quantisation, without calibration (Son et al., arXiv 2505.18231).

Tokens are packed in chunks; ``nsn_encode.py`` has the arithmetic, ``nsn_store.py`` what is held, ``codebooks.py`` the
codewords. Of head_dim d and chunks of W tokens an element takes

    b + (20 + 32 / W + (mean_bits + 32 / g) d / W) / d  bits        g: 32 channels that share a range of the mean

which is 1.238 and 2.238 with d = 128, W = 64 and means of 4 bits. The newest tokens and the first few stay as they are.

The paper reads a prompt in full precision while it is processed. Here attention reads what is stored at all times: in a
call with many tokens each of them sees chunks that are complete at the end of the call as codes, its own among them.
Generating token by token, a token sees at least those before it that are not yet due in full precision, so what a
perplexity measures in one pass is the less favourable case. What is stored is the same in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, Field
from torch import Tensor

from quantkit.kv.codebooks import load
from quantkit.kv.interface import LayerKV
from quantkit.kv.nsn_encode import Coder
from quantkit.kv.nsn_store import NSNStore, check_width
from quantkit.kv.quantiser import straight
from quantkit.kv.rope import Rope


class Config(BaseModel, frozen=True, extra="forbid"):
    """What is None is decided by ``preset``; ``settled`` has it filled in."""

    preset: Literal["safe", "paper"] = Field(
        "safe",
        description="safe: sink 4, min_recent 64, mean_bits_k 8, codebook e8; paper: sink 0, min_recent 0 (64 if keys "
        "or values have 1 bit), mean_bits_k 4, codebook kmeans",
    )
    bits: Literal[1, 2] = Field(2, description="width of a code per element")
    bits_k: Literal[1, 2] | None = Field(None, description="of keys, where they differ")
    bits_v: Literal[1, 2] | None = Field(None, description="of values, where they differ")
    window: int = Field(64, ge=16, le=1024, multiple_of=8, description="tokens that are packed together")
    sink: int | None = Field(None, ge=0, description="first tokens that stay as they are")
    min_recent: int | None = Field(None, ge=0, description="newest tokens that stay as they are; up to window more do")
    mean_bits_k: Literal[4, 8] | None = Field(None, description="width of the mean of the keys of a chunk")
    mean_bits_v: Literal[4, 8] = Field(4, description="width of the mean of the values of a chunk")
    key_shift: Literal["pre_rope", "post_rope", "none"] = Field(
        "pre_rope", description="where the mean is taken from keys; behind the rotary embedding if it cannot be undone"
    )
    gain_k: Literal["unbiased", "mse"] = Field(
        "unbiased", description="length of the codewords of a key: error orthogonal to it, or least error (shrinks it)"
    )
    gain_v: Literal["unbiased", "mse"] = Field("unbiased", description="the same of values")
    codebook: str | None = Field(
        None, description="for 1 bit: e8, kmeans, or the path of a safetensors file with signed codewords [256, 8]"
    )
    magnitudes: str = Field(
        "magnitudes", description="for 2 bits: magnitudes, or the path of a safetensors file with magnitudes [256, 8]"
    )

    def settled(self) -> Config:
        """The same with nothing left to decide."""
        bits_k, bits_v = self.bits_k or self.bits, self.bits_v or self.bits
        safe = self.preset == "safe"
        choices = {
            "bits_k": bits_k,
            "bits_v": bits_v,
            "sink": 4 if safe else 0,
            "min_recent": 64 if safe or 1 in (bits_k, bits_v) else 0,
            "mean_bits_k": 8 if safe else 4,
            "codebook": "e8" if safe else "kmeans",
        }
        return self.model_copy(update={name: choices[name] for name in choices if getattr(self, name) is None})

    def describe(self) -> str:
        """In words, behind "keys and values"."""
        made = self.settled()
        bits = f"{made.bits_k}-bit" if made.bits_k == made.bits_v else f"{made.bits_k}-bit and {made.bits_v}-bit"
        kept = f"the newest {made.min_recent} tokens" if made.min_recent else "tokens of an incomplete chunk"
        first = f"the first {made.sink} and " if made.sink else ""
        return (
            f"{bits} codewords of eight numbers (NSNQuant), packed by {made.window} tokens, {first}{kept} in full "
            "precision"
        )


@dataclass(frozen=True, eq=False)
class NSN:
    """A ``Method``."""

    coder: Coder
    sink: int
    min_recent: int

    def store(self) -> NSNStore:
        return NSNStore(self.coder, self.sink, self.min_recent)

    def round(self, states: Tensor) -> Tensor:
        """Gradients go straight through."""
        return straight(states, lambda given: self.store().append(given.detach()))


def layer_kv(config: Config, head_dim_keys: int, head_dim_values: int, rope: Rope | None) -> LayerKV:
    """How one layer keeps its keys and values.

    Args:
        head_dim_keys: numbers in a key of one head; 0: not known yet, the store looks at what it is given.
        rope: of its keys (``rope.rope_of``); None: there is none, or it cannot be undone. The mean is then taken from
            keys as they come.

    Raises:
        QuantkitError: 8 does not divide a head_dim; a codebook cannot be used.
    """
    for what, width in (("keys", head_dim_keys), ("values", head_dim_values)):
        check_width(what, width)
    made = config.settled()
    assert made.codebook is not None
    assert made.sink is not None
    assert made.min_recent is not None
    coders = []
    for bits, mean_bits, gain, shift, turned in (
        (made.bits_k, made.mean_bits_k, made.gain_k, made.key_shift != "none", rope),
        (made.bits_v, made.mean_bits_v, made.gain_v, True, None),
    ):
        assert bits is not None
        assert mean_bits is not None
        book = load(made.codebook if bits == 1 else made.magnitudes, bits)
        coders.append(
            Coder(book, made.window, mean_bits, gain, shift, turned if made.key_shift == "pre_rope" else None)
        )
    keys, values = (NSN(coder, made.sink, made.min_recent) for coder in coders)
    return LayerKV(keys, values)
