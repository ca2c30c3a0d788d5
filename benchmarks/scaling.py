"""How the cost of the rounding grows: with calibration images, width, depth, up to ResNet-50.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --large          # ResNet-50 for 224x224, minutes

Random weights, noise for images. Every line is a process of its own: CPU and wall seconds of the
rounding alone, peak memory of the whole process, and the time that the matrix products of the
moments would take at the speed the machine reaches on one large product, all in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.architectures import OURS
from qdeploy.data import Preprocessing, images_from_array
from qdeploy.exporting.exporter import export
from qdeploy.quantization.calibrate import calibrate
from qdeploy.quantization.plan import plan_layers
from qdeploy.quantization.rounding.layers import RoundingTask, round_layers
from qdeploy.settings.device import load_device
from qdeploy.settings.methods import method
from qdeploy.settings.recipe import load_recipe
from qdeploy.values import Loaded, Origin, Stated

METHOD = "efrap-descent"
BLOCKS_50 = (3, 4, 6, 3)


@dataclass(frozen=True, slots=True)
class Case:
    """A network and a number of images."""

    network: str
    width: int
    images: int


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut; He et al., CVPR 2016."""

    def __init__(self, before: int, inner: int, after: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(before, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, after, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        changes = before != after or stride > 1
        self.shortcut = (
            nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
            if changes
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers(x) + self.shortcut(x))


def resnet50(width: int) -> nn.Module:
    """ResNet-50 for ImageNet; `width` is 64 in the original."""
    stages: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    before = width
    for stage, blocks in enumerate(BLOCKS_50):
        inner = width * 2**stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            stages.append(Bottleneck(before, inner, 4 * inner, stride))
            before = 4 * inner
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000))
    return nn.Sequential(*stages, *head)


def plain(depth: int) -> nn.Module:
    """`depth` equal convolutions of 32 channels."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def network(case: Case) -> tuple[nn.Module, tuple[int, int, int]]:
    torch.manual_seed(0)
    if case.network == "resnet50":
        return resnet50(case.width), (3, 224, 224)
    if case.network == "plain":
        return plain(case.width), (3, 32, 32)
    return OURS[case.network](width=case.width), (3, 32, 32)


def measure(case: Case) -> dict[str, float]:
    """Seconds and megabytes of one case, in this process."""
    module, shape = network(case)
    model = export(Loaded(Origin("", "", ""), module.eval(), "module"), stated=Stated(shape))
    pixels = np.random.default_rng(0).integers(0, 256, (case.images, *shape), dtype=np.uint8)
    images = images_from_array("noise", pixels, Preprocessing(shape, (0.5,) * 3, (0.25,) * 3))
    recipe = load_recipe("int4").model_copy(update={"rounding": method(METHOD)})
    plan = plan_layers(model, recipe, load_device(recipe.device))
    grids = calibrate(model, plan, images.sample(32, 0), recipe.activations)
    task = RoundingTask(model, plan, grids, images, 0)
    wall, cpu = time.perf_counter(), time.process_time()
    layers = round_layers(task, recipe.rounding)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "seconds": wall,
        "cpu": cpu,
        "megabytes": peak_megabytes(),
        "layers": len(layers),
        "weights": sum(layer.codes.size for layer in layers),
        "products": products(task) / speed(),
    }


def peak_megabytes() -> float:
    """Of this process alone; the figure that getrusage gives begins with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def products(task: RoundingTask) -> float:
    """Floating-point operations of the Gram matrices."""
    total, limit = 0.0, 64
    shape = (1, *task.calibration().preprocessing.shape)
    from qdeploy.quantization.inner_tensors import open_tap

    uses = [use for layer in task.plan.layers for use in layer.site.uses]
    tap = open_tap(task.model.onnx, task.model.input_name, [use.input for use in uses])
    values = tap(np.zeros(shape, np.float32))
    problems = task.problems()
    for layer in task.plan.layers:
        groups, _, fan_in = problems[layer.site.name].weight.shape
        for use in layer.site.uses:
            x = values[use.input]
            outputs = use.window.output_shape(x.shape[2:]) if use.window else x.shape[1:-1]
            samples = min(int(np.prod(outputs)), limit) * len(task.calibration())
            total += 2.0 * groups * samples * fan_in**2
    return total


def speed() -> float:
    """Floating-point operations per second of one large float32 product on all cores."""
    a = np.ones((4096, 2048), np.float32)
    a.T @ a
    started = time.perf_counter()
    for _ in range(3):
        a.T @ a
    return 3 * 2.0 * 4096 * 2048**2 / (time.perf_counter() - started)


def show(case: Case) -> None:
    command = [sys.executable, __file__, "--one", case.network, str(case.width), str(case.images)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ}, check=True)
    found = json.loads(done.stdout)
    print(
        f"{case.network:<10}{case.width:>6}{case.images:>8}{found['layers']:>8.0f}"
        f"{found['weights'] / 1e6:>9.2f}{found['seconds']:>9.1f}{found['cpu']:>9.1f}"
        f"{found['products']:>11.1f}{found['megabytes']:>9.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, width, images = given.one
        print(json.dumps(measure(Case(name, int(width), int(images)))))
        return
    print(f"{'network':<10}{'width':>6}{'images':>8}{'layers':>8}{'M weights':>9}", end="")
    print(f"{'wall s':>9}{'CPU s':>9}{'products s':>11}{'peak MB':>9}")
    cases = [Case("resnet18", 16, n) for n in (256, 1024, 4096, 16_384)]
    cases += [Case("resnet18", width, 1024) for width in (32, 64)]
    cases += [Case("plain", depth, 1024) for depth in (8, 16, 32)]
    if given.large:
        cases = [Case("resnet50", 64, n) for n in (256, 1024)]
    for case in cases:
        show(case)


if __name__ == "__main__":
    main()
