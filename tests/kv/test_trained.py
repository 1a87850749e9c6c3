"""On a model that has learned something: fewer bits cost more, and at equal bits NSNQuant costs least."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from quantkit.calibrate.text import load_text
from quantkit.eval.perplexity import perplexity
from quantkit.formats.kv import kv_of
from quantkit.kv.attach import set_kv
from quantkit.loading import load

NO_RECENT: dict[str, Any] = {"sink": 0, "min_recent": 0}


def test_the_order_of_caches():
    """Windows of four chunks in one pass, with no token in full precision: every token is read from codes."""
    model, tokenizer = load("demo", dtype="float32")
    text = load_text("demo")

    def measured(name: str, settings: dict[str, Any] | None = None) -> float:
        set_kv(model, kv_of(name, settings or {}))
        return perplexity(model, tokenizer, text, seqlen=256, max_tokens=1024, batch_size=4, stream=False).value

    two_bits = measured("nsnquant-2bit", NO_RECENT)
    ascending = [
        measured("none"),
        measured("kivi-4bit", {"residual": 0}),
        two_bits,
        measured("nsnquant-1bit", NO_RECENT),
    ]
    assert all(less < 0.995 * more for less, more in pairwise(ascending[:1] + ascending[2:]))
    assert ascending[0] < ascending[1] < two_bits
    assert two_bits < 0.97 * measured("rotation-2bit")  # 2.25 bits, and 2.4
    assert two_bits < 0.95 * measured("kivi-2bit", {"residual": 0, "group_size": 64})  # 2.5 bits
    assert ascending[-1] < 0.7 * measured("rotation-1bit")
