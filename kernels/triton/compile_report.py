"""Every kernel in every shipped form, compiled for GPUs that are not there.

    python -m quantkit.kernels.triton.compile_report [sm_80 sm_90 gfx942]

prints the tables of ``weight_only_report``, ``integer_report`` and ``activation_report``: registers, spills, shared
memory, instructions; exits with 1 if something spills or asks for more shared memory than there is.
"""

from __future__ import annotations

import sys

from quantkit.kernels.triton import activation_report, integer_report, weight_only_report

REPORTS = (weight_only_report, integer_report, activation_report)


def main(targets: list[str]) -> int:
    """Print the tables; 1 if a variant does not fit its target."""
    return max([report.main(targets) for report in REPORTS])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
