"""What a fleet costs beside a loop, how it grows, and what is left of it when everything fails.

    python benchmarks/fleet.py overhead 'models/*/model.pt' --policy demo --cells 6
    python benchmarks/fleet.py growth MODEL.onnx --counts 10 100 1000
    python benchmarks/fleet.py faults 'models/*/model.pt' --policy demo --folder /mnt/small

`overhead` runs the same commands in a loop and as a fleet of one worker, in turn, and compares the
files. `growth` scans copies of one model that differ in a byte. `faults` kills a cell every few
seconds and the fleet itself twice, fills the disk of FOLDER, and adds a poisoned pickle and a model
that hangs; then it lets the fleet end, and compares with one that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx

from qdeploy.fleet.run import FleetRequest, plan_fleet
from qdeploy.fleet.verbs import verb_of
from qdeploy.fleet.whole import read_fleet
from qdeploy.progress import SILENT
from qdeploy.report.kept import read_report

QDEPLOY = (sys.executable, "-m", "qdeploy")
PICKLE = b"\x80\x02cposix\nsystem\nX\x0b\x00\x00\x00touch owned\x85R."
HANG = "def make():\n    while True:\n        pass\n"


def key_of(given: argparse.Namespace, root: Path) -> Path:
    """The key that is given, else one that all here share."""
    if given.key is not None:
        return Path(given.key).absolute()
    key = root / "benchmark.key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_bytes(bytes(32))
    return key


def manifest(
    folder: Path, key: Path, models: Sequence[str], job: str, *, minutes: float = 10
) -> Path:
    """A manifest with a store of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fleet.toml"
    listed = ", ".join(models)
    path.write_text(
        f'schema_version = 1\nname = "benchmark"\nkey = "{key}"\nmodels = [{listed}]\n'
        f"[limits]\nminutes = {minutes}\nretries = 50\n[[jobs]]\n{job}\n"
    )
    return path


def entry(pattern: Path | str) -> str:
    return f'{{ path = "{Path(pattern).absolute()}" }}'


def sanitizing(given: argparse.Namespace) -> str:
    policy = str(Path(given.policy).absolute()) if given.policy.endswith(".toml") else given.policy
    devices = json.dumps(given.devices)
    axes = f'recipes = ["int4", "int8"]\npolicies = ["{policy}"]\ndevices = {devices}'
    return f'verb = "sanitize"\n{axes}'


def timed(work: Iterator[None]) -> tuple[float, float]:
    """Wall and CPU seconds of what children do meanwhile."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in work:
        pass
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu


def overhead(given: argparse.Namespace, root: Path) -> None:
    key = key_of(given, root)
    environment = {**os.environ, "QDEPLOY_KEY": str(key)}
    walls, cpus = [], []
    for number in range(given.rounds):
        folder = root / f"r{number}"
        path = manifest(folder, key, [entry(given.models)], sanitizing(given))
        every = len(plan_fleet(FleetRequest(path, folder / "plan"), SILENT).cells)
        share = (0, max(1, every // given.cells))
        cells = plan_fleet(FleetRequest(path, folder / "plan", share=share), SILENT).cells
        places = [folder / "loop" / cell.id for cell in cells]

        def loop(cells=cells, places=places) -> Iterator[None]:
            for cell, place in zip(cells, places, strict=True):
                place.mkdir(parents=True)
                words = verb_of(cell.asked.verb).command(cell.asked, place, place / "kept")
                subprocess.run(
                    [*QDEPLOY, *words, "--quiet"], env=environment, capture_output=True, check=False
                )
                yield

        def fleet(path=path, folder=folder, share=share) -> Iterator[None]:
            out = ["--out", str(folder / "fleet"), "--workers", "1", "--quiet"]
            command = [*QDEPLOY, "fleet", str(path), *out, "--share", f"{share[0]}/{share[1]}"]
            subprocess.run(command, capture_output=True, check=False)
            yield

        order = (loop, fleet) if number % 2 else (fleet, loop)
        took = {one.__name__: timed(one()) for one in order}
        walls.append(took["fleet"][0] / took["loop"][0])
        cpus.append(took["fleet"][1] / took["loop"][1])
        print(f"round {number + 1}: {len(cells)} cells, wall and CPU s: {took}", flush=True)
        planned = plan_fleet(FleetRequest(path, folder / "plan", share=share), SILENT)
        kept = [planned.known(cell).sha256 for cell in cells]
        made = [read_report(place / "report.json").content.judged_sha256 for place in places]
        same = sum(one == other for one, other in zip(kept, made, strict=True))
        print(f"  {same} of {len(cells)} files are the same bytes", flush=True)
    for name, ratios in (("wall", walls), ("CPU", cpus)):
        middle = statistics.median(ratios)
        print(f"fleet / loop, {name}: {middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def growth(given: argparse.Namespace, root: Path) -> None:
    model, key = onnx.load(given.model), key_of(given, root)
    for count in given.counts:
        folder = root / f"n{count}"
        (folder / "models").mkdir(parents=True)
        for number in range(count):
            model.doc_string = f"{number}"
            (folder / "models" / f"{number}.onnx").write_bytes(model.SerializeToString())
        path = manifest(folder, key, [entry(folder / "models")], 'verb = "scan"')
        began = time.perf_counter()
        command = [*QDEPLOY, "fleet", str(path), "--out", str(folder / "out"), "--quiet"]
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        peak = 0
        while driver.poll() is None:
            peak = max(peak, resident(driver.pid))
            time.sleep(0.2)
        took = time.perf_counter() - began
        page = (folder / "out" / "fleet.html").stat().st_size
        print(
            f"{count} cells: {took:.0f} s, {took / count:.2f} s a cell; driver {peak / 1e6:.0f} MB;"
            f" page {page / 1e3:.0f} kB; exit code {driver.returncode}",
            flush=True,
        )


def resident(process: int) -> int:
    """Bytes, of that process alone."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    held = [line for line in text.splitlines() if line.startswith("VmRSS")]
    return int(held[0].split()[1]) * 1024 if held else 0


def children(process: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        return [int(x) for task in tasks for x in (task / "children").read_text().split()]
    except OSError:
        return []


def faults(given: argparse.Namespace, root: Path) -> None:
    folder = Path(given.folder).absolute()
    bad = root / "bad"
    bad.mkdir()
    (bad / "poisoned.pkl").write_bytes(PICKLE)
    (bad / "hang.py").write_text(HANG)
    shutil.copytree(min(Path().glob(given.models)).parent, bad / "hanging")
    hang = f'{{ path = "{bad}/hanging/model.pt", options = {{ arch = "{bad}/hang.py:make" }} }}'
    models = [entry(given.models), entry(bad / "poisoned.pkl"), hang]
    path = manifest(folder, key_of(given, root), models, sanitizing(given), minutes=given.minutes)
    command = [*QDEPLOY, "fleet", str(path), "--out", str(folder / "out"), "--quiet"]
    command += ["--executor", given.executor]
    done, killed = Counter(), random.Random(0)  # noqa: S311 - any will do
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    began = last = time.monotonic()
    filler = folder / "filler"
    while True:
        time.sleep(0.5)
        now = time.monotonic() - began
        code = driver.poll()
        if code is not None and not (code < 0 or code == 2):
            break
        if code is not None:  # as whoever watches it would
            done[f"started again after {code}"] += 1
            filler.unlink(missing_ok=True)
            driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        servers = children(driver.pid)
        cells = [cell for server in servers for cell in children(server)] or servers
        if time.monotonic() - last > given.every and cells:
            last = time.monotonic()
            os.kill(killed.choice(cells), signal.SIGKILL)
            done["cells killed"] += 1
        if done["fleet killed"] < 2 and now > given.every * 2.5 * (done["fleet killed"] + 1):
            driver.kill()
            driver.wait()
            done["fleet killed"] += 1
        if not done["disk filled"] and now > given.every * 4:
            fill(filler)
            done["disk filled"] += 1
        elif filler.exists() and now > given.every * 5:
            filler.unlink()
    print(f"{time.monotonic() - began:.0f} s, exit code {code}: {dict(done)}")
    compare(folder / "out" / "fleet.json", Path(given.against) if given.against else None)


def fill(path: Path) -> None:
    """Leave no byte on the disk."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def compare(ours: Path, theirs: Path | None) -> None:
    cells = read_fleet(ours).cells
    print(f"{len(cells)} cells: {dict(Counter(r.outcome.value for r in cells))}")
    print(f"  attempts: {dict(sorted(Counter(r.attempts for r in cells).items()))}")
    for record in cells:
        if record.outcome.value in {"FAILED", "BAD INPUT"}:
            print(f"  {record.title}: {record.outcome.value}: {record.reason[:120]}")
    if theirs is not None:
        known = {r.title: (r.outcome, r.sha256) for r in read_fleet(theirs).cells}
        both = [r for r in cells if r.title in known]
        same = sum(known[r.title] == (r.outcome, r.sha256) for r in both)
        print(f"  {same} of {len(both)} have the verdict and the bytes of the undisturbed fleet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(required=True)
    for work in (overhead, faults):
        kind = kinds.add_parser(work.__name__)
        kind.add_argument("models")
        kind.add_argument("--policy", default="demo")
        kind.add_argument("--devices", nargs="+", default=["x86-avx2"])
        kind.set_defaults(work=work)
        if work is overhead:
            kind.add_argument("--cells", type=int, default=6)
            kind.add_argument("--rounds", type=int, default=5)
        else:
            kind.add_argument("--folder", required=True)
            kind.add_argument("--every", type=float, default=30.0)
            kind.add_argument("--minutes", type=float, default=2.0)
            kind.add_argument("--executor", default="local")
            kind.add_argument("--against")
    kind = kinds.add_parser("growth")
    kind.add_argument("model")
    kind.add_argument("--counts", type=int, nargs="+", default=[10, 100])
    kind.set_defaults(work=growth)
    for kind in kinds.choices.values():
        kind.add_argument("--key", help="in place of one that is made, to compare with files of it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        given.work(given, Path(name))


if __name__ == "__main__":
    main()
