"""What the cache of a model takes once a window of text has gone through it: measured, not worked out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantkit.kv.attach import kv_cache, kv_format

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantkit.kv.cache import KVCache


@torch.inference_mode()
def filled_cache(model: PreTrainedModel, tokens: int) -> KVCache | None:
    """A cache of ``model`` that holds ``tokens`` tokens; None: the model keeps keys and values in full precision.

    Which tokens they are makes no difference to what is wanted of it, ``memory_report()``.
    """
    if kv_format(model) is None:
        return None
    cache = kv_cache(model)
    ids = torch.arange(tokens, device=model.device) % model.config.get_text_config().vocab_size
    model(input_ids=ids[None], past_key_values=cache, use_cache=True)
    return cache
