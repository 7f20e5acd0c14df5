"""The command line: ``python -m dgate_wrap demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .demo import demo
from .errors import DGateError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status: 0 if all that it checks is right, 1 if not, 2 if it could not run."""
    parser = argparse.ArgumentParser(prog="python -m dgate_wrap", description="Sparse networks by D-Gating.")
    commands = parser.add_subparsers(dest="command", required=True)
    said = "train a small residual network on handwritten digits, dense and gated, and compare what is exported"
    command = commands.add_parser("demo", help=said, description=said)
    command.add_argument("--seed", type=int, default=0, help="seed of the weights and the batches (default 0)")
    command.add_argument("--out", type=Path, default=Path("demo_out"), help="folder to write to (default demo_out)")
    command.add_argument("--quick", action="store_true", help="a few epochs of a tiny network, to see that it runs")
    command.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads of torch (default 1: more make networks this small slower, and change the last bits)",
    )
    args = parser.parse_args(argv)
    try:
        return demo(seed=args.seed, out=args.out, quick=args.quick, threads=args.threads)
    except DGateError as e:
        sys.stderr.write(f"{type(e).__name__}: {e}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
