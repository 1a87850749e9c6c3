"""Learn the rotation of the residual stream from what its readers see in the float model, all blocks together."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.calibrate.session import Session
from quantkit.calibrate.statistics import Want
from quantkit.learn.rotation import Learned, learn_rotation
from quantkit.models.rotated import RotatedCheckpoint
from quantkit.models.skeleton import Skeleton
from quantkit.plan import Plan

_VALUES = 2**25
"""Of all samples together, float32: 128 MiB."""


def learn_residual(plan: Plan, skeleton: Skeleton, checkpoint: RotatedCheckpoint, windows: Tensor) -> Learned:
    """What to turn ``checkpoint`` further by, learned in one pass of the calibration samples through its blocks.

    One block is in memory at a time, and a sample of the rows that enter the readers of each norm.

    Args:
        windows: the samples, [samples, tokens] int64.
    """
    activations = plan.recipe.scheme.activations
    assert activations is not None
    width = int(skeleton.config.hidden_size)
    per_input = max(_VALUES // (2 * skeleton.num_blocks * width), 1)  # two norms in a block
    samples = []

    def warn(text: str) -> None:
        """The run says the same again."""

    with Session(plan, skeleton, checkpoint, warn, names=("quantised",), windows=windows) as session:
        for index in range(skeleton.num_blocks):
            tensors = skeleton.read_block(index, checkpoint).tensors
            module = skeleton.build_block(index, tensors, torch.float32)
            readers = [site.consumers[0] for site in skeleton.sites(index) if site.kind != "linear"]
            want: tuple[Want, ...] = ("rows",)
            seen = session.observe(module, readers, want)
            for name in readers:
                rows = seen.inputs[name].rows
                samples.append(rows[:: max(-(-len(rows) // per_input), 1), None].clone())
            session.streams.advance({"quantised": module})
    steps, seed = plan.steps.learn_steps, plan.recipe.seed
    return learn_rotation(torch.cat(samples), activations, steps, seed, keeps_mean=checkpoint.keeps_mean)
