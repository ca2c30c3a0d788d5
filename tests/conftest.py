from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest
from filelock import FileLock

if TYPE_CHECKING:  # the process that hands out the tests to others runs none: it loads no libraries
    from _pytest.terminal import TerminalReporter

    from qdeploy.data import Images, Preprocessing
    from qdeploy.values import FloatModel

if "PYTEST_XDIST_WORKER" in os.environ:  # several at once: one thread each, also in what they start
    os.environ["OMP_NUM_THREADS"] = "1"

hypothesis.settings.register_profile(
    "any machine, busy or not",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("any machine, busy or not")

SHARED = Path(__file__).parents[2] / "shared"
PACKAGE = Path(__file__).parents[1] / "qdeploy"
MAKERS = (
    "architectures", "core", "data", "exporting", "formats", "graph", "quantization", "redteam",
    "settings", "training",
)  # fmt: skip


# Files whose tests take more than a second or two, and fixtures that take tens of them to make.
COSTLY_FILES = frozenset({
    "test_adam", "test_attest", "test_batch_axis", "test_batching", "test_compare", "test_compute",
    "test_distillation", "test_export_torch", "test_fuzz_commands", "test_fuzz_readers",
    "test_graph_limits", "test_mlflow", "test_onnxruntime_quantizer", "test_program",
    "test_provenance", "test_provenance_differences", "test_quantized_file", "test_redteam",
    "test_redteam_defence", "test_redteam_suite", "test_redteam_weights", "test_rounding_stage",
    "test_safe_kernels", "test_scan", "test_silence", "test_trained_methods", "test_unlearning",
    "test_weight_grids",
})  # fmt: skip
COSTLY_FIXTURES = frozenset({"backdoored", "lab_files", "poisoned", "shared"})


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make check` leaves out, and put what needs the poisoned model first.

    Processes that share the tests begin with equal parts of the list: while one of them makes the
    model, the others have something else to do.
    """
    for item in items:
        if COSTLY_FIXTURES & _fixtures(item) or item.path.stem in COSTLY_FILES:
            item.add_marker(pytest.mark.costly)
    items.sort(key=lambda item: "poisoned" not in _fixtures(item))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--costs", action="store_true", help="Say what each file of tests took.")


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    """Seconds by file, with the fixtures that a file happened to be the first to need."""
    if not config.getoption("--costs"):
        return
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.fspath] += report.duration
    terminalreporter.section(f"seconds by file, {sum(seconds.values()):.0f} together")
    cells = [f"{took:6.1f} {Path(file).stem}" for file, took in seconds.most_common()]
    for row in range(-(-len(cells) // 3)):
        terminalreporter.line("".join(f"{cell:<37}" for cell in cells[row :: -(-len(cells) // 3)]))


def _fixtures(item: pytest.Item) -> set[str]:
    return set(getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A folder that one of the processes of this run fills, for all of them."""
    here = tmp_path_factory.getbasetemp()
    root = here.parent if "PYTEST_XDIST_WORKER" in os.environ else here

    def folder(name: str, fill: Callable[[Path], object]) -> Path:
        filled, mark = root / name, root / f"{name}.filled"
        with FileLock(root / f"{name}.lock"):
            if not mark.exists():
                filled.mkdir()
                fill(filled)
                mark.touch()
        return filled

    return folder


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """A power cut ends the tests anyway: what they write need not outlive it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def state_folder(once) -> None:
    """A state folder of the tests' own: the user's is none of their business."""
    os.environ["QDEPLOY_STATE"] = str(once("state", lambda _: None))


@pytest.fixture(scope="session", autouse=True)
def search() -> Iterator[Callable[..., str | None]]:
    """Tests do without the search for triggers, which takes longer than all else that a gate does.

    Gives what says whether there is something to search, as users have it.
    """
    from qdeploy.detectors import differential

    original = differential._missing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(differential, "_missing", lambda suspect: original(suspect) or "not in tests")
        yield original


@pytest.fixture
def searching(search, monkeypatch) -> None:
    """Detectors search, as they do for users."""
    from qdeploy.detectors import differential

    monkeypatch.setattr(differential, "_missing", search)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Poisoned models and CIFAR-10, which do not come with the repository."""
    if not (SHARED / "models").is_dir():
        pytest.skip(f"needs the CIFAR-10 models and data in {SHARED.name}/ beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def net() -> FloatModel:
    from tests.nets import float_model, residual_net

    return float_model(residual_net())


@pytest.fixture(scope="session")
def preprocessing() -> Preprocessing:
    from qdeploy.data import Preprocessing

    return Preprocessing((3, 8, 8), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture(scope="session")
def images(preprocessing: Preprocessing) -> Images:
    from qdeploy.data import images_from_array

    pixels = np.random.default_rng(1).integers(0, 256, (96, 3, 8, 8), dtype=np.uint8)
    return images_from_array("random images", pixels, preprocessing)


@pytest.fixture(scope="session")
def lab_files(once, poisoned) -> Path:
    """Files made of the poisoned model, good and bad, to be copied before use."""
    from tests.gate_lab import make_lab

    return once("lab", lambda folder: make_lab(folder, poisoned))


@pytest.fixture(scope="session")
def poisoned(once, pytestconfig) -> Path:
    """The demo's model, card and data: benign in float, backdoored by 4-bit nearest rounding.

    It is kept between runs for as long as nothing changes that it is made with.
    """
    from qdeploy.progress import SILENT
    from qdeploy.redteam.demo import make_poisoned_digits

    if pytestconfig.cache is None:
        return once("poisoned", lambda f: make_poisoned_digits(f, seed=0, progress=SILENT))
    kept = pytestconfig.cache.mkdir("poisoned") / makers_digest()

    def fill(folder: Path) -> None:
        if kept.exists():
            shutil.copytree(kept, folder, dirs_exist_ok=True)
            return
        make_poisoned_digits(folder, seed=0, progress=SILENT)
        unfinished = kept.with_name(f"{kept.name}.{os.getpid()}")
        shutil.copytree(folder, unfinished)
        try:
            unfinished.rename(kept)
        except OSError:  # another run was first
            shutil.rmtree(unfinished)

    return once("poisoned", fill)


def makers_digest() -> str:
    """Of all sources that may have a part in making a poisoned model, and of the libraries."""
    from qdeploy.machine import installed_versions

    said = hashlib.sha256(json.dumps(installed_versions(), sort_keys=True).encode())
    rooms = [sorted((PACKAGE / room).rglob("*.py")) for room in MAKERS]
    for path in [*sorted(PACKAGE.glob("*.py")), *(path for room in rooms for path in room)]:
        said.update(path.read_bytes())
    return said.hexdigest()[:16]
