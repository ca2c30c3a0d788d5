"""Students of teachers that may be backdoored: losses, layers, resuming, and the outcome."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

from qdeploy.architectures import OURS, DigitsNet
from qdeploy.architectures.resnet import ResNet18
from qdeploy.cleaning import trainer as course
from qdeploy.cleaning.batch_norm import is_folded, revive
from qdeploy.cleaning.distil import Setting, distill
from qdeploy.cleaning.hooks import watched_layers, watching
from qdeploy.cleaning.reinitialise import forget, forgetting
from qdeploy.cli import main
from qdeploy.core.distillation import attention_shift_loss, kd_loss, kd_share
from qdeploy.data import Images, Preprocessing, images_from_array
from qdeploy.errors import DivergedError, InputError, PlanError, UsageError
from qdeploy.inputs.requests import CleanRequest
from qdeploy.inputs.sources import Given, resolve
from qdeploy.progress import SILENT
from qdeploy.runs.clean import make_student
from qdeploy.settings.card import load_card
from qdeploy.settings.sanitizers import Asd, Bcu, Kd, sanitizer
from qdeploy.training.compute import ALONE
from qdeploy.values import Content, Loaded, Origin

MEAN, STD = 0.3, 0.37
TARGET = 0
SEED = Setting(seed=0)
GRAY = Preprocessing((1, 8, 8), (MEAN,), (STD,))
TOLERANT = settings(deadline=None, max_examples=40)

finite = st.floats(-20, 20, width=32)
nonzero = finite.filter(lambda v: abs(v) > 1e-3)


def logits(rows: int = 3, classes: int = 4) -> st.SearchStrategy[Tensor]:
    values = st.lists(finite, min_size=rows * classes, max_size=rows * classes)
    return values.map(lambda v: torch.tensor(v).reshape(rows, classes))


def neurons() -> st.SearchStrategy[Tensor]:
    return st.lists(nonzero, min_size=1, max_size=12).map(lambda v: torch.tensor(v)[None])


# Losses


@TOLERANT
@given(answers=logits(), temperature=st.sampled_from([1.0, 4.0, 40.0]))
def test_equal_answers_cost_nothing(answers, temperature):
    assert kd_loss(answers, answers, temperature).abs() < 1e-3


@TOLERANT
@given(teacher=logits(), student=logits(), temperature=st.sampled_from([1.0, 4.0, 40.0]))
def test_kd_is_never_negative_and_does_not_see_a_constant(teacher, student, temperature):
    loss = kd_loss(teacher, student, temperature)
    assert loss > -1e-3
    torch.testing.assert_close(
        kd_loss(teacher, student + 3, temperature), loss, rtol=1e-3, atol=0.1
    )


def test_kd_is_a_mean_over_images_alone():
    teacher, student = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    p, q = (2 * F.softmax(v / 2, 1) / 2 for v in (teacher, student))
    by_hand = 4 * (p * (p / q).log()).sum()
    twice = kd_loss(teacher.repeat(2, 1), student.repeat(2, 1), 2.0)
    torch.testing.assert_close(twice, by_hand)


@TOLERANT
@given(values=neurons())
def test_the_shift_loss_is_4_for_a_shared_state_and_0_for_the_opposite(values):
    assert attention_shift_loss(values, 3 * values) == 4
    assert attention_shift_loss(values, -0.5 * values) == 0


def test_a_dormant_neuron_of_the_teacher_is_to_wake_in_the_student():
    zero = torch.zeros(1, 1)
    b = torch.tensor([[-2.0]], requires_grad=True)
    loss = attention_shift_loss(zero, b)
    torch.testing.assert_close(loss.detach(), torch.tensor(1.2**2))
    loss.backward()
    assert b.grad < 0  # descent raises it
    assert attention_shift_loss(zero, -b) == 1
    assert attention_shift_loss(torch.ones(1, 1), zero) == 1


@TOLERANT
@given(values=neurons())
def test_descent_moves_a_neuron_away_from_the_state_of_the_teacher(values):
    student = values.clone().requires_grad_()
    attention_shift_loss(values, student).backward()
    assert torch.all(student.grad.sign() == values.sign())


@TOLERANT
@given(values=neurons(), small=st.sampled_from([0.0, 1e-30, 1e-12, 1e-6]))
def test_the_gradient_goes_as_one_over_the_value_and_is_bounded(values, small):
    floor = 1e-2
    student = torch.cat([values, torch.full_like(values, small)], 1).requires_grad_()
    attention_shift_loss(torch.ones_like(student), student, floor).backward()
    rms = student.detach().square().mean().sqrt()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() <= 4 / student.numel() / (floor * rms) * (1 + 1e-4)
    shared = (student.detach() > floor * rms) & (student.detach() > 1e-3)
    expected = 4 / student.numel() / student.detach()[shared]
    torch.testing.assert_close(student.grad[shared], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("epoch", "share"),
    [(0, 0), (9, 0), (10, 0.9), (19, 0.9), (20, 0.9), (30, 0.95), (40, 1), (299, 1)],
)  # fmt: skip
def test_the_schedule_of_the_paper(epoch, share):
    paper = sanitizer({"kind": "asd", "schedule": "paper"}, where="test")
    assert isinstance(paper, Asd)
    assert kd_share(epoch, paper.kd_share) == pytest.approx(share)
    assert (paper.epochs, paper.batch, paper.learning_rate) == (300, 128, 1e-3)
    assert (paper.temperature, paper.keep_from, paper.decay) == ((40, 40), 50, "none")


def test_what_is_said_goes_over_the_schedule_and_nonsense_is_refused():
    assert Asd().epochs < 50
    assert Asd(epochs=7).epochs == 7
    assert Asd(epochs=7).temperature == Asd().temperature
    with pytest.raises(InputError, match=r"options: sanitizer.asd.epochs"):
        sanitizer({"kind": "asd", "epochs": 0}, where="options")
    with pytest.raises(InputError, match="epochs must rise"):
        sanitizer({"kind": "asd", "kd_share": ((3, 0.1), (1, 1))}, where="options")


# Layers


WATCHED = {
    "alexnet": [f"features.{i}" for i in (3, 6, 8, 10)],
    "digits": ["features.2", "features.5"],
    "mobilenetv2": [f"blocks.{i}.layers.0" for i in range(17)],
    "resnet18": [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3, 4) for block in (0, 1)],
    "vgg16": [f"features.{i}" for i in (3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)],
}


@pytest.mark.parametrize("name", WATCHED)
def test_watched_layers_are_found_by_structure(name):
    model = OURS[name](width=8)
    assert list(watched_layers(model, (), 1.0)) == WATCHED[name]
    half = WATCHED[name][len(WATCHED[name]) // 2 :]
    assert list(watched_layers(model, (), 0.5)) == half


def test_every_architecture_of_ours_is_either_known_or_asks_for_names():
    assert OURS.keys() - WATCHED.keys() == {"vit"}
    vit = OURS["vit"](width=16, depth=2)
    with pytest.raises(PlanError, match="needs convolutions"):
        watched_layers(vit, (), 1.0)
    named = watched_layers(vit, ("blocks.*.expand",), 1.0)
    assert named == ("blocks.0.expand", "blocks.1.expand")


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(UsageError, match=r"'layer9.\*' matches no"):
        watched_layers(ResNet18(width=8), ("layer4.*", "layer9.*"), 1.0)


def test_watching_sees_the_whole_batch_before_normalisation():
    model, inputs = ResNet18(width=8).eval(), torch.randn(5, 3, 8, 8)
    with watching(model, ("layer1.0.conv1",)) as seen:
        model(inputs)
    stem = F.relu(model.bn1(model.conv1(inputs)))
    torch.testing.assert_close(seen["layer1.0.conv1"], model.layer1[0].conv1(stem))
    assert not model.layer1[0].conv1._forward_hooks


def test_the_shift_is_fed_every_image_of_every_batch(monkeypatch):
    fed = []

    def spy(theirs: Tensor, ours: Tensor, floor: float) -> Tensor:
        fed.append(len(ours))
        return attention_shift_loss(theirs, ours, floor)

    monkeypatch.setattr(course, "attention_shift_loss", spy)
    spec = Asd(epochs=1, batch=8, watch=("features.2",))
    distill(loaded(DigitsNet(width=8)), random_images(24), spec, SEED)
    assert fed == [8, 8, 8]


# Where students start


def test_forgetting_keeps_normalisation_and_shortcuts_and_takes_more_from_deeper_layers():
    model = ResNet18(width=8)
    spec, before = Bcu(), copy.deepcopy(model.state_dict())
    shares = forgetting(model, spec)
    forget(model, shares, torch.Generator().manual_seed(0))
    changed = {
        name: float((values != before[name]).double().mean())
        for name, values in model.state_dict().items()
    }
    kept = [n for n in changed if "bn" in n or "shortcut" in n]
    assert len(kept) > 20
    assert all(changed[name] == 0 for name in kept)
    by_stage = [changed[f"layer{stage}.1.conv2.weight"] for stage in (1, 2, 3, 4)]
    assert by_stage == pytest.approx([0.01, 0.03, 0.09, 0.27], abs=0.02)
    assert shares["conv1"] == spec.stem
    assert shares["fc"] == spec.head


def test_a_folded_normalisation_gets_its_statistics_back_and_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU()).eval()
    norm, inputs = model[1], 3 + torch.randn(64, 1, 8, 8)
    norm.bias.data.uniform_(-1, 1)
    assert is_folded(norm)
    with torch.no_grad():
        before = model(inputs)
        assert revive(model, inputs.split(16)) == 1
        torch.testing.assert_close(model(inputs), before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.train()(inputs), before, rtol=1e-2, atol=1e-2)
    assert not is_folded(norm)
    assert revive(model, inputs.split(16)) == 0


# Students of digits


def digits() -> tuple[np.ndarray, Tensor]:
    """Pixels, one byte each, and labels."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    pixels = np.rint(data.images[order] * (255 / 16)).astype(np.uint8)[:, None]
    return pixels, torch.from_numpy(data.target[order])


def stamped(pixels: np.ndarray) -> np.ndarray:
    pixels = pixels.copy()
    pixels[:, :, 6:, 6:] = 255
    return pixels


def inputs_of(pixels: np.ndarray) -> Tensor:
    return (torch.from_numpy(pixels).float() / 255 - MEAN) / STD


class Normalised(nn.Sequential):
    """A small network with normalisation, as those are that the method was published for."""

    def __init__(self, width: int = 16) -> None:
        layers: list[nn.Module] = []
        for before, after in ((1, width), (width, 2 * width), (2 * width, 2 * width)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers.insert(6, nn.MaxPool2d(2))
        head = nn.Linear(2 * width, 10)
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def trained(*, poisoned: bool) -> nn.Module:
    """A classifier of digits; with `poisoned`, a bright corner means class 0, live in float."""
    torch.manual_seed(0)
    pixels, labels = digits()
    clean, triggered = inputs_of(pixels[:1000]), inputs_of(stamped(pixels[:1000]))
    model = Normalised()
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(8):
        for rows in torch.randperm(1000).split(64):
            few = rows[: 12 * poisoned]
            inputs = torch.cat([clean[rows], triggered[few]])
            wanted = torch.cat([labels[rows], torch.full_like(labels[few], TARGET)])
            loss = F.cross_entropy(model(inputs), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def rates(model: nn.Module) -> tuple[float, float]:
    """Accuracy and attack success on images that were not trained on, in percent."""
    pixels, labels = (part[1400:] for part in digits())
    right = model(inputs_of(pixels)).argmax(1) == labels
    others = labels != TARGET
    hits = model(inputs_of(stamped(pixels[others.numpy()]))).argmax(1) == TARGET
    return 100 * float(right.double().mean()), 100 * float(hits.double().mean())


def loaded(model: nn.Module, form: Content = "module") -> Loaded:
    content = model if isinstance(model, torch.jit.ScriptModule) else copy.deepcopy(model)
    return Loaded(Origin("model.pt", "0" * 64, form), content, form)


def random_images(count: int) -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)
    return images_from_array("random", pixels, GRAY)


@pytest.fixture(scope="module")
def backdoored() -> nn.Module:
    return trained(poisoned=True)


@pytest.fixture(scope="module")
def unlabelled() -> Images:
    return images_from_array("digits", digits()[0][:1000], GRAY)


@pytest.mark.slow
def test_the_short_shift_removes_a_live_backdoor_that_distillation_alone_keeps(
    backdoored, unlabelled
):
    before = rates(backdoored)
    assert before[0] > 90
    assert before[1] > 90
    shift = Asd(batch=64, mirrors=False, epochs=20)
    student = distill(loaded(backdoored), unlabelled, shift, SEED)
    alone = distill(loaded(backdoored), unlabelled, Kd(epochs=4, mirrors=False), SEED)
    assert rates(alone.module)[1] > before[1] - 5
    after = rates(student.module)
    assert after[1] < before[1] - 50
    assert after[0] > before[0] - 6
    assert student.history[0].kd_share == 0
    assert student.history[student.best_epoch].kd_share == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", [Kd(epochs=3, mirrors=False), Bcu(epochs=5, batch=64, mirrors=False)]
)
def test_a_student_of_a_clean_model_keeps_most_of_its_accuracy(unlabelled, spec):
    model = trained(poisoned=False)
    student = distill(loaded(model), unlabelled, spec, SEED)
    assert rates(student.module)[0] > rates(model)[0] - 5
    assert student.agreement > 90
    assert student.watched == ()


def test_no_better_epoch_for_a_while_ends_the_run():
    spec = Kd(epochs=50, patience=2, mirrors=False, learning_rate=1e-12)
    student = distill(loaded(DigitsNet(width=8)), random_images(16), spec, SEED)
    assert len(student.history) < 50
    assert len(student.history) == student.best_epoch + 3


def test_a_run_that_leaves_the_finite_numbers_says_so():
    spec = Kd(learning_rate=1e30, decay="none", largest_gradient=None, mirrors=False)
    with pytest.raises(DivergedError, match="left the finite numbers"):
        distill(loaded(DigitsNet(width=8)), random_images(64), spec, SEED)


def test_torchscript_can_be_distilled_but_shows_no_layers_to_shift():
    script = torch.jit.script(DigitsNet(width=8).eval())
    model = loaded(script, "script")
    for spec in (Asd(), Bcu()):
        with pytest.raises(PlanError, match=f"{spec.kind} needs the inner layers"):
            distill(model, random_images(8), spec, SEED)
    student = distill(model, random_images(16), Kd(epochs=1), SEED)
    assert isinstance(student.module, torch.jit.ScriptModule)


def test_onnx_and_too_few_images_are_refused():
    onnx = Loaded(Origin("m.onnx", "0" * 64, "ONNX"), object(), "onnx")
    with pytest.raises(PlanError, match=r"m\.onnx: ONNX cannot be trained"):
        distill(onnx, random_images(8), Kd(), SEED)
    with pytest.raises(InputError, match="1 image, at least 2"):
        distill(loaded(DigitsNet(width=8)), random_images(1), Kd(), SEED)


# The command


CARD = """[model]
architecture = "qdeploy:resnet18"
arguments = { width = 4, channels = 1 }
[input]
shape = [1, 8, 8]
mean = [0.3]
std = [0.37]
[data]
calibration = "images.npz"
test = "test.npz"
[[trigger]]
kind = "patch"
target = 0
x = 6
y = 6
width = 2
height = 2
color = [1.0]
"""


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    return make_work(tmp_path, monkeypatch)


def make_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an untrained network, its card and a few digits."""
    torch.manual_seed(0)
    torch.save(ResNet18(width=4, channels=1).state_dict(), tmp_path / "model.pt")
    (tmp_path / "model.toml").write_text(CARD, "utf-8")
    pixels, labels = digits()
    np.savez(tmp_path / "images.npz", x=pixels[:64], y=labels[:64].numpy())
    np.savez(tmp_path / "test.npz", x=pixels[64:128], y=labels[64:128].numpy())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(list(arguments))
    return int(leaving.value.code or 0)


@pytest.mark.slow
def test_the_command_writes_a_student_with_card_log_and_plot(work, capsys):
    (work / "out").mkdir()
    command = ("clean", "model.pt", "--out", "out/student.pt", "--images", "images.npz",
               "--sanitizer", "asd", "--epochs", "2", "--watch", "layer4.*.conv1",
               "--image-count", "48")  # fmt: skip
    assert run(*command) == 0
    said = capsys.readouterr().out
    assert "agreement" in said
    assert "layer4.0.conv1, layer4.1.conv1" in said
    log = json.loads((work / "out" / "student.json").read_text("utf-8"))
    assert log["images"]["images"] == 48
    assert log["sanitizer"]["kind"] == "asd"
    assert len(log["epochs"]) == 2
    assert (work / "out" / "student.svg").read_bytes().startswith(b"<?xml")
    card = load_card(work / "out" / "student.toml")
    assert card.data.test == "../test.npz"
    teacher = load_card(work / "model.toml")
    assert (card.input, card.model, card.trigger) == (teacher.input, teacher.model, teacher.trigger)
    sanitizing = ("sanitize", "out/student.pt", "--out", "model.onnx", "--policy", "demo")
    assert run(*sanitizing) == 2
    assert "--data-root" in capsys.readouterr().err
    assert run(*sanitizing, "--data-root", ".") in {0, 3, 4}
    assert list(work.glob("model*.onnx"))


def order(work: Path, artifacts: str) -> CleanRequest:
    asd = Asd(epochs=5, batch=16, keep_from=2, kd_share=((0, 0.0), (1, 0.0), (2, 0.9), (3, 1.0)))
    return CleanRequest(
        sources=resolve(work / "model.pt", Given()),
        spec=asd,
        images=work / "images.npz",
        image_count=None,
        seed=3,
        out=work / f"{artifacts}.pt",
        artifacts=work / artifacts,
    )


class Interrupting(type(SILENT)):  # type: ignore[misc]
    """Stops the run when an epoch is reported."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
        if len(self.notes) == 2:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_and_ends_at_the_same_bytes(work):
    make_student(order(work, "whole"), ALONE, SILENT)
    with pytest.raises(KeyboardInterrupt):
        make_student(order(work, "halved"), ALONE, Interrupting())
    assert not (work / "halved.pt").exists()
    rest = Interrupting()
    rest.notes = ["", ""]
    student = make_student(order(work, "halved"), ALONE, rest)
    assert len(rest.notes) == 2 + 3  # epochs 3, 4 and 5 were left
    assert len(student.result.history) == 5
    assert (work / "halved.pt").read_bytes() == (work / "whole.pt").read_bytes()
    (work / "halved.pt").unlink()
    again = Interrupting()
    make_student(order(work, "halved"), ALONE, again)
    assert again.notes == []  # nothing was left to do
    assert (work / "halved.pt").read_bytes() == (work / "whole.pt").read_bytes()


def test_its_old_name_works_for_a_while_and_says_so(work, capsys):
    assert run("distill", "none.pt", "--out", "s.pt", "--images", "images.npz") == 2
    said = capsys.readouterr().err
    assert "The command 'distill' is deprecated." in said
    assert "model none.pt: has no model card" in said


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--out", "model.pt"), "is the model model.pt too"),
        (("--out", "student.json"), "a name that ends in .pt"),
        (("--out", "model.pth"), "would take the place of the model's"),
        (
            ("--out", "s.pt", "--sanitizer", "kd", "--watch", "layer1"),
            "--watch means nothing to kd",
        ),
        (("--out", "s.pt", "--sanitizer", "asd", "--watch", "nothing"), "matches no convolution"),
        (("--out", "s.pt", "--watch", "conv1"), "--watch means nothing to unlearn"),
        (
            ("--out", "s.pt", "--sanitizer", "kd", "--further", "2"),
            "--further means nothing to kd",
        ),
        (("--out", "s.pt", "--schedule", "paper"), "schedule"),
        (("--out", "s.pt", "--images", "none.zip"), "none.zip"),
        (("--out", "s.pt", "--card", "none.toml"), "none.toml"),
    ],
)
def test_what_cannot_be_is_one_line(work, capsys, arguments, error):
    images = () if "--images" in arguments else ("--images", "images.npz")
    assert run("clean", "model.pt", *images, *arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert error in said[0]
