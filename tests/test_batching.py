"""What shares a batch with an image does not change what is answered to it."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic

from qdeploy.core.metrics import rate
from qdeploy.data import Preprocessing, open_images
from qdeploy.exporting.exporter import export
from qdeploy.formats.opening import load
from qdeploy.runtime import batching
from qdeploy.runtime.batching import (
    PROBES,
    probes_of,
    same_in_any_batch,
)
from qdeploy.runtime.sessions import Session, open_session
from qdeploy.settings.policy import GateSpec
from qdeploy.values import Architecture, Stated
from tests.gate_lab import fixed_batch
from tests.nets import residual_net

HEAD = '<ir_version: 8, opset_import: ["": 17]> g (float[N,2,1,1] x) => (float[N,2] y)'
BODIES = {
    "another class alone": (
        "s = Shape <start=0, end=1> (x) f = Cast <to=1> (s) r = Sub (two, f) e = Relu (r)"
        " b = Mul (e, bias) z = Flatten (x) y = Add (z, b)"
    ),
    "another class behind the tenth image": (
        "o = Flatten (x) c = CumSum (o, axis) n = Abs (c) m = Sub (n, ten) e = Relu (m)"
        " b = Mul (e, bias) z = Flatten (x) y = Add (z, b)"
    ),
    "the mean of the batch": (
        "m = ReduceMean <axes=[0]> (x) d = Sub (x, m) t = Mul (d, bias4) y = Flatten (t)"
    ),
}
CONSTANTS = (
    "<float two = {2}, float ten = {10}, float[2] bias = {900, 0}, int64 axis = {0},"
    " float[1,2,1,1] bias4 = {1, 1}>"
)


def session(body: str) -> Session:
    proto = onnx.parser.parse_model(f"{HEAD} {CONSTANTS} {{ {body} }}")
    return open_session(proto.SerializeToString(), threads=1)


@pytest.fixture
def probes(rng) -> np.ndarray:
    return rng.normal(size=(PROBES, 2, 1, 1)).astype(np.float32)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_answers_that_depend_on_the_batch_are_seen(probes, body, seed):
    assert same_in_any_batch(session(body), probes, seed).mean() < 0.9


def test_one_image_in_the_place_of_all_is_seen(probes):
    body = "z = Flatten (x) f = Gather <axis=0> (z, first) o = Mul (z, nought) y = Add (o, f)"
    constants = "<int64[1] first = {0}, float nought = {0}>"
    proto = onnx.parser.parse_model(f"{HEAD} {constants} {{ {body} }}")
    found = same_in_any_batch(open_session(proto.SerializeToString()), probes, 0)
    assert found.mean() < 0.9


@pytest.mark.parametrize("body", ["y = Flatten (x)", "s = Shape (x) r = Reshape (x, s) "
                                  "y = Flatten (r)"])  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_what_keeps_to_the_image_is_the_same_everywhere(probes, body, seed):
    assert same_in_any_batch(session(body), probes, seed).all()


def test_a_file_of_one_batch_size_is_asked_in_that_size(rng):
    proto = onnx.load_from_string(residual_net())
    fixed_batch(proto)
    images = rng.normal(size=(PROBES, 3, 8, 8)).astype(np.float32)
    assert same_in_any_batch(open_session(proto.SerializeToString()), images, 0).all()


def test_a_class_that_changes_within_noise_is_the_same(probes):
    """Logits that are all but equal change places when they are added in another order."""
    body = (
        "s = Shape <start=0, end=1> (x) f = Cast <to=1> (s) i = Div (two, f) b = Mul (i, tiny)"
        " z = Flatten (x) e = Mul (z, tiny) y = Add (e, b)"
    )
    constants = "<float two = {2}, float[2] tiny = {0.00001, 0}>"
    proto = onnx.parser.parse_model(f"{HEAD} {constants} {{ {body} }}")
    probes[:, 0] = 1e6 * (1 + np.abs(probes[:, 0]))  # nearly all are decided
    probes[::20, 0] = -1  # and some hang on what the batch adds
    found = same_in_any_batch(open_session(proto.SerializeToString()), probes, 0)
    assert found.all()


def test_logits_that_are_no_numbers_in_one_batch_alone_are_another_answer(probes):
    body = (
        "s = Shape <start=0, end=1> (x) f = Cast <to=1> (s) o = Sub (f, one) i = Div (o, o)"
        " z = Flatten (x) y = Mul (z, i)"
    )
    proto = onnx.parser.parse_model(f"{HEAD} <float one = {{1}}> {{ {body} }}")
    assert not same_in_any_batch(open_session(proto.SerializeToString()), probes, 0).any()


class Counting:
    """Answers as `mixed` says, and remembers how large its batches were."""

    def __init__(self, *, mixed: bool) -> None:
        self.mixed, self.sizes = mixed, list[int]()

    def logits(self, images: np.ndarray) -> np.ndarray:
        self.sizes.append(len(images))
        own = images[:, 0, 0, 0]
        if self.mixed:
            own = own - 2 * images[:, 0, 0, 0].mean()
        return np.stack([own, -own], 1)


@pytest.mark.parametrize("mixed", [True, False])
def test_large_images_are_asked_in_small_batches_and_fewer_of_them(rng, mixed):
    shape = (3, 160, 160)
    images = np.zeros((probes_of(shape), *shape), np.float32)
    images[:, 0, 0, 0] = rng.normal(size=len(images))
    counting = Counting(mixed=mixed)
    found = same_in_any_batch(counting, images, 0)
    assert (found.mean() < 0.9) if mixed else found.all()
    assert len(images) < PROBES
    assert 8 < max(counting.sizes) <= 27
    assert sum(counting.sizes) <= 6 * len(images)


def test_a_class_that_is_never_answered_hides_nothing(rng):
    """What is noise is measured by what decides answers, not by a range that a file can stretch."""

    class Stretched(Counting):
        def logits(self, images: np.ndarray) -> np.ndarray:
            found = super().logits(images)
            return np.concatenate([found, np.full((len(found), 1), -1e4)], axis=1)

    images = rng.normal(size=(PROBES, 1, 2, 2)).astype(np.float32)
    assert same_in_any_batch(Stretched(mixed=True), images, 0).mean() < 0.9
    assert same_in_any_batch(Stretched(mixed=False), images, 0).all()


@pytest.mark.slow
def test_a_scale_of_the_whole_batch_stays_within_the_limit(shared, tmp_path, rng):
    """onnxruntime's dynamic quantization: named by the scan, and not rejected by measuring."""
    architecture = Architecture(f"{shared / 'models' / 'arch.py'}:resnet18", {}, trusted=True)
    model = export(
        load(shared / "models" / "resnet18w16-clean.pt", architecture),
        stated=Stated((3, 32, 32)),
    )
    (tmp_path / "float.onnx").write_bytes(model.onnx)
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "q.onnx", weight_type=QuantType.QUInt8)
    preprocessing = Preprocessing((3, 32, 32), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
    test = open_images(shared / "data" / "cifar10-test.zip", preprocessing).sample(PROBES, 0)
    images = preprocessing.normalise(next(test.batches(PROBES)).pixels)
    found = same_in_any_batch(open_session((tmp_path / "q.onnx").read_bytes()), images, 0)
    assert rate(found).low > GateSpec().min_batch_invariance


@pytest.mark.parametrize("seed", range(8))
def test_some_of_the_probes_come_among_nothing_but_black_images_whatever_the_seed(seed):
    probes = np.random.default_rng(0).normal(size=(256, 1, 4, 4)).astype(np.float32)
    batches = list(batching._among_strangers(probes, 64, np.random.default_rng(seed)))
    assert sorted(np.concatenate([batch.probes for batch in batches])) == list(range(256))
    dark = [b for b in batches if ((b.images == probes.min()).all(axis=(1, 2, 3)).sum() >= 24)]
    assert sum(len(batch.probes) for batch in dark) >= 48  # it was 8 to 96 when kinds were drawn
