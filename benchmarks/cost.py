"""What whole commands cost: seconds by stage, and peak memory by calibration images.

    python benchmarks/cost.py
    python benchmarks/cost.py MODEL --arch FILE.py:FACTORY

`qdeploy sanitize` first, then `qdeploy gate` on the file that it wrote. Without a model: ResNet-18
of width 16 with random weights, and noise for images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from command import qdeploy

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


def run(command: list[str], report: Path) -> tuple[float, float, dict]:
    """Seconds, peak MB and the report of one whole command."""
    took = qdeploy([*command, "--report", str(report)])
    return took.seconds, took.megabytes, json.loads(report.read_text())


def sanitize(
    model: Path, folder: Path, images: int, options: list[str]
) -> tuple[float, float, dict]:
    """Fitted to so many calibration images; the file may not be an accepted one."""
    command = [
        "sanitize", str(model), "--out", str(folder / "out.onnx"),
        "--artifacts", str(folder / "runs"), "--calibration-images", str(images), *options,
    ]  # fmt: skip
    return run(command, folder / f"report-{images}.json")


def gate(file: str, model: Path, folder: Path, options: list[str]) -> tuple[float, float, dict]:
    """The file beside its float model and beside nearest rounding, on every runtime."""
    command = [
        "gate", file, "--reference", str(model), "--artifacts", str(folder / "gates"), *options,
    ]  # fmt: skip
    return run(command, folder / "gate.json")


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
            seconds, megabytes, report = sanitize(model, folder, images, options)
            stages = {stage["name"]: stage["seconds"] for stage in report["stages"]}
            rest = ", ".join(f"{k} {v:.1f}" for k, v in stages.items() if k != "round")
            print(f"{images:>7}{seconds:>9.1f}{stages['round']:>9.1f}{megabytes:>9.0f}   {rest}")
        seconds, megabytes, report = gate(report["output"], model, folder, options)
        measured = [f"{m['variant']} on {m['runtime']}" for m in report["measurements"]]
        count = report["measurements"][0]["accuracy"]["samples"]
        rest = ", ".join(f"{stage['name']} {stage['seconds']:.1f}" for stage in report["stages"])
        print(f"   gate{seconds:>9.1f}{'':>9}{megabytes:>9.0f}   {rest}")
        print(f"   {count:,} test images; {'; '.join(measured)}: {report['outcome']}")


if __name__ == "__main__":
    main()
