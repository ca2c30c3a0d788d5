"""What a gate over four runtimes costs beside one over the first of them, in turns.

    python benchmarks/runtimes.py
    python benchmarks/runtimes.py --rounds 5 --images 10000

A ResNet-18 of width 16 with random weights at 8 bits, and noise for images. The four are native:
onnxruntime with and without its optimizations, OpenVINO (an extra), and the file in ORT format.
`--count 2` and `--count 3` leave the last of them out. Predictions of an earlier round are not used
again.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cost import make_model

RUNTIMES = (
    'provider = "cpu"', 'provider = "ort-format"', 'provider = "openvino"',
    'provider = "cpu"\noptimizations = "off"',
)  # fmt: skip
POLICY = """
schema_version = 1
name = "answers"
description = "What files answer, and nothing about it."
[validation]
detection = "off"
latency_runs = 30
[gate]
required = ["runtime_agreement"]
"""


def device(folder: Path, count: int) -> Path:
    """A profile of the first `count` runtimes."""
    path = folder / f"{count}.toml"
    listed = "".join(f"[[runtimes]]\n{runtime}\n" for runtime in RUNTIMES[:count])
    path.write_text(f'schema_version = 1\nname = "n{count}"\ndescription = "d"\n{listed}')
    return path


def seconds(folder: Path, profile: Path, images: int) -> float:
    """Of one whole gate, from nothing."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    command = [
        sys.executable, "-m", "qdeploy", "gate", "out.onnx", "--card", "model.toml", "--device",
        str(profile), "--policy", "answers.toml", "--artifacts", "runs", "--test-images",
        str(images), "--quiet",
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in {0, 3, 4}:
        sys.exit(done.stderr)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--count", type=int, choices=(2, 3, 4), default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        (folder / "answers.toml").write_text(POLICY)
        made = [
            sys.executable, "-m", "qdeploy", "quantize", "model.pt", "--bits", "8", "--rounding",
            "nearest", "--out", "out.onnx", "--artifacts", "made", "--quiet",
        ]  # fmt: skip
        subprocess.run(made, cwd=folder, check=True, capture_output=True)
        one, more = device(folder, 1), device(folder, given.count)
        ratios = []
        for number in range(given.rounds):
            single, several = (
                seconds(folder, one, given.images),
                seconds(folder, more, given.images),
            )
            ratios.append(several / single)
            print(
                f"round {number + 1}: one {single:.1f} s, {given.count} {several:.1f} s", flush=True
            )
        print(
            f"{given.count} runtimes take {statistics.median(ratios):.2f} times as long as one"
            f" ({min(ratios):.2f} to {max(ratios):.2f}), {given.images:,} images"
        )


if __name__ == "__main__":
    main()
