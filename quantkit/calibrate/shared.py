"""Calibration samples that the runs of a sweep leave for each other in a folder: the first one makes them.

Samples depend on the model as it came and on the settings of its calibration, not on method and scheme, so that every
cell of a sweep can have the same ones: a text is tokenised once, and ``generated`` lets the model write once.

What comes behind them is not kept. Statistics are of what the quantised blocks before make of the samples, which is
another thing for every method and every scheme; of the first block alone they are the same. The float stream is the
same too where nothing rotates it, but it takes blocks x tokens x width float32 numbers (16 GiB for 32 blocks of width
4096 and 32,768 tokens) to spare the methods that carry one a forward pass among several passes and a rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.formats.writer import source_fingerprint
from quantkit.recipe import Calibration

_WINDOWS = "windows"


def shared_windows(folder: Path, source: Path, settings: Calibration, make: Callable[[], Tensor]) -> Tensor:
    """The samples in ``folder``, put there by ``make`` if they are not there yet.

    Of several processes that ask at the same time one makes them, and the others wait. A process that dies while it
    does leaves nothing that the next one would take for samples.

    Args:
        folder: of one sweep: a text that has changed since is not noticed.
        source: folder of the model as it came.
        settings: fitted to the model.
        make: gives [samples, tokens] int64; what it raises is passed on, and the next one tries again.

    Returns:
        [samples, tokens] int64.
    """
    about = {"source": source_fingerprint(source), "folder": str(source), "calibration": settings.model_dump()}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"calibration-{digest}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            unfinished = path.with_suffix(".tmp")
            save_file({_WINDOWS: make().contiguous()}, unfinished)
            unfinished.replace(path)
        return load_file(path)[_WINDOWS]
