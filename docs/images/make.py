"""Make the pictures of this folder: `make pictures`, or `python docs/images/make.py`; about a minute on 2 cores.

`run.png` is two runs of examples/digits.py, drawn by `lumen plot`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from lumen.cli.main import main as lumen

HERE = Path(__file__).parent
LRS = {"fast": 3e-3, "slow": 3e-4}


def train(rundir: Path, lr: float, epochs: int) -> Path:
    """One run of the example; its directory."""
    sys.path.insert(0, str(HERE.parents[1] / "examples"))
    try:
        import digits
    finally:
        del sys.path[0]
    digits.main(digits.Config(epochs=epochs, lr=lr, logdir=rundir, progress="lines"))
    return rundir


def main(epochs: int, output: Path) -> int:
    """Train, and draw; the exit code of the command."""
    with tempfile.TemporaryDirectory() as directory:
        runs = [train(Path(directory) / name, lr, epochs) for name, lr in LRS.items()]
        return lumen(["plot", *map(str, runs), "--metric", "loss", "accuracy", "--x", "epoch", "-o", str(output)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "run.png")
    options = parser.parse_args()
    sys.exit(main(options.epochs, options.output))
