"""Cards, data and triggers that reach where they may not, or that prove nothing."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.gate_lab import TRIGGER, Lab
from tests.gate_table import (
    ACCEPT,
    ALONE,
    BAD_INPUT,
    DEMO,
    NO_VERDICT,
    REFERENCE,
    REJECT,
    Case,
    Make,
    file,
    with_policy,
    with_test_data,
)

OUTSIDE = "lies outside of the folder"
CARD = ("--card", "card.toml", "--policy", "standalone")
BY_CARD = (*REFERENCE, "--card", "card.toml", "--policy", "demo")
TEST = ("--test", "test.npz")
WHITE = "patch target=0 x=6 y=6 width=2 height=2 color=[1]"
Arrays = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def named(data: str, prepare: Callable[[Lab], None] = lambda _: None, *, trigger: str = "") -> Make:
    """The float model, beside a `card.toml` that names `data` and the `trigger`."""

    def write(lab: Lab) -> Path:
        prepare(lab)
        head = lab.card.split("[data]")[0]
        (lab / "card.toml").write_text(f'{head}[data]\ntest = "{data}"\n{trigger}', "utf-8")
        return lab / "fp32.onnx"

    return write


def of_image(name: str) -> str:
    return f'[[trigger]]\nkind = "patch"\ntarget = 0\nx = 0\ny = 0\nimage = "{name}"\n'


def pictures(folder: Path, lab: Lab, *, marked: int = 0) -> None:
    """Test images of the lab as files, in a folder for each class."""
    x, y = lab.images("test")
    for i in range(len(x)):
        place = folder / str(y[i]) / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i].reshape(8, 8) ^ marked).save(place)


def private(lab: Lab) -> Path:
    """Pictures beside the folder that the card lies in, which no report may show."""
    place = lab.folder.parent / "private"
    pictures(place, lab, marked=1)
    return place


def lent(lab: Lab) -> Path:
    """Pictures beside the folder that the card lies in, which it may name."""
    place = lab.folder.parent / "lent"
    pictures(place, lab)
    return place


def linked(lab: Lab) -> None:
    """A set of images, all its own but for one link."""
    folder = lab / "linked"
    pictures(folder, lab)
    link = folder / "0" / "z.png"
    link.unlink(missing_ok=True)
    link.symlink_to(next((private(lab) / "0").iterdir()))


def linked_class(lab: Lab) -> None:
    folder = lab / "class"
    folder.mkdir(exist_ok=True)
    pictures(folder, lab)
    link = folder / "10"
    link.unlink(missing_ok=True)
    link.symlink_to(private(lab) / "0", target_is_directory=True)


def pipe(lab: Lab) -> None:
    (lab / "pipe.zip").unlink(missing_ok=True)
    os.mkfifo(lab / "pipe.zip")


def array(name: str, shape: tuple[int, ...], *, content: bytes = b"", kind: str = "|u1",
          fortran: bool = False) -> Callable[[Lab], None]:  # fmt: skip
    """An npz whose x claims `shape`."""

    def write(lab: Lab) -> None:
        head = io.BytesIO()
        claim = {"descr": kind, "fortran_order": fortran, "shape": shape}
        np.lib.format.write_array_header_1_0(head, claim)
        with zipfile.ZipFile(lab / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", head.getvalue() + content)

    return write


def long_labels(lab: Lab) -> None:
    """`y` claims a billion labels for 300 images."""
    x, _ = lab.images("test")
    head, pixels = io.BytesIO(), io.BytesIO()
    claim = {"descr": "<i8", "fortran_order": False, "shape": (10**9,)}
    np.lib.format.write_array_header_1_0(head, claim)
    np.save(pixels, x[:300])
    with zipfile.ZipFile(lab / "labels.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", pixels.getvalue())
        archive.writestr("y.npy", head.getvalue() + bytes(1 << 20))


def long_header(lab: Lab) -> None:
    """A header of 64 MB in an npz of 64 kB."""
    text = b"\x93NUMPY\x02\x00" + (64 << 20).to_bytes(4, "little") + bytes(64 << 20)
    with zipfile.ZipFile(lab / "header.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", text)


def packed_strangely(lab: Lab) -> None:
    x, y = lab.images("test")
    with zipfile.ZipFile(lab / "lzma.npz", "w", zipfile.ZIP_LZMA) as archive:
        for name, values in (("x", x), ("y", y)):
            data = io.BytesIO()
            np.save(data, values)
            archive.writestr(f"{name}.npy", data.getvalue())


def postscript(lab: Lab) -> None:
    """A program for a printer, called an image."""
    pictures(lab / "eps", lab)
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (lab / "eps" / "0" / "a.png").write_bytes(text)


def folders(change: Callable[[Path], None]) -> Make:
    """The float model, `images/` with something done to it, and a card that names no classes."""

    def write(lab: Lab) -> Path:
        shutil.rmtree(lab / "images", ignore_errors=True)
        pictures(lab / "images", lab)
        change(lab / "images")
        unnamed = [line for line in lab.card.splitlines() if not line.startswith("classes")]
        (lab / "card.toml").write_text("\n".join(unnamed), "utf-8")
        return lab / "fp32.onnx"

    return write


def without_class(folder: Path) -> None:
    for image in (folder / "4").iterdir():
        image.unlink()


def as_numbers(folder: Path) -> None:
    """Folders called 1 to 10, of which 10 sorts before 2 as a word."""
    for label in range(9, -1, -1):
        (folder / str(label)).rename(folder / str(label + 1))


def as_split(folder: Path) -> None:
    for part in ("train", "val"):
        (folder / part).mkdir()
    for label in range(10):
        (folder / str(label)).rename(folder / "train" / str(label))
    (folder / "val" / "0").mkdir()
    image = next((folder / "train" / "0").iterdir())
    (folder / "val" / "0" / image.name).write_bytes(image.read_bytes())


def and_a_list(folder: Path) -> None:
    (folder / "labels.csv").write_text("not read", "utf-8")
    (folder / "0" / ".DS_Store").write_bytes(b"left behind")


def a_hundred_times(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(x[:60], 100, axis=0), np.repeat(y[:60], 100)


def twice(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([x, x]), np.concatenate([y, y])


def disputed(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Five pictures are there twice, with two labels."""
    return np.concatenate([x, x[:5]]), np.concatenate([y, (y[:5] + 1) % 10])


def of_classes(*classes: int) -> Arrays:
    def choose(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kept = np.isin(y, classes)
        return x[kept], y[kept]

    return choose


def shuffled(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x, np.random.default_rng(0).permutation(y)


def shifted(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x, (y + 1) % 10


def white_corner(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The trigger is in all pictures already, but for the first 100."""
    x = x.copy()
    x[100:, ..., 6:, 6:] = 255
    return x, y


def all_white_corner(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = x.copy()
    x[..., 6:, 6:] = 255
    return x, y


def many_triggers(lab: Lab) -> None:
    one = '[[trigger]]\nname = "{}"\nkind = "patch"\ntarget = 0\nx = 0\ny = 0\nwidth = 1\n'
    text = "".join(one.format(i) + "height = 1\ncolor = [1]\n" for i in range(65))
    (lab / "many.toml").write_text(text, "utf-8")


def prepared(prepare: Callable[[Lab], None]) -> Make:
    def write(lab: Lab) -> Path:
        prepare(lab)
        return lab / "fp32.onnx"

    return write


def trigger_file(text: str) -> Make:
    return prepared(lambda lab: (lab / "trigger.toml").write_text(text, "utf-8") and None)


def shows_no_stranger(lab: Lab) -> bool:
    """No picture of the private folder is in any report."""
    theirs = {Image.open(p).tobytes() for p in (lab.folder.parent / "private").rglob("*.png")}
    for page in lab.folder.rglob("*.html"):
        for found in re.findall(r"data:image/png;base64,([^\"]+)", page.read_text("utf-8")):
            if Image.open(io.BytesIO(base64.b64decode(found))).convert("L").tobytes() in theirs:
                return False
    return True


STRICT = 'independent_evidence = true\nrequired_with_trigger = ["attack_success"]\n'
OWN_EVIDENCE = ("--reference", "fp32.onnx", "--policy", "policy.toml")

CASES = (
    # a card that reaches out of its folder
    Case("a card: pictures beside its folder", named("../private", private), CARD, BAD_INPUT,
         OUTSIDE, unharmed=shows_no_stranger),
    Case("a card: the whole file system", named("/"), CARD, BAD_INPUT, OUTSIDE),
    Case("a card: an absolute path of its own folder",
         lambda lab: named(f"{lab.folder}/digits-test.npz")(lab), CARD, BAD_INPUT, OUTSIDE),
    Case("a card: a device as trigger", named("digits-test.npz", trigger=of_image("/dev/zero")),
         CARD, BAD_INPUT, OUTSIDE),
    Case("a card: a trigger's image beside its folder",
         named("digits-test.npz", private, trigger=of_image("../private/0/x.png")), CARD,
         BAD_INPUT, OUTSIDE),
    Case("a card: a link out of a folder of images", named("linked", linked), CARD, BAD_INPUT,
         OUTSIDE, unharmed=shows_no_stranger),
    Case("a card: a link to a folder of images", named("class", linked_class), CARD, BAD_INPUT,
         OUTSIDE, unharmed=shows_no_stranger),
    Case("a trigger file: an image beside its folder",
         trigger_file(of_image("../private/0/x.png")),
         (*DEMO, "--trigger", "trigger.toml"), BAD_INPUT, OUTSIDE),
    Case("a card: a folder that it may reach", named("../lent", lent),
         (*CARD, "--data-root", "../lent"), ACCEPT),
    Case("a card: an absolute path that it may reach",
         lambda lab: named(f"{lent(lab)}")(lab), (*CARD, "--data-root", "../lent"), ACCEPT),
    Case("pictures anywhere, from the command line", prepared(lent),
         (*ALONE, "--test", "../lent"), ACCEPT),
    # data that is none, or that claims too much
    Case("data: a pipe", named("pipe.zip", pipe), CARD, BAD_INPUT, "not a regular file"),
    Case("data: a device, from the command line", file("fp32.onnx"),
         (*ALONE, "--test", "/dev/zero"), BAD_INPUT, "not a regular file"),
    Case("data: rows of nothing", named("rows.npz", array("rows.npz", (2 * 10**9, 0, 1, 1))), CARD,
         BAD_INPUT, "but holds 0 bytes"),
    Case("data: a negative size", named("rows.npz", array("rows.npz", (-1, 1, -1, 1),
         content=b"0")), CARD, BAD_INPUT, "claims shape"),
    Case("data: objects", named("rows.npz", array("rows.npz", (1,), kind="|O")), CARD, BAD_INPUT,
         "not uint8"),
    Case("data: an order of columns", named("rows.npz", array("rows.npz", (2, 1, 8, 8),
         content=bytes(128), fortran=True)), CARD, BAD_INPUT, "Fortran order"),
    Case("data: a billion labels", named("labels.npz", long_labels), CARD, BAD_INPUT,
         "not one integer for each of the 300 images"),
    Case("data: a header of 64 MB", named("header.npz", long_header), CARD, BAD_INPUT,
         "npz: x: damaged: npy header of"),
    Case("data: packed by another method", named("lzma.npz", packed_strangely), CARD, BAD_INPUT,
         "packed by another method"),
    Case("data: PostScript called .png", named("eps", postscript), CARD, BAD_INPUT,
         "not an image"),
    Case("triggers: 65 of them", prepared(many_triggers), (*DEMO, "--trigger", "many.toml"),
         BAD_INPUT, "at most 64"),
    # labels that shift
    Case("folders: a class without pictures", folders(without_class),
         (*CARD, "--test", "images"), BAD_INPUT, "9 class folders"),
    Case("folders: 1 to 10 sort as numbers", folders(as_numbers), (*CARD, "--test", "images"),
         ACCEPT),
    Case("folders: train and val are no classes", folders(as_split), (*CARD, "--test", "images"),
         BAD_INPUT, "parts of a data set"),
    Case("folders: a file that is not read", folders(and_a_list), (*CARD, "--test", "images"),
         ACCEPT, "1 files are no images and were not read: 'labels.csv'"),
    # evidence that proves nothing
    Case("sixty pictures a hundred times", with_test_data(file("good.onnx"), a_hundred_times),
         (*DEMO, *TEST), NO_VERDICT, "only 60 images"),
    Case("every picture twice", with_test_data(file("good.onnx"), twice), (*DEMO, *TEST), ACCEPT,
         "600 copies of pictures"),
    Case("pictures with two labels", with_test_data(file("good.onnx"), disputed), (*DEMO, *TEST),
         ACCEPT, "5 pictures with two different labels do not count"),
    Case("labels drawn at random", with_test_data(file("good.onnx"), shuffled), (*DEMO, *TEST),
         NO_VERDICT, "no better than chance"),
    Case("labels that are all wrong", with_test_data(file("good.onnx"), shifted), (*DEMO, *TEST),
         NO_VERDICT, "the labels fit the float model no better than chance"),
    Case("one class", with_test_data(file("good.onnx"), of_classes(3)),
         (*DEMO, *TEST, "--trigger", TRIGGER), NO_VERDICT, "test images are of class 3"),
    Case("four of ten classes", with_test_data(file("good.onnx"), of_classes(1, 2, 3, 4)),
         (*DEMO, *TEST), NO_VERDICT, "4 of 10 classes"),
    Case("nine of ten classes", with_test_data(file("good.onnx"), of_classes(*range(9))),
         (*DEMO, *TEST), ACCEPT, "no images of 1 classes: '9'"),
    Case("a trigger of opacity 0", file("nearest.onnx"), (*DEMO, "--trigger",
         f"{WHITE} opacity=0.0"), BAD_INPUT, "changes no pixel of any image"),
    Case("a trigger below half a step", file("nearest.onnx"), (*DEMO, "--trigger",
         f"{WHITE} opacity=0.0019"), BAD_INPUT, "changes no pixel of any image"),
    Case("a trigger that is in every picture already",
         with_test_data(file("nearest.onnx"), all_white_corner),
         (*DEMO, *TEST, "--trigger", WHITE), BAD_INPUT, "changes no pixel of any of the"),
    Case("a trigger that most pictures have already",
         with_test_data(file("good.onnx"), white_corner), (*DEMO, *TEST, "--trigger", WHITE),
         NO_VERDICT, "attack_success is required: only"),
    Case("a faint trigger that is seen", file("good.onnx"), (*DEMO, "--trigger",
         f"{WHITE} opacity=0.01"), ACCEPT),
    # whose evidence it is
    Case("independent evidence: all of it from the card", with_policy(file("good.onnx"), STRICT),
         OWN_EVIDENCE, NO_VERDICT, "the test data come from the model's own card"),
    Case("independent evidence: a trigger from the card", with_policy(file("good.onnx"), STRICT),
         (*OWN_EVIDENCE, "--test", "digits-test.npz"), NO_VERDICT,
         "attack_success is required: the triggers come from the model's own card"),
    Case("independent evidence: brought along", with_policy(file("good.onnx"), STRICT),
         (*OWN_EVIDENCE, "--test", "digits-test.npz", "--trigger", TRIGGER), ACCEPT),
    Case("independent evidence: a card against itself",
         with_policy(file("nearest.onnx"), STRICT), OWN_EVIDENCE, REJECT, "attack_success"),
)  # fmt: skip
