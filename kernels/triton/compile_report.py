"""Every kernel in every shipped form, compiled for GPUs that are not there.

    python -m quantkit.kernels.triton.compile_report [sm_80 sm_90 gfx942]

prints the tables of all ``REPORTS``: registers, spills, shared memory, instructions; exits with 1 if something spills
or asks for more shared memory than there is.
"""

from __future__ import annotations

import sys

from quantkit.kernels.triton import (
    activation_report,
    heads_report,
    integer_report,
    kv_attention_report,
    kv_encode_report,
    weight_only_report,
)

REPORTS = (weight_only_report, integer_report, activation_report, heads_report, kv_attention_report, kv_encode_report)


def main(targets: list[str]) -> int:
    """Print the tables; 1 if a variant does not fit its target."""
    return max([report.main(targets) for report in REPORTS])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
