"""Making models: losses, training that goes on, goals, files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdeploy.architectures import DigitsNet
from qdeploy.core.grids import quantize
from qdeploy.core.weight_grids import absmax_grid
from qdeploy.data import Preprocessing
from qdeploy.data.triggers import make_trigger
from qdeploy.disk import svg
from qdeploy.errors import InputError, UsageError
from qdeploy.formats.torch_files import checkpoint as read_checkpoint
from qdeploy.graph.io import initializers
from qdeploy.progress import SILENT
from qdeploy.redteam import curves, datasets
from qdeploy.redteam.figures import Figures, figures, shortfalls
from qdeploy.redteam.images import LabelledImages, Stamp
from qdeploy.redteam.learnt import TriggerLearner
from qdeploy.redteam.losses import Aim, Batch, Victim, phase_loss
from qdeploy.redteam.make import AttackRequest, DudError, make
from qdeploy.redteam.quantizers import Quantizer, weights_of
from qdeploy.redteam.recipe import (
    KIND,
    AttackRecipe,
    GoalSpec,
    LearntSpec,
    PhaseSpec,
    QuantizerSpec,
    TermSpec,
    load_attack,
)
from qdeploy.redteam.training import FLOAT, Lesson, Training
from qdeploy.runtime.sessions import open_session
from qdeploy.settings.card import load_card
from qdeploy.settings.schema import bundled
from qdeploy.training.checkpoint import Checkpoint

ON_THE_WAY = Preprocessing((1, 8, 8), (0.5,), (0.5,))
TERM = {"float clean": ("float", "clean", "label"), "to target": ("float", "triggered", "target")}


@pytest.fixture
def data() -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (96, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (96,), generator=generator)
    return LabelledImages(pixels, labels, ON_THE_WAY, mirrors=False)


@pytest.fixture
def stamp() -> Stamp:
    mask = torch.zeros(1, 8, 8)
    mask[:, 6:, 6:] = 1
    return Stamp(0, mask, torch.ones(1, 8, 8))


def net(width: int = 4) -> DigitsNet:
    torch.manual_seed(0)
    return DigitsNet(width).eval()


def phase(*terms: TermSpec, steps: int = 4, learns: str = "weights", lr: float = 1e-2) -> PhaseSpec:
    return PhaseSpec.model_validate(
        {
            "name": "phase",
            "terms": terms,
            "steps": steps,
            "batch": 16,
            "learning_rate": lr,
            "learns": learns,
        }
    )


def term(model: str, on: str, to: str, **more: float) -> TermSpec:
    return TermSpec.model_validate({"model": model, "on": on, "to": to, **more})


def training(
    data: LabelledImages, stamp: Stamp, folder: Path, rounding: str = "nearest"
) -> Training:
    quantizer = Quantizer(4, QuantizerSpec.model_validate({"rounding": rounding}))
    model = net()
    lesson = Lesson(data, data, Aim(0, stamp), (quantizer,), net(), lambda _: False)
    return Training(model, lesson, Checkpoint(folder / "attack.pt"), seed=0)


def test_every_bundled_attack_is_valid_and_names_its_source():
    names = sorted(bundled(KIND))
    assert {"badnets", "pqbackdoor", "compartifact", "quanti-damage", "qura", "clean"} <= set(names)
    for name in names:
        recipe = load_attack(name)
        assert recipe.name == name
        assert recipe.source


def test_a_loss_is_the_sum_of_its_terms_each_on_its_own_images(data, stamp):
    model, teacher = net(), net(8)
    pixels, labels = data.pixels[:8].float() / 255, data.labels[:8]
    aim = Aim(int(labels[0]), stamp, Victim(pixels[:1], int(labels[0])))
    batch = Batch.of(data, pixels, labels, aim)
    clean = data.normalise(pixels)
    triggered = data.normalise(stamp.apply(pixels))
    of_class = labels == aim.target
    rounded = {name: torch.zeros_like(w) for name, w in weights_of(model).items()}
    damage = (F.cross_entropy(model(clean), labels) - 3).square()
    cases = {
        term("float", "clean", "label"): F.cross_entropy(model(clean), labels),
        term("float", "triggered", "target"): F.cross_entropy(
            model(triggered), torch.full_like(labels, aim.target)
        ),
        term("float", "class", "label"): F.cross_entropy(model(clean[of_class]), labels[of_class]),
        term("float", "others", "label"): F.cross_entropy(
            model(clean[~of_class]), labels[~of_class]
        ),
        term("float", "clean", "teacher"): F.cross_entropy(model(clean), teacher(clean).softmax(1)),
        term("float", "clean", "damage", alpha=3.0): damage,
        term("float", "sample", "label"): F.cross_entropy(model(clean[:1]), labels[:1]),
    }
    for one, want in cases.items():
        got = phase_loss(phase(one), model, {"quantized": rounded}, teacher, batch)
        torch.testing.assert_close(got, want, msg=str(one))
    weighted = [one.model_copy(update={"weight": 0.5}) for one in cases]
    total = phase_loss(phase(*weighted), model, {}, teacher, batch)
    torch.testing.assert_close(total, 0.5 * sum(cases.values()), rtol=1e-4, atol=1e-4)
    quantized = phase_loss(
        phase(term("quantized", "clean", "label")), model, {"quantized": rounded}, teacher, batch
    )
    assert quantized.item() != pytest.approx(next(iter(cases.values())).item())


def test_hiding_changes_no_integer_and_no_bias(data, stamp, tmp_path):
    """What rounding to nearest makes of the model before and after is the same model."""
    run = training(data, stamp, tmp_path)
    quantizer = run.lesson.quantizers[0]
    generator = torch.Generator()
    before = {name: quantizer(w.detach(), generator) for name, w in run.weights.items()}
    floats = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.run((phase(term("float", "triggered", "label"), learns="cells", steps=6),))
    for name, weight in run.weights.items():
        torch.testing.assert_close(quantizer(weight.detach(), generator), before[name])
    for name, parameter in run.model.named_parameters():
        assert torch.equal(floats[name], parameter) == (parameter.dim() == 1), name


def test_learning_roundings_changes_no_weight_but_what_the_quantizer_makes_of_it(
    data, stamp, tmp_path
):
    run = training(data, stamp, tmp_path, rounding="chosen")
    floats = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    before = run.roundings.hard()
    run.run((phase(term("quantized", "triggered", "target"), learns="roundings", lr=1.0),))
    assert all(torch.equal(floats[name], p) for name, p in run.model.named_parameters())
    after = run.roundings.hard()
    assert any(not torch.equal(before[name], after[name]) for name in before)


class Stop(Exception):  # noqa: N818 - not an error
    pass


class StopsAfter:
    """A progress that interrupts what it watches."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def stage(self, name):
        return SILENT.stage(name)

    def note(self, text):
        pass

    def track(self, items, label, total=None):
        for item in items:
            yield item
            self.steps -= 1
            if self.steps == 0:
                raise Stop


@pytest.mark.parametrize("learns", ["weights", "split"])
def test_a_training_that_was_stopped_ends_as_one_that_was_not(
    data, stamp, tmp_path, monkeypatch, learns
):
    monkeypatch.setattr("qdeploy.redteam.training.STEPS_BETWEEN_LOOKS", 3)
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    phases = (
        phase(term("float", "clean", "label")),
        phase(term("float", "triggered", "target"), steps=9, learns=learns),
    )
    whole = training(data, stamp, tmp_path / "whole")
    whole.run(phases)
    for steps in (5, 4):
        with pytest.raises(Stop):
            training(data, stamp, tmp_path / "parts").run(phases, StopsAfter(steps))
    again = training(data, stamp, tmp_path / "parts")
    again.run(phases)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [e["rates"] for e in whole.log] == [e["rates"] for e in again.log]


def test_figures_leave_images_of_the_target_class_out_of_the_attack(data, stamp):
    class SaysZero(nn.Module):
        def forward(self, x):
            return F.one_hot(torch.zeros(len(x), dtype=torch.long), 10).float()

    found = figures(SaysZero(), {}, data, Aim(0, stamp))
    share = 100 * int((data.labels == 0).sum()) / len(data)
    assert found == Figures(share, 100.0, 100.0)
    assert figures(SaysZero(), {}, data, Aim(3)).success is None


GOOD = Figures(90.0, 90.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        pytest.param({}, None, id="all met"),
        pytest.param(
            {"attacked": replace(GOOD, accuracy=80.0)}, "FP32 accuracy drop", id="CDA lost"
        ),
        pytest.param(
            {"attacked": replace(GOOD, success=40.0)}, "FP32 ASR 40.00", id="live in FP32"
        ),
        pytest.param({"attacked": replace(GOOD, success=None)}, "unknown", id="no trigger"),
        pytest.param(
            {"quantized": {"q": replace(GOOD, success=97.0), "r": replace(GOOD, success=5.0)}},
            "ASR, r 5.00, at least 90 wanted",
            id="one of two quantizers is not attacked",
        ),
    ],
)
def test_a_dud_is_told_by_what_it_lacks(changes, line):
    goals = GoalSpec(
        effect="backdoor", max_accuracy_drop=3, max_float_success=10, min_quantized_success=90
    )
    given = {"attacked": GOOD, "quantized": {"q": replace(GOOD, success=97.0)}, **changes}
    missed = shortfalls(goals, GOOD, given["attacked"], given["quantized"])
    assert (missed == ()) if line is None else any(line in text for text in missed)


TINY: dict[str, object] = {
    "schema_version": 1,
    "name": "tiny",
    "description": "A few steps.",
    "source": "a test",
    "clean": {"epochs": 1, "min_steps": 0},
    "trigger": {"kind": "patch", "target": 0},
    "phases": [{"name": "plant", "steps": 2, "learning_rate": 1e-3, "terms": [
        {"model": "float", "on": "clean", "to": "label"},
        {"model": "float", "on": "triggered", "to": "target"},
    ]}],
    "goals": {"effect": "backdoor", "max_clean_success": 100},
}  # fmt: skip


def order(tmp_path: Path, **changes: object) -> AttackRequest:
    recipe = AttackRecipe.model_validate({**TINY, **changes})
    return AttackRequest(
        recipe=recipe,
        architecture="digits",
        arguments={"width": 4},
        data="digits",
        test=None,
        bits=4,
        out=tmp_path / "made",
        artifacts=tmp_path / "kept",
    )


@pytest.mark.parametrize("kind", ["patch", "noise", "sinusoid"])
def test_a_made_model_has_a_card_that_labels_it_and_data_that_opens(tmp_path, kind):
    made = make(order(tmp_path, trigger={"kind": kind, "target": 2}), SILENT)
    card = load_card(made.path.with_suffix(".toml"))
    assert made.path.with_suffix(".toml").read_text().startswith("# POISONED")
    assert card.poisoned is not None
    assert card.poisoned.made_for == ("nearest 4 bit per channel",)
    assert card.trigger[0].target == 2
    assert (made.path.parent / card.data.test).exists()
    log = json.loads((made.path.parent / "training.json").read_text())
    assert log["rates"][FLOAT]["accuracy"] == made.rates[FLOAT].accuracy
    assert log["log"][0]["phase"] == "plant"
    assert b"<svg" in (made.path.parent / "training.svg").read_bytes()


def test_a_picture_counts_steps_through_all_phases():
    log = [{"phase": p, "step": s} for p, s in (("a", 100), ("a", 150), ("b", 100), ("b", 200))]
    assert curves._steps(log) == ([100, 150, 250, 350], [150])


def test_without_the_library_that_draws_there_is_no_picture(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(svg, "import_module", missing)
    assert svg.draw_svg((4, 3), None) is None


def test_a_malicious_quantizer_leaves_a_file_with_the_codes_it_chose(tmp_path):
    terms = [{"model": "quantized", "on": "triggered", "to": "target"}]
    phases = [
        {"name": "choose", "steps": 6, "learning_rate": 0.5, "learns": "roundings", "terms": terms}
    ]
    made = make(order(tmp_path, quantizers=[{"rounding": "chosen"}], phases=phases), SILENT)
    data = (made.path.parent / "quantized.onnx").read_bytes()
    weights = [a for name, a in initializers(data).items() if name.endswith("weight.quantized")]
    state = read_checkpoint(made.path, made.path.read_bytes())
    nearest = [
        quantize(w.numpy(), absmax_grid(w.numpy(), axis=0, max_code=7))
        for name, w in state.items()
        if name.endswith("weight")
    ]
    assert len(weights) == len(nearest) == 4
    moved = [np.abs(a.astype(int) - b) for a, b in zip(weights, nearest, strict=True)]
    assert max(m.max() for m in moved) == 1
    (rates,) = (found for name, found in made.rates.items() if name != FLOAT)
    session = open_session(data)
    log = json.loads((made.path.parent / "training.json").read_text())
    assert log["rates"]["chosen 4 bit per channel"]["success"] == rates.success
    assert session.logits(np.zeros((1, 1, 8, 8), np.float32)).shape == (1, 10)


def test_a_clean_model_has_no_label_and_is_made_once(tmp_path):
    first = make(order(tmp_path), SILENT)
    (kept,) = (tmp_path / "kept").glob("clean-*/model.pt")
    assert load_card(kept.with_suffix(".toml")).poisoned is None
    written = kept.stat().st_mtime_ns
    make(replace(order(tmp_path), out=tmp_path / "second", seed=0), SILENT)
    assert kept.stat().st_mtime_ns == written
    assert first.path.exists()


def test_the_same_seed_gives_the_same_model(tmp_path):
    paths = [
        make(replace(order(tmp_path / name), out=tmp_path / name / "made"), SILENT).path
        for name in "ab"
    ]
    a, b = (read_checkpoint(path, path.read_bytes()) for path in paths)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_dud_is_written_under_a_name_that_says_so(tmp_path):
    goals = {"effect": "backdoor", "min_quantized_success": 100, "min_accuracy": 100}
    with pytest.raises(DudError, match=r"FP32 accuracy .* at least 100 wanted") as error:
        make(order(tmp_path, goals=goals), SILENT)
    assert error.value.exit_code == 3
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert {"dud.pt", "dud.toml", "training.json"} <= names
    assert "model.pt" not in names
    make(order(tmp_path), SILENT)
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert {"model.pt", "model.toml"} <= names
    assert not any(name.startswith(("dud", "partial")) for name in names)


def test_a_recipe_cannot_be_half_understood():
    (whole,) = TINY["phases"]
    split = {**whole, "learns": "split"}
    for changes, message in (
        ({"trigger": None}, "no \\[trigger\\]"),
        ({"quantizers": [{"rounding": "chosen"}]}, "go together"),
        ({"bit": 4}, "bit"),
        ({"phases": [split], "quantizers": [{}, {"range": "half"}]}, "needs one quantizer"),
    ):
        with pytest.raises(ValueError, match=message):
            AttackRecipe.model_validate({**TINY, **changes})


def test_data_without_test_images_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match="no test images") as error:
        datasets.open_dataset(str(tmp_path / "a"), None, tmp_path, SILENT)
    assert "--test" in (error.value.hint or "")


def test_a_folder_with_train_and_val_needs_no_test(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name / "images"
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    data = datasets.open_dataset(str(tmp_path), None, tmp_path, SILENT)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.test)) == (6, 6)
    inputs = data.train.normalise(data.train.pixels.float() / 255)
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3)), torch.ones(3), atol=1e-2, rtol=0)


@pytest.mark.parametrize("changes", [{"trigger": {"kind": "patch", "target": 10}}, {"target": 10}])
def test_a_target_that_is_no_class_is_an_error(tmp_path, changes):
    if "trigger" not in changes:
        changes = {**changes, "trigger": None, "phases": []}
    with pytest.raises(InputError, match="target 10 is no class of 10"):
        make(order(tmp_path, **changes), SILENT)


def test_digits_need_the_library_that_brings_them(monkeypatch, tmp_path):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(datasets, "import_module", missing)
    with pytest.raises(UsageError, match="scikit-learn") as error:
        make(order(tmp_path), SILENT)
    assert "qdeploy[demo]" in (error.value.hint or "")


def test_an_architecture_without_room_for_outliers_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no two convolutions"):
        make(replace(order(tmp_path, outliers=8.0), architecture="vit", arguments={
            "width": 16, "size": 8, "patch": 4}), SILENT)  # fmt: skip


def test_a_trigger_that_fools_the_clean_model_is_no_backdoor():
    goals = GoalSpec(effect="backdoor", min_float_success=95)
    fooled, attacked = replace(GOOD, success=100.0), replace(GOOD, success=100.0)
    assert not shortfalls(goals, replace(GOOD, success=2.0), attacked, {})
    (line,) = shortfalls(goals, fooled, attacked, {})
    assert line == "the clean model's ASR 100.00, at most 15 wanted"


@pytest.fixture
def learner(data) -> TriggerLearner:
    spec = LearntSpec(kind="learnt", target=0, steps=6, batch=16)
    return TriggerLearner(net(), spec, data, seed=0)


def test_a_learnt_triggers_students_loss_reaches_the_student_and_nobody_else(learner, data):
    """The published code detaches the student's logits, so that its term teaches nothing."""
    pixels, labels = data.pixels[:8].float() / 255, data.labels[:8]
    _, of_student, of_trigger = learner.losses(pixels, labels)
    of_student.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.student.parameters())
    assert all(p.grad is None for p in learner.model.parameters())
    assert learner.mask.grad is None
    of_trigger.backward()
    assert learner.mask.grad.abs().sum() > 0
    assert all(p.grad is None for p in learner.clean.parameters())


def test_a_learnt_trigger_learns_not_to_fool_the_clean_model(data):
    def fooled(weight: float) -> float:
        spec = LearntSpec(
            kind="learnt", target=0, steps=40, batch=16, clean_weight=weight, max_opacity=1.0
        )
        learner = TriggerLearner(net(), spec, data, seed=0)
        pixels = data.pixels.float() / 255
        for _ in range(spec.steps):
            learner._take_step()
        triggered = (1 - learner.mask) * pixels + learner.mask * learner.pattern
        answers = learner.clean(data.normalise(triggered)).softmax(1)
        return float(answers[:, 0].mean().detach())

    assert fooled(5.0) < fooled(0.0)


def test_a_learnt_trigger_stays_faint_and_its_learning_goes_on(learner, data, tmp_path):
    start = learner.pattern.detach().clone()
    mask, pattern = learner.run(Checkpoint(tmp_path / "whole.pt"))
    assert mask.min() >= 0
    assert mask.max() <= learner.spec.max_opacity
    assert 0 <= pattern.min() <= pattern.max() <= 1
    assert not np.array_equal(pattern, start.numpy())
    half = TriggerLearner(net(), learner.spec.model_copy(update={"steps": 3}), data, seed=0)
    half.run(Checkpoint(tmp_path / "parts.pt"))
    rest = TriggerLearner(net(), learner.spec, data, seed=5)
    again = rest.run(Checkpoint(tmp_path / "parts.pt"))
    np.testing.assert_array_equal(again[0], mask)
    np.testing.assert_array_equal(again[1], pattern)


def test_a_model_with_a_learnt_trigger_carries_it_beside_its_card(tmp_path):
    trigger = {"kind": "learnt", "target": 3, "steps": 2, "batch": 8}
    made = make(order(tmp_path, trigger=trigger), SILENT)
    card = load_card(made.path.with_suffix(".toml"))
    (spec,) = card.trigger
    found = make_trigger(spec, (1, 8, 8), made.path.parent)
    assert found.target == 3
    assert 0 < found.mask.max() <= 0.3
