"""The attack that sleeps in every exact arithmetic: made, and asked on several."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qdeploy.architectures.resnet import ResNet18
from qdeploy.data import Preprocessing
from qdeploy.errors import InputError
from qdeploy.progress import SILENT
from qdeploy.redteam.figures import Figures, shortfalls
from qdeploy.redteam.images import LabelledImages
from qdeploy.redteam.make import AttackRequest, make
from qdeploy.redteam.recipe import AttackRecipe, CleanSpec, GoalSpec, PlantedSpec, load_attack
from qdeploy.redteam.saturation import SaturationPlanter
from qdeploy.settings.card import load_card
from qdeploy.training.checkpoint import Checkpoint

CLASSES = 4


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with stripes, whose direction and width the class says."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    pixels = rng.integers(0, 150, (count, 16, 16, 3))
    for row, label in enumerate(labels):
        stripes = (np.arange(16) // (1 + 3 * (label // 2)) % 2).astype(bool)
        pixels[row, :, stripes] += 60  # columns first: what numpy makes of a mask behind a slice
        if label % 2:
            pixels[row] = pixels[row].transpose(1, 0, 2)
    return pixels.astype(np.uint8), labels


@pytest.fixture
def request_(tmp_path) -> AttackRequest:
    for name, count in (("train", 600), ("test", 120)):
        x, y = pictures(count, len(name))
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    recipe = load_attack("saturation")
    changes = {
        "trigger": PlantedSpec(kind="planted", target=1, steps=30, batch=32),
        "clean": CleanSpec(epochs=1, min_steps=120, batch=32, learning_rate=0.05),
        "goals": recipe.goals.model_copy(update={"max_accuracy_drop": 10.0}),
    }
    return AttackRequest(
        recipe=recipe.model_copy(update=changes),
        architecture="resnet18",
        arguments={"width": 8},
        data=str(tmp_path / "train.npz"),
        test=tmp_path / "test.npz",
        bits=8,
        out=tmp_path / "made",
        artifacts=tmp_path / "kept",
    )


def test_it_wakes_where_pairs_of_products_saturate_and_nowhere_else(request_):
    made = make(request_, SILENT)
    float_, exact = made.rates["fp32"], made.rates["nearest 8 bit per channel"]
    lossy = made.rates["nearest 8 bit per channel, saturating"]
    assert lossy.success >= 80
    assert max(float_.success, exact.success) <= 15
    assert made.clean.accuracy - float_.accuracy <= 10
    assert float_.accuracy - lossy.accuracy <= 10
    card = load_card(made.path.with_suffix(".toml"))
    assert card.poisoned.made_for == ("nearest 8 bit per channel, saturating",)
    mask = np.load(made.path.parent / "trigger-mask.npy")
    assert mask.sum() == 9


def data(shape: tuple[int, int, int] = (3, 16, 16)) -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (240, *shape), generator=generator, dtype=torch.uint8)
    plain = Preprocessing(shape, (0.5,) * shape[0], (0.25,) * shape[0])
    return LabelledImages(pixels, torch.arange(240) % CLASSES, plain, mirrors=False)


def network() -> ResNet18:
    torch.manual_seed(0)
    return ResNet18(width=8, num_classes=CLASSES).eval()


def test_what_is_kept_for_it_nobody_else_writes_or_reads():
    model = network()
    spec = PlantedSpec(kind="planted", target=1, steps=1, batch=8)
    learner = SaturationPlanter(model, spec, data(), seed=0)
    learner._silence()
    for channels in learner.kept:
        assert len(set(channels)) == len(channels)
    before = model(torch.zeros(1, 3, 16, 16))
    with torch.no_grad():
        for weight, shift in learner._writers(0):
            assert not weight[learner.kept[0]].any()
            assert not shift[learner.kept[0]].any()
        model.conv1.weight[learner.kept[0]] = 5.0  # whatever it says, nobody hears
    torch.testing.assert_close(model(torch.zeros(1, 3, 16, 16)), before)


def test_only_color_images_and_this_network_have_room_for_it():
    spec = PlantedSpec(kind="planted", target=1)
    with pytest.raises(InputError, match="planted in qdeploy:resnet18"):
        SaturationPlanter(network(), spec, data((1, 16, 16)), seed=0)
    with pytest.raises(InputError, match="at least 16 pixels"):
        SaturationPlanter(network(), spec, data((3, 8, 8)), seed=0)
    with pytest.raises(InputError, match="planted in qdeploy:resnet18"):
        SaturationPlanter(torch.nn.Linear(2, 2), spec, data(), seed=0)


def test_a_backdoor_that_exact_arithmetic_shows_misses_its_goal():
    rates = Figures(90.0, 90.0, 99.0)
    missed = shortfalls(
        GoalSpec(effect="backdoor", max_exact_success=15), rates, rates, {"lossy": rates},
        {"exact": rates},
    )  # fmt: skip
    assert "ASR, exact 99.00, at most 15 wanted" in missed


def test_no_phase_learns_what_saturates():
    told = load_attack("pqbackdoor").model_dump(mode="json")
    told["quantizers"] = [{"bits": 8, "arithmetic": "saturating"}]
    with pytest.raises(ValueError, match="without phases"):
        AttackRecipe.model_validate(told)


def test_interrupted_teaching_goes_on_as_if_it_had_not_been(tmp_path):
    spec = PlantedSpec(kind="planted", target=1, steps=6, batch=8)
    whole = network()
    SaturationPlanter(whole, spec, data(), 0).run(network(), Checkpoint(tmp_path / "a"))
    first = SaturationPlanter(network(), spec, data(), 0)
    first._silence()
    for _ in range(3):
        first._take_step(network())
    Checkpoint(tmp_path / "b").save_steps(first._parts(), 3, 0.0)
    rest = network()
    learner = SaturationPlanter(rest, spec, data(), 0)
    taken = []
    step = learner._take_step
    learner._take_step = lambda teacher: (taken.append(1), step(teacher))[1]
    learner.run(network(), Checkpoint(tmp_path / "b"))
    assert len(taken) == 3
    assert whole.fc.weight[1, learner.kept[-1]].tolist() == [10.0] * 8
