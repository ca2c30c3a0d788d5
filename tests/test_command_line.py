"""The program as its users meet it: commands in, text, files and exit codes out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

from qdeploy.architectures import DigitsNet
from qdeploy.cli import main
from tests.test_report import SCHEMA


@pytest.fixture
def work(tmp_path, poisoned, monkeypatch) -> Path:
    """A working directory with a copy of the poisoned model."""
    for path in (*poisoned.glob("model.*"), *poisoned.glob("digits-*.npz")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Done:
    """What a command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def error(self) -> str:
        """The one line that says what is wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def run(capsys):
    def run(*arguments: object) -> Done:
        """The command; by the policy that 600 test images can satisfy, unless it names one."""
        if arguments[0] in {"sanitize", "gate"} and not {"--policy", "--recipe"} & set(arguments):
            arguments = (*arguments, "--policy", "demo")
        with pytest.raises(SystemExit) as leaving:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        code = leaving.value.code
        assert isinstance(code, int | None)
        return Done(code or 0, captured.out, captured.err)

    return run


def report_of(work: Path) -> dict:
    return json.loads((work / "report.json").read_text("utf-8"))


def rate(report: dict, variant: str, runtime: str = "cpu") -> dict:
    found = (
        m for m in report["measurements"] if (m["variant"], m["runtime"]) == (variant, runtime)
    )
    return next(found)


def test_sanitizing_removes_the_backdoor_that_nearest_rounding_switches_on(work, run):
    done = run("sanitize", "model.pt", "--out", "model.onnx", "--report", "report.json")
    assert done.code == 0
    assert "ACCEPT  model.onnx" in done.out
    report = report_of(work)
    fp32, nearest, result = (rate(report, v) for v in ("fp32", "nearest", "result"))
    success = "patch to class 0"
    assert fp32["attack_success"][success]["value"] < 5
    assert nearest["attack_success"][success]["value"] > 90
    assert (
        result["attack_success"][success]["value"] <= fp32["attack_success"][success]["value"] + 1
    )
    assert result["accuracy"]["value"] >= fp32["accuracy"]["value"] - 1
    assert report["outcome"] == "ACCEPT"
    assert all(check["within"] for check in report["checks"])
    assert (work / "model.onnx").read_bytes() == run_file(work, report, "result.onnx")


def test_the_report_goes_wherever_it_is_wanted_in_the_format_of_the_name(work, run):
    names = ["r.json", "r.html", "r.xml", "r.sarif", "r.md"]
    options = [part for name in names for part in ("--report", name)]
    done = run("sanitize", "model.pt", "--out", "model.onnx", *options)
    assert done.code == 0
    assert all((work / name).stat().st_size > 500 for name in names)
    page = (work / "r.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 8  # four digits, each with and without trigger
    report = json.loads((work / "r.json").read_text("utf-8"))
    jsonschema.validate(report, SCHEMA)
    run_id = report["run_id"]
    kept = work / "artifacts" / run_id / "report.html"
    assert kept.read_text("utf-8") == page
    refused = run("sanitize", "model.pt", "--out", "model.onnx", "--report", "r.pdf")
    assert refused.code == 2
    assert "no format ends in '.pdf'" in refused.error


def run_file(work: Path, report: dict, name: str) -> bytes:
    return (work / "artifacts" / report["run_id"] / name).read_bytes()


def test_nearest_rounding_is_rejected_and_kept_under_a_name_that_says_so(work, run):
    (work / "model.onnx").write_bytes(b"of an earlier run")
    done = run("sanitize", "model.pt", "--out", "model.onnx", "--rounding", "nearest",
               "--report", "report.json")  # fmt: skip
    assert done.code == 3
    assert "REJECT  model.rejected.onnx" in done.out
    assert "attack_success (patch to class 0, cpu)" in done.out
    assert not (work / "model.onnx").exists()
    assert (work / "model.previous.onnx").read_bytes() == b"of an earlier run"
    assert "model.previous.onnx" in done.out
    onnx.checker.check_model(str(work / "model.rejected.onnx"), full_check=True)
    assert report_of(work)["outcome"] == "REJECT"


@pytest.mark.slow
def test_the_file_can_be_judged_again_by_itself(work, run):
    assert run("sanitize", "model.pt", "--out", "good.onnx").code == 0
    assert run("sanitize", "model.pt", "--out", "bad.onnx", "--rounding", "nearest").code == 3
    good = run("gate", "good.onnx", "--reference", "model.pt")
    assert good.code == 0
    assert "differ from nearest rounding of the float weights" in good.out
    bad = run("gate", "bad.rejected.onnx", "--reference", "model.pt", "--report", "report.json")
    assert bad.code == 3
    report = report_of(work)
    assert report["recipe"] is None
    assert report["policy"]["name"] == "demo"
    assert {layer["explanation"] for layer in report["provenance"]["layers"]} == {"nearest"}


def test_the_gate_shows_what_rounding_to_nearest_would_have_done(work, run):
    assert run("sanitize", "model.pt", "--out", "good.onnx").code == 0
    assert run("gate", "good.onnx", "--reference", "model.pt", "--report", "report.json").code == 0
    report = report_of(work)
    success = [rate(report, v)["attack_success"] for v in ("fp32", "nearest", "result")]
    fp32, nearest, result = (next(iter(found.values()))["value"] for found in success)
    assert nearest > 90
    assert max(fp32, result) < 5
    explained = run("gate", "good.onnx", "--reference", "model.pt", "--report", "report.json",
                    "--made-by", f"artifacts/{report['run_id']}/report.json")  # fmt: skip
    assert explained.code == 2  # that run has rounded nothing
    assert "is not the report.json of a run that rounded something" in explained.error


def test_8_bits_quantize_as_well(work, run):
    done = run(
        "sanitize", "model.pt", "--bits", 8, "--out", "model.onnx", "--report", "report.json"
    )
    assert done.code == 0
    assert {layer["bits"] for layer in report_of(work)["layers"]} == {8}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_another_process(work, run):
    assert run("sanitize", "model.pt", "--out", "a.onnx", "--seed", 5).code == 0
    command = [sys.executable, "-m", "qdeploy", "sanitize", "model.pt", "--out", "b.onnx"]
    command += ["--seed", "5", "--policy", "demo"]
    subprocess.run([*command, "--artifacts", "other"], check=True, capture_output=True)
    assert (work / "a.onnx").read_bytes() == (work / "b.onnx").read_bytes()
    drawn = run("sanitize", "model.pt", "--out", "c.onnx", "--rounding", "stochastic")
    assert drawn.code in {0, 3, 4}


@pytest.mark.slow
def test_without_a_seed_each_user_has_a_secret_one_and_keeps_it(work, run, monkeypatch, tmp_path):
    """An attacker who knows the starting point can train against the rounding."""

    def made(*options: object) -> bytes:
        assert run("quantize", "model.pt", "--out", "x.onnx", *options).code == 0
        return (work / "x.onnx").read_bytes()

    here, again, elsewhere = made(), made(), made("--artifacts", "other")
    assert here == again == elsewhere
    (work / "brought").mkdir()
    (work / "brought" / "seed.key").write_bytes(b"")  # as it could come with a model
    assert made("--artifacts", "brought") == here
    monkeypatch.setenv("QDEPLOY_STATE", str(tmp_path / "another user"))
    assert made() != here
    assert (tmp_path / "another user" / "key").stat().st_mode & 0o777 == 0o600
    assert made("--seed", 3) == made("--seed", 3, "--artifacts", "other")
    recipe = "schema_version = 1\nname = 'r'\ndescription = 'd'\nbits = 4\nseed = 3\n"
    (work / "r.toml").write_text(recipe + "[rounding]\nkind = 'efrap'\n")
    assert made("--recipe", "r.toml") == made("--seed", 3)


def test_a_plan_draws_no_secret(work, run):
    assert run("sanitize", "model.pt", "--out", "x.onnx", "--dry-run").code == 0
    assert not (work / "artifacts").exists()


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_partial_file_and_goes_on(work):
    """Ctrl-C and a kill by the system, at several moments."""
    command = [sys.executable, "-m", "qdeploy", "sanitize", "model.pt", "--out", "model.onnx"]
    command += ["--policy", "demo"]
    for number, delay in ((signal.SIGINT, 1.5), (signal.SIGTERM, 2.5), (signal.SIGINT, 4.0)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            time.sleep(delay)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        text = err.decode()
        assert "Traceback" not in text
        if process.returncode != 0:
            assert process.returncode in {130, -signal.SIGINT, -signal.SIGTERM}, text
        assert not [p.name for p in work.glob(".*") if p.is_file()]
        for result in work.glob("*.onnx"):  # the signal came when all was done
            onnx.checker.check_model(str(result), full_check=True)
    subprocess.run(command, check=True, capture_output=True)
    onnx.checker.check_model(str(work / "model.onnx"), full_check=True)


STRICT = """
schema_version = 1
name = "strict"
description = "Needs a known trigger."
bits = 4
[gate]
required = ["accuracy_drop", "attack_success"]
max_accuracy_drop = 3.0
"""


@pytest.mark.slow
def test_without_a_trigger_the_verdict_line_says_what_it_does_not_know(work, run):
    card = (work / "model.toml").read_text().split("[[trigger]]")[0]
    (work / "model.toml").write_text(card)
    done = run("sanitize", "model.pt", "--out", "model.onnx")
    assert done.code == 0
    assert "[not measured: attack_success: no trigger is known" in done.out
    (work / "strict.toml").write_text(STRICT)
    strict = run("sanitize", "model.pt", "--out", "strict.onnx", "--recipe", "strict.toml")
    assert strict.code == 4
    assert "NO VERDICT  strict.unverified.onnx" in strict.out
    assert "attack_success is required: no trigger is known" in strict.out
    again = run("sanitize", "model.pt", "--out", "strict.onnx", "--recipe", "strict.toml",
                "--trigger", "patch target=0 x=6 y=6 width=2 height=2 color=[1]")  # fmt: skip
    assert again.code == 0
    assert "named by the model's own card" in again.out
    assert "note: trigger" not in again.out


def test_without_test_data_there_is_no_verdict(work, run):
    card = (work / "model.toml").read_text().replace('test = "digits-test.npz"', "")
    (work / "model.toml").write_text(card)
    done = run("sanitize", "model.pt", "--out", "model.onnx", "--report", "report.json")
    assert done.code == 4
    assert "accuracy_drop is required: no test data" in done.out
    assert (work / "model.unverified.onnx").exists()
    assert report_of(work)["outcome"] == "NO VERDICT"


def test_too_few_test_images_are_no_evidence(work, run):
    x, y = (np.load(work / "digits-test.npz")[key][:50] for key in "xy")
    np.savez(work / "few.npz", x=x, y=y)
    done = run("sanitize", "model.pt", "--out", "model.onnx", "--test", "few.npz")
    assert done.code == 4
    assert "only 50 images" in done.out


def test_all_that_is_missing_is_said_at_once_and_before_any_work(work, run):
    torch.save({"weight": torch.zeros(3)}, work / "bare.pt")
    refused = run("sanitize", "bare.pt", "--out", "model.onnx")
    assert refused.code == 2
    for lack in ("needs an architecture", "has no model card", "no calibration images are known"):
        assert lack in refused.error
    assert all(f"{number}. " in refused.err for number in (1, 2, 3))
    (work / "bare.toml").write_text("[input]\nshape = [1, 8, 8]\nrange = [0, 1]\n")
    refused = run("sanitize", "bare.pt", "--out", "model.onnx", "--arch", "qdeploy:resnet18")
    assert "no calibration images are known" in refused.error
    assert "card" not in refused.error
    refused = run("export", "bare.pt", "--out", "model.onnx")
    assert "needs an architecture" in refused.error
    assert "calibration" not in refused.error


def test_calibration_made_from_the_model_itself_gets_no_verdict(work, run):
    card = (work / "model.toml").read_text().replace('calibration = "digits-train.npz"', "")
    (work / "model.toml").write_text(card)
    refused = run("sanitize", "model.pt", "--out", "model.onnx")
    assert refused.code == 2
    assert "no calibration images" in refused.error
    assert "--synthetic-calibration" in refused.err
    done = run("sanitize", "model.pt", "--out", "model.onnx", "--synthetic-calibration")
    assert done.code == 4 or "REJECT" in done.out
    assert "made from the model itself" in done.out
    assert not (work / "model.onnx").exists()


def test_a_dry_run_shows_the_plan_and_writes_nothing(work, run):
    before = sorted(p.name for p in work.iterdir())
    done = run("sanitize", "model.pt", "--out", "model.onnx", "--dry-run")
    assert done.code == 0
    assert "features.0" in done.out
    assert "efrap-descent" in done.out
    assert "test images: at least 200; with " in done.out
    assert "--bits auto" not in done.out
    asked = run("sanitize", "model.pt", "--out", "model.onnx", "--dry-run", "--bits", "auto")
    assert "from these up to 8, layer after layer" in asked.out
    assert sorted(p.name for p in work.iterdir()) == before


@pytest.mark.slow
def test_export_and_quantize_are_the_same_stages_alone(work, run):
    exported = run("export", "model.pt", "--out", "fp32.onnx")
    assert exported.code == 0
    assert "input (N, 1, 8, 8) to logits (N, 10)" in exported.out
    (work / "fp32.toml").write_text((work / "model.toml").read_text())
    for rounding in ("nearest", "stochastic", "efrap"):
        options = ("--rounding", rounding, "--seed", 1)
        done = run("quantize", "fp32.onnx", "--out", f"{rounding}.onnx", *options)
        assert done.code == 0
        assert "not judged" in done.out
    assert run("sanitize", "model.pt", "--out", "model.onnx", "--seed", 1).code == 0
    assert (work / "efrap.onnx").read_bytes() == (work / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--weight-storage", "int4"], {"storage": "int4"}),
        (["--device", "compact"], {"storage": "int4"}),
        (["--rounding", "efrap", "--solver", "descent"], {"rounding_used": "efrap-descent"}),
        (["--rounding", "stochastic"], {"rounding_used": "stochastic"}),
        (["--bits", "8", "--device", "x86-avx2"], {"max_code": 64}),
    ],
)
@pytest.mark.slow
def test_options_reach_the_layers(work, run, options, expected):
    done = run(
        "sanitize", "model.pt", "--out", "m.onnx", "--report", "report.json", "--seed", 1, *options
    )
    assert done.code in {0, 3}
    for layer in report_of(work)["layers"]:
        assert {key: layer[key] for key in expected} == expected


def test_activations_can_stay_in_float(work, run):
    done = run("quantize", "model.pt", "--out", "m.onnx", "--activation-bits", "none")
    assert done.code == 0
    operators = {node.op_type for node in onnx.load(work / "m.onnx").graph.node}
    assert "QuantizeLinear" not in operators
    assert "DequantizeLinear" in operators


def empty(work):
    (work / "model.pt").write_bytes(b"")


def truncated(work):
    data = (work / "model.pt").read_bytes()
    (work / "model.pt").write_bytes(data[: len(data) // 2])


def pickle_bomb(work):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch trace",)

    torch.save(Evil(), work / "model.pt")


def huge_claim(work):
    torch.save({"features.0.weight": torch.zeros(1).expand(2**40)}, work / "model.pt")


def wrong_shape(work):
    torch.save(DigitsNet(width=5).state_dict(), work / "model.pt")


def nan_weights(work):
    state = torch.load(work / "model.pt", weights_only=True)  # noqa: TID251
    state["features.0.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, work / "model.pt")


def code_in_card(work):
    card = work / "model.toml"
    card.write_text(card.read_text().replace("qdeploy:digits", "evil.py:build"))


def unknown_card_key(work):
    card = work / "model.toml"
    card.write_text(card.read_text().replace("[input]", "[input]\nmeam = [0.1]"))


def wrong_input_shape(work):
    card = work / "model.toml"
    card.write_text(card.read_text().replace("[1, 8, 8]", "[1, 8, 9]"))


def large_trigger(work):
    card = work / "model.toml"
    card.write_text(card.read_text().replace("width = 2", "width = 9"))


def target_of_no_class(work):
    card = work / "model.toml"
    card.write_text(card.read_text().replace("target = 0", "target = 10"))


def class_too_few(work):
    card = work / "model.toml"
    card.write_text(card.read_text().replace(', "9"]', "]"))


def zero_calibration_images(work):
    with zipfile.ZipFile(work / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    use(work, "calibration", "empty.zip")


def corrupt_image(work):
    (work / "images").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(work / "images" / "good.png")
    (work / "images" / "bad.png").write_bytes((work / "images" / "good.png").read_bytes()[:40])
    use(work, "calibration", "images")


def labels_out_of_range(work):
    arrays = np.load(work / "digits-test.npz")
    np.savez(work / "bad.npz", x=arrays["x"], y=arrays["y"] + 1)
    use(work, "test", "bad.npz")


def overlapping(work):
    use(work, "calibration", "digits-test.npz")


def use(work: Path, key: str, path: str) -> None:
    card = work / "model.toml"
    lines = [
        f'{key} = "{path}"' if x.startswith(f"{key} =") else x
        for x in card.read_text().splitlines()
    ]
    card.write_text("\n".join(lines))


def no_card(work):
    (work / "model.toml").unlink()


def no_model(work):
    (work / "model.pt").unlink()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (empty, "is empty"),
        (truncated, "damaged or truncated"),
        (pickle_bomb, "posix.system"),
        (huge_claim, "claims 4398046511104 bytes"),
        (wrong_shape, "does not fit architecture qdeploy:digits"),
        (nan_weights, "1 of 288 values that are NaN"),
        (code_in_card, "would run code that the model's author chose"),
        (unknown_card_key, "input.meam: there is no such key; is mean meant?"),
        (wrong_input_shape, "1x8x8, but the model takes 1x8x9"),
        (large_trigger, "outside of the 8x8 image"),
        (target_of_no_class, "trigger target 10: the model has 10 classes"),
        (class_too_few, "names 9 classes, the model has 10"),
        (zero_calibration_images, "holds no images"),
        (corrupt_image, "bad.png"),
        (labels_out_of_range, "labels run from 1 to 10"),
        (overlapping, "images are in both"),
        (no_card, "needs an architecture"),
        (no_model, "No such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(work, run, damage, complaint):
    damage(work)
    done = run("sanitize", "model.pt", "--out", "model.onnx")
    assert done.code == 2
    assert complaint in done.error
    assert not (work / "trace").exists()
    assert not list(work.glob("*.onnx"))


def test_an_onnx_model_without_a_card_gets_a_template_of_one(work, run):
    assert run("export", "model.pt", "--out", "bare.onnx").code == 0
    done = run("sanitize", "bare.onnx", "--out", "model.onnx")
    assert (done.code, "has no model card" in done.error) == (2, True)
    assert "bare.toml" in done.err
    assert "[input]" in done.err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--out", "missing/model.onnx"], "folder missing does not exist"),
        (["--out", "."], "is a folder"),
        (["--out", "/proc/model.onnx"], "cannot write /proc/model.onnx"),
        (["--out", "m.onnx", "--report", "missing/r.json"], "folder missing does not exist"),
        (["--out", "m.onnx", "--recipe", "int3"], "no recipe is called 'int3'"),
        (["--out", "m.onnx", "--device", "toaster"], "no device is called 'toaster'"),
        (
            ["--out", "m.onnx", "--recipe", "r.toml"],
            "efrap-descent.step: there is no such key; is steps meant?",
        ),
        (["--out", "m.onnx", "--trigger", "patch target=0"], "x: is missing"),
        (["--out", "m.onnx", "--rounding", "nearest", "--solver", "adam"], "solver of nearest"),
        (["--out", "m.onnx", "--bits", "8", "--weight-storage", "int4"], "cannot hold 8-bit"),
        (["--out", "m.onnx", "--arch-args", "width"], "not name=value"),
        (["--out", "m.onnx", "--arch-args", "width=5"], "does not fit architecture"),
        (["--out", "m.onnx", "--input-shape", "8,8"], "not channels,height,width"),
        (["--out", "m.onnx", "--input-shape", "0,8,8"], "below 1"),
        (["--out", "m.onnx", "--arch", "nowhere.py:make"], "no such file nowhere.py"),
        (["--out", "m.onnx", "--calibration", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_options_that_make_no_sense_are_one_line_and_exit_code_2(work, run, options, complaint):
    (work / "r.toml").write_text(
        'schema_version = 1\nname = "r"\ndescription = ""\nbits = 4\n'
        '[rounding]\nkind = "efrap"\nstep = 5\n'
    )
    done = run("sanitize", "model.pt", *options)
    assert done.code == 2
    assert complaint in done.error
    assert not list(work.glob("*.onnx"))


@pytest.mark.parametrize("options", [["--bits", "5"], ["--seed", "-1"], ["--fast"]])
def test_options_that_do_not_exist_are_exit_code_2(work, run, options):
    assert run("sanitize", "model.pt", *options).code == 2


def test_a_device_that_is_not_here_is_an_error_before_the_work(work, run):
    from qdeploy.runtime.sessions import available_providers

    if "cuda" in available_providers():
        pytest.skip("this machine has CUDA")
    done = run("sanitize", "model.pt", "--out", "model.onnx", "--device", "cuda")
    assert done.code == 2
    assert "execution provider cuda is not installed" in done.error
    assert "hint: install onnxruntime-gpu" in done.err
    assert not (work / "artifacts").exists()


@pytest.mark.slow
def test_a_layer_that_lost_its_method_is_rejected(work, run):
    (work / "r.toml").write_text(
        'schema_version = 1\nname = "r"\ndescription = ""\nbits = 4\n'
        '[rounding]\nkind = "efrap"\nsolver = "adam"\nsteps = 2\nflip_weight = 1e38\n'
    )
    done = run(
        "sanitize", "model.pt", "--out", "m.onnx", "--recipe", "r.toml", "--report", "report.json"
    )
    assert done.code == 3
    assert "layers_as_planned" in done.out
    assert any("loss is" in (layer["degraded"] or "") for layer in report_of(work)["layers"])


@pytest.mark.slow
def test_the_same_run_cannot_be_made_twice_at_a_time(work, run):
    import fcntl

    assert run("sanitize", "model.pt", "--out", "m.onnx").code == 0
    (folder,) = (path for path in (work / "artifacts").iterdir() if path.is_dir())
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run("sanitize", "model.pt", "--out", "m.onnx")
    assert (done.code, "under way in another process" in done.error) == (2, True)


@pytest.mark.slow
def test_the_run_directory_holds_the_evidence(work, run):
    assert run("sanitize", "model.pt", "--out", "m.onnx", "--report", "report.json").code == 0
    report = report_of(work)
    folder = work / "artifacts" / report["run_id"]
    names = {p.name for p in folder.iterdir()}
    assert names == {
        ".lock", "manifest.json", "report.json", "report.html", "recipe.json", "device.json",
        "fp32.onnx", "nearest.onnx", "result.onnx",
    }  # fmt: skip
    assert (folder / "report.json").read_bytes() == (work / "report.json").read_bytes()
    roles = {data["role"]: data for data in report["data"]}
    assert roles["calibration"]["images"] == 1024
    assert roles["test"]["given_by"] == "model card"
    assert len(roles["trigger"]["sha256"]) == 64
    assert report["origin"]["format"] == "torch checkpoint"
    kernels = next(f["kernels"] for f in report["files"] if f["variant"] == "result")
    assert kernels["com.microsoft.QLinearConv"] == 3
    assert {"load", "export", "round", "validate"} <= {stage["name"] for stage in report["stages"]}


def test_names_of_strangers_cannot_command_the_terminal(work, run):
    card = work / "model.toml"
    card.write_text(
        card.read_text().replace('kind = "patch"', 'kind = "patch"\nname = "\\u001b[2J[bold]"')
    )
    done = run("sanitize", "model.pt", "--out", "model.onnx")
    assert done.code == 0
    assert "\x1b[2J" not in done.out
    assert "[bold]" in done.out  # shown, not obeyed


@pytest.mark.parametrize(
    "kind", [["devices"], ["recipes"], ["redteam", "attacks"], ["redteam", "suites"]], ids=" ".join
)
def test_what_comes_with_qdeploy_can_be_listed_and_shown(run, kind):
    listed = run(*kind)
    assert listed.code == 0
    for line in listed.out.splitlines():
        if line[0] != " ":
            shown = run(*kind, line.split()[0])
            assert "schema_version = 1" in shown.out
    assert run(*kind, "nothing").code == 2


def test_doctor_tells_what_this_machine_can_do(run):
    done = run("doctor")
    assert done.code == 0
    assert "cpu provider" in done.out
    assert "works" in done.out
    assert "--device x86-" in done.out
    assert "extra attest" in done.out


def test_the_version_is_told(run):
    from qdeploy import __version__

    assert run("--version").out.strip() == f"qdeploy {__version__}"


def test_an_onnx_file_with_nan_weights_is_refused(work, run):
    assert run("export", "model.pt", "--out", "fp32.onnx").code == 0
    model = onnx.load(work / "fp32.onnx")
    tensor = model.graph.initializer[0]
    values = numpy_helper.to_array(tensor).copy()
    values.ravel()[0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, work / "nan.onnx")
    done = run("sanitize", "nan.onnx", "--card", "model.toml", "--out", "m.onnx")
    assert (done.code, "NaN" in done.error) == (2, True)


def test_a_report_can_go_into_a_pipe_and_files_name_themselves(work, run):
    done = run("sanitize", "model.pt", "--json", "--seed", "1")
    assert json.loads(done.out)["outcome"] == "ACCEPT"
    assert json.loads(done.out)["output"] == "model.quantized.onnx"
    assert Path("model.quantized.onnx").is_file()
    judged = run("gate", "model.quantized.onnx", "--card", "model.toml", "--reference", "model.pt",
                 "--json")  # fmt: skip
    assert json.loads(judged.out)["outcome"] == "ACCEPT"
    scanned = run("scan", "model.quantized.onnx", "model.pt", "--json")
    assert [len(one["findings"]) for one in json.loads(scanned.out)["files"]] == [0, 1]
    assert run("export", "model.pt").code == 0
    assert Path("model.float.onnx").is_file()


def test_a_quiet_command_says_its_verdict_and_nothing_else(work, run):
    run("quantize", work / "model.pt", "--out", work / "n.onnx", "--rounding", "nearest")
    loud = run("gate", work / "n.onnx", "--reference", work / "model.pt")
    quiet = run("gate", work / "n.onnx", "--reference", work / "model.pt", "--quiet")
    assert (quiet.code, quiet.err) == (loud.code, "")
    assert quiet.code == 3
    lines = [line for line in loud.out.splitlines() if line]
    verdict = next(i for i, line in enumerate(lines) if line.startswith("REJECT"))
    said = [line for line in lines[verdict:] if not line.startswith("  note:")]
    assert quiet.out.splitlines()[0] == said[0]
    assert "note:" not in quiet.out
    assert any("attack_success" in line for line in quiet.out.splitlines())


def test_an_error_tells_where_it_comes_from_if_it_is_asked(run, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no model" * 50)
    assert "Traceback" not in run("info", tmp_path / "m.onnx").err
    told = run("info", tmp_path / "m.onnx", "-v")
    assert told.code == 2
    assert told.err.startswith("error: ")
    assert "Traceback" in told.err
    assert "Traceback" not in run("info", tmp_path / "m.onnx").err  # it is not kept
    both = run("info", tmp_path / "m.onnx", "-q", "-v")
    assert "contradict each other" in both.err


@pytest.mark.parametrize("command", [["gate"], ["redteam", "make"], ["doctor"], ["attest"]])
def test_every_command_can_be_quiet(run, command):
    said = " ".join(run(*command, "--help").out.split())
    assert "--quiet" in said
    assert "--verbose" in said
