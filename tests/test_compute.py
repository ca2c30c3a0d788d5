"""Training on another device, and in several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from qdeploy.cleaning.distil import Setting, distill
from qdeploy.errors import ProviderError, UsageError
from qdeploy.formats.torch_files import checkpoint
from qdeploy.settings.sanitizers import Asd, Bcu, Kd, Sanitizer, Unlearn
from qdeploy.training import precision
from qdeploy.training.compute import ALONE, Compute, computing
from tests.pretend import pretending
from tests.test_distillation import (
    CARD,
    TARGET,
    Normalised,
    digits,
    loaded,
    make_work,
    random_images,
    rates,
    run,
    trained,
)

ROOT = Path(__file__).parents[1]
TWO = Compute(torch.device("cpu"), 0, 2)
COMMAND = ("clean", "model.pt", "--out", "student.pt", "--images", "images.npz")
ARCHITECTURE = 'architecture = "qdeploy:resnet18"\narguments = { width = 4, channels = 1 }\n'

SPECS: dict[str, Sanitizer] = {
    "kd": Kd(epochs=2, batch=16),
    "bcu": Bcu(epochs=1, batch=16),
    "asd": Asd(epochs=2, batch=16, kd_share=((0, 0.0), (1, 0.9)), watch=("*",)),
    "unlearn": Unlearn(suspicious=1e3, survey_steps=3, least_steps=6, lifetime=3, batch=16),
}


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setattr(precision, "fast_type", lambda device: None)
    with pretending() as device:
        yield Compute(device)


@pytest.mark.parametrize("kind", SPECS)
def test_every_tensor_is_where_it_is_needed(pretended, kind):
    model = Normalised(width=8).eval()
    told = Setting(seed=0, compute=pretended)
    student = distill(loaded(model), random_images(32), SPECS[kind], told)
    devices = {value.device.type for value in student.module.state_dict().values()}
    theirs = {value.device.type for value in model.state_dict().values()}
    assert (devices, theirs) == ({"cpu"}, {"cpu"})
    assert student.history


def test_a_tensor_left_behind_is_noticed(pretended):
    there = torch.ones(3).to(pretended.device)
    with pytest.raises(AssertionError, match="mixes devices"):
        there + torch.ones(3)


def test_a_device_that_is_missing_is_an_error():
    with (
        patch("torch.cuda.is_available", return_value=False),
        pytest.raises(ProviderError, match="finds no CUDA device") as caught,
        computing("cuda"),
    ):
        pass
    assert "use --accelerator cpu" in str(caught.value.hint)


def test_more_processes_than_devices_are_an_error(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with (
        patch("torch.cuda.is_available", return_value=True),
        patch("torch.cuda.device_count", return_value=2),
        pytest.raises(ProviderError, match="process 2 of this machine has no device, there are 2"),
        computing("cuda"),
    ):
        pass


@pytest.mark.parametrize(("name", "value"), [("RANK", "3"), ("WORLD_SIZE", "many")])
def test_an_environment_that_describes_no_place_is_an_error(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{name}={value}.* is no place"), computing("cpu"):
        pass


def test_too_many_processes_for_a_batch_are_an_error():
    many = Compute(torch.device("cpu"), 0, 9)
    told = Setting(seed=0, compute=many)
    with pytest.raises(UsageError, match="9 processes: too many for batches of 16"):
        distill(loaded(Normalised(width=8)), random_images(32), SPECS["kd"], told)


def test_the_command_says_that_there_is_no_such_device(tmp_path, monkeypatch, capsys):
    make_work(tmp_path, monkeypatch)
    with patch("torch.cuda.is_available", return_value=False):
        assert run(*COMMAND, "--sanitizer", "kd", "--accelerator", "cuda") == 2
    assert "error: --accelerator cuda" in capsys.readouterr().err
    assert not (tmp_path / "student.pt").exists()


def test_cleaning_within_sanitize_is_for_one_process(tmp_path, monkeypatch, capsys):
    make_work(tmp_path, monkeypatch)
    monkeypatch.setattr("qdeploy.runs.clean.computing", lambda _: nullcontext(TWO))
    command = ("sanitize", "model.pt", "--out", "model.onnx", "--sanitizer", "kd", "--epochs", "1")
    assert run(*command) == 2
    assert "sanitize runs in one process" in capsys.readouterr().err


# Two processes


def torchrun(*arguments: str) -> None:
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, *arguments], env=path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def plain() -> nn.Module:
    """Without normalisation, whose statistics would be of half a batch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).eval()


def taught(compute: Compute) -> nn.Module:
    """The plain network after steps far from itself, in float32."""
    with patch.object(precision, "fast_type", lambda _: None):
        spec = Bcu(epochs=3, batch=16, mirrors=False, learning_rate=0.1)
        images = random_images(64)
        return distill(loaded(plain()), images, spec, Setting(seed=0, compute=compute)).module


def one_of_two(out: str) -> None:
    """What each of the processes does."""
    with computing("cpu") as compute:
        student = taught(compute)
        torch.save(student.state_dict(), f"{out}/{compute.rank}.pt")
    names = [path.read_text("utf-8") for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in names if "gloo" in name]  # one left aborts the exit, now and then


@pytest.mark.slow
def test_two_processes_make_the_student_that_one_makes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"from tests.test_compute import one_of_two\none_of_two({str(tmp_path)!r})\n")
    torchrun(str(script))
    alone = taught(ALONE).state_dict()
    assert any((alone[k] - v).abs().max() > 0.05 for k, v in plain().state_dict().items())
    for rank in (0, 1):
        path = tmp_path / f"{rank}.pt"
        theirs = checkpoint(path, path.read_bytes())
        for name, value in alone.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_unlearn_a_backdoor(tmp_path, monkeypatch):
    make_work(tmp_path, monkeypatch)
    model = trained(poisoned=True)
    torch.jit.save(torch.jit.script(model), "model.pt")
    Path("model.toml").write_text(CARD.replace(ARCHITECTURE, ""), "utf-8")
    pixels, labels = digits()
    np.savez("images.npz", x=pixels[:1000], y=labels[:1000].numpy())
    torchrun("-m", "qdeploy", *COMMAND, "--seed", "1", "--run-code-from-model")
    log = json.loads(Path("student.json").read_text("utf-8"))
    assert log["compute"] == {"device": "cpu", "precision": "float32", "processes": 2}
    assert TARGET in log["survey"]["suspects"]
    before, after = rates(model), rates(torch.jit.load("student.pt"))
    assert (before[1] > 90, after[1] < 20, after[0] > before[0] - 5) == (True, True, True)
