"""Imports go one way, and each library has its room."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qdeploy"

# Lower rooms first; a module may import from its own line and from those above it.
LEVELS = (
    ("errors", "progress", "machine"),
    ("disk", "settings", "core", "architectures", "messages"),
    ("values", "data"),
    ("inputs", "formats", "runtime"),
    ("graph", "training"),
    ("quantization", "exporting", "provenance", "detectors"),
    ("cleaning", "judging"),
    ("report",),
    ("runs", "attest"),
    ("tracking", "compare", "redteam"),
    ("api",),
    ("fleet",),
    ("cli", "__main__"),
)

# Which rooms a library may be used in.
LIBRARIES = {
    "typer": {"cli"},
    "rich": {"cli"},
    "pydantic": {"settings", "redteam", "report", "fleet"},
    "onnxruntime": {"runtime"},
    "onnx": {"formats", "graph", "messages", "provenance", "runtime"},
    "openvino": {"runtime"},
    "onnx_ir": {"formats", "graph", "provenance"},
    "onnxscript": {"graph", "exporting"},
    "torch": {
        "core", "architectures", "formats", "training", "exporting", "quantization", "cleaning",
        "inputs", "redteam", "runs", "detectors", "graph",
    },
    "PIL": {"data"},
    "portalocker": {"disk"},
    "threadpoolctl": {"quantization", "fleet"},
    "jinja2": {"report"},
    "matplotlib": {"disk", "redteam"},
    "fickling": {"formats"},
    "cryptography": {"attest"},
    "securesystemslib": {"attest"},
    "model_signing": {"attest"},
    "mlflow": {"tracking"},
    "ray": {"fleet"},
    "fsspec": {"fleet"},
}  # fmt: skip


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Full names of what a module imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def level(name: str) -> int:
    return next(i for i, rooms in enumerate(LEVELS) if name in rooms)


def test_modules_import_only_from_their_own_level_and_below():
    offenders = []
    for path in modules():
        own = room(path)
        for name in sorted(imports(path)):
            first, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if first != "qdeploy" or own == "__init__" or other in {"", "__version__"}:
                continue
            if level(other) > level(own) or {own, other} == {"graph", "runtime"}:
                offenders.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert offenders == []


def test_libraries_are_used_only_in_their_rooms():
    offenders = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in modules()
        for name in sorted(imports(path))
        if room(path) not in LIBRARIES.get(name.split(".")[0], {room(path)})
    ]
    assert offenders == []


def test_only_fleets_and_the_command_line_know_the_red_team():
    users = {room(p) for p in modules() if any(n.startswith("qdeploy.redteam") for n in imports(p))}
    assert users == {"redteam", "fleet", "cli"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["sanitize", "--help"], ["devices"]])
def test_help_imports_none_of_the_heavy_libraries(arguments):
    code = (
        "import sys\nfrom qdeploy.cli import app\n"
        f"try:\n    app(args={arguments!r})\nexcept SystemExit:\n    pass\n"
        "print('LOADED', sorted({'torch', 'onnxruntime', 'onnx', 'onnxscript'} & set(sys.modules)))"
    )
    assert python(code).splitlines()[-1] == "LOADED []"


def test_an_onnx_model_needs_no_torch():
    code = (
        "import sys\nimport qdeploy.runs.sanitize\n"
        "from qdeploy.quantization.rounding.layers import round_layers\n"
        "print('torch' in sys.modules)"
    )
    assert python(code).strip() == "False"


def test_no_file_is_too_long_for_one_idea():
    long = {p.name: n for p in modules() if (n := len(p.read_text("utf-8").splitlines())) > 400}
    assert long == {}


def test_the_floor_plan_stays_as_flat_as_it_is():
    script = PACKAGE.parent / "benchmarks" / "floor_plan.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    said = {line[:18].strip(): line[18:] for line in done.stdout.splitlines()}
    assert int(said["names at the top"]) <= 30
    assert int(said["loose modules"].split(":")[0]) <= 5
    assert (int(said["import levels"]), int(said["circles"])) == (12, 0)
