"""Perturbations that lead to a class: their sizes, their search, and what it finds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdeploy.core import gradient_memory
from qdeploy.core.gradient_memory import images_at_once
from qdeploy.core.inversion import (
    KINDS,
    Additive,
    Masked,
    Perturbations,
    Radii,
    towards,
)

SHAPE = (1, 6, 6)
TOLERANT = settings(deadline=None, max_examples=30)


def radii(count: int, least: float, most: float, start: float) -> Radii:
    return Radii(*(torch.full((count,), float(value)) for value in (least, most, start)))


def triggers(
    kind: type[Perturbations], targets=(1, 0), seed=0, lifetime=None, **bounds
) -> Perturbations:
    given_ = {"least": 0.1, "most": 20.0, "start": 3.0, **bounds}
    generator = torch.Generator().manual_seed(seed)
    return kind(targets, SHAPE, radii(len(targets), **given_), generator, lifetime)


def by_corner(pixels: torch.Tensor) -> torch.Tensor:
    """Class 1 if the last pixel is bright, 0 if the image is bright as a whole, else 2."""
    whole = 20 * (pixels.mean((1, 2, 3)) - 0.6)
    corner = 20 * (pixels[:, 0, -1, -1] - 0.6)
    return torch.stack([whole, corner, torch.zeros(len(pixels))], 1)


def dark(count: int) -> torch.Tensor:
    return 0.3 * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(9))


def test_as_many_images_at_once_as_fit_in_memory(monkeypatch):
    pixels, weight = torch.ones(9, 1, 4, 4), torch.ones(16, 1000, requires_grad=True)

    def losses(part: slice) -> torch.Tensor:
        return (pixels[part].flatten(1) @ weight).exp().exp().sum(1)  # keeps 8,000 bytes of each

    assert images_at_once(losses, pixels) == gradient_memory.MOST_VALUES // 16
    monkeypatch.setattr(gradient_memory, "LARGEST_KEPT", 35_000)  # not counting 64,000 of weights
    assert images_at_once(losses, pixels) == 4
    monkeypatch.setattr(gradient_memory, "LARGEST_KEPT", 10)
    assert images_at_once(losses, pixels) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_do_not_fit_at_once_give_the_same_step(monkeypatch, kind):
    found = []
    for bytes_kept in (gradient_memory.LARGEST_KEPT, 10):
        monkeypatch.setattr(gradient_memory, "LARGEST_KEPT", bytes_kept)
        sought = triggers(kind)
        sought.step(towards(by_corner), dark(8))
        found.append(sought)
    for name, whole in found[0].variables.items():
        torch.testing.assert_close(found[1].variables[name], whole)
    assert found[0].success.tolist() == found[1].success.tolist()


@TOLERANT
@given(
    values=st.lists(st.floats(0, 1, width=32), min_size=36, max_size=36),
    most=st.floats(0.125, 40, width=32),
)
def test_a_mask_is_the_nearest_one_within_its_size(values, most):
    mask = torch.tensor(values).view(1, 1, 6, 6)
    found = Masked((0,), SHAPE, radii(1, 0, 40, most), torch.Generator())._within(
        {"mask": mask, "values": torch.zeros(1, *SHAPE)}, torch.tensor([most])
    )["mask"]
    assert float(found.sum()) <= most * (1 + 1e-3) + 1e-3
    assert torch.all(found >= 0)
    if float(mask.sum()) <= most:
        torch.testing.assert_close(found, mask)
    else:  # the same was taken from all that are left
        taken = (mask - found)[found > 0]
        assert float(found.sum()) > most - 36 / 2**12 - 1e-3
        assert taken.numel() == 0 or float(taken.max() - taken.min()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_leaves_the_ball_or_the_range_of_pixels(kind):
    found = triggers(kind, start=1.0, most=1.5)
    for _ in range(15):
        found.step(towards(by_corner), dark(8))
        size = (
            found.variables["mask"].flatten(1).sum(1)
            if kind is Masked
            else found.variables["values"].flatten(1).norm(dim=1)
        )
        assert torch.all(size <= found.radius + 1e-3)
        assert torch.all(found.radius <= 1.5)
    shown = found.apply(dark(8), torch.tensor([0, 1] * 4), torch.full((8,), 1.5))
    assert 0 <= float(shown.min()) <= float(shown.max()) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_shortcut_is_found_smaller_than_the_ordinary_way(kind):
    """One pixel leads to class 1; to class 0 only all of them."""
    found = triggers(kind, start=kind.scale(SHAPE) / 3)
    for _ in range(150):
        found.step(towards(by_corner), dark(16))
    assert float(found.found[0]) < float(found.found[1]) / 2
    shown = found.apply(dark(8), torch.zeros(8, dtype=torch.int64), torch.full((8,), 1.5))
    assert (by_corner(shown).argmax(1) == 1).float().mean() > 0.5


def test_those_past_their_lifetime_start_anew():
    found = triggers(Additive, lifetime=5)
    found.age[:] = torch.tensor([0, 4])
    before = found.variables["values"].clone()
    found.radius[:] = 2.0
    found.step(towards(by_corner), dark(8))
    assert found.age.tolist() == [1, 0]
    assert found.radius.tolist()[1] == 3.0
    assert not torch.equal(found.variables["values"][1], before[1])
    assert found.means["values"][1].abs().sum() == 0
    assert found.means["values"][0].abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_goes_on_from_its_state(kind):
    whole, halved = (triggers(kind, lifetime=4) for _ in range(2))
    for _ in range(3):
        whole.step(towards(by_corner), dark(8))
        halved.step(towards(by_corner), dark(8))
    rest = triggers(kind, seed=5, lifetime=4)
    rest.load_state_dict(halved.state_dict())
    rest.generator.set_state(halved.generator.get_state())
    for _ in range(4):
        whole.step(towards(by_corner), dark(8))
        rest.step(towards(by_corner), dark(8))
    for name, value in whole.variables.items():
        torch.testing.assert_close(rest.variables[name], value, rtol=0, atol=0)
