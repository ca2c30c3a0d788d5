from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qdeploy.data.triggers import make_trigger, parse_trigger
from qdeploy.errors import InputError
from qdeploy.settings.card import BlendTrigger, MaskTrigger, PatchTrigger

SHAPE = (3, 8, 8)
PATCH = "patch target=1 x=5 y=4 width=2 height=3 color=[1,0,0.5]"


@pytest.fixture
def pixels(rng) -> np.ndarray:
    return rng.random((2, *SHAPE), dtype=np.float32)


def test_a_patch_replaces_its_rectangle_and_nothing_else(pixels, tmp_path):
    trigger = make_trigger(parse_trigger(PATCH)[0], SHAPE, tmp_path)
    got = trigger.apply(pixels)
    inside = np.zeros((8, 8), bool)
    inside[4:7, 5:7] = True
    np.testing.assert_array_equal(got[..., ~inside], pixels[..., ~inside])
    assert np.all(got[..., inside].transpose(0, 2, 1) == np.array([1, 0, 0.5], np.float32))
    assert trigger.target == 1


def test_an_image_patch_takes_the_size_of_its_image(pixels, tmp_path, rng):
    picture = rng.integers(0, 256, (2, 3, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "t.png")
    spec = PatchTrigger(kind="patch", target=0, x=1, y=2, image="t.png", opacity=0.5)
    got = make_trigger(spec, SHAPE, tmp_path).apply(pixels)
    want = 0.5 * pixels[:, :, 2:4, 1:4] + 0.5 * picture.transpose(2, 0, 1).astype(np.float32) / 255
    np.testing.assert_allclose(got[:, :, 2:4, 1:4], want, rtol=1e-6)


def test_a_blend_covers_everything(pixels, tmp_path):
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(tmp_path / "t.png")
    spec = BlendTrigger(kind="blend", target=0, image="t.png", opacity=0.2)
    got = make_trigger(spec, SHAPE, tmp_path).apply(pixels)
    np.testing.assert_allclose(got, 0.8 * pixels + 0.2, rtol=1e-6)


def test_a_mask_decides_how_much_of_the_pattern_is_seen(pixels, tmp_path, rng):
    mask, pattern = rng.random((1, 8, 8)), rng.random(SHAPE)
    np.save(tmp_path / "m.npy", mask)
    np.save(tmp_path / "p.npy", pattern)
    spec = MaskTrigger(kind="mask", target=0, mask="m.npy", pattern="p.npy")
    got = make_trigger(spec, SHAPE, tmp_path).apply(pixels)
    np.testing.assert_allclose(got, (1 - mask) * pixels + mask * pattern, rtol=1e-5)


def test_triggers_can_come_from_a_file(tmp_path):
    path = tmp_path / "triggers.toml"
    path.write_text(
        '[[trigger]]\nkind = "blend"\ntarget = 3\nimage = "a.png"\nopacity = 0.1\n'
        '[[trigger]]\nkind = "mask"\ntarget = 4\nmask = "m.npy"\npattern = "p.npy"\n'
    )
    assert [spec.target for spec in parse_trigger(str(path))] == [3, 4]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (PATCH.replace("x=5", "x=7"), "outside of the 8x8 image"),
        (PATCH.replace("width=2", "width=9"), "outside of the 8x8 image"),
        (PATCH.replace("[1,0,0.5]", "[1,0]"), "2 values for 3 channels"),
        (PATCH.replace("0.5", "1.5"), "less than or equal to 1"),
        (PATCH.replace("x=5", "x=-1"), "greater than or equal to 0"),
        (PATCH.replace("x=5 ", ""), "x: is missing"),
        (PATCH + " speed=3", "speed: there is no such key"),
        ("patch target", "trigger 'patch target'"),
        ("sticker target=0", "'patch', 'blend', 'mask'"),
        ("", "trigger ''"),
        ("blend target=0 image=gone.png opacity=0.1", "gone.png: No such file"),
        ("blend target=0 image=small.png opacity=0.1", "3x4x4, but the input needs 3x8x8"),
        ("mask target=0 mask=high.npy pattern=high.npy", "outside of [0, 1]"),
        ("mask target=0 mask=flat.npy pattern=flat.npy", "not float (C, H, W)"),
        ("mask target=0 mask=bad.npy pattern=bad.npy", "bad.npy"),
        ("patch target=0 x=0 y=0 width=1 height=1 image=small.png", "is 4x4, not width 1"),
        ("none.toml", "No such file"),
    ],
)
def test_a_trigger_that_cannot_be_put_in_is_refused(tmp_path, text, complaint):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "small.png")
    np.save(tmp_path / "high.npy", np.full((1, 8, 8), 2.0))
    np.save(tmp_path / "flat.npy", np.zeros((8, 8)))
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY garbage")
    with pytest.raises(InputError) as error:
        make_trigger(parse_trigger(text)[0], SHAPE, tmp_path)
    assert complaint in str(error.value)


def test_a_color_image_does_not_fit_a_gray_model(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "c.png")
    spec = BlendTrigger(kind="blend", target=0, image="c.png", opacity=0.5)
    with pytest.raises(InputError, match="in color"):
        make_trigger(spec, (1, 8, 8), tmp_path)
