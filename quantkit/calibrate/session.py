"""The calibration of one run: its samples, on their way through the blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from quantkit.calibrate.data import token_windows
from quantkit.calibrate.hidden import HiddenStates
from quantkit.calibrate.observe import BlockStatistics, observe
from quantkit.calibrate.replay import Call, Replay, owner_of
from quantkit.calibrate.shared import shared_windows
from quantkit.calibrate.statistics import Want
from quantkit.calibrate.streams import StreamName, Streams
from quantkit.errors import QuantkitError
from quantkit.layers.quant_experts import split_experts
from quantkit.models.block import Site
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.models.stream import BlockStream
from quantkit.plan import Plan
from quantkit.transforms.interface import Lesson
from quantkit.tuning.samples import usable_in_autograd


class Session:
    """Hidden states of the samples before the current block, as the finished blocks make them.

    Use as a context manager: it removes what was put on disk.

    Raises:
        QuantkitError: as ``read_windows``.
    """

    def __init__(
        self,
        plan: Plan,
        skeleton: Skeleton,
        checkpoint: Checkpoint,
        warn: Callable[[str], None],
        *,
        names: Sequence[StreamName] | None = None,
        windows: Tensor | None = None,
    ) -> None:
        """
        Args:
            names: the streams to carry; None: those that the plan needs.
            windows: [samples, tokens] of ``read_windows``; None: read now.
        """
        assert plan.calibration is not None
        self._settings = plan.calibration
        self._experts = skeleton.expert_names
        if windows is None:
            windows = read_windows(plan, skeleton)
        self.windows = windows
        """Token ids of the samples, [samples, tokens]."""
        names = plan.streams if names is None else names
        stream = BlockStream(skeleton, checkpoint, torch.float32)
        self.streams = Streams(
            stream,
            windows,
            names=names,
            batch_size=self._settings.batch_size,
            max_bytes=_share(self._settings.max_memory_bytes, len(names)),
            warn=warn,
        )
        self.carries_float = "float" in names

    def observe(
        self,
        module: nn.Module,
        names: Collection[str],
        want: Collection[Want],
        *,
        reference: nn.Module | None = None,
        skip_first: int = 1,
        stream: StreamName = "quantised",
    ) -> BlockStatistics:
        """Statistics of what enters the modules ``names`` when ``module`` is the current block.

        Args:
            reference: what the float stream goes through for ``cross``; None: ``module``.
            skip_first: positions at the start of a sample that only second moments see; see ``observe``.
            stream: the one that is observed.
        """
        return observe(
            self.streams,
            module,
            names,
            want,
            experts=self._experts,
            seed=self._settings.seed,
            skip_first=skip_first if self.streams.tokens > 1 else 0,
            reference=reference,
            stream=stream,
        )

    def outputs(self, module: nn.Module, stream: StreamName = "quantised") -> HiddenStates:
        """What ``module`` as the current block makes of a stream, which stays where it is."""
        states = self.streams.new_states()
        for number in range(self.streams.batches):
            states.replace(number, self.streams.run(stream, number, module))
        return states

    def lessons(
        self, module: nn.Module, names: Collection[str], prepare: Callable[[nn.Module], None]
    ) -> Callable[[Sequence[StreamName]], Lesson]:
        """A function that gives the ``Lesson`` about ``module``, the current block, whose targets are the mean of what
        it makes of the given streams.

        Args:
            module: its merged experts are taken apart if one of them is in ``names``; only when a lesson is asked for.
            names: paths of modules that other weights may be tried in.
            prepare: called with ``module`` once there are targets: makes it round what is not learned.
        """

        def lesson(streams: Sequence[StreamName]) -> Lesson:
            targets = self.streams.new_states()
            for number in range(self.streams.batches):
                outputs = [self.streams.run(name, number, module) for name in streams]
                targets.replace(number, torch.stack(outputs).mean(0) if len(outputs) > 1 else outputs[0])
            split_experts(module, names, self._experts)
            usable_in_autograd(module)
            prepare(module)
            return Lesson(module, self.streams, targets)

        return lesson

    def replays(self, module: nn.Module, linears: Collection[str]) -> Callable[[Site, int], Replay]:
        """A function that gives the ``Replay`` of a site of ``module``, the current block, on about so many tokens.

        Args:
            module: its merged experts are taken apart if one of them is in ``linears``.
            linears: paths that are going to be replaced.
        """
        split_experts(module, linears, self._experts)

        def replay(site: Site, tokens: int) -> Replay:
            path = site.consumers[0] if site.kind == "linear" else owner_of(site) or site.consumers[0]
            return Replay(module.get_submodule(path), f"{path}.", self._record(module, path, tokens))

        return replay

    def _record(self, module: nn.Module, path: str, tokens: int) -> list[Call]:
        """The calls of ``path`` for the first samples, as many as make ``tokens`` tokens, whatever the batch size."""
        calls: list[Call] = []
        wanted = -(-tokens // self.streams.tokens)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            if x.shape[:2] != mask.shape:  # of an expert: the rows that were routed to it
                calls.append(Call(args, kwargs, None))
                return
            first = min(len(mask), wanted - start)
            counts = mask[:first]
            if first < len(mask) != mask.shape[1]:
                args, kwargs = _first(args, first, len(mask)), _first(kwargs, first, len(mask))
            elif first < len(mask):  # which dimension is the batch cannot be told
                counts = torch.cat((counts, torch.zeros_like(mask[first:])))
            calls.append(Call(args, kwargs, None if bool(counts.all()) else counts))

        handle = module.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with torch.inference_mode(False):
                for number in range(self.streams.batches):
                    mask, start = self.streams.token_mask(number), self.streams.samples(number).start
                    if start >= wanted:
                        break
                    self.streams.run("quantised", number, module)
        finally:
            handle.remove()
        return calls

    def advance(self, module: nn.Module, float_states: HiddenStates | None) -> None:
        """Take the samples behind the current block.

        Args:
            module: the block as it is stored.
            float_states: what the block as it came makes of the float stream, if that is carried.
        """
        outputs: dict[StreamName, nn.Module | HiddenStates] = {"quantised": module}
        if float_states is not None:
            outputs["float"] = float_states
        self.streams.advance(outputs)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.streams.close()


def read_windows(plan: Plan, skeleton: Skeleton, shared: Path | None = None) -> Tensor:
    """The calibration samples of ``plan``, [samples, tokens] int64.

    Args:
        shared: folder for samples of several runs of the same sweep (``shared_windows``); None: made for this one.

    Raises:
        QuantkitError: the model has no tokenizer, or the text cannot be used (``token_windows``).
    """
    settings = plan.calibration
    assert settings is not None

    def make() -> Tensor:
        return token_windows(
            settings,
            _tokenizer(plan, skeleton),
            vocab_size=skeleton.config.vocab_size,
            load_model=lambda: _float_model(plan, skeleton),
        )

    return make() if shared is None else shared_windows(shared, plan.source, settings, make)


def _share(max_bytes: int | None, streams: int) -> int | None:
    """Bytes for one store: every stream has one, and another one while it is taken through a block."""
    return None if max_bytes is None else max_bytes // (streams + 1)


def _first(value: Any, rows: int, batch: int) -> Any:
    """``value`` (arguments of a module) for the first ``rows`` samples of a batch of ``batch``."""
    if isinstance(value, Tensor):
        # ALiBi is [batch * heads, 1, tokens], samples one after the other
        parts = value.shape[0] // batch if value.dim() == 3 else 1
        return value[: rows * parts] if value.dim() and parts and value.shape[0] == batch * parts else value
    if isinstance(value, dict):
        return {key: _first(part, rows, batch) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_first(part, rows, batch) for part in value)
    return value


def _tokenizer(plan: Plan, skeleton: Skeleton) -> Any:
    try:
        return AutoTokenizer.from_pretrained(plan.source, trust_remote_code=skeleton.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise QuantkitError(
            f"{plan.source} has no tokenizer that can be loaded ({reason}): calibration turns text into tokens; "
            "put the model's tokenizer files into its folder, or use a method that needs no data."
        ) from None


def _float_model(plan: Plan, skeleton: Skeleton) -> PreTrainedModel:
    """The source model as a whole; text can only be generated by all of it."""
    from quantkit.loading import check_writes_text, load

    model, _ = load(plan.source, trust_remote_code=skeleton.trust_remote_code)
    check_writes_text(model, "calibration text that the model writes itself")
    return model
