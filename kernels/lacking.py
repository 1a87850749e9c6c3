"""What a machine lacks that a kernel needs, said once.

Layers that no kernel takes run through the reference, which is right and slow. Where that is the layer's doing (its
format, its dtype), ``quantkit inspect --kernels`` says so to who asks. Where it is the machine's, nobody may think of
asking.
"""

from __future__ import annotations

import logging
from functools import cache

logger = logging.getLogger("quantkit")


class Lacking(str):
    """A reason against a kernel that lies with the machine: Triton is not there, the device is too old."""

    __slots__ = ()


@cache
def say_once(kind: str, reason: Lacking) -> None:
    """Warn that quantised layers on devices of ``kind`` (cpu, cuda) run through the reference, and why."""
    logger.warning(
        "%s: %s; quantised layers that need it run through the reference, which unpacks weights at every call. "
        "`quantkit inspect --kernels OUT` lists them.",
        kind,
        reason,
    )
