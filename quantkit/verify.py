"""Proof that a saved checkpoint reloads: read it back block by block and answer the probe as before the save.

The blocks in memory computed the probe with dense weights made from the codes; here the files alone are used, through
the modules that a user's load gets. What differs would be a name, a packing, a format that config.json does not say.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.integrations.transformers import QuantkitConfig, QuantkitHfQuantizer
from quantkit.kernels.dispatch import only_reference
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.skeleton import Skeleton
from quantkit.models.source import load_config
from quantkit.models.stream import BlockStream

PROBE_TOKENS = 32
TOLERANCE = 1e-3
"""Largest difference allowed, relative to the largest value of the block's output. Both sides compute in float32 from
the same stored numbers; rounding accounts for about 1e-6, a single wrong scale for far more than this."""


def probe_ids(vocab_size: int) -> Tensor:
    """[1, PROBE_TOKENS] token ids, the same for every run of a model."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (1, PROBE_TOKENS), generator=generator)


@torch.inference_mode()
def verify(
    folder: Path,
    probe_file: Callable[[int], Path],
    logits: Tensor,
    on_progress: Callable[[str, int, int], None],
    *,
    trust_remote_code: bool = False,
) -> float:
    """Reload ``folder`` and compare.

    Args:
        folder: a finished checkpoint.
        probe_file: block index -> safetensors with ``input`` and ``hidden``, [1, T, H] before and behind that block.
        logits: of the in-memory run, as ``BlockStream.logits`` gives them.

    Returns:
        The largest relative difference found.

    Raises:
        QuantkitError: tensors are missing or unknown, or a block answers differently.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint.open(folder)
    block = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    quantizer = QuantkitHfQuantizer(QuantkitConfig(**block))
    skeleton = Skeleton(config, checkpoint, quantizer=quantizer, trust_remote_code=trust_remote_code)
    skeleton.check(checkpoint)
    stream = BlockStream(skeleton, checkpoint, torch.float32)
    captured = stream.capture(probe_ids(skeleton.config.vocab_size))
    worst = 0.0
    hidden = captured.hidden
    for index in range(skeleton.num_blocks):
        expected = load_file(probe_file(index))
        prefix = skeleton.block_prefix(index)
        names = [prefix + name for name in skeleton.block_tensors(index)]
        tensors = {name.removeprefix(prefix): t for name, t in skeleton.read_tensors(names, checkpoint).items()}
        module = skeleton.build_block(index, tensors, torch.float32)
        with only_reference():
            difference = _difference(stream.run_block(module, expected["input"], index, captured), expected["hidden"])
        if difference > TOLERANCE:
            raise QuantkitError(
                f"the saved block {index} answers the probe differently from the one in memory "
                f"(relative difference {difference:.2e}, allowed {TOLERANCE:.0e}): nothing was published. "
                "This is a bug in quantkit; please report it with the recipe."
            )
        worst = max(worst, difference)
        hidden = expected["hidden"]
        on_progress("checking", index + 1, skeleton.num_blocks)
    difference = _difference(stream.logits(hidden, captured), logits)
    if difference > TOLERANCE:
        raise QuantkitError(
            "the saved final norm and head answer the probe differently from the source's (relative difference "
            f"{difference:.2e}): nothing was published. This is a bug in quantkit; please report it."
        )
    return max(worst, difference)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value; NaN must meet NaN."""
    if not torch.equal(found.isnan(), expected.isnan()):
        return float("inf")
    largest = expected.nan_to_num().abs().max().clamp(min=1e-30)
    return float((found - expected).nan_to_num().abs().max() / largest)
