"""Greedy decoding as something that can be timed: the same steps from the same prompt, as often as one likes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache


class Decoding:
    """Greedy steps from the same prompt, again and again, as ``generate`` takes them."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor, tokens: int) -> None:
        """
        Args:
            prompt: ids [batch, at least 2].
        """
        self._model, self._prompt, self._tokens = model, prompt, tokens
        self._cache = DynamicCache(config=model.config)
        model(input_ids=prompt[:, :-1], past_key_values=self._cache, logits_to_keep=1)

    def __call__(self, number: int) -> Tensor:
        """The ids, [batch, tokens]."""
        found = [self._prompt[:, -1:]]
        for _ in range(self._tokens):
            logits = self._model(input_ids=found[-1], past_key_values=self._cache, logits_to_keep=1).logits
            found.append(logits[:, -1:].argmax(-1))
        self._cache.crop(-self._tokens)
        return torch.cat(found[1:], dim=1)


class GraphDecoding:
    """The same steps over a cache of fixed size; on a GPU one step is a CUDA graph, so nothing waits for Python."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor, tokens: int) -> None:
        self._model, self._tokens, self._first = model, tokens, prompt[:, -1:]
        self._cache = StaticCache(model.config, max_cache_len=prompt.shape[1] + tokens)
        model(input_ids=prompt[:, :-1], past_key_values=self._cache, logits_to_keep=1)
        self._seen = [layer.cumulative_length.clone() for layer in self._layers()]
        self._ids = self._first.clone()
        self._advance: Callable[[], None] = self._step
        if prompt.device.type == "cuda":
            self._capture()

    def __call__(self, number: int) -> Tensor:
        self._rewind()
        found = []
        for _ in range(self._tokens):
            self._advance()
            found.append(self._ids.clone())
        return torch.cat(found, dim=1)

    def _step(self) -> None:
        logits = self._model(input_ids=self._ids, past_key_values=self._cache, logits_to_keep=1).logits
        self._ids.copy_(logits[:, -1:].argmax(-1))

    def _rewind(self) -> None:
        self._ids.copy_(self._first)
        for layer, seen in zip(self._layers(), self._seen, strict=True):
            layer.cumulative_length.copy_(seen)

    def _layers(self) -> list[Any]:
        return list(self._cache.layers)

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled and tuned before the capture
            for _ in range(2):
                self._rewind()
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._advance = graph.replay
