"""One scan of many model files, hostile ones among them: exit code, what was said, CPU and memory.

`python benchmarks/scan_many.py MODEL.onnx [--files 500]`
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper  # noqa: TID251 - writes what onnx_ir would not

Change = Callable[[onnx.ModelProto], None]


def custom_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Run", [], ["z"], domain="com.evil"))
    proto.opset_import.append(helper.make_opsetid("com.evil", 1))


def not_a_number(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.full(4, np.nan, np.float32), "nan"))


def doubling(proto: onnx.ModelProto) -> None:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("l", 1)]
    for i in range(40):
        callee, domain = (f"f{i + 1}", "l") if i < 39 else ("Relu", "")
        nodes = [
            helper.make_node(callee, ["x"], ["t"], domain=domain),
            helper.make_node(callee, ["t"], ["y"], domain=domain),
        ]
        proto.functions.append(helper.make_function("l", f"f{i}", ["x"], ["y"], nodes, opsets))


def many_nodes(proto: onnx.ModelProto) -> None:
    proto.graph.node.extend(
        helper.make_node("Relu", [f"r{i}"], [f"r{i + 1}"]) for i in range(100_000)
    )


def many_dimensions(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer.add(name="d", data_type=TensorProto.FLOAT)
    tensor.dims.extend([1] * 400_000)


def endless_products(proto: onnx.ModelProto) -> None:
    shape = numpy_helper.from_array(np.array([4096, 4096], np.int64), "shape")
    proto.graph.initializer.append(shape)
    proto.graph.node.append(helper.make_node("ConstantOfShape", ["shape"], ["p0"]))
    proto.graph.node.extend(
        helper.make_node("MatMul", [f"p{i}", f"p{i}"], [f"p{i + 1}"]) for i in range(1000)
    )


CHANGES: tuple[Change, ...] = (
    custom_operator, not_a_number, doubling, many_nodes, many_dimensions, endless_products,
)  # fmt: skip


def fill(folder: Path, model: Path, files: int) -> list[Path]:
    """Honest copies, with the hostile and the damaged files spread over them."""
    data = model.read_bytes()
    made = {f"{change.__name__}.onnx": change for change in CHANGES}
    paths = []
    for name, change in made.items():
        proto = onnx.ModelProto.FromString(data)
        change(proto)
        (folder / name).write_bytes(proto.SerializeToString())
        paths.append(folder / name)
    for name, held in {"empty": b"", "cut": data[:-100], "text": b"no model\n" * 99}.items():
        (folder / f"{name}.onnx").write_bytes(held)
        paths.append(folder / f"{name}.onnx")
    paths.append(folder / "nowhere.onnx")
    gap = (files - len(paths)) // len(paths) + 1
    mixed: list[Path] = []
    for i in range(files - len(paths)):
        path = folder / f"honest{i}.onnx"
        path.write_bytes(data)
        mixed.append(path)
        if i % gap == 0 and paths:
            mixed.append(paths.pop())
    return mixed + paths


def scan(
    paths: list[Path], folder: Path
) -> tuple[int, float, float, float, list[dict[str, object]]]:
    """Exit code, seconds by the wall and of CPU, peak MB, and what is said of each file."""
    report = folder / "scan.json"
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "qdeploy", "scan", *map(str, paths), "--report", str(report)]
    code = subprocess.run(command, check=False, capture_output=True).returncode
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return code, wall, cpu, after.ru_maxrss / 1e3, json.loads(report.read_text("utf-8"))["files"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--files", type=int, default=500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = fill(folder, options.model, options.files)
        idle = scan([folder / "empty.onnx"], folder)[2]
        code, wall, cpu, peak, told = scan(paths, folder)
        answers = Counter(
            "unreadable" if file["failed"] else "stands against" if file["findings"] else "nothing"
            for file in told
        )
        print(f"{len(told)} of {len(paths)} files told, exit code {code}: {dict(answers)}")
        each = (cpu - idle) / len(paths)
        print(f"{wall:.1f} s, {cpu:.1f} s of CPU ({each:.3f} a file), at most {peak:,.0f} MB")
        print("| file | CPU s | exit code | |\n|---|---|---|---|")
        for path in (p for p in paths if not p.name.startswith("honest")):
            code, _, cpu, peak, (file,) = scan([path], folder)
            rules = sorted({f["rule"] for f in file["findings"]})  # type: ignore[attr-defined]
            said = ", ".join(rules) or str(file["failed"]).replace(str(folder), "")[:60]
            print(f"| {path.stem} | {max(cpu - idle, 0):.2f} | {code} | {said}, {peak:,.0f} MB |")


if __name__ == "__main__":
    main()
