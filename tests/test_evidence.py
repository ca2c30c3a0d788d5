"""What may be read as an image, and what test images can carry."""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qdeploy.core.metrics import rate
from qdeploy.core.observers import Extent
from qdeploy.data import Images, Preprocessing, images_from_array, open_images, read_picture
from qdeploy.data import folders as folders_module
from qdeploy.data.triggers import make_trigger, parse_trigger
from qdeploy.errors import InputError
from qdeploy.inputs.opened import NO_EVIDENCE, Evidence
from qdeploy.inputs.sources import CARD, COMMAND_LINE, Given, resolve
from qdeploy.inputs.usable import described, distinct, repeated, seen
from qdeploy.judging.rates import ArmRates, rates
from qdeploy.judging.soundness import BY_LABELS, objections, sound
from qdeploy.judging.verdict import Check
from qdeploy.settings.card import find_card
from qdeploy.settings.policy import GateSpec
from qdeploy.values import Arm, DataUsed, Predictions

GRAY = Preprocessing((1, 4, 4), (0.0,), (1.0,))
CARD_TEXT = "[input]\nshape = [1, 4, 4]\nmean = [0.0]\nstd = [1.0]\n"


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def first(images: Images) -> np.ndarray:
    return np.rint(next(images.batches(1)).pixels[0] * 255)


def labelled(labels: list[int], rng: np.random.Generator) -> Images:
    pixels = rng.integers(0, 256, (len(labels), 1, 4, 4), dtype=np.uint8)
    images = images_from_array("test", pixels, GRAY)
    return Images(images.source, GRAY, images.indices, np.array(labels), None)


# what may be decoded


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, name):
    deep = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096
    save(tmp_path / "d" / name, deep)
    want = np.rint(deep / 257)
    np.testing.assert_array_equal(first(open_images(tmp_path / "d", GRAY))[0], want)
    np.testing.assert_array_equal(read_picture(tmp_path / "d" / name)[0], want)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_a_picture_without_a_known_white_is_an_error(tmp_path, kind):
    save(tmp_path / "d" / "a.tif", np.ones((4, 4), kind))
    with pytest.raises(InputError, match="32-bit or float values"):
        open_images(tmp_path / "d", GRAY).decoded()[1]


@pytest.mark.parametrize(
    ("kind", "picture"), [("PCX", "a.png"), ("EPS", "a.jpg"), ("ICO", "a.bmp"), ("TGA", "a.gif")]
)
def test_other_formats_are_not_decoded_whatever_they_are_called(tmp_path, kind, picture):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, kind)
    (tmp_path / picture).write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="not an image"):
        open_images(tmp_path, GRAY).decoded()[1]


def test_a_picture_of_more_pixels_than_any_is_not_decoded(tmp_path):
    save(tmp_path / "d" / "a.png", np.zeros((8000, 8000), np.uint8))
    with pytest.raises(InputError, match="8000x8000 is over"):
        open_images(tmp_path / "d", GRAY).decoded()[1]


def test_one_nan_is_not_forgotten():
    extent = Extent()
    for value in (1.0, np.nan, 2.0):
        extent.update(np.array([value], np.float32))
    assert np.isnan(extent.low)
    assert np.isnan(extent.high)


# where it may lie


def test_links_are_followed_within_the_folder_and_into_a_root(tmp_path):
    save(tmp_path / "elsewhere" / "a.png", np.zeros((4, 4), np.uint8))
    save(tmp_path / "d" / "real" / "b.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "d" / "inside").symlink_to(tmp_path / "d" / "real")
    assert len(open_images(tmp_path / "d", GRAY)) == 2
    (tmp_path / "d" / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="lies outside of the folder") as error:
        open_images(tmp_path / "d", GRAY)
    assert "--data-root" in (error.value.hint or "")
    roots = ((tmp_path / "elsewhere").resolve(),)
    assert len(open_images(tmp_path / "d", GRAY, roots).decoded()[1]) == 3


def test_a_link_that_is_put_in_after_the_walk_is_not_followed(tmp_path):
    save(tmp_path / "private.png", np.zeros((4, 4), np.uint8))
    picture = save(tmp_path / "d" / "a.png", np.zeros((4, 4), np.uint8))
    images = open_images(tmp_path / "d", GRAY)
    picture.unlink()
    picture.symlink_to(tmp_path / "private.png")
    with pytest.raises(InputError, match="lies outside of the folder"):
        images.decoded()[1]


def test_folders_in_a_circle_and_without_an_end_are_errors(tmp_path, monkeypatch):
    (tmp_path / "circle").mkdir()
    (tmp_path / "circle" / "again").symlink_to(tmp_path / "circle")
    with pytest.raises(InputError, match="lie deeper than 16"):
        open_images(tmp_path / "circle", GRAY)
    monkeypatch.setattr(folders_module, "MOST_LINKED", 20)
    (tmp_path / "circle" / "other").symlink_to(tmp_path / "circle")
    monkeypatch.setattr(folders_module, "DEEPEST", 10_000)
    with pytest.raises(InputError, match="over 20 links to folders"):
        open_images(tmp_path / "circle", GRAY)
    for i in range(5):
        save(tmp_path / "many" / f"{i}.png", np.zeros((4, 4), np.uint8))
    monkeypatch.setattr(folders_module, "MOST_ENTRIES", 4)
    with pytest.raises(InputError, match="holds over 4 files"):
        open_images(tmp_path / "many", GRAY)


def test_a_pipe_among_images_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        open_images(tmp_path, GRAY)


def test_a_zip_may_not_claim_what_its_bytes_cannot_hold(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0/a.png", b"short")
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\1\2")
    data[directory + 24 : directory + 28] = (50 << 20).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(InputError, match="claims 52,428,800 bytes"):
        open_images(path, GRAY).decoded()[1]


def test_two_files_of_one_name_in_a_zip_are_an_error(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.png", b"2")
    with pytest.raises(InputError, match="two files of one name"):
        open_images(path, GRAY)


def test_a_card_that_is_a_link_is_not_found_by_itself(tmp_path):
    (tmp_path / "real.toml").write_text(CARD_TEXT)
    (tmp_path / "model.toml").symlink_to(tmp_path / "real.toml")
    with pytest.raises(InputError, match="is a link"):
        find_card(tmp_path / "model.onnx")
    given = Given(card=tmp_path / "model.toml")
    assert resolve(tmp_path / "model.onnx", given).card is not None
    (tmp_path / "other.toml").mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        find_card(tmp_path / "other.onnx")


def test_each_trigger_file_has_its_own_folder_and_words_have_this_one(tmp_path, monkeypatch):
    text = '[[trigger]]\nkind = "blend"\ntarget = 0\nimage = "a.png"\nopacity = 0.5\nname = "{}"\n'
    for name, level in (("one", 10), ("two", 20), ("here", 30)):
        save(tmp_path / name / "a.png", np.full((4, 4), level, np.uint8))
        (tmp_path / name / "t.toml").write_text(text.format(name))
    (tmp_path / "model.toml").write_text(CARD_TEXT)
    monkeypatch.chdir(tmp_path / "here")
    told = ("../one/t.toml", "../two/t.toml", "blend target=0 image=a.png opacity=0.5")
    sources = resolve(tmp_path / "model.onnx", Given(triggers=told))
    levels = [round(float(t.pattern.max()) * 255) for t in sources.triggers(2)]
    assert levels == [10, 20, 30]


# what it proves


def test_copies_count_once_and_disputed_pictures_not_at_all(rng):
    images = labelled([0, 1, 0, 1, 1], rng)
    a, b, c = b"a", b"b", b"c"
    usable = distinct(images, [a, b, a, c, c])
    assert usable.images.labels.tolist() == [0, 1, 1]
    assert usable.hashes == (a, b, c)
    assert "2 copies" in usable.notes[0]
    usable = distinct(images, [a, a, b, b, c])
    assert usable.images.labels.tolist() == [1]
    assert "2 pictures with two different labels" in usable.notes[-1]
    with pytest.raises(InputError, match="every picture"):
        distinct(images.only(np.arange(2)), [a, a])


def test_attack_success_is_counted_where_the_trigger_is_seen():
    pixels = np.zeros((4, 1, 4, 4), np.uint8)
    pixels[2:, :, 3, 3] = 255
    images = images_from_array("test", pixels, GRAY)
    (spec,) = parse_trigger("patch target=1 x=3 y=3 width=1 height=1 color=[1]")
    trigger = make_trigger(spec, GRAY.shape, Path())
    changed = seen([trigger], images)
    assert changed[trigger.name].tolist() == [True, True, False, False]
    arm = Arm("result", "cpu")
    answers = {arm: np.array([1, 1, 0, 0], np.int32)}
    predictions = Predictions(
        labels=np.zeros(4, np.int64),
        clean={arm: np.zeros(4, np.int32)},
        triggered={trigger.name: answers},
        targets={trigger.name: 1},
    )
    (found,) = rates(predictions, 2, changed)
    assert found.attack_success[trigger.name].value == 100
    assert found.attack_success[trigger.name].samples == 2
    with pytest.raises(InputError, match="changes no pixel of any of the 2 test images"):
        seen([trigger], images.skip(2))


def arm_rates(variant: str, right: int, of: int) -> ArmRates:
    return ArmRates(Arm(variant, "cpu"), rate(np.arange(of) < right), (), {}, None)


def evidence(images: Images | None, given_by: str = COMMAND_LINE) -> Evidence:
    used = tuple(DataUsed(role, role, 1, None, given_by) for role in ("test", "trigger"))
    return Evidence(images, (), used)


@pytest.mark.parametrize(
    ("labels", "right", "says"),
    [
        pytest.param([i % 4 for i in range(400)], 390, None, id="good"),
        pytest.param(
            [i % 4 for i in range(400)], 110, "no better than chance: 27.5 %", id="chance"
        ),
        pytest.param(
            [0] * 300 + [1, 2, 3, 1] * 25, 310, "75.0 % are of the largest", id="constant"
        ),
        pytest.param([2] * 400, 400, "all 400 test images are of class 2", id="one class"),
        pytest.param([0, 1] * 200, 400, None, id="half of the classes"),
        pytest.param([1, 2, 3], 3, None, id="as many classes as images"),
    ],
)
def test_labels_must_fit_the_float_model(rng, labels, right, says):
    measured = (arm_rates("fp32", right, len(labels)), arm_rates("result", 0, len(labels)))
    found = objections(evidence(labelled(labels, rng)), measured, 4, GateSpec())
    assert set(found) == (BY_LABELS if says else set())
    assert all(says in reason for reason in found.values())


def test_without_a_float_model_labels_must_fit_the_file(rng):
    images = labelled([0, 1] * 200, rng)
    found = objections(evidence(images), (arm_rates("result", 200, 400),), 2, GateSpec())
    assert "fit the file no better" in found["accuracy"]


def test_fewer_than_half_of_the_classes_carry_no_accuracy(rng):
    images = labelled([0, 1] * 200, rng)
    found = objections(evidence(images), (arm_rates("fp32", 400, 400),), 5, GateSpec())
    assert found["accuracy_drop"] == "there are test images of 2 of 5 classes, not of half of them"


def test_evidence_of_the_card_does_not_count_where_the_policy_says_so(rng):
    images, measured = labelled([0, 1] * 200, rng), (arm_rates("fp32", 400, 400),)
    strict = GateSpec(independent_evidence=True)
    assert not objections(evidence(images, CARD), measured, 2, GateSpec())
    assert not objections(evidence(images), measured, 2, strict)
    found = objections(evidence(images, CARD), measured, 2, strict)
    assert {"accuracy", "agreement", "attack_success", "runtime_agreement"} <= set(found)


def test_a_check_that_is_off_stands_whoever_brought_the_evidence():
    off = Check("attack_success", 99.0, "<=", 10.0, "%")
    within = Check("accuracy_drop", 0.0, "<=", 1.0, "points")
    other = Check("static_findings", 0.0, "<=", 0.0, "findings")
    objected = {"attack_success": "a reason", "accuracy_drop": "another"}
    assert sound((off, within, other), objected, NO_EVIDENCE) == (off, other)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("a", "only 1 different picture: scales and integers are fitted to that one alone"),
        ("aaaa", "only 1 different picture in 4 images"),
        ("abcabc", "only 3 different pictures in 6 images"),
        (range(100), None),
        ([n % 40 for n in range(100)], "60 of 100 images are copies of others"),
        ([n % 60 for n in range(100)], None),
    ],
    ids=["one", "copies of one", "few", "plain", "mostly copies", "some copies"],
)
def test_calibration_images_that_are_few_or_copies_are_named(names, said):
    notes = list(repeated([str(name).encode() for name in names]))
    assert bool(notes) is (said is not None)
    assert said is None or said in notes[0]


@pytest.mark.parametrize(("largest", "said"), [(200, True), (40, False)])
def test_classes_of_very_different_sizes_are_named(largest, said, preprocessing):
    labels = np.array([0] * largest + [1] * 20 + [2] * 10)
    pixels = np.zeros((len(labels), 3, 8, 8), np.uint8)
    images = replace(
        images_from_array("x", pixels, preprocessing), labels=labels, classes=("cat", "dog", "owl")
    )
    notes = " ".join(described(images, 3, labelled=True))
    assert ("cat has 200 images, the middle one of the classes 20" in notes) is said
