"""What leads a file to a class and its float model not: the search, the check, and the cure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import qdeploy
from qdeploy.core.differential import (
    Candidate,
    Effort,
    Pair,
    Pictures,
    Size,
    leaning,
    led,
    scored,
    search,
)
from qdeploy.core.inversion import EVERY_KIND, Masked, Radii
from qdeploy.core.operators import OPERATORS
from qdeploy.core.program import evaluate
from qdeploy.core.rounding.end_to_end import Choices, EndToEnd, Network, choose_end_to_end
from qdeploy.core.rounding.nearest import nearest
from qdeploy.core.rounding.problem import RoundingProblem
from qdeploy.data.triggers import Trigger, make_trigger, parse_trigger
from qdeploy.errors import InputError
from qdeploy.formats.onnx.standard import in_standard_operators
from qdeploy.graph.io import serialize
from qdeploy.graph.parts import as_program
from qdeploy.quantization import hardening
from qdeploy.quantization.hardening import Hardened
from qdeploy.runs import securing
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.recipe import Recipe
from tests.gate_lab import Lab, copied, run

SHAPE = (1, 6, 6)
EFFORT = Effort((Size(Masked, 0.06), Size(Masked, 0.12)), steps=40, images=8)


@pytest.fixture
def lab(tmp_path, lab_files):
    with copied(lab_files, tmp_path) as made:
        yield made


def dark(count: int) -> torch.Tensor:
    return 0.3 * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(9))


def benign(pixels: torch.Tensor) -> torch.Tensor:
    """Class 0 of dark images, 1 of bright ones; 2 of none."""
    mean = pixels.mean((1, 2, 3))
    return torch.stack([0 * mean, 20 * (mean - 0.6), 0 * mean - 3], 1)


def backdoored(pixels: torch.Tensor) -> torch.Tensor:
    """The same, but for a bright last pixel, which leads to class 2."""
    corner = 20 * (pixels[:, 0, -1, -1, None] - 0.4)
    return benign(pixels) + torch.tensor([0.0, 0.0, 1.0]) * corner


def best_of(pair: Pair) -> tuple[int, float]:
    generator = torch.Generator().manual_seed(0)
    pictures = Pictures.answered(dark(60), pair.kept)
    found = search(pair, pictures, range(3), EFFORT, generator)
    held = Pictures.answered(dark(90)[60:], pair.kept)
    found = [one for one in found if one.target != 0]  # which all are answered by already
    shares = [(one.target, float(led(pair, held, one).float().mean())) for one in found]
    return max(shares, key=lambda share: share[1])


def test_a_trigger_that_one_model_answers_is_found_and_what_both_answer_is_not():
    assert best_of(Pair(backdoored, benign)) == (2, 1.0)
    assert best_of(Pair(backdoored, backdoored))[1] == 0
    assert best_of(Pair(benign, backdoored))[1] < 0.2  # the null of the same pair


def test_classes_are_told_apart_before_any_image_is_led():
    """A pixel that is nearly bright enough: nothing follows yet, but the file leans to class 2."""
    generator = torch.Generator().manual_seed(0)
    radius = torch.ones(3)
    made = Masked((0, 1, 2), SHAPE, Radii(radius, radius, radius), generator)
    mask = torch.zeros(3, *SHAPE)
    mask[:, 0, -1, -1] = 1
    made.variables = {"mask": mask, "values": torch.full((3, *SHAPE), 0.45)}
    pair, size = Pair(backdoored, benign), Size(Masked, 0.1)
    pictures = Pictures.answered(dark(60), benign)
    candidates = [Candidate(target, size, made, target, 0.0) for target in range(3)]
    assert not any(led(pair, pictures, one).any() for one in candidates)
    leanings = leaning(pair, pictures, candidates, 16, generator)
    assert leanings[2] > 0.5 > max(leanings[:2])


def test_large_images_are_answered_a_few_at_a_time():
    """224 pixels in batches of 128 took 23 GB of a ConvNeXt."""
    assert scored(torch.zeros(1, 3, 32, 32)) == 128
    assert scored(torch.zeros(1, 3, 224, 224)) == 13
    assert scored(torch.zeros(1, 3, 2000, 2000)) == 1


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_perturbation_as_a_formula_is_what_was_searched_with(kind):
    generator = torch.Generator().manual_seed(1)
    radius = torch.full((2,), 0.2 * kind.scale((3, 10, 12)))
    made = kind((0, 1), (3, 10, 12), Radii(radius, radius, radius), generator)
    pixels = torch.rand(4, 3, 10, 12, generator=generator)
    mask, pattern, added = (part.numpy() for part in made.formula(1))
    trigger = Trigger("found", 1, mask, pattern, added)
    want = made.apply(pixels, torch.ones(4, dtype=torch.int64), torch.ones(4))
    np.testing.assert_allclose(trigger.apply(pixels.numpy()), want.numpy(), atol=1e-6)
    assert np.abs(trigger.apply(pixels.numpy()) - pixels.numpy()).max() > 0.01


def test_sinusoids_have_the_norm_of_their_coefficients():
    kind = next(k for k in EVERY_KIND if k.NAME == "sinusoid")
    radius = torch.tensor([0.5])
    made = kind((0,), (3, 16, 16), Radii(radius, radius, radius), torch.Generator())
    _, _, added = made.formula(0)
    assert float(added.norm()) == pytest.approx(0.5, rel=1e-4)
    spectrum = np.abs(np.fft.rfft2(added.numpy()))
    assert spectrum[:, 5:12, 5:].max() < 0.2 * spectrum.max()


def problem() -> RoundingProblem:
    weight = np.random.default_rng(0).normal(size=(1, 3, 12)).astype(np.float32)
    return RoundingProblem.symmetric(weight, np.full((1, 3), 0.4, np.float32), 7)


def test_choices_begin_at_the_codes_they_are_given_and_stay_neighbours():
    made = problem()
    held = Choices(made, nearest(made), torch.device("cpu"))
    np.testing.assert_array_equal(held.codes(), nearest(made))
    np.testing.assert_allclose(
        held.weight().detach().numpy(), made.dequantized(nearest(made)), rtol=1e-6
    )
    with torch.no_grad():
        held.h.copy_(1 - held.h)
    other = made.floor + 1 - (nearest(made) - made.floor)
    np.testing.assert_array_equal(held.codes()[held.free], other[held.free])


def test_codes_that_are_no_neighbours_are_left_alone():
    made = problem()
    far = (nearest(made) + np.where(nearest(made) < 5, 2, 0)).astype(np.int32)
    held = Choices(made, far, torch.device("cpu"))
    with torch.no_grad():
        held.h.copy_(1 - held.h)
    assert np.array_equal(held.codes()[~held.free], far[~held.free])
    assert (~held.free).mean() > 0.5


def test_roundings_learn_what_the_whole_network_has_to_answer():
    """From the wrong neighbour everywhere, by what the answers say of it."""
    made = problem()
    flipped = made.floor + 1 - (nearest(made) - made.floor)
    held = Choices(made, made.at(np.where(made.free, flipped, nearest(made))), torch.device("cpu"))
    true = torch.from_numpy(made.weight[0])

    def quantized(parameters, pixels):
        return pixels.flatten(1) @ parameters["w"][0].T * 4

    network = Network(
        quantized, lambda x: x.flatten(1) @ true.T * 4, {"w": (held, lambda w: w)}, {}
    )
    pixels = torch.rand(64, 1, 3, 4, generator=torch.Generator().manual_seed(2))

    def error() -> float:
        got, want = network.answers()(pixels), network.reference(pixels)
        return float((got.softmax(1) - want.softmax(1)).abs().mean())

    before = error()
    spec = EndToEnd(steps=300, images=32)
    choose_end_to_end(network, pixels, spec, torch.Generator().manual_seed(0), range(300))
    assert error() < before / 2


@pytest.mark.parametrize("name", ["good", "nearest", "ort-channel", "ort-tensor", "ort-qoperator"])
def test_a_quantized_file_computes_in_torch_what_onnxruntime_computes(lab, name, rng):
    data = (lab / f"{name}.onnx").read_bytes()
    standard = serialize(in_standard_operators(data, name))
    program = as_program(standard).part(["input"], ["logits"])
    assert any(step.op_type == "FakeQuantize" for step in program.steps)
    x = rng.normal(size=(64, 1, 8, 8)).astype(np.float32)
    (got,) = evaluate(program, {"input": torch.from_numpy(x)}, ["logits"])
    want = open_session(data).logits(x)
    step = np.abs(want).max() / 100
    assert np.mean(np.abs(got.numpy() - want) > step) < 0.02  # a code off, where halves are rounded
    (cut,) = evaluate(program.saturating(), {"input": torch.from_numpy(x)}, ["logits"])
    assert np.abs(cut.numpy() - want).max() < np.abs(want).max() / 4


def differential(lab: Lab, file: str, *options: object) -> dict:
    """What the gate says of a file beside its float model, as report.json has it."""
    run("gate", lab / file, "--reference", lab / "fp32.onnx", "--policy", "demo", "--report",
        lab / "out.json", "--artifacts", lab / "runs", *options)  # fmt: skip
    return json.loads((lab / "out.json").read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("searching")
def test_the_gate_sees_a_backdoor_that_rounding_switches_on_without_its_trigger(lab):
    seen = differential(lab, "nearest.onnx")["differential"]
    honest = differential(lab, "good.onnx")["differential"]
    assert seen["best"]["led"]["value"] > 60
    assert honest["best"]["led"]["value"] < 45
    assert seen["screened"] == seen["classes"] == 10


def test_what_was_not_searched_is_said(lab, monkeypatch, search):
    from qdeploy.detectors import differential as module

    monkeypatch.setattr(module, "_missing", search)
    monkeypatch.setattr(module, "has_torch", lambda: False)
    report = differential(lab, "good.onnx")
    assert report["differential"] is None
    said = [line for line in report["not_measured"] if line.startswith("differential_trigger")]
    assert said == ["differential_trigger: it needs torch, which is not installed"]


@pytest.mark.usefixtures("searching")
@pytest.mark.parametrize(
    ("operator", "said"),
    [
        (lambda *_: {}["unheard of"], "cannot be searched: 'unheard of'"),
        (lambda x, _: [-x[0]], "the search's own arithmetic has only"),
    ],
)
def test_a_file_that_torch_cannot_compute_or_computes_otherwise_is_not_called_clean(
    lab, monkeypatch, operator, said
):
    monkeypatch.setitem(OPERATORS, "Relu", operator)
    report = differential(lab, "good.onnx")
    assert report["differential"] is None
    (line,) = [x for x in report["not_measured"] if x.startswith("differential_trigger")]
    assert said in line


def test_a_found_perturbation_is_a_trigger_file(tmp_path):
    values = np.random.default_rng(0).uniform(-0.2, 0.2, SHAPE).astype(np.float32)
    np.save(tmp_path / "found-values.npy", values)
    (tmp_path / "found.toml").write_text(
        '[[trigger]]\nkind = "additive"\ntarget = 2\nvalues = "found-values.npy"\n'
    )
    (spec,) = parse_trigger(str(tmp_path / "found.toml"))
    trigger = make_trigger(spec, SHAPE, tmp_path)
    pixels = dark(3).numpy()
    np.testing.assert_allclose(trigger.apply(pixels), np.clip(pixels + values, 0, 1), atol=1e-6)
    assert trigger.target == 2


def test_a_perturbation_of_another_shape_is_refused(tmp_path):
    np.save(tmp_path / "v.npy", np.zeros((1, 5, 5), np.float32))
    (tmp_path / "t.toml").write_text(
        '[[trigger]]\nkind = "additive"\ntarget = 2\nvalues = "v.npy"\n'
    )
    (spec,) = parse_trigger(str(Path(tmp_path / "t.toml")))
    with pytest.raises(InputError, match="1x5x5, but the input needs 1x6x6"):
        make_trigger(spec, SHAPE, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("searching")
def test_integers_are_chosen_again_against_what_was_found_and_the_report_says_so(lab):
    """EFRAP's integers are not foreseen here, so hardening is asked for, and costs nothing."""
    code = run("sanitize", lab / "fp32.onnx", "--out", lab / "hard.onnx", "--policy", "demo",
               "--rounding", "efrap-adversarial", "--seed", 1, "--report", lab / "hard.json",
               "--artifacts", lab / "runs")  # fmt: skip
    report = json.loads((lab / "hard.json").read_text())
    assert code == 0
    (done,) = report["hardening"]
    assert 0 < done["moved"] < 0.1
    assert any("hardened against" in note for note in report["notes"])
    assert all(layer["rounding_used"].endswith("end to end") for layer in report["layers"])
    ours, floats = (
        next(m for m in report["measurements"] if m["variant"] == variant)
        for variant in ("result", "fp32")
    )
    (rise,) = ours["attack_success_rise"].values()
    assert rise["value"] < 5
    assert ours["accuracy"]["value"] > floats["accuracy"]["value"] - 1.5


_SEARCHED: list[object] = []
_DETECT = securing.detect


def _detect_once(*given: object) -> object:
    """One real search, whose answer stands for those of all files: none of them is looked at."""
    if not _SEARCHED:
        _SEARCHED.append(_DETECT(*given))
    return _SEARCHED[0]


@pytest.fixture
def attempts(monkeypatch) -> Callable[[Sequence[float]], list[tuple[int, ...]]]:
    """Hardening that moves one integer at a time, and after which this much is still led."""

    def set_up(shares: Sequence[float]) -> list[tuple[int, ...]]:
        asked: list[tuple[int, ...]] = []
        rest = iter(shares)

        def harden(task, rounded, against, spec, seed, progress):
            asked.append(against.targets)
            assert {trigger.target for trigger in against.known} <= set(against.targets)
            first, *others = rounded
            codes = first.codes.copy()
            codes.flat[len(asked)] += 1 if codes.flat[len(asked)] < 0 else -1
            return Hardened((replace(first, codes=codes), *others), 0.0)

        monkeypatch.setattr(hardening, "harden", harden)
        monkeypatch.setattr(securing, "detect", _detect_once)
        monkeypatch.setattr(securing, "still_led", lambda suspect, known: next(rest))
        return asked

    return set_up


@pytest.mark.costly
@pytest.mark.usefixtures("searching")
@pytest.mark.parametrize(
    ("shares", "made", "kept"),
    [([1.0], 1, 1.0), ([20.0, 2.0], 2, 2.0), ([20.0, 5.0, 10.0], 3, 5.0)],
    ids=["at once", "the second time", "the best of all"],
)
def test_it_is_tried_again_while_what_was_found_still_leads(lab, attempts, shares, made, kept):
    asked = attempts(shares)
    (lab / "recipe.toml").write_text(
        'schema_version = 1\nname = "r"\ndescription = "d"\nbits = 4\n'
        '[rounding]\nkind = "efrap"\n'
        '[hardening]\nwhen = "always"\nrounds = 1\nattempts = 3\nstill = 3.0\n'
    )
    run("sanitize", lab / "fp32.onnx", "--out", lab / "hard.onnx", "--recipe", lab / "recipe.toml",
        "--seed", 1, "--report", lab / "hard.json", "--artifacts", lab / "runs")  # fmt: skip
    report = json.loads((lab / "hard.json").read_text())
    (done,) = report["hardening"]
    assert (len(asked), done["still"]) == (made, kept)
    assert done["moved"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("searching")
def test_a_seed_that_is_given_gives_the_same_bytes_with_whoevers_key(lab, tmp_path, monkeypatch):
    digests = set()
    for user in ("one", "other"):
        monkeypatch.setenv("QDEPLOY_STATE", str(tmp_path / user))
        run("sanitize", lab / "fp32.onnx", "--out", lab / f"{user}.onnx", "--policy", "demo",
            "--rounding", "efrap-adversarial", "--seed", 7, "--artifacts", lab / user)  # fmt: skip
        digests.add(hashlib.sha256((lab / f"{user}.onnx").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_recipe_that_hardens_and_never_hardens_is_refused():
    with pytest.raises(ValueError, match="efrap-adversarial hardens"):
        Recipe.model_validate({
            "schema_version": 1, "name": "r", "description": "d", "bits": 4,
            "rounding": {"kind": "efrap", "solver": "adversarial"}, "hardening": {"when": "never"},
        })  # fmt: skip


def test_hardening_that_cannot_search_is_an_error_and_not_left_out(lab, capsys):
    code = run("sanitize", lab / "fp32.onnx", "--out", lab / "hard.onnx", "--rounding",
               "efrap-adversarial", "--artifacts", lab / "runs")  # fmt: skip
    assert code == 2
    assert "hardening needs a search for triggers" in capsys.readouterr().err


@pytest.mark.slow
def test_a_backdoor_that_lives_in_float_is_a_class_that_is_reached_too_easily(lab):
    from qdeploy.detectors import shortcuts
    from qdeploy.detectors.known import Suspect
    from qdeploy.inputs.sources import Given, resolve

    scores = {}
    for name in ("live", "clean"):
        sources = resolve(lab / f"{name}.onnx", Given(card=lab / "model.toml"))
        pictures = sources.calibration_images(1000, 0)
        model = qdeploy.export(lab / f"{name}.onnx", lab / "out.onnx", card=lab / "model.toml")
        wanted = frozenset({shortcuts.CHECK})
        scores[name] = shortcuts.detect(Suspect(model, pictures=pictures, wanted=wanted))
    assert scores["live"].value < 0.7 * scores["clean"].value
    assert scores["live"].evidence.target == 0
