"""The order of the stages, and the only file that knows it.

Per block: read its tensors, transform, round each linear, write and commit, run the probe through it. One block is in
memory at a time. At the end the checkpoint is read back block by block and must answer the probe as the quantised
blocks did in memory.
"""

from __future__ import annotations

import ctypes
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import quantkit
from quantkit.blockwise import BlockQuantizer, QuantisedBlock
from quantkit.errors import QuantkitError
from quantkit.formats.config import native_config, portable_config
from quantkit.formats.layer import LayerFormat
from quantkit.formats.writer import RECIPE_FILE, CheckpointWriter, ResumableError, check_output, source_fingerprint
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.models.source import load_config, resolve
from quantkit.models.stream import BlockStream
from quantkit.plan import Plan, make_plan
from quantkit.presets import expand
from quantkit.recipe import Recipe
from quantkit.verify import probe_ids, verify

if TYPE_CHECKING:
    from quantkit.calibrate.session import Session

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
    """Everything before the first weight is read: resolve the model, check its files and shapes, make the plan."""
    source = resolve(model, trust_remote_code=trust_remote_code)
    config = load_config(source, trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint.open(source)
    skeleton = Skeleton(config, checkpoint, trust_remote_code=trust_remote_code)
    skeleton.check(checkpoint)
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
    torch.manual_seed(expanded.seed)
    fingerprint = {"recipe": expanded.model_dump(mode="json"), "source": source_fingerprint(plan.source)}
    shards = skeleton.num_blocks + (2 if skeleton.extra_tensors() else 1)
    about = {"model": str(model), "versions": _versions()} | {k: v for k, v in plan.describe().items() if k != "layers"}
    writer = CheckpointWriter(output, plan.source, fingerprint, shards, about, overwrite=overwrite, resume=resume)
    try:
        run = _Run(plan, skeleton, checkpoint, writer, on_progress or (lambda stage, done, total: None))
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
        self.formats: dict[str, LayerFormat] = {}
        self.warnings: list[str] = []
        self.noted: set[str] = set()
        self.quantizer = BlockQuantizer(plan, skeleton, checkpoint, self._warn, self._note)

    def all(self, started: float) -> Result:
        skeleton, writer = self.skeleton, self.writer
        stream = BlockStream(skeleton, self.checkpoint, torch.float32)
        with torch.inference_mode(), self._calibration() as session:
            captured = stream.capture(probe_ids(skeleton.config.vocab_size))
            hidden = captured.hidden
            for index in range(skeleton.num_blocks):
                began = time.perf_counter()
                float_states = None
                if session and session.carries_float:
                    float_states = session.outputs(self.quantizer.float_module(index), "float")
                event = writer.done.get(f"block {index}")
                if event is None:
                    block = skeleton.read_block(index, self.checkpoint)
                    done = self.quantizer.quantise(block, session)
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
                    module = self.quantizer.restore(index, event, writer.read_shard(event)) if session else None
                if session and module:
                    session.advance(module, float_states)
                del module
                _give_back_memory()
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
        result = self._result(started)
        writer.record({"event": "end", "probe_difference": worst, **_summary(result)})
        writer.publish()
        return result

    def _calibration(self) -> AbstractContextManager[Session | None]:
        """The calibration of the run, if a method of it wants statistics."""
        if self.plan.calibration is None:
            return nullcontext()
        from quantkit.calibrate.session import Session  # only here: tokenizers take a while to import

        return Session(self.plan, self.skeleton, self.checkpoint, self._warn)

    def _commit(self, index: int, done: QuantisedBlock, began: float) -> None:
        event = {
            "block": index,
            "layers": done.rows,
            "kept": done.kept,
            "transforms": done.transforms,
            "tuning": done.tuning,
            "seconds": round(time.perf_counter() - began, 3),
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
        """The source's config.json with our block, and the dtype if the recipe changes it."""
        config: dict[str, Any] = json.loads((self.plan.source / "config.json").read_text(encoding="utf-8"))
        kept = self._linears_left_alone()
        build = portable_config if self.plan.format == "compressed-tensors" else native_config
        config["quantization_config"] = build(self.formats, ignore=kept)
        if self.recipe.dtype != "auto":
            config.pop("torch_dtype", None)
            config["dtype"] = self.recipe.dtype
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
            source_bytes=self.checkpoint.nbytes,
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
        self.warnings.append(text)
        logger.warning(text)


def _versions() -> dict[str, str]:
    return {"quantkit": quantkit.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _give_back_memory() -> None:
    """Hand freed memory back to the system: what glibc keeps in its arenas would add up from block to block."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in musl
        if trim is not None:
            trim(0)


def peak_rss() -> int:
    """Largest resident set of this process so far, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says on Linux begins with the size of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
