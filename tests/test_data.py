from __future__ import annotations

import contextlib
import io
import unicodedata
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from qdeploy.data import (
    Images,
    Preprocessing,
    images_from_array,
    open_images,
    open_labelled_images,
    read_picture,
)
from qdeploy.errors import InputError

PRE = Preprocessing((3, 4, 4), (0.5, 0.25, 0.0), (0.5, 0.5, 1.0))
CLASSES = ("cat", "dog")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pixels(rng) -> np.ndarray:
    return rng.integers(0, 256, (6, 3, 4, 4), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, pixels) -> Path:
    """Three cats and three dogs, and what operating systems leave around."""
    root = tmp_path / "animals"
    for i, image in enumerate(pixels):
        place = root / CLASSES[i // 3] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(image))
    (root / "cat" / ".DS_Store").write_bytes(b"junk")
    (root / "notes.txt").write_text("six animals")
    return root


def zipped(folder: Path, prefix: str = "") -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, prefix + str(file.relative_to(folder)))
    return path


def saved(tmp_path: Path, **arrays: np.ndarray) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    return path


def read(images: Images) -> np.ndarray:
    batches = [batch.pixels for batch in images.batches(4)]
    return np.rint(np.concatenate(batches) * 255).astype(np.uint8)


def test_folder_zip_and_npz_hold_the_same_images(tmp_path, folder, pixels):
    labels = np.array([0, 0, 0, 1, 1, 1])
    npz = saved(tmp_path, x=pixels, y=labels)
    sets = [open_labelled_images(p, PRE, CLASSES) for p in (folder, zipped(folder), npz)]
    for images in sets:
        np.testing.assert_array_equal(read(images), pixels)
        np.testing.assert_array_equal(images.labels, labels)
    assert len({images.digest(images.decoded()[1]) for images in sets}) == 1


def test_a_folder_around_the_classes_changes_nothing(folder):
    images = open_labelled_images(zipped(folder, "wrapped/deep/"), PRE, CLASSES)
    np.testing.assert_array_equal(images.labels, [0, 0, 0, 1, 1, 1])


def test_labels_follow_the_cards_order_or_the_names(folder):
    swapped = open_labelled_images(folder, PRE, ("dog", "cat"))
    np.testing.assert_array_equal(swapped.labels, [1, 1, 1, 0, 0, 0])
    named = open_labelled_images(folder, PRE, None)
    assert named.classes == CLASSES


@pytest.mark.parametrize("arrays", [("x_{}", "y_{}"), ("{}_images", "{}_labels")])
def test_archives_of_keras_and_medmnist_are_read(tmp_path, pixels, arrays):
    labels = np.array([0, 0, 0, 1, 1, 1])
    x, y = arrays
    held = {x.format("test"): pixels, x.format("train"): 255 - pixels}
    held |= {y.format(part): labels[:, None] for part in ("test", "train")}
    path = saved(tmp_path, **held)
    images = open_labelled_images(path, PRE, None)
    np.testing.assert_array_equal(read(images), pixels)
    np.testing.assert_array_equal(images.labels, labels)
    assert len(images.source.unread) == 2
    np.testing.assert_array_equal(read(open_images(path, PRE)), 255 - pixels)


def test_zips_with_backslashes_have_folders(tmp_path, folder, pixels):
    """As PowerShell 5 and .NET wrote them."""
    path = tmp_path / "back.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            entry = zipfile.ZipInfo("x")
            entry.filename = str(file.relative_to(folder)).replace("/", "\\")
            archive.writestr(entry, file.read_bytes())
    images = open_labelled_images(path, PRE, CLASSES)
    np.testing.assert_array_equal(read(images), pixels)
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_classes_are_the_same_however_their_accents_are_written(folder):
    apart, together = (unicodedata.normalize(form, "V\u00f6gel") for form in ("NFD", "NFC"))
    (folder / "cat").rename(folder / apart)
    images = open_labelled_images(folder, PRE, (together, "dog"))
    assert sorted(images.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    by_key = dict(zip(images.source.keys, images.labels.tolist(), strict=True))
    assert by_key["dog/3.png"] == 1
    with pytest.raises(InputError, match="two classes have one name"):
        open_labelled_images(folder, PRE, (apart, together, "dog"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("classes", "rows"), [(CLASSES, "{0}.png,{1}"), (None, "images/{0}.png,{2}")]
)
def test_labels_may_lie_in_a_table(tmp_path, pixels, packed, classes, rows):
    root = tmp_path / "flat"
    (root / "images").mkdir(parents=True)
    for i, image in enumerate(pixels):
        (root / "images" / f"{i}.png").write_bytes(png(image))
    lines = [rows.format(i, CLASSES[i % 2], i % 2) for i in range(6)]
    (root / "labels.csv").write_text("\n".join(["file,label", *lines]))
    images = open_labelled_images(zipped(root) if packed else root, PRE, classes)
    assert images.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert images.source.unread == ()


@pytest.mark.parametrize("text", ["0.png", "\xff\xfe", "1.png,cat"])
def test_a_table_that_does_not_say_it_is_refused(folder, text):
    (folder / "cat" / "labels.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"labels\.csv"):
        open_labelled_images(folder / "cat", PRE, CLASSES)


def test_folders_of_classes_come_before_a_table(folder):
    (folder / "labels.csv").write_text("0.png,dog")
    images = open_labelled_images(folder, PRE, CLASSES)
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.source.unread == ("labels.csv", "notes.txt")


def test_a_zip_of_tiny_imagenets_validation_has_its_labels(tmp_path, pixels):
    path = tmp_path / "tiny.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i, image in enumerate(pixels):
            archive.writestr(f"tiny/val/images/val_{i}.png", png(image))
        lines = [f"val_{i}.png\t{CLASSES[i % 2]}\t0\t0\t3\t3" for i in range(6)]
        archive.writestr("tiny/val/val_annotations.txt", "\n".join(lines))
    assert open_labelled_images(path, PRE, CLASSES).labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_tiny_imagenets_validation_folder_has_its_labels_in_a_file(tmp_path, pixels):
    (tmp_path / "images").mkdir()
    for i, image in enumerate(pixels):
        (tmp_path / "images" / f"val_{i}.png").write_bytes(png(image))
    lines = [f"val_{i}.png\t{CLASSES[i % 2]}\t0\t0\t3\t3" for i in range(6)]
    (tmp_path / "val_annotations.txt").write_text("\n".join(lines))
    images = open_labelled_images(tmp_path, PRE, CLASSES)
    assert images.labels.tolist() == [0, 1, 0, 1, 0, 1]
    (tmp_path / "val_annotations.txt").write_text("\n".join(lines[:4]))
    with pytest.raises(InputError, match=r"no line for image 'val_4.png'"):
        open_labelled_images(tmp_path, PRE, CLASSES)
    (tmp_path / "val_annotations.txt").write_text("no tabs here")
    with pytest.raises(InputError, match=r"val_annotations.txt"):
        open_labelled_images(tmp_path, PRE, CLASSES)


def test_an_npz_may_have_channels_last_or_none(tmp_path, pixels):
    last = saved(tmp_path, x=pixels.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(read(open_images(last, PRE)), pixels)
    gray = replace(PRE, shape=(1, 4, 4), mean=(0.0,), std=(1.0,))
    flat = saved(tmp_path, x=pixels[:, 0])
    np.testing.assert_array_equal(read(open_images(flat, gray)), pixels[:, :1])


def test_a_compressed_npz_is_read_like_any_other(tmp_path, pixels):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=pixels)
    np.testing.assert_array_equal(read(open_images(path, PRE)), pixels)


def test_normalising_is_what_the_card_says(pixels):
    x = pixels.astype(np.float32) / 255
    got = PRE.normalise(x)
    np.testing.assert_allclose(got[:, 1], (x[:, 1] - 0.25) / 0.5, rtol=1e-6)


def test_a_sample_is_seeded_and_without_repetition(rng):
    x = rng.integers(0, 256, (200, 3, 4, 4), dtype=np.uint8)
    images = images_from_array("x", x, PRE)
    first, again, other = (images.sample(50, seed) for seed in (1, 1, 2))
    assert first.decoded()[1] == again.decoded()[1] != other.decoded()[1]
    assert len(set(first.indices)) == 50
    assert len(images.sample(None, 0)) == len(images.sample(1000, 0)) == 200


def test_skipping_leaves_the_rest_in_order(tmp_path, pixels):
    images = open_labelled_images(saved(tmp_path, x=pixels, y=np.arange(6)), PRE, None).skip(4)
    np.testing.assert_array_equal(read(images), pixels[4:])
    np.testing.assert_array_equal(next(images.batches(9)).labels, [4, 5])


def test_a_digest_changes_with_a_pixel_and_with_a_label(tmp_path, pixels):
    def digest(x: np.ndarray, y: np.ndarray) -> str:
        images = open_labelled_images(saved(tmp_path, x=x, y=y), PRE, None)
        return images.digest(images.decoded()[1])

    labels, touched = np.zeros(6, int), pixels.copy()
    touched[0, 0, 0, 0] ^= 1
    assert len({digest(pixels, labels), digest(touched, labels), digest(pixels, labels + 1)}) == 3


def test_the_same_picture_in_another_file_format_has_the_same_hash(tmp_path, pixels):
    for name in ("a.png", "b.bmp"):
        Image.fromarray(pixels[0].transpose(1, 2, 0)).save(tmp_path / name)
    one, two = open_images(tmp_path, PRE).decoded()[1]
    assert one == two


def test_images_of_another_size_are_resized_only_if_the_card_says_so(tmp_path, rng):
    Image.fromarray(rng.integers(0, 256, (10, 20, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="3x10x20, but the model takes 3x4x4") as error:
        read(open_images(tmp_path, PRE))
    assert "input.resize" in (error.value.hint or "")
    assert read(open_images(tmp_path, replace(PRE, resize=5))).shape == (1, 3, 4, 4)


def test_resizing_keeps_the_centre(tmp_path):
    picture = np.zeros((8, 24, 3), np.uint8)
    picture[:, 8:16] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert read(open_images(tmp_path, replace(PRE, resize=4)))[..., 1:3].min() > 250


def test_gray_images_fill_three_channels(tmp_path):
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(open_images(tmp_path, PRE)), 7)
    assert read_picture(tmp_path / "a.png").shape == (1, 4, 4)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """An npz is read row by row, also where its array would not fit."""
    import tracemalloc

    peaks = []
    for count in (200, 4000):
        path = saved(tmp_path, x=np.zeros((count, 3, 32, 32), np.uint8))
        images = open_images(path, replace(PRE, shape=(3, 32, 32)))
        tracemalloc.start()
        for _ in images.batches(50):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def broken_png(folder: Path) -> Path:
    (folder / "cat" / "0.png").write_bytes(png(np.zeros((3, 4, 4), np.uint8))[:-40])
    return folder


def not_an_image(folder: Path) -> Path:
    (folder / "cat" / "0.png").write_text("I am no image")
    return folder


def truncated_zip(folder: Path) -> Path:
    path = zipped(folder)
    path.write_bytes(path.read_bytes()[:-40])
    return path


def damaged_zip_entry(folder: Path) -> Path:
    path = zipped(folder)
    data = bytearray(path.read_bytes())
    start = data.index(b"IDAT")
    data[start : start + 8] = b"\0" * 8
    path.write_bytes(data)
    return path


def no_images(folder: Path) -> Path:
    for file in folder.rglob("*.png"):
        file.unlink()
    return folder


def wrong_dtype(folder: Path) -> Path:
    return saved(folder, x=np.zeros((2, 3, 4, 4)), y=np.zeros(2, int))


def no_labels(folder: Path) -> Path:
    return saved(folder, x=np.zeros((2, 3, 4, 4), np.uint8))


def too_few_labels(folder: Path) -> Path:
    return saved(folder, x=np.zeros((2, 3, 4, 4), np.uint8), y=np.zeros(1, int))


def pickled_labels(folder: Path) -> Path:
    return saved(folder, x=np.zeros((1, 3, 4, 4), np.uint8), y=np.array([{}], object))


def huge_claim(folder: Path) -> Path:
    """An array header that claims terabytes."""
    path = folder / "claim.npz"
    header = io.BytesIO()
    shape = (2**40, 3, 4, 4)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue() + b"\0" * 48)
        archive.writestr("y.npy", b"")
    return path


def unknown_class(folder: Path) -> Path:
    (folder / "dog").rename(folder / "wolf")
    return folder


def unlabelled(folder: Path) -> Path:
    (folder / "cat" / "0.png").rename(folder / "0.png")
    return folder


def plain_file(folder: Path) -> Path:
    return folder / "notes.txt"


def missing(folder: Path) -> Path:
    return folder / "nothing"


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (broken_png, "cat/0.png"),
        (not_an_image, "not an image"),
        (truncated_zip, "neither a folder nor a zip"),
        (damaged_zip_entry, "damaged"),
        (no_images, "holds no images"),
        (wrong_dtype, "x is float64"),
        (no_labels, "no y"),
        (too_few_labels, "not one integer for each of the 2 images"),
        (pickled_labels, "y is object of shape (1,)"),
        (huge_claim, "claims shape"),
        (unknown_class, "'wolf'"),
        (unlabelled, "in no class folder"),
        (plain_file, "neither a folder nor a zip"),
        (missing, "no such file or folder"),
    ],
)
def test_bad_data_is_named_in_one_line(folder, damage, complaint):
    path = damage(folder)
    with pytest.raises(InputError) as error:
        open_labelled_images(path, PRE, CLASSES).decoded()[1]
    assert complaint in str(error.value)
    assert str(path.name) in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_flipped_bytes_never_end_in_a_traceback(tmp_path_factory, data):
    """Damage anywhere either goes unnoticed or is an error of ours."""
    folder = tmp_path_factory.mktemp("fuzz")
    pixels = np.zeros((2, 3, 4, 4), np.uint8)
    if data.draw(st.booleans()):
        path = saved(folder, x=pixels, y=np.zeros(2, int))
    else:
        path = folder / "data.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for i, image in enumerate(pixels):
                archive.writestr(f"cat/{i}.png", png(image))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with contextlib.suppress(InputError):
        open_labelled_images(path, PRE, None).decoded()[1]


def test_a_zip_entry_without_a_name_is_no_traceback(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", b"")
    path.write_bytes(path.read_bytes().replace(b"x", b"\0"))
    with pytest.raises(InputError):
        open_images(path, PRE)


def test_decoded_images_are_the_same_and_are_not_decoded_again(folder, monkeypatch):
    images = open_images(folder, PRE)
    kept, hashes = images.decoded()
    wanted = read(images)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    np.testing.assert_array_equal(read(kept), wanted)
    assert kept.decoded()[1] == hashes
    assert (kept.name, kept.source.keys) == (images.name, images.source.keys)


def test_what_is_too_large_to_keep_is_streamed(folder, monkeypatch):
    images = open_images(folder, PRE)
    _, hashes = images.decoded()
    monkeypatch.setattr("qdeploy.data.images.LARGEST_DECODED_BYTES", 10)
    streamed, same = images.decoded()
    assert streamed is images
    assert same == hashes
