"""Architectures of timm with random weights: quantized, judged, and beside onnxruntime's quantizer.

    pip install --no-deps timm
    python benchmarks/architectures.py swin_tiny_patch4_window7_224 inception_v3 --pictures PICTURES

PICTURES is a folder or a zip of photographs. Crops of every second one calibrate, and give
BatchNorm its statistics; crops of the others test. Printed are CPU seconds and peak memory of
`qdeploy quantize --bits 8` and of `qdeploy gate --policy unlabelled`, each a process of its own,
and for both quantizers what trained_networks.py prints. `--exporter script` takes torch's older
exporter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import nn
from trained_networks import answers, by_onnxruntime, crops_of, figures, inputs, photographs

from qdeploy.inputs.sources import Given, resolve

CALIBRATION, TEST = 128, 256
VERDICTS = {0: "ACCEPT", 3: "REJECT", 4: "NO VERDICT"}
UNUSED = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional")
BETWEEN = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({
    "code": done.returncode, "seconds": used.ru_utime + used.ru_stime,
    "megabytes": used.ru_maxrss / 1024, "said": done.stdout + done.stderr,
}))
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended, and what it took."""

    code: int
    seconds: float  # of CPU
    megabytes: float
    said: str

    def __str__(self) -> str:
        return f"{self.seconds:6.0f} s of CPU  {self.megabytes:6.0f} MB"


def qdeploy(*arguments: str | Path) -> Ended:
    """The command in a process of its own; one in between, or its peak would begin with ours."""
    command = [sys.executable, "-c", BETWEEN, sys.executable, "-m", "qdeploy", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Ended(**json.loads(done.stdout))


def made(name: str) -> nn.Module:
    """The network; it needs nothing of the torchvision that timm imports."""
    absent = [] if find_spec("torchvision") else [f"torchvision{part}" for part in UNUSED]
    sys.modules.update({part: MagicMock() for part in absent})
    import timm

    for part in absent:
        sys.modules.pop(part, None)
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(name, pretrained=False)
    return network.eval()


@torch.no_grad()
def settle(network: nn.Module, x: np.ndarray) -> None:
    """Every BatchNorm takes the statistics of what it reads."""
    norms = [norm for norm in network.modules() if isinstance(norm, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for i in range(0, len(x) if norms else 0, 32):
        network(torch.from_numpy(x[i : i + 32]))
    network.eval()


def exported(name: str, exporter: str, folder: Path) -> Path:
    """The network's file, beside its card."""
    model, network = folder / f"{name}.onnx", made(name)
    mean, std = (list(network.default_cfg[part]) for part in ("mean", "std"))
    card = f"[input]\nshape = [3, 224, 224]\nmean = {mean}\nstd = {std}\n"
    model.with_suffix(".toml").write_text(card)
    settle(network, taken(model, "calibration"))
    example = torch.zeros(2, 3, 224, 224)
    if exporter == "script":
        axes = {"x": {0: "batch"}, "logits": {0: "batch"}}
        torch.onnx.export(
            network, (example,), model, dynamo=False, input_names=["x"], output_names=["logits"],
            dynamic_axes=axes,
        )  # fmt: skip
    else:
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        torch.onnx.export(network, (example,), model, dynamic_shapes=shapes, external_data=False)
    return model


def taken(model: Path, part: str) -> np.ndarray:
    """The crops as the network takes them."""
    return inputs(resolve(model, Given(calibration=model.with_name(f"{part}.npz"))))


def row(model: Path, owners: np.ndarray) -> None:
    """All that is measured of one architecture."""
    out, other = model.with_name("out.onnx"), model.with_name("other.onnx")
    calibration, test = model.with_name("calibration.npz"), model.with_name("test.npz")
    x = taken(model, "test")
    want = answers(model.read_bytes(), x)
    print(f"  float: {len(np.unique(want.argmax(1)))} classes, {model.stat().st_size / 1e6:.0f} MB")
    common = ("--card", model.with_suffix(".toml"), "--artifacts", model.parent / "runs", "--quiet")
    quantized = qdeploy(
        "quantize", model, "--bits", "8", "--seed", "0", "--calibration", calibration,
        "--out", out, *common,
    )  # fmt: skip
    print(f"  quantize  {quantized}", flush=True)
    if quantized.code:
        print(quantized.said)
        return
    print("  qdeploy, 8 bits     ", figures(want, answers(out.read_bytes(), x), owners))
    by_onnxruntime(model, other, taken(model, "calibration"))
    said = figures(want, answers(other.read_bytes(), x), owners)
    print("  onnxruntime, 8 bits ", said, flush=True)
    gate = qdeploy(
        "gate", out, "--reference", model, "--policy", "unlabelled", "--test", test, *common
    )
    print(f"  gate      {gate}  {VERDICTS.get(gate.code, gate.said)}", flush=True)
    if gate.code in {3, 4}:
        print(gate.said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+")
    parser.add_argument("--pictures", type=Path, required=True, help="folder or zip")
    parser.add_argument("--exporter", choices=("dynamo", "script"), default="dynamo")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        owners = crops_of(photographs(given.pictures, folder), folder, (CALIBRATION, TEST))
        for name in given.names:
            print(f"{name}, {given.exporter}", flush=True)
            row(exported(name, given.exporter, folder), owners)


if __name__ == "__main__":
    main()
