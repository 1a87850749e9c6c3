"""The order of the stages, and the only file that knows it.

Per block: read its tensors, transform, round each linear, write and commit, run the probe through it. One block is in
memory at a time. At the end the checkpoint is read back block by block and must answer the probe as the quantised
blocks did in memory.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantkit
from quantkit.errors import QuantkitError
from quantkit.formats.config import native_config, portable_config
from quantkit.formats.layer import LayerFormat, to_tensors
from quantkit.formats.quantized import QuantizedWeight
from quantkit.formats.writer import RECIPE_FILE, CheckpointWriter, ResumableError, check_output, source_fingerprint
from quantkit.layers.simulate import simulate_inputs
from quantkit.models.block import Block
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.models.source import load_config, resolve
from quantkit.models.stream import BlockStream, Captured
from quantkit.plan import Plan, make_plan
from quantkit.presets import expand
from quantkit.recipe import Recipe
from quantkit.transforms import fold
from quantkit.verify import probe_ids, verify

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

    def all(self, started: float) -> Result:
        skeleton, writer = self.skeleton, self.writer
        stream = BlockStream(skeleton, self.checkpoint, torch.float32)
        with torch.inference_mode():
            captured = stream.capture(probe_ids(skeleton.config.vocab_size))
            hidden = captured.hidden
            for index in range(skeleton.num_blocks):
                key = f"block {index}"
                if key in writer.done:
                    self._restore(writer.done[key])
                    hidden = load_file(self._probe_file(index))["hidden"]
                else:
                    hidden = self._one_block(index, hidden, stream, captured)
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

    def _one_block(self, index: int, hidden: Tensor, stream: BlockStream, captured: Captured) -> Tensor:
        began = time.perf_counter()
        block = self.skeleton.read_block(index, self.checkpoint)
        broken = self._nonfinite(block)
        wanted = {
            info.name
            for info in block.linears
            if self.plan.layer(block.prefix + info.name).format is not None and info.name not in broken
        }
        online, column_scale = self._transform(block, wanted) if not broken else ({}, {})
        activations = self.recipe.scheme.activations
        tensors: dict[str, Tensor] = {}
        input_scales: dict[str, Tensor | None] = {}
        rows = []
        for info in block.linears:
            name = block.prefix + info.name
            if info.name not in wanted:
                continue
            planned = self.plan.layer(name).format
            assert planned is not None
            layer = planned.model_copy(update={"input_scale": info.name in online})
            weight = block.weight(info.name)
            quantised, input_scale = self._round(weight, layer, online.get(info.name))
            stored = to_tensors(quantised, layer, input_scale)
            for suffix, tensor in stored.items():
                tensors[self.skeleton.checkpoint_name(f"{name}.{suffix}")] = tensor
            dense = quantised.dequantize()
            effective = dense if input_scale is None else dense * input_scale.float()
            error = _relative_error(weight, effective, column_scale.get(info.name))
            input_scales[info.name] = input_scale
            block.tensors[f"{info.name}.weight"] = dense if activations else effective
            self.formats[name] = layer
            rows.append(
                {
                    "layer": name,
                    "stored": self.skeleton.checkpoint_name(f"{name}.weight").removesuffix(".weight"),
                    "shape": [info.out_features, info.in_features],
                    "format": layer.model_dump(mode="json"),
                    "bytes": sum(tensor.nbytes for tensor in stored.values()),
                    "error": error,
                }
            )
        self._keep_the_rest(block, wanted, tensors)
        module = self.skeleton.build_block(index, block.tensors, torch.float32)
        if activations:
            simulate_inputs(module, activations, input_scales, self.skeleton.expert_names)
        after = stream.run_block(module, hidden, index, captured)
        save_file({"input": hidden, "hidden": after}, self._probe_file(index))
        event = {
            "block": index,
            "layers": rows,
            "kept": sorted(block.prefix + name for name in broken),
            "seconds": round(time.perf_counter() - began, 3),
            "peak_rss_bytes": peak_rss(),
        }
        self.writer.write_shard(f"block {index}", index + 2, tensors, event)
        return after

    def _nonfinite(self, block: Block) -> set[str]:
        """Linears with NaN or Inf. Without ``allow_nonfinite`` the first broken tensor ends the run."""
        bad = [name for name, tensor in block.tensors.items() if not _finite(tensor)]
        if bad and not self.recipe.allow_nonfinite:
            name = self.skeleton.checkpoint_name(block.prefix + bad[0])
            file = self.skeleton.tensor_info(block.prefix + bad[0], self.checkpoint).file
            raise QuantkitError(
                f"tensor {name} in {file} holds NaN or Inf: the source is damaged, fetch it again; "
                "--allow-nonfinite keeps such layers in full precision and goes on."
            )
        linears = {info.name for info in block.linears}
        owners = {name.rsplit(".", 1)[0] for name in bad}
        for owner in sorted(owners):
            self._warn(f"{block.prefix}{owner} holds NaN or Inf: kept in full precision, block not transformed.")
        return (owners & linears) or ({""} if owners else set())

    def _transform(self, block: Block, wanted: set[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Apply the transforms in order.

        Returns:
            Per linear the input-column scale [in_features] that stays online, and the column scale by which the
            stored weight differs from the source's (online or folded), both float32.
        """
        weights = self.recipe.scheme.weights
        assert weights is not None
        online: dict[str, Tensor] = {}
        total: dict[str, Tensor] = {}
        for step in self.plan.transforms:
            solution = step.module.solve(block, wanted, weights, step.config)
            for site in block.sites:
                if site.name not in solution.sites:
                    continue
                applied = fold.apply_scale(block, site, solution.sites[site.name], wanted)
                for consumer in site.consumers:
                    columns = fold.consumer_columns(site, applied)
                    total[consumer] = total[consumer] * columns if consumer in total else columns
            for name, scale in solution.linears.items():
                online[name] = online[name] * scale if name in online else scale
        for name, scale in online.items():
            total[name] = total[name] * scale if name in total else scale
        return online, total

    def _round(
        self, weight: Tensor, layer: LayerFormat, online: Tensor | None
    ) -> tuple[QuantizedWeight, Tensor | None]:
        """Codes for ``weight``; the input scale is rounded to its stored dtype before the weight is divided by it."""
        step = self.plan.rounding
        dtype = self.plan.scale_dtype
        if online is None:
            return step.module.quantize(weight, layer.weights, dtype, step.config), None
        stored = online.to(dtype)
        return step.module.quantize(weight / stored.float(), layer.weights, dtype, step.config), stored

    def _keep_the_rest(self, block: Block, quantised: set[str], tensors: dict[str, Tensor]) -> None:
        """Everything of the block that is not quantised, in the dtype it had (or the one asked for)."""
        for local, tensor in block.tensors.items():
            owner, _, leaf = local.rpartition(".")
            if owner in quantised and leaf == "weight":
                continue
            name = self.skeleton.checkpoint_name(block.prefix + local)
            tensors[name] = tensor.to(self._kept_dtype(block.stored_dtypes[local]))
            block.tensors[local] = tensors[name].float() if tensor.is_floating_point() else tensor

    def _kept_dtype(self, stored: torch.dtype) -> torch.dtype:
        if self.recipe.dtype == "auto" or not stored.is_floating_point:
            return stored
        return self.plan.scale_dtype

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
                tensors = {name: tensor.to(self._kept_dtype(tensor.dtype)) for name, tensor in tensors.items()}
            number = 1 if key != "extra" else self.writer.shards
            self.writer.write_shard(key, number, tensors, {})

    def _restore(self, event: Mapping[str, Any]) -> None:
        for row in event["layers"]:
            self.formats[row["layer"]] = LayerFormat.model_validate(row["format"])
        for name in event["kept"]:
            self._warn(f"{name} holds NaN or Inf: kept in full precision.")

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

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        logger.warning(text)


def _versions() -> dict[str, str]:
    return {"quantkit": quantkit.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def peak_rss() -> int:
    """Largest resident set of this process so far, bytes."""
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


def _finite(tensor: Tensor) -> bool:
    # The sum is NaN or Inf as soon as one element is; half the time of isfinite().all(), no mask in memory.
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum(dtype=torch.float64)))


def _relative_error(weight: Tensor, dense: Tensor, column_scale: Tensor | None) -> float:
    """Frobenius norm of the error over the weight's, measured on the source's columns (folded scales undone)."""
    columns = torch.ones(weight.shape[1]) if column_scale is None else column_scale.float()
    error = torch.linalg.vector_norm(dense - weight, dim=0)  # per column: the scale then costs nothing
    norm = float((torch.linalg.vector_norm(weight, dim=0) * columns).norm())
    return float((error * columns).norm()) / norm if norm else 0.0
