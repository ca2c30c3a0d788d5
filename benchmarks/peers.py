"""Rounding methods of several tools on the same network, images and grid: quality and cost.

    python -m venv artifacts/aimet && artifacts/aimet/bin/pip install aimet-onnx
    python benchmarks/peers.py MODEL [--arch FILE.py:FACTORY] --aimet artifacts/aimet/bin/python

All weights in 4 bits per channel, activations in 8. Each tool is a process of its own; they take
turns. Seconds are those of the quantization alone (least of all turns), memory is the peak of
the whole process. The logits are compared with the float model's on test images.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.api.requests import quantize_request
from qdeploy.api.settings import SanitizeSettings
from qdeploy.inputs.requests import QuantizeRequest
from qdeploy.progress import SILENT, Clock
from qdeploy.runs.opening import open_model
from qdeploy.runtime.sessions import open_session

PROGRAMS = Path(__file__).parent / "peers"
THREADS = 2


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way of making the file."""

    name: str
    python: str
    program: str
    arguments: tuple[str, ...] = ()


def contestants(aimet: str | None, iterations: int, steps: int) -> list[Contestant]:
    ours = [
        Contestant(f"qdeploy {name}", sys.executable, "qdeploy_rounding.py", (name,))
        for name in ("nearest", "gptq", "adaround-descent", "efrap-descent")
    ]
    if steps:
        trained = ("efrap-adam", str(steps))
        name = f"qdeploy efrap-adam, {steps} steps"
        ours.append(Contestant(name, sys.executable, "qdeploy_rounding.py", trained))
    peers = [Contestant("onnxruntime.quantization", sys.executable, "onnxruntime_static.py")]
    if aimet is not None:
        peers.append(Contestant("AIMET nearest", aimet, "aimet_adaround.py", ("0",)))
        name = f"AIMET AdaRound, {iterations} iterations"
        peers.append(Contestant(name, aimet, "aimet_adaround.py", (str(iterations),)))
    return [*ours, *peers]


def prepare(folder: Path, request: QuantizeRequest, tests: int) -> tuple[np.ndarray, np.ndarray]:
    """Write what every tool reads; the float logits and the labels."""
    _, model = open_model(request, Clock(SILENT))
    (folder / "float.onnx").write_bytes(model.onnx)
    count = request.recipe.calibration.images
    calibration = request.sources.calibration_images(count, 0)
    images = request.sources.test_images(tests, 0, model.classes)
    assert calibration is not None
    assert images is not None
    assert images.labels is not None
    pixels = next(calibration.batches(len(calibration))).pixels
    preprocessing = calibration.preprocessing
    np.savez(
        folder / "pixels.npz",
        x=np.rint(pixels * 255).astype(np.uint8),
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    np.save(folder / "calibration.npy", preprocessing.normalise(pixels))
    inputs = preprocessing.normalise(next(images.batches(len(images))).pixels)
    np.save(folder / "inputs.npy", inputs)
    session = open_session(model.onnx)
    parts = np.array_split(inputs, len(inputs) // 100)
    return np.concatenate([session.logits(x) for x in parts]), images.labels


def run(contestant: Contestant, folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """What it says of itself, and its logits."""
    command = [contestant.python, str(PROGRAMS / contestant.program), str(folder)]
    threads = {"OMP_NUM_THREADS": str(THREADS)}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*command, *contestant.arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **threads},
        )
        output, _ = process.communicate()
        lines = output.decode().strip().splitlines()
        if process.returncode or not lines:
            errors.seek(0)
            sys.exit(f"{contestant.name} failed:\n{errors.read().decode()}")
    return json.loads(lines[-1]), np.load(folder / "logits.npy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--arch")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--tests", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--aimet", help="Python interpreter that has aimet-onnx")
    parser.add_argument("--iterations", type=int, default=50, help="of AIMET, which means 10,000")
    parser.add_argument("--steps", type=int, default=0, help="of efrap-adam, which means 10,000")
    given = parser.parse_args()
    settings: SanitizeSettings = {
        "calibration_images": given.images,
        "data_roots": ["/"],  # a card of one's own may name any data
    }
    if given.arch is not None:
        settings["arch"] = given.arch
    request = quantize_request(given.model, settings)
    entrants = contestants(given.aimet, given.iterations, given.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        float_logits, labels = prepare(folder, request, given.tests)
        answers = float_logits.argmax(1)
        costs: dict[str, list[tuple[float, float]]] = {entrant.name: [] for entrant in entrants}
        lines: dict[str, str] = {}
        versions: set[str] = set()
        for _ in range(given.turns):
            for entrant in entrants:
                said, logits = run(entrant, folder)
                versions.add(str(said["version"]))
                costs[entrant.name].append((said["cpu"], said["wall"]))
                accuracy = 100 * np.mean(logits.argmax(1) == labels)
                agreement = 100 * np.mean(logits.argmax(1) == answers)
                error = np.square(logits - float_logits).mean()
                lines[entrant.name] = (
                    f"{accuracy:>10.2f}{agreement:>10.2f}{error:>11.4f}{said['megabytes']:>9.0f}"
                )
    print(", ".join(sorted(versions)))
    print(f"{given.images} calibration images, {given.tests} test images, {THREADS} threads;")
    print(f"float32 accuracy {100 * np.mean(answers == labels):.2f}\n")
    base = min(cpu for cpu, _ in costs["qdeploy efrap-descent"])
    print(f"{'':<32}{'accuracy':>10}{'agree %':>10}{'logit MSE':>11}{'peak MB':>9}", end="")
    print(f"{'CPU s':>9}{'of ours':>9}{'wall s':>9}")
    for name, line in lines.items():
        cpu, wall = (min(times) for times in zip(*costs[name], strict=True))
        print(f"{name:<32}{line}{cpu:>9.2f}{f'{cpu / base:.2f}x':>9}{wall:>9.2f}")


if __name__ == "__main__":
    main()
