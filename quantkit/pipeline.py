"""The order of the stages, and the only file that knows it.

Per block: read its tensors, transform, round each linear, write and commit, run the probe through it. One block is in
memory at a time. At the end the checkpoint is read back block by block and must answer the probe as the quantised
blocks did in memory.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantkit
from quantkit.blockwise import BlockQuantizer, QuantisedBlock
from quantkit.errors import QuantkitError, RecipeError
from quantkit.formats.config import native_config, portable_config
from quantkit.formats.layer import LayerFormat
from quantkit.formats.writer import RECIPE_FILE, CheckpointWriter, ResumableError, check_output, source_fingerprint
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.rotated import RotatedCheckpoint, rotate
from quantkit.models.skeleton import Skeleton
from quantkit.models.source import load_config, resolve
from quantkit.models.stream import BlockStream
from quantkit.plan import Plan, make_plan
from quantkit.presets import expand
from quantkit.process import Clock, give_back_memory, peak_rss
from quantkit.recipe import Recipe
from quantkit.steps import bind_steps
from quantkit.transforms.residual import fusion, obstacle
from quantkit.verify import probe_ids, verify

if TYPE_CHECKING:
    from quantkit.ahead import Ahead
    from quantkit.calibrate.session import Session
    from quantkit.transforms.interface import Solution

logger = logging.getLogger("quantkit")

OnProgress = Callable[[str, int, int], None]
"""Called with (stage, done, total) as the run goes on."""


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    output: Path
    format: str
    loads_in: str
    layers: int
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    """Stored bits per quantised weight, scales and everything else included."""
    seconds: float
    peak_rss_bytes: int
    warnings: tuple[str, ...]


def prepare(model: str, recipe: Recipe, *, trust_remote_code: bool = False) -> tuple[Plan, Skeleton, Checkpoint]:
    """Everything before the first block is read: resolve the model, check its files and shapes, make the plan.

    Skeleton and checkpoint are of the model that the blocks are taken from: rotated, if a step of the recipe wants the
    residual stream rotated.
    """
    source = resolve(model, trust_remote_code=trust_remote_code)
    config = load_config(source, trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint.open(source)
    skeleton = Skeleton(config, checkpoint, trust_remote_code=trust_remote_code)
    skeleton.check(checkpoint)
    steps = bind_steps(recipe)
    if steps.learn_steps and (steps.fuses != "always" or recipe.scheme.activations is None):
        raise RecipeError(
            f"learn_steps: {steps.learn_steps} with scheme {recipe.scheme.name}: a rotation is learned for what "
            "rounding of activations loses; give residual: always and a scheme such as W4A4, or leave learn_steps out."
        )
    if steps.fuses != "never":
        reason, must = obstacle(skeleton, checkpoint), steps.fuses == "always"
        if reason and must:
            raise RecipeError(
                f"step '{steps.transforms[0].method.name}' with residual: always: the residual stream cannot be "
                f"rotated: {reason}; leave residual out to rotate inputs at run time."
            )
        if not reason and (must or not fusion(skeleton).untied):
            skeleton, checkpoint = rotate(config, skeleton, checkpoint, recipe.seed)
    return make_plan(recipe, source, skeleton, checkpoint), skeleton, checkpoint


def quantize(
    model: str,
    *,
    output: str | Path,
    method: str | None = None,
    scheme: str | None = None,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    block_parallel: int | None = None,
    shared: str | Path | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress | None = None,
    **flags: Any,
) -> Result:
    """Quantise ``model`` into the folder ``output``.

    Args:
        model: hub id, local folder, or ``demo``.
        output: folder to create; must not exist or be empty unless ``overwrite``.
        method: preset, methods joined by ``+``: ``rtn``, ``sinq``, ``sinq+rtn``.
        scheme: ``W4A16G64`` and the like.
        recipe: a ``Recipe``, a mapping, or the path of a YAML/JSON file; what else is given overrides it.
        resume: go on after the blocks that an earlier, stopped run of the same recipe finished.
        block_parallel: solve the transforms of so many blocks at once, each in a process with one thread; only for
            transforms that look at the float model alone. None: one after the other, here. The result does not depend
            on the number.
        shared: folder where runs of one sweep leave calibration samples for each other; None: each makes its own, and
            the result is the same.
        flags: any other field of ``Recipe``: ``ignore``, ``format``, ``dtype``, ``seed``, ``allow_nonfinite``.

    Raises:
        RecipeError: the request cannot be carried out on this model; nothing was written.
        QuantkitError: the input is broken or the check of the saved checkpoint failed.
    """
    started = time.perf_counter()
    expanded = expand(recipe, method=method, scheme=scheme, **flags)
    output = Path(output)
    check_output(output, resolve(model, trust_remote_code=trust_remote_code), overwrite=overwrite)
    plan, skeleton, checkpoint = prepare(model, expanded, trust_remote_code=trust_remote_code)
    if block_parallel is not None:
        _check_block_parallel(block_parallel, plan)
    torch.manual_seed(expanded.seed)
    fingerprint = {"recipe": expanded.model_dump(mode="json"), "source": source_fingerprint(plan.source)}
    shards = skeleton.num_blocks + (2 if skeleton.extra_tensors() else 1)
    about = {"model": str(model), "versions": _versions(), "blocks": skeleton.num_blocks}
    about |= {name: value for name, value in plan.describe().items() if name != "layers"}
    writer = CheckpointWriter(output, plan.source, fingerprint, shards, about, overwrite=overwrite, resume=resume)
    try:
        run = _Run(plan, skeleton, checkpoint, writer, on_progress or (lambda stage, done, total: None))
        run.block_parallel = block_parallel
        run.shared = None if shared is None else Path(shared)
        result = run.all(started)
    except (ResumableError, KeyboardInterrupt) as stop:
        if not writer.done:
            writer.discard()
        elif isinstance(stop, KeyboardInterrupt):
            logger.warning("finished blocks are kept in %s: repeat the command with --resume to go on.", writer.folder)
        raise
    except QuantkitError:
        writer.discard()
        raise
    return result


class _Run:
    """One run over the blocks; state that lives longer than a block, and nothing that grows with the weights."""

    def __init__(
        self, plan: Plan, skeleton: Skeleton, checkpoint: Checkpoint, writer: CheckpointWriter, on_progress: OnProgress
    ) -> None:
        self.plan = plan
        self.recipe = plan.recipe
        self.skeleton = skeleton
        self.checkpoint = checkpoint
        self.writer = writer
        self.on_progress = on_progress
        self.block_parallel: int | None = None
        self.shared: Path | None = None
        self.formats: dict[str, LayerFormat] = {}
        self.warnings: list[str] = []
        self.noted: set[str] = set()
        self.quantizer = BlockQuantizer(plan, skeleton, checkpoint, self._warn, self._note)

    def all(self, started: float) -> Result:
        skeleton, writer = self.skeleton, self.writer
        self._learn_rotation()
        stream = BlockStream(skeleton, self.checkpoint, torch.float32)
        with torch.inference_mode(), self._calibration() as session, self._ahead(session) as ahead:
            captured = stream.capture(probe_ids(skeleton.config.vocab_size))
            hidden = captured.hidden
            for index in range(skeleton.num_blocks):
                began = Clock()
                float_states = None
                if session and session.carries_float:
                    float_states = session.outputs(self.quantizer.dense.float_module(index), "float")
                event = writer.done.get(f"block {index}")
                if event is None:
                    block = skeleton.read_block(index, self.checkpoint)
                    done = self.quantizer.quantise(block, session, self._solved(ahead, index))
                    del block
                    self.formats |= done.formats
                    after = stream.run_block(done.module, hidden, index, captured)
                    save_file({"input": hidden, "hidden": after}, self._probe_file(index))
                    self._commit(index, done, began)
                    hidden = after
                    module: nn.Module | None = done.module
                    del done
                else:
                    hidden = load_file(self._probe_file(index))["hidden"]
                    self.formats |= {row["layer"]: LayerFormat.model_validate(row["format"]) for row in event["layers"]}
                    module = self.quantizer.dense.restore(index, event, writer.read_shard(event)) if session else None
                if session and module:
                    session.advance(module, float_states)
                del module
                give_back_memory()
                self.on_progress("quantising", index + 1, skeleton.num_blocks)
            self._rest()
            logits = stream.logits(hidden, captured)
        writer.finish_weights()
        config = self._config()
        writer.write_side_files({RECIPE_FILE: self.recipe.to_yaml(), "README.md": self._card()})
        writer.write_config(config)
        worst = verify(
            writer.folder, self._probe_file, logits, self.on_progress, trust_remote_code=skeleton.trust_remote_code
        )
        for index in range(skeleton.num_blocks):
            self._probe_file(index).unlink()
        (writer.folder / "rotation.tmp").unlink(missing_ok=True)
        result = self._result(started)
        writer.record({"event": "end", "probe_difference": worst, **_summary(result)})
        writer.publish()
        return result

    def _learn_rotation(self) -> None:
        """Learn the rotation of the residual stream, or take up what a stopped run has learned."""
        if not self.plan.steps.learn_steps or not isinstance(self.checkpoint, RotatedCheckpoint):
            return
        file = self.writer.folder / "rotation.tmp"
        if not file.exists():
            from quantkit.calibrate.rotation import learn_residual

            learned = learn_residual(self.plan, self.skeleton, self.checkpoint, self._windows)
            unfinished = file.with_name("rotation-unfinished.tmp")
            save_file({"matrix": learned.matrix}, unfinished)
            unfinished.replace(file)
            facts = {"loss_before": learned.before, "loss": learned.after}
            text = f"learned, error of rounded inputs {learned.before:.3g} -> {learned.after:.3g}"
            self.writer.record({"event": "rotation", "residual": text, **facts})
        self.checkpoint.turn_further(load_file(file)["matrix"])

    def _calibration(self) -> AbstractContextManager[Session | None]:
        """The calibration of the run, if a method of it wants statistics."""
        if self.plan.calibration is None:
            return nullcontext()
        from quantkit.calibrate.session import Session  # only here: tokenizers take a while to import

        return Session(self.plan, self.skeleton, self.checkpoint, self._warn, windows=self._windows)

    @cached_property
    def _windows(self) -> Tensor:
        """The calibration samples: the same for all that is learned in the run."""
        from quantkit.calibrate.session import read_windows

        return read_windows(self.plan, self.skeleton, self.shared)

    def _ahead(self, session: Session | None) -> AbstractContextManager[Ahead | None]:
        """The workers that solve blocks ahead, if the run has them."""
        if self.block_parallel is None or session is None:
            return nullcontext()
        from quantkit.ahead import Ahead

        done = {index for index in range(self.skeleton.num_blocks) if f"block {index}" in self.writer.done}
        return Ahead(self.plan, self.skeleton, self.checkpoint, session, self.block_parallel, done)

    def _solved(self, ahead: Ahead | None, index: int) -> list[Solution] | None:
        if ahead is None:
            return None
        solved = ahead.solved(index)
        for text in solved.warnings:
            self._warn(text)
        for text in solved.notes:
            self._note(text)
        return solved.solutions

    def _commit(self, index: int, done: QuantisedBlock, began: Clock) -> None:
        event = {
            "block": index,
            "layers": done.rows,
            "kept": done.kept,
            "transforms": done.transforms,
            "tuning": done.tuning,
            **began.elapsed(),
            "peak_rss_bytes": peak_rss(),
        }
        self.writer.write_shard(f"block {index}", index + 2, done.tensors, event)

    def _rest(self) -> None:
        """Tensors outside the blocks, and those that the model itself does not load, as they are."""
        groups = {"outside the blocks": [self.skeleton.checkpoint_name(name) for name in self.skeleton.other_tensors()]}
        if self.skeleton.extra_tensors():
            groups["extra"] = list(self.skeleton.extra_tensors())
        for key, names in groups.items():
            if key in self.writer.done:
                continue
            present = [name for name in names if name in self.checkpoint.names]
            tensors = self.checkpoint.read_many(present)
            if key != "extra":
                tensors = {name: tensor.to(self.quantizer.kept_dtype(tensor.dtype)) for name, tensor in tensors.items()}
            number = 1 if key != "extra" else self.writer.shards
            self.writer.write_shard(key, number, tensors, {})

    def _config(self) -> dict[str, Any]:
        """The source's config.json with our block, and what else is not as it was: the dtype, tied embeddings."""
        config: dict[str, Any] = json.loads((self.plan.source / "config.json").read_text(encoding="utf-8"))
        kept = self._linears_left_alone()
        if self.plan.format == "compressed-tensors":
            config["quantization_config"] = portable_config(self.formats, ignore=kept)
        else:
            config["quantization_config"] = native_config(self.formats, ignore=kept, kv=self.plan.kv)
        if self.recipe.dtype != "auto":
            config.pop("torch_dtype", None)
            config["dtype"] = self.recipe.dtype
        if isinstance(self.checkpoint, RotatedCheckpoint) and self.checkpoint.untied:
            config["tie_word_embeddings"] = False
        return config

    def _linears_left_alone(self) -> list[str]:
        """Names of every linear in full precision: heads, ignored or broken layers, routers.

        Routers are no nn.Linear in transformers but are linears to vLLM, which knows them by their stored names.
        """
        skeleton = self.skeleton
        kept = {name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Linear)}
        kept |= {layer.name for layer in self.plan.layers}  # experts are no modules of their own
        for index in range(skeleton.num_blocks):
            prefix = skeleton.block_prefix(index)
            matrices = {f"{prefix}{name}" for name in skeleton.block_tensors(index) if name.endswith(".weight")}
            routers = {name for name in matrices if len(skeleton.tensor_info(name, self.checkpoint).shape) == 2}
            routers -= {f"{name}.weight" for name in kept}
            kept |= {skeleton.checkpoint_name(name).removesuffix(".weight") for name in routers}
        return sorted(kept - self.formats.keys())

    def _card(self) -> str:
        steps = " + ".join(step.method for step in self.recipe.steps)
        return (
            "---\nbase_model_relation: quantized\ntags:\n- quantkit\n---\n"
            f"Quantised with quantkit {quantkit.__version__}: {steps}, {self.recipe.scheme.name}. "
            f"Loads in {self.plan.loads_in}. The recipe is in {RECIPE_FILE}.\n"
        )

    def _result(self, started: float) -> Result:
        events = [event for key, event in self.writer.done.items() if key.startswith("block ")]
        rows = [row for event in events for row in event["layers"]]
        weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
        return Result(
            output=self.writer.output,
            format=self.plan.format,
            loads_in=self.plan.loads_in,
            layers=len(rows),
            source_bytes=self.checkpoint.source_bytes,
            output_bytes=sum(event["bytes"] for event in self.writer.done.values()),
            bits_per_weight=8 * sum(row["bytes"] for row in rows) / max(weights, 1),
            seconds=time.perf_counter() - started,
            peak_rss_bytes=peak_rss(),
            warnings=tuple(self.warnings),
        )

    def _probe_file(self, index: int) -> Path:
        return self.writer.folder / f"probe-{index:05d}.tmp"

    def _note(self, text: str) -> None:
        """Something about the model that holds for the whole run: said once."""
        if text not in self.noted:
            self.noted.add(text)
            logger.info(text)

    def _warn(self, text: str) -> None:
        if text not in self.warnings:  # what a worker said of a block is found again when it is carried out
            self.warnings.append(text)
            logger.warning(text)


def _check_block_parallel(workers: int, plan: Plan) -> None:
    """
    Raises:
        RecipeError: no worker, or blocks that cannot be solved apart.
    """
    if workers < 1:
        raise RecipeError(f"--block-parallel {workers}: give the number of worker processes, at least 1.")
    from quantkit.ahead import check_independent

    check_independent(plan.steps)


def _versions() -> dict[str, str]:
    return {"quantkit": quantkit.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _summary(result: Result) -> dict[str, Any]:
    return {
        "linears": result.layers,
        "format": result.format,
        "output_bytes": result.output_bytes,
        "bits_per_weight": result.bits_per_weight,
        "seconds": round(result.seconds, 3),
        "peak_rss_bytes": result.peak_rss_bytes,
        "warnings": list(result.warnings),
    }
