"""What has become slower between two commits: whole commands, in turn, on this machine.

    python benchmarks/guard.py OLD [NEW] [--rounds 7] [--slower 10] [--only scan gate]

Both commits are checked out beside each other and run by the Python that runs this, so that its
packages must suit both. For each command: the median ratio of the CPU seconds, new over old, with
the 95 % interval of the rounds drawn anew. Leaves with 1 if some command is slower by more than
`--slower` percent with its whole interval.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from command import qdeploy
from cost import make_model

ROOT = Path(__file__).parents[1]
COMMANDS: Mapping[str, Sequence[str]] = {
    "scan": ["scan", "model.pt"],
    "export": ["export", "model.pt", "--out", "float.onnx"],
    "quantize 4 bits": ["quantize", "model.pt", "--bits", "4", "--out", "four.onnx"],
    "quantize 8 bits": ["quantize", "model.pt", "--bits", "8", "--out", "eight.onnx"],
    "sanitize": ["sanitize", "model.pt", "--out", "out.onnx", "--test-images", "2000"],
    "gate": ["gate", "given.onnx", "--reference", "model.pt", "--test-images", "2000"],
}


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """The files of a commit, as git keeps them."""
    with tempfile.TemporaryDirectory() as name:
        command = ["git", "archive", "--format=tar", commit]
        archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", name], input=archive.stdout, check=True)  # noqa: S607
        yield Path(name)


def cpu_seconds(code: Path, folder: Path, words: Sequence[str]) -> float:
    """Of one command and all that it starts, with nothing kept of earlier ones."""
    shutil.rmtree(folder / "artifacts", ignore_errors=True)
    with tempfile.TemporaryDirectory() as state:
        places = {"PYTHONPATH": str(code), "QDEPLOY_STATE": state}
        return qdeploy([*words, "--quiet"], folder=folder, variables=places).cpu_seconds


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Of the median, from rounds drawn anew."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.asarray(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new", nargs="?", default="HEAD")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slower", type=float, default=10.0, help="percent that is too much")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    given = parser.parse_args()
    slower = []
    with (
        checked_out(given.old) as old,
        checked_out(given.new) as new,
        tempfile.TemporaryDirectory() as name,
    ):
        folder = Path(name)
        make_model(folder)
        cpu_seconds(old, folder, ["quantize", "model.pt", "--bits", "8", "--out", "given.onnx"])
        for title in given.only:
            ratios = []
            for number in range(given.rounds):
                order = (old, new) if number % 2 else (new, old)
                took = {code: cpu_seconds(code, folder, COMMANDS[title]) for code in order}
                ratios.append(took[new] / took[old])
            low, high = interval(ratios)
            print(
                f"{title:<16} {np.median(ratios):.3f} ({low:.3f} to {high:.3f}),"
                f" last {took[old]:.1f} and {took[new]:.1f} CPU s",
                flush=True,
            )
            if low > 1 + given.slower / 100:
                slower.append(title)
    if slower:
        sys.exit(f"slower by more than {given.slower:g} %: {', '.join(slower)}")


if __name__ == "__main__":
    main()
