"""Whole commands on files, cards, triggers, run folders, reports and envelopes that lie.

Each trial is a home of its own with a project in it. Whatever the command is given, it answers with
a documented exit code and without a traceback, and it touches nothing in that home but its own
results, its artifacts and its state.

`python -m tests.test_fuzz_commands --seconds 1200` goes on for so long, each trial in a process
with bounded memory, and prints what it found.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests import gate_lab, test_fuzz_readers
from tests.gate_lab import Lab, run
from tests.test_fuzz_readers import Shelf

MEMORY_BYTES = 4 << 30  # address space of a trial, torch and onnxruntime included
SLOWEST_SECONDS = 120
DOCUMENTED = {0, 2, 3, 4}
OURS = ("project/artifacts", "project/out", "project/report", "state")
Rng = np.random.Generator

GATE = ("gate", "good.onnx", "--reference", "fp32.onnx", "--policy", "demo")
JUDGED = (*GATE, "--test-images", "200", "--report", "report.json")


@dataclass(frozen=True, slots=True)
class Home:
    """A home with things in it that are nobody's business, and a project to work in."""

    folder: Path

    @property
    def project(self) -> Path:
        return self.folder / "project"

    def untouched(self) -> dict[str, str]:
        """What must not change: every path but our own, and what is there."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if not name.startswith(OURS):
                found[name] = _content(path)
        return found


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "other"


def make_home(folder: Path, shelf: Shelf) -> Home:
    home = Home(folder)
    (folder / ".ssh").mkdir(parents=True)
    (folder / ".ssh" / "id").write_text("a key\n")
    (folder / ".bashrc").write_text("export A=1\n")
    (folder / ".data").mkdir()
    shutil.copytree(shelf.folder, home.project, ignore=shutil.ignore_patterns("runs", "damaged*"))
    return home


# one function for each kind of lie: it spoils the project by a seed, and returns the command


def spoil_model(home: Home, rng: Rng) -> tuple[str, ...]:
    name = str(rng.choice([
        "fp32.onnx", "good.onnx", "ort-channel.onnx", "model.pt", "model.safetensors", "script.pt",
    ]))  # fmt: skip
    path = Shelf(home.project).damaged(name, int(rng.integers(2**32)))
    shutil.copy(home.project / "model.toml", path.with_suffix(".toml"))
    commands: list[tuple[str, ...]] = [
        ("scan", path.name, "--report", "report.sarif"),
        ("export", path.name, "--out", "out.onnx"),
        ("quantize", path.name, "--out", "out.onnx", "--rounding", "nearest", "--seed", "0"),
        ("gate", path.name, "--card", "model.toml", "--policy", "standalone"),
    ]
    return commands[int(rng.integers(len(commands)))]


PLACES = (
    "../.bashrc", "../.ssh", "..", "/", "/dev/zero", "/dev/stdin", "pipe", "link", "loop",
    "digits-test.npz", "model.pt", "images.zip", "", ".", "~", "nowhere", "\\u0000", "empty",
)  # fmt: skip


def spoil_card(home: Home, rng: Rng) -> tuple[str, ...]:
    """Another word in the card, or another place for its data."""
    project, card = home.project, home.project / "model.toml"
    os.mkfifo(project / "pipe")
    (project / "link").symlink_to(home.folder / ".ssh")
    (project / "loop").symlink_to("loop")
    (project / "empty").mkdir()
    if rng.random() < 0.5:
        data = Shelf(project).damaged("model.toml", int(rng.integers(2**32))).read_bytes()
        card.write_bytes(data)
    else:
        text = card.read_text("utf-8")
        place = str(rng.choice(PLACES))
        old = str(rng.choice(["digits-test.npz", "digits-train.npz"]))
        card.write_text(text.replace(old, place), "utf-8")
        if rng.random() < 0.3:
            trigger = (
                f'\n[[trigger]]\nkind = "blend"\ntarget = 1\nimage = "{place}"\nopacity = 0.5\n'
            )
            card.write_text(card.read_text("utf-8") + trigger, "utf-8")
    return (*JUDGED, "--card", "model.toml")


def spoil_trigger(home: Home, rng: Rng) -> tuple[str, ...]:
    path = Shelf(home.project).damaged("trigger.toml", int(rng.integers(2**32)))
    return (*JUDGED, "--card", "model.toml", "--trigger", path.name)


def spoil_run(home: Home, rng: Rng) -> tuple[str, ...]:
    """What lies in the folder of the run: of an earlier one, damaged, or links to elsewhere."""
    runs = home.project / "artifacts"
    command = (*JUDGED, "--card", "model.toml")
    run(*command)
    folder = next(path for path in runs.iterdir() if path.is_dir())
    files = [path for path in folder.rglob("*") if path.is_file()]
    for _ in range(int(rng.integers(1, 4))):
        path = files[int(rng.integers(len(files)))]
        kind = rng.integers(5)
        with contextlib.suppress(OSError):
            if kind == 0:
                path.write_bytes(test_fuzz_readers._other_bytes(path.read_bytes(), rng))
            elif kind == 1:
                path.unlink()
                path.symlink_to(home.folder / ".bashrc")
            elif kind == 2:
                (folder / "manifest.json").unlink()
            elif kind == 3:
                (folder / "partial").mkdir()
                np.savez(folder / "partial" / "predictions.npz", done=np.array(200))
            else:
                (folder / "partial").symlink_to(home.folder / ".ssh")
    return command


def spoil_report(home: Home, rng: Rng) -> tuple[str, ...]:
    name = Shelf(home.project).damaged("good.json", int(rng.integers(2**32))).name
    return ("attest", "good.onnx", "--report", name, "--key", "private.pem", "--out", "out.json")


def spoil_envelope(home: Home, rng: Rng) -> tuple[str, ...]:
    name = Shelf(home.project).damaged("signed.json", int(rng.integers(2**32))).name
    return ("verify", "good.onnx", "--attestation", name, "--key", "public.pem")


LIES: dict[str, Callable[[Home, Rng], tuple[str, ...]]] = {
    "model": spoil_model,
    "card": spoil_card,
    "trigger": spoil_trigger,
    "run folder": spoil_run,
    "report": spoil_report,
    "envelope": spoil_envelope,
}


def fill(lab: Lab) -> Shelf:
    """The files of the readers' shelf, and a signed verdict."""
    shelf = test_fuzz_readers.fill(lab)
    key = lab / "private.pem"
    for arguments in (
        ["genpkey", "-algorithm", "ed25519", "-out", str(key)],
        ["pkey", "-in", str(key), "-pubout", "-out", str(lab / "public.pem")],
    ):
        openssl = shutil.which("openssl") or "openssl"
        subprocess.run([openssl, *arguments], check=True, capture_output=True)
    assert run("attest", lab / "good.onnx", "--report", lab / "good.json", "--key", key,
               "--out", lab / "signed.json") == 0  # fmt: skip
    return shelf


def trial(shelf: Shelf, kind: str, seed: int, folder: Path) -> None:
    """One lie told to one command.

    Raises:
        AssertionError: the answer is none that is documented, or something was touched.
    """
    home = make_home(folder, shelf)
    said = io.StringIO()
    with (
        contextlib.chdir(home.project),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        os.environ.update(HOME=str(home.folder), QDEPLOY_STATE=str(home.folder / "state"))
        command = LIES[kind](home, np.random.default_rng(seed))
        before = home.untouched()
        code = run(*command)
        after = home.untouched()
    text = said.getvalue()
    assert code in DOCUMENTED, f"{command}: exit code {code}\n{text[-2000:]}"
    assert "Traceback" not in text, f"{command}\n{text[-2000:]}"
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert not changed, f"{command}: touched {sorted(changed)}"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, lab_files) -> Iterator[Shelf]:
    folder = tmp_path_factory.mktemp("shelf")
    with gate_lab.copied(lab_files, folder) as lab:
        yield fill(lab)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LIES)
@pytest.mark.parametrize("seed", range(3))
def test_a_lie_is_answered_and_nothing_else_is_touched(shelf, kind, seed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", os.environ["HOME"])  # a trial sets these: put back afterwards
    monkeypatch.setenv("QDEPLOY_STATE", "unset")
    trial(shelf, kind, seed, tmp_path / "home")


def main() -> int:
    """Lie for a while; 1 if something was believed that must not be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        shelf = _in_a_child(lambda: _make_shelf(Path(name)), Path(name) / "shelf")
        return int(_fuzz(shelf, Path(name), time.monotonic() + given.seconds, given.seed) > 0)


def _make_shelf(folder: Path) -> None:
    with gate_lab.made_anew() as lab:
        fill(lab)
        shutil.copytree(lab.folder, folder / "shelf", ignore=shutil.ignore_patterns("runs"))


def _in_a_child(make: Callable[[], None], folder: Path) -> Shelf:
    """Files made in another process: after a fork, this one's libraries must not have run."""
    child = os.fork()
    if not child:
        make()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit("the files to be damaged could not be made")
    return Shelf(folder)


def _fuzz(shelf: Shelf, folder: Path, end: float, seed: int) -> int:
    tried, wrong, peak = Counter[str](), Counter[str](), Counter[str]()
    kinds = tuple(LIES)
    while time.monotonic() < end:
        kind = kinds[seed % len(kinds)]
        tried[kind] += 1
        code, size = _limited(shelf, kind, seed, folder)
        peak[kind] = max(peak[kind], size)
        if code:
            wrong[kind] += 1
            sys.stdout.write(f"seed {seed}, {kind}: ended with {code}\n")
            sys.stdout.flush()
        seed += 1
    for kind in kinds:
        said = f"{tried[kind]:6} tried, {wrong[kind]:3} wrong, at most {peak[kind] >> 20} MiB"
        sys.stdout.write(f"{kind:12} {said}\n")
    return sum(wrong.values())


def _limited(shelf: Shelf, kind: str, seed: int, folder: Path) -> tuple[int, int]:
    """How a trial in a child with limits ended, and the most memory that it held, in bytes."""
    place = folder / f"home-{seed}"
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (SLOWEST_SECONDS, SLOWEST_SECONDS))
        try:
            trial(shelf, kind, seed, place)
        except BaseException as error:  # noqa: BLE001 - the very thing that is looked for
            sys.stdout.write(f"{type(error).__name__}: {error}\n")
            sys.stdout.flush()
            os._exit(1)
        os._exit(0)
    _, status, used = os.wait4(child, 0)
    shutil.rmtree(place, ignore_errors=True)
    return os.waitstatus_to_exitcode(status), used.ru_maxrss << 10


if __name__ == "__main__":
    sys.exit(main())
