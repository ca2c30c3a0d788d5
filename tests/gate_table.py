"""What a row of the gate's table of cases says, and how it is tried.

A row is a file and what a command must answer to it: the exit code, and a part of the reason.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from tests import gate_lab
from tests.gate_lab import Lab

ACCEPT, BAD_INPUT, REJECT, NO_VERDICT = 0, 2, 3, 4
Make = Callable[[Lab], Path]


@dataclass(frozen=True, slots=True)
class Case:
    """A file, the options that it is judged with, and the answer.

    `make` returns the file, which the command gets as its first argument.
    """

    name: str
    make: Make
    options: tuple[str, ...]
    code: int
    says: str = ""
    command: str = "gate"
    unharmed: Callable[[Lab], bool] = lambda _: True  # what must hold in the lab afterwards


def file(name: str) -> Make:
    """One of the files that the lab starts with."""
    return lambda lab: lab / name


def made(source: str, change: Callable[[onnx.ModelProto], None]) -> Make:
    """A file of the lab with something done to it."""
    return lambda lab: lab.changed(source, "changed.onnx", change)


def written(data: bytes, name: str = "file.onnx") -> Make:
    def write(lab: Lab) -> Path:
        (lab / name).write_bytes(data)
        return lab / name

    return write


def cut_short(source: str) -> Make:
    return lambda lab: written((lab / source).read_bytes()[:-2000])(lab)


def with_policy(make: Make, limits: str, *, base: str = "demo") -> Make:
    """`make`, beside a `policy.toml` that sets more limits than `base` does."""

    def write(lab: Lab) -> Path:
        policy = Path(__file__).parents[1] / "recipes" / "policies" / f"{base}.toml"
        names = {line.split(" =")[0] for line in limits.splitlines()}
        kept = [x for x in policy.read_text("utf-8").splitlines() if x.split(" =")[0] not in names]
        (lab / "policy.toml").write_text("\n".join(kept) + f"\n{limits}", "utf-8")
        return make(lab)

    return write


def with_test_data(
    make: Make, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> Make:
    """`make`, beside a `test.npz` that is the test data with something done to it."""

    def write(lab: Lab) -> Path:
        x, y = change(*lab.images("test"))
        np.savez(lab / "test.npz", x=x, y=y)
        return make(lab)

    return write


def without_data(make: Make) -> Make:
    """`make`, beside a `bare.toml` that names neither data nor triggers."""

    def write(lab: Lab) -> Path:
        (lab / "bare.toml").write_text(lab.card.split("[data]")[0], "utf-8")
        return make(lab)

    return write


REFERENCE = ("--reference", "fp32.onnx")
DEMO = (*REFERENCE, "--policy", "demo")
ALONE = ("--card", "model.toml", "--policy", "standalone")
BARE = (*REFERENCE, "--card", "bare.toml")
INTEGERS = "max_weight_steps = 1.01\nmax_unexplained_rounding = 1.0\n"
WAIVER = """
[[gate.waivers]]
kind = "finding"
pattern = "custom-operator"
owner = "the edge team"
reason = "our runtime has it"
until = {until}
"""
OWN = (*REFERENCE, "--policy", "policy.toml")


def judge(case: Case, lab: Lab) -> tuple[int, str]:
    """The exit code, and everything that was said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        path = case.make(lab)
        code = gate_lab.run(case.command, path, *case.options)
    if not case.unharmed(lab):
        said.write("\nHARMED: something is not as it must be afterwards\n")
    return code, said.getvalue()


def answered_as_expected(case: Case, code: int, said: str) -> bool:
    fitting = code == case.code and case.says in " ".join(said.split())
    if code in {REJECT, NO_VERDICT} and case.command != "scan":  # and somebody knows what to do now
        fitting = fitting and "next: " in said
    return fitting and "Traceback" not in said and "HARMED" not in said
