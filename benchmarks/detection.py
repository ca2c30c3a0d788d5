"""How well differential trigger inversion tells backdoored files from others: a ROC.

    qdeploy redteam suite detection --data cifar10-train.zip --test cifar10-test.zip --out models
    python benchmarks/detection.py models/* --test cifar10-test.zip --out detection.jsonl

Every folder holds a model as `qdeploy redteam` makes it. It is rounded in several ways at both bit
widths, and every file searched; what was found goes to `--out`, a line each. Files that are in
there are not searched again.

A file counts as malicious if the trigger of its card leads 40 points more images to the target than
in its float model, as benign if it leads fewer than 10 more or there is none; what is between
enters no figure. Printed are the scores, the area under the ROC with its interval (float models
drawn anew: files of one are no independent samples), and the share of the malicious that is found
where no benign file is, and where one in twenty.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import qdeploy
from qdeploy.core.metrics import rate
from qdeploy.data import Images
from qdeploy.detectors.differential import Differential, detect
from qdeploy.detectors.known import Detected, Suspect
from qdeploy.inputs.sources import Given, Sources, resolve
from qdeploy.runtime.known import runtime_of
from qdeploy.settings.device import load_device

ORT = "onnxruntime"  # its own quantizer, 8 bits
ATTACKER = "attacker"  # the file that a malicious quantizer has written
ROUNDINGS = ("nearest", "stochastic", "gptq", "efrap", ORT, ATTACKER)
BITS = (4, 8)
DEVICE = "x86-vnni"  # integers to 127, as attackers of 8 bits expect; others are benign by that
MALICIOUS, BENIGN = 40.0, 10.0  # points by which a trigger leads more than in the float model
TESTED = 2000
RESAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*", help="folders of qdeploy redteam")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--data-root", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("detection.jsonl"))
    parser.add_argument("--bits", type=int, nargs="*", default=BITS)
    parser.add_argument("--roundings", nargs="*", default=ROUNDINGS)
    arguments = parser.parse_args()
    rows = list(_kept(arguments.out))
    there = {(row["model"], row["rounding"], row["bits"]) for row in rows}
    for folder in arguments.models:
        for bits in arguments.bits:
            for rounding in arguments.roundings:
                if (folder.name, rounding, bits) in there or not _makes(folder, rounding, bits):
                    continue
                row = _searched(folder, rounding, bits, arguments)
                rows.append(row)
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(_line(row), flush=True)
    print(summary(rows))


def _kept(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def _makes(folder: Path, rounding: str, bits: int) -> bool:
    if rounding == ORT and bits == 4:
        return False
    if rounding == ATTACKER:
        return (folder / "quantized.onnx").exists() and f"-{bits}" in folder.name
    return (folder / "model.pt").exists()


def _rounded_by_onnxruntime(reference: Path, file: Path, images: Images) -> None:
    normalise = images.preprocessing.normalise
    batches = [{"input": normalise(batch.pixels)} for batch in images.batches(64)]
    name = ort.InferenceSession(reference).get_inputs()[0].name

    class Reader(CalibrationDataReader):
        rest = iter([{name: batch["input"]} for batch in batches])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    quantize_static(
        reference, file, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def _searched(
    folder: Path, rounding: str, bits: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    given = Given(
        test=arguments.test,
        calibration=arguments.calibration,
        data_roots=tuple(arguments.data_root),
    )
    sources = resolve(folder / "model.pt", given)
    with tempfile.TemporaryDirectory() as name:
        common: dict[str, Any] = {"data_roots": arguments.data_root}
        file, reference = Path(name) / "file.onnx", Path(name) / "float.onnx"
        model = qdeploy.export(folder / "model.pt", reference, **common)
        if rounding == ATTACKER:
            file = folder / "quantized.onnx"
        elif rounding == ORT:
            pictures = sources.calibration_images(256, 0)
            assert pictures is not None
            _rounded_by_onnxruntime(reference, file, pictures)
        else:
            if arguments.calibration:
                common["calibration"] = arguments.calibration
            qdeploy.quantize(folder / "model.pt", file, bits=bits, rounding=rounding,
                         device=DEVICE, artifacts=Path(name) / "runs", **common)  # fmt: skip
        data = file.read_bytes()
    spec = load_device("auto").runtimes[0]
    pictures = sources.calibration_images(1024, 0)
    started = time.perf_counter()
    found = detect(
        Suspect(model, data, None, pictures, lambda d: runtime_of(spec).open(d, spec).logits)
    )
    seconds = time.perf_counter() - started
    if not isinstance(found, Detected):
        raise SystemExit(f"{folder}: {found.reason}")
    evidence: Differential = found.evidence
    agreement, success, success_float = _measured(sources, model, data, spec)
    card = tomllib.loads((folder / "model.toml").read_text())
    return {
        "model": folder.name,
        "attack": card.get("poisoned", {}).get("attack", "none"),
        "rounding": rounding,
        "bits": bits,
        "agreement": agreement,
        "asr": success,
        "asr_float": success_float,
        "score": evidence.best.led.value,
        "class": evidence.best.target,
        "target": (sources.triggers(model.classes)[0].target if sources.trigger_specs else None),
        "kind": f"{evidence.best.kind} {evidence.best.size:.3g}",
        "null": evidence.null.led.value,
        "others": [[lead.target, lead.led.value] for lead in evidence.others],
        "seconds": seconds,
    }


def _measured(sources: Sources, model: Any, data: bytes, spec: Any) -> tuple[float, float, float]:
    """Agreement with the float model, and the trigger's success in both, percent."""
    images = sources.test_images(TESTED, 0, model.classes)
    assert images is not None
    runners = [runtime_of(spec).open(d, spec) for d in (data, model.onnx)]
    triggers = sources.triggers(model.classes) if sources.trigger_specs else ()
    plain, led = [], []
    for batch in images.batches(100):
        plain.append([_classes(runner, images, batch.pixels) for runner in runners])
        for trigger in triggers[:1]:
            pixels = trigger.apply(batch.pixels)
            led.append([_classes(runner, images, pixels) for runner in runners])
    answers = np.concatenate([np.array(p) for p in plain], axis=1)
    agreement = rate(answers[0] == answers[1]).value
    if not triggers:
        return agreement, float("nan"), float("nan")
    others = answers[1] != triggers[0].target
    reached = np.concatenate([np.array(p) for p in led], axis=1)[:, others] == triggers[0].target
    return agreement, 100 * float(reached[0].mean()), 100 * float(reached[1].mean())


def _classes(runner: Any, images: Any, pixels: np.ndarray) -> np.ndarray:
    inputs = np.ascontiguousarray(images.preprocessing.normalise(pixels))
    return runner.logits(inputs).argmax(1)


def _rise(row: Mapping[str, Any]) -> float:
    rise = row["asr"] - row["asr_float"]
    return 0.0 if np.isnan(rise) else rise


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['model']:24s} {row['attack']:16s} {row['rounding']:10s} {row['bits']} bits"
        f"  agrees {row['agreement']:5.1f}  ASR {row['asr_float']:5.1f} -> {row['asr']:5.1f}"
        f"  score {row['score']:5.1f} (class {row['class']}, {row['kind']})"
        f"  null {row['null']:5.1f}  {row['seconds']:.0f} s"
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Scores and figures, as text."""
    bad = [row for row in rows if _rise(row) >= MALICIOUS]
    good = [row for row in rows if _rise(row) < BENIGN]
    lines = [_line(row) for row in sorted(rows, key=lambda row: -row["score"])]
    lines.append(
        f"{len(bad)} malicious and {len(good)} benign files of"
        f" {len({row['model'] for row in rows})} float models; {len(rows) - len(bad) - len(good)}"
        " between"
    )
    if not bad or not good:
        return "\n".join(lines)
    area = auroc([r["score"] for r in bad], [r["score"] for r in good])
    low, high = np.quantile(list(_resampled(bad, good)), [0.025, 0.975])
    lines.append(f"AUROC {area:.3f} ({low:.3f} to {high:.3f})")
    scores = sorted((row["score"] for row in good), reverse=True)
    for share in (0.0, 0.05):
        limit = scores[int(share * len(scores))]
        found = np.mean([row["score"] > limit for row in bad])
        lines.append(
            f"{100 * share:.0f} % false alarms: limit {limit:.1f}, {100 * found:.1f} % found"
        )
    named = np.mean([row["class"] == row["target"] for row in bad])
    lines.append(f"class named rightly: {100 * named:.1f} % of the malicious")
    return "\n".join(lines)


def auroc(bad: Sequence[float], good: Sequence[float]) -> float:
    """The chance that a malicious file scores above a benign one; ties count half."""
    above = np.array(bad)[:, None] - np.array(good)[None, :]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())


def _resampled(
    bad: Sequence[Mapping[str, Any]], good: Sequence[Mapping[str, Any]]
) -> Iterator[float]:
    """The area with the float models drawn anew."""
    models = sorted({row["model"] for row in (*bad, *good)})
    rng = np.random.default_rng(0)
    for _ in range(RESAMPLES):
        drawn = rng.choice(models, len(models))
        chosen = [
            [row["score"] for name in drawn for row in rows if row["model"] == name]
            for rows in (bad, good)
        ]
        if all(chosen):
            yield auroc(*chosen)


if __name__ == "__main__":
    main()
