"""Solve the transforms of several blocks at once, in worker processes.

Where everything that a transform looks at is of the float model, blocks do not depend on each other: a worker gets what
enters its block and returns what it learned, and the run carries that out when it comes to the block. The float stream
is ahead of the run by as many blocks as there are workers. Each worker computes in one thread, so that the result does
not depend on how many there are.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.blockwise import BlockQuantizer
from quantkit.calibrate.session import Session
from quantkit.errors import QuantkitError, RecipeError
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.plan import Plan
from quantkit.steps import Steps
from quantkit.transforms.interface import Solution


@dataclass(frozen=True)
class Solved:
    """What a worker returns."""

    solutions: list[Solution]
    """One per transform of the recipe; none for a block that cannot be transformed."""
    warnings: list[str]
    notes: list[str]


@dataclass(frozen=True)
class _Task:
    model: str
    trust_remote_code: bool
    recipe: dict[str, Any]
    windows: Tensor
    """[samples, tokens] int64"""
    index: int
    inputs: Path
    """Folder with the batches of what enters the block."""
    broken: dict[int, int]


def check_independent(steps: Steps) -> None:
    """
    Raises:
        RecipeError: a transform looks at what the quantised blocks make of the samples, or none looks at samples.
    """
    looking = [step for step in steps.transforms if step.needs_data]
    if not looking:
        raise RecipeError("--block-parallel needs a transform that learns, for example flatquant; leave it out.")
    for step in looking:
        aims = getattr(step.config, "target", "float")
        if step.stream != "float" or aims != "float":
            raise RecipeError(
                f"--block-parallel: {step.method.name} looks at what the quantised blocks make of the samples, so one "
                "block waits for the other; leave it out, or use a transform with options inputs: float and "
                "target: float (flatquant has them)."
            )


class Ahead:
    """The solutions of all blocks in order, computed ahead of the run.

    Use as a context manager: it ends the workers and removes what was put on disk.
    """

    def __init__(
        self,
        plan: Plan,
        skeleton: Skeleton,
        checkpoint: Checkpoint,
        session: Session,
        workers: int,
        done: Collection[int],
    ) -> None:
        """
        Args:
            session: standing before block 0; its samples are used.
            workers: blocks at a time, at least 1.
            done: blocks that need no solution.
        """
        self._plan, self._skeleton, self._checkpoint = plan, skeleton, checkpoint
        self._workers, self._done = workers, done
        self._windows = session.windows
        self._floats = Session(plan, skeleton, checkpoint, _silent, names=("float",), windows=self._windows)
        self._quantizer = BlockQuantizer(plan, skeleton, checkpoint, _silent, _silent)
        self._folder = Path(tempfile.mkdtemp(prefix="quantkit-ahead-"))
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)
        self._waiting: deque[tuple[int, Future[Solved]]] = deque()

    def solved(self, index: int) -> Solved:
        """The solutions for block ``index``; to be called for each block that is not done, in order.

        Raises:
            QuantkitError: a worker died, for lack of memory perhaps.
        """
        # One more than work at a time: none has to wait for the run to write a block.
        while len(self._waiting) <= self._workers and self._floats.streams.block < self._skeleton.num_blocks:
            self._submit()
        found, future = self._waiting.popleft()
        if found != index:
            raise RuntimeError(f"block {found} comes next, asked for {index}")
        try:
            solved = future.result()
        except BrokenProcessPool:
            raise QuantkitError(
                f"a worker process of block {index} died, perhaps for lack of memory; "
                "use a smaller --block-parallel and --resume."
            ) from None
        shutil.rmtree(self._inputs(index))
        return solved

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._floats.streams.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _submit(self) -> None:
        """Hand the next block to a worker, and take the float stream behind it."""
        streams, last = self._floats.streams, self._skeleton.num_blocks - 1
        index = streams.block
        if index not in self._done:
            folder = self._inputs(index)
            folder.mkdir()
            for number in range(streams.batches):
                save_file({"hidden": streams.states["float"].batch(number)}, folder / f"{number}.safetensors")
            task = _Task(
                model=str(self._plan.source),
                trust_remote_code=self._skeleton.trust_remote_code,
                recipe=self._plan.recipe.model_dump(mode="json"),
                windows=self._windows,
                index=index,
                inputs=folder,
                broken=dict(streams.broken),
            )
            self._waiting.append((index, self._pool.submit(_solve, task)))
        if index == last:
            streams.block += 1
        else:
            streams.advance({"float": self._quantizer.dense.float_module(index)})

    def _inputs(self, index: int) -> Path:
        return self._folder / str(index)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _solve(task: _Task) -> Solved:
    """In a worker: everything that the transforms find out about one block."""
    from quantkit.pipeline import prepare
    from quantkit.recipe import Recipe

    warnings: list[str] = []
    notes: list[str] = []
    recipe = Recipe.model_validate(task.recipe)
    torch.manual_seed(recipe.seed)
    plan, skeleton, checkpoint = prepare(task.model, recipe, trust_remote_code=task.trust_remote_code)
    session = Session(plan, skeleton, checkpoint, warnings.append, names=("float",), windows=task.windows)
    with torch.inference_mode(), session:
        streams = session.streams
        for number in range(streams.batches):
            streams.states["float"].replace(number, load_file(task.inputs / f"{number}.safetensors")["hidden"])
        streams.block, streams.broken = task.index, task.broken
        quantizer = BlockQuantizer(plan, skeleton, checkpoint, warnings.append, notes.append)
        solutions = quantizer.solve(skeleton.read_block(task.index, checkpoint), session)
    return Solved(solutions, warnings, notes)


def _silent(_: str) -> None:
    """The run says it."""
