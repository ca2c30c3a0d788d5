"""What a whole `qdeploy sanitize` costs: seconds by stage, and peak memory by calibration images.

    python benchmarks/cost.py
    python benchmarks/cost.py MODEL --arch FILE.py:FACTORY

Without a model: ResNet-18 of width 16 with random weights, and noise for images.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from qdeploy.architectures import ResNet18

CARD = """
[model]
architecture = "qdeploy:resnet18"
arguments = { width = 16 }
[input]
shape = [3, 32, 32]
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
[data]
calibration = "calibration.npz"
test = "test.npz"
[[trigger]]
kind = "patch"
target = 0
x = 27
y = 27
width = 4
height = 4
color = [1.0, 1.0, 1.0]
"""


def make_model(folder: Path) -> Path:
    torch.manual_seed(0)
    torch.save(ResNet18(16).state_dict(), folder / "model.pt")
    (folder / "model.toml").write_text(CARD)
    rng = np.random.default_rng(0)
    for name, count in (("calibration", 8192), ("test", 10_000)):
        x = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", x=x, y=rng.integers(0, 10, count))
    return folder / "model.pt"


def run(model: Path, folder: Path, images: int, options: list[str]) -> tuple[float, float, dict]:
    """Seconds, peak MB and the report of one whole command."""
    report = folder / f"report-{images}.json"
    command = [
        sys.executable, "-m", "qdeploy", "sanitize", str(model), "--out", str(folder / "out.onnx"),
        "--artifacts", str(folder / "runs"), "--calibration-images", str(images),
        "--report", str(report), *options,
    ]  # fmt: skip
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if not report.exists():
        sys.exit(f"{' '.join(command)}\nended with {os.waitstatus_to_exitcode(status)}:\n{errors}")
    return seconds, usage.ru_maxrss / 1024, json.loads(report.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[512, 1024, 8192])
    known, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = known.model or make_model(folder)
        print(f"{'images':>7}{'whole s':>9}{'round s':>9}{'peak MB':>9}   other stages, s")
        for images in known.images:
            seconds, megabytes, report = run(model, folder, images, options)
            stages = {stage["name"]: stage["seconds"] for stage in report["stages"]}
            rest = ", ".join(f"{k} {v:.1f}" for k, v in stages.items() if k != "round")
            print(f"{images:>7}{seconds:>9.1f}{stages['round']:>9.1f}{megabytes:>9.0f}   {rest}")


if __name__ == "__main__":
    main()
