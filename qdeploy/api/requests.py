"""From keywords to requests: settings put over model card, recipe and device profile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from qdeploy.api.settings import (
    ARTIFACTS,
    CleaningSettings,
    CleanSettings,
    EvidenceSettings,
    GateSettings,
    ModelSettings,
    PathLike,
    QuantizationSettings,
    SanitizeSettings,
    ScanSettings,
)
from qdeploy.disk.places import Named, refuse_overlaps
from qdeploy.disk.state import private_number
from qdeploy.errors import UsageError
from qdeploy.inputs.requests import CleanRequest, QuantizeRequest, Request
from qdeploy.inputs.sources import Given, Sources, resolve
from qdeploy.runs.converting import places_beside
from qdeploy.runtime.known import runtime_of
from qdeploy.settings.card import find_card
from qdeploy.settings.device import ORT_FORMAT, DeviceProfile, load_device
from qdeploy.settings.methods import SOLVERS, method
from qdeploy.settings.policy import Policy, in_force, load_policy
from qdeploy.settings.recipe import Recipe, load_recipe
from qdeploy.settings.sanitizers import Sanitizer, sanitizer
from qdeploy.settings.schema import validate

OF_CLEANING = ("images", "image_count", "schedule", "epochs", "watch", "further", "accelerator")
NOTHING_SAID: SanitizeSettings = {}


def any_settings(settings: Mapping[str, Any]) -> SanitizeSettings:
    """A copy of a verb's settings, as those of the verb that has all keywords."""
    return cast("SanitizeSettings", {**settings})


def quantize_request(
    model: Path, settings: SanitizeSettings = NOTHING_SAID, *, out: Path | None = None
) -> QuantizeRequest:
    """Everything that rounding and judging need to know, validated before any work.

    Args:
        out: Where the file goes: no other place may be the same.

    Raises:
        UsageError: settings contradict each other or cannot be read.
        InputError: a file that they name is not valid.
    """
    recipe = _recipe(settings)
    policy = recipe.policy() if "policy" not in settings else _policy(settings)
    policy, ended = in_force(policy, datetime.now(UTC).date())
    recipe = recipe.model_copy(update={"gate": policy.gate, "validation": policy.validation})
    device = load_device(str(settings.get("device", recipe.device)))
    sources = _sources(model, settings, out=out)
    return QuantizeRequest(
        sources=sources,
        recipe=recipe,
        policy=policy,
        device=_within(_device(device, settings, recipe), policy),
        synthetic_calibration=settings.get("synthetic_calibration", False),
        ended=ended,
        cleaning=_first_cleaned(settings, sources, recipe, out),
        **_of_any_run(settings),
    )


def with_private_seed(model: Path, settings: SanitizeSettings) -> SanitizeSettings:
    """`settings` with a seed that an attacker cannot foresee, unless somebody has chosen one."""
    if "seed" in settings or "seed" in load_recipe(_recipe_name(settings)).model_fields_set:
        return settings
    return {**settings, "seed": _private_seed(model)}


def gate_request(file: Path, settings: GateSettings) -> Request:
    """What `gate` needs to know about the file and, if there is one, its reference.

    The card beside the reference counts, else the one beside the file.

    Raises:
        UsageError: settings contradict each other or cannot be read.
        InputError: a file that they name is not valid.
    """
    policy, ended = in_force(_policy(settings), datetime.now(UTC).date())
    said = any_settings(settings)
    model = file
    if "reference" in settings:
        model = Path(settings["reference"])
        card = find_card(model) or find_card(file)
        if "card" not in settings and card is not None:
            said["card"] = card
    return Request(
        sources=_sources(model, said, file=file),
        policy=policy,
        device=_within(load_device(str(settings.get("device", policy.device))), policy),
        ended=ended,
        **_of_any_run(settings),
    )


def clean_request(model: Path, images: Path, out: Path, settings: CleanSettings) -> CleanRequest:
    """What `clean` needs to know.

    Raises:
        UsageError: settings contradict each other or cannot be read.
        InputError: a file that they name is not valid.
    """
    said = any_settings({**settings, "images": images})
    seed = settings.get("seed")
    return CleanRequest(
        sources=_sources(model, said, out=out),
        spec=_sanitizer(settings),
        images=images,
        image_count=settings.get("image_count"),
        seed=_private_seed(model) if seed is None else seed,
        out=out,
        artifacts=Path(settings.get("artifacts", ARTIFACTS)),
        accelerator=settings.get("accelerator", "cpu"),
        command=settings.get("command", ""),
        run_code_from_model=settings.get("run_code_from_model", False),
    )


def refuse_lost_models(models: Sequence[Path], settings: ScanSettings) -> None:
    """Find out before any file is opened that a report would replace one, or its card.

    Raises:
        UsageError: it would.
    """
    models = [*models, *_paths(settings.get("reference"))]
    cards = [*_paths(settings.get("card")), *filter(None, map(find_card, models))]
    read = [*(("the model", path) for path in models), *(("the card", path) for path in cards)]
    refuse_overlaps(tuple(_written(settings.get("reports", ()), None)), read)


def _of_any_run(settings: ModelSettings | EvidenceSettings) -> Mapping[str, Any]:
    said: Mapping[str, Any] = settings
    return {
        "artifacts": Path(said.get("artifacts", ARTIFACTS)),
        "command": said.get("command", ""),
        "reports": tuple(map(Path, said.get("reports", ()))),
        "run_code_from_model": said.get("run_code_from_model", False),
    }


def _first_cleaned(
    settings: SanitizeSettings, sources: Sources, recipe: Recipe, out: Path | None
) -> CleanRequest | None:
    """How the float model is to be cleaned first; None if it is not to be."""
    if "sanitizer" not in settings:
        if any(keyword in settings for keyword in OF_CLEANING):
            raise UsageError("--images and the like are for a --sanitizer", hint="name one")
        return None
    if out is None:
        raise UsageError("--sanitizer: a place for the student is needed", hint="give --out")
    named = sources.calibration.checked() if sources.calibration is not None else None
    images = settings.get("images", named)
    if images is None:
        raise UsageError(
            f"--sanitizer {settings['sanitizer']}: no images are known",
            hint="give --images FOLDER_OR_ZIP: unlabelled, and other things may be on them",
        )
    return CleanRequest(
        sources=sources,
        spec=_sanitizer(settings),
        images=Path(images),
        image_count=settings.get("image_count"),
        seed=recipe.seed,
        out=out.with_name(f"{out.stem}.student.pt"),
        artifacts=Path(settings.get("artifacts", ARTIFACTS)),
        accelerator=settings.get("accelerator", "cpu"),
        command=settings.get("command", ""),
        run_code_from_model=settings.get("run_code_from_model", False),
    )


def _sanitizer(settings: CleaningSettings) -> Sanitizer:
    kind = settings.get("sanitizer", "unlearn")
    table: dict[str, Any] = {"kind": kind, "schedule": settings.get("schedule", "short")}
    if "epochs" in settings:
        table["epochs"] = settings["epochs"]
    if settings.get("watch"):
        if kind != "asd":
            raise UsageError(f"--watch means nothing to {kind}: only asd has a shift")
        table["watch"] = tuple(settings["watch"])
    if "further" in settings:
        if kind != "unlearn":
            raise UsageError(
                f"--further means nothing to {kind}: only unlearn goes on"
                " from where its training ended"
            )
        table["further"] = settings["further"]
    return sanitizer(table, where="options")


def _policy(settings: EvidenceSettings) -> Policy:
    policy = load_policy(str(settings.get("policy", "default")))
    if "test_images" not in settings:
        return policy
    table = policy.model_dump()
    table["validation"] = {**table["validation"], "images": settings["test_images"]}
    return validate(table, Policy, where="options")


def _within(device: DeviceProfile, policy: Policy) -> DeviceProfile:
    """The device with the budget of the policy put over its own."""
    for runtime in device.runtimes:
        runtime_of(runtime)  # an unknown one is an error now
    budget = policy.budget.model_dump(exclude_none=True)
    return device.model_copy(update={"budget": device.budget.model_copy(update=budget)})


def _private_seed(model: Path) -> int:
    """A seed that nobody outside can foresee, and that stays the same here for this model.

    A report that is published gives away the seed of its own model and of no other.
    """
    from qdeploy.formats.opening import model_digest

    return private_number(model_digest(model))


def _recipe_name(settings: QuantizationSettings) -> str:
    bits = settings.get("bits", 4)
    return str(settings.get("recipe", bits if bits == "auto" else f"int{bits}"))


def _recipe(settings: SanitizeSettings) -> Recipe:
    table = load_recipe(_recipe_name(settings)).model_dump()
    for keyword in ("bits", "seed", "optimize"):
        if keyword in settings:
            table[keyword] = settings[keyword]
    if "calibration_images" in settings:
        table["calibration"] = {**table["calibration"], "images": settings["calibration_images"]}
    if "test_images" in settings:
        table["validation"] = {**table["validation"], "images": settings["test_images"]}
    if "activation_bits" in settings:
        table["activations"] = {**table["activations"], "bits": settings["activation_bits"]}
    kept = [{"layers": p, "bits": 8} for p in settings.get("keep_at_8", ())]
    kept += [
        {"layers": p, "bits": 8, "activations": "none"} for p in settings.get("keep_float", ())
    ]
    table["overrides"] = (*table["overrides"], *kept)
    table["rounding"] = _rounding(settings, table["rounding"])
    return validate(table, Recipe, where="options")


def _rounding(settings: QuantizationSettings, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe's rounding, or another method with its own defaults."""
    kind, solver = settings.get("rounding", given["kind"]), settings.get("solver")
    if solver is not None and solver not in SOLVERS.get(kind, ()):
        raise UsageError(f"--solver {solver} is not a solver of {kind}")
    wanted = method(f"{kind}-{solver}" if solver is not None else kind)
    unchanged = kind == given["kind"] and solver in {None, given.get("solver")}
    return given if unchanged else wanted.model_dump()


def _device(device: DeviceProfile, settings: QuantizationSettings, recipe: Recipe) -> DeviceProfile:
    """The profile with what was said put over it."""
    storage, form = settings.get("weight_storage"), settings.get("format")
    if recipe.bits == 8 and storage == "int4":
        raise UsageError("--weight-storage int4 cannot hold 8-bit weights")
    table = device.model_dump()
    if storage is not None:
        table["weights"]["storage"] = {**table["weights"]["storage"], "4": storage}
    if form is not None:
        table["format"] = form
    if form == "ort" and not any(r.provider == ORT_FORMAT for r in device.runtimes):
        table["runtimes"] = (*table["runtimes"], {"provider": ORT_FORMAT})
    return validate(table, DeviceProfile, where="options")


def _sources(
    model: Path,
    settings: SanitizeSettings,
    *,
    out: Path | None = None,
    file: Path | None = None,
) -> Sources:
    """What the model is and comes with; no place that is read is also written to."""
    sources = resolve(model, given_by(settings))
    read = [("the model", model), *([("the file", file)] if file is not None else [])]
    read += _read(settings, sources)
    refuse_overlaps(tuple(_written(settings.get("reports", ()), out)), read)
    return sources


def given_by(settings: SanitizeSettings) -> Given:
    """What was given besides the model.

    Raises:
        UsageError: the shape is none.
    """
    shape = settings.get("input_shape")
    if shape is not None and min(shape) < 1:
        raise UsageError(f"--input-shape {','.join(map(str, shape))!r} has a size below 1")
    return Given(
        card=next(_paths(settings.get("card")), None),
        architecture=settings.get("arch"),
        arguments=settings.get("arch_args"),
        input_shape=shape,
        layout=settings.get("layout"),
        output=settings.get("output"),
        calibration=next(_paths(settings.get("calibration")), None),
        test=next(_paths(settings.get("test")), None),
        triggers=tuple(map(str, settings.get("triggers", ()))),
        data_roots=tuple(map(Path, settings.get("data_roots", ()))),
    )


def _written(reports: Sequence[PathLike], out: Path | None) -> Iterator[Named]:
    """Every place that a verb may write to, but its run directories."""
    if out is not None and not out.is_dir():
        yield "--out", out
        for word in ("rejected", "unverified", "previous", "student"):
            yield f"--out ({word})", out.with_name(f"{out.stem}.{word}{out.suffix}")
        yield from (("--out (in another format)", place) for place in places_beside(out))
    yield from (("--report", Path(path)) for path in reports)


def _read(settings: Mapping[str, Any], sources: Sources) -> Iterator[Named]:
    """Every file that the settings or the model card name to be read."""
    if sources.card_path is not None:
        yield "the model card", sources.card_path
    for name, place in (("calibration data", sources.calibration), ("test data", sources.test)):
        if place is not None:
            yield f"the {name}", place.path
    for keyword in ("reference", "made_by", "images"):
        yield from (("what is read from", path) for path in _paths(settings.get(keyword)))
    named = [settings.get(keyword, "") for keyword in ("recipe", "policy", "device")]
    for text in map(str, [*named, *settings.get("triggers", ())]):
        if text.endswith(".toml"):
            yield "what is read from", Path(text)


def _paths(path: PathLike | None) -> Iterator[Path]:
    """The path, if there is one."""
    if path is not None:
        yield Path(path)
