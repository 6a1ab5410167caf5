"""The command that measures this machine's CPU once, for analytic costs: ``python -m stagecut.tools.calibrate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..partitioner.calibrate import calibrate
from ..partitioner.cpu import calibration_file
from ..progress import shown_progress
from .arguments import positive


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate, say what was found and where it is kept, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m stagecut.tools.calibrate", description=__doc__)
    parser.add_argument("--seconds", type=positive, default=5.0, help="how long to measure (default: 5)")
    seconds = parser.parse_args(arguments).seconds
    try:
        with shown_progress() as progress:
            kind = calibrate(seconds, progress)
    except OSError as error:
        print(f"calibrate: the result cannot be kept: {error}", file=sys.stderr)
        return 1
    rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in kind.flops_per_s.items())
    print(
        f"one thread: {rates} GFLOP/s; {kind.bytes_per_s / 1e9:.1f} GB/s; {kind.kernel_overhead_s * 1e6:.2f} us an op"
    )
    print(f"kept in {calibration_file()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
