"""Options of the command line put over the model card, the recipe and the device profile."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qdeploy.disk.places import Named, refuse_overlaps
from qdeploy.disk.state import private_number
from qdeploy.errors import UsageError
from qdeploy.inputs.order import StudentOrder
from qdeploy.inputs.requests import QuantizeRequest, Request
from qdeploy.inputs.sources import Given, Sources, resolve
from qdeploy.options import Options
from qdeploy.settings.card import find_card
from qdeploy.settings.device import DeviceProfile, load_device
from qdeploy.settings.methods import SOLVERS, method
from qdeploy.settings.policy import Policy, in_force, load_policy
from qdeploy.settings.recipe import Recipe, load_recipe
from qdeploy.settings.sanitizers import Sanitizer, sanitizer
from qdeploy.settings.schema import validate


def make_request(options: Options) -> QuantizeRequest:
    """Everything a command needs to know, validated before any work.

    Raises:
        UsageError: options contradict each other or cannot be read.
        InputError: a file that they name is not valid.
    """
    recipe = _recipe(options)
    policy = recipe.policy() if options.policy is None else _policy(options)
    policy, ended = in_force(policy, datetime.now(UTC).date())
    recipe = recipe.model_copy(update={"gate": policy.gate, "validation": policy.validation})
    device = load_device(options.device or recipe.device)
    return QuantizeRequest(
        sources=_sources(options),
        recipe=recipe,
        policy=policy,
        device=_within(_device(device, options, recipe), policy),
        artifacts=options.artifacts,
        command=options.command,
        reports=tuple(options.report or ()),
        synthetic_calibration=options.synthetic_calibration,
        run_code_from_model=options.run_code_from_model,
        ended=ended,
    )


def request_for(options: Options, model: Path) -> QuantizeRequest:
    """`make_request` for one of several models."""
    return make_request(replace(options, model=model))


def refuse_lost_models(options: Options) -> None:
    """Find out before any file is opened that a report would replace one, or its card.

    Raises:
        UsageError: it would.
    """
    models = [*(options.models or ()), *([options.reference] if options.reference else [])]
    cards = [options.card, *map(find_card, models)]
    read = [
        *(("the model", path) for path in models),
        *(("the card", path) for path in cards if path),
    ]
    refuse_overlaps(tuple(_written(options)), read)


def make_gate_request(options: Options) -> Request:
    """What `gate` needs to know about the file and, if there is one, its reference.

    The card beside the reference counts, else the one beside the file.

    Raises:
        UsageError: options contradict each other or cannot be read.
        InputError: a file that they name is not valid.
    """
    policy, ended = in_force(_policy(options), datetime.now(UTC).date())
    subject = options.reference or options.file
    if options.reference is not None and options.card is None:
        card = find_card(options.reference) or find_card(options.file)
        options = replace(options, card=card)
    return Request(
        sources=_sources(replace(options, model=subject)),
        policy=policy,
        device=_within(load_device(options.device or policy.device), policy),
        artifacts=options.artifacts,
        command=options.command,
        reports=tuple(options.report or ()),
        run_code_from_model=options.run_code_from_model,
        ended=ended,
    )


def make_student_order(options: Options) -> StudentOrder:
    """What `distill` needs to know.

    Raises:
        UsageError: options contradict each other or cannot be read.
        InputError: a file that they name is not valid.
    """
    seed = options.seed
    return StudentOrder(
        sources=_sources(options),
        spec=_sanitizer(options),
        images=options.unlabelled,
        image_count=options.image_count,
        seed=_private_seed(options.model) if seed is None else seed,
        out=options.out,
        artifacts=options.artifacts,
        accelerator=options.accelerator,
        command=options.command,
        run_code_from_model=options.run_code_from_model,
    )


def make_cleaning_order(options: Options, request: QuantizeRequest) -> StudentOrder | None:
    """What `sanitize` needs to know to clean the float model first; None if it is not to.

    Raises:
        UsageError: options contradict each other, or nobody named any images.
    """
    said = [
        options.cleaning_images, options.image_count, options.epochs, options.watch, options.further
    ]  # fmt: skip
    if options.clean_with is None:
        told = (options.schedule, options.accelerator) != ("short", "cpu")
        if told or any(value is not None for value in said):
            raise UsageError("--images and the like are for a --sanitizer", hint="name one")
        return None
    calibration = request.sources.calibration
    named = calibration.checked() if calibration is not None else None
    images = options.cleaning_images or named
    if images is None:
        raise UsageError(
            f"--sanitizer {options.clean_with}: no images are known",
            hint="give --images FOLDER_OR_ZIP: unlabelled, and other things may be on them",
        )
    return StudentOrder(
        sources=request.sources,
        spec=_sanitizer(replace(options, sanitizer=options.clean_with)),
        images=images,
        image_count=options.image_count,
        seed=request.recipe.seed,
        out=options.out.with_name(f"{options.out.stem}.student.pt"),
        artifacts=options.artifacts,
        accelerator=options.accelerator,
        command=request.command,
        run_code_from_model=options.run_code_from_model,
    )


def _sanitizer(options: Options) -> Sanitizer:
    table: dict[str, Any] = {"kind": options.sanitizer, "schedule": options.schedule}
    if options.epochs is not None:
        table["epochs"] = options.epochs
    if options.watch:
        if options.sanitizer != "asd":
            raise UsageError(f"--watch means nothing to {options.sanitizer}: only asd has a shift")
        table["watch"] = tuple(options.watch)
    if options.further is not None:
        if options.sanitizer != "unlearn":
            raise UsageError(
                f"--further means nothing to {options.sanitizer}: only unlearn goes on"
                " from where its training ended"
            )
        table["further"] = options.further
    return sanitizer(table, where="options")


def _policy(options: Options) -> Policy:
    policy = load_policy(options.policy or "default")
    if options.test_images is None:
        return policy
    table = policy.model_dump()
    table["validation"] = {**table["validation"], "images": options.test_images}
    return validate(table, Policy, where="options")


def _within(device: DeviceProfile, policy: Policy) -> DeviceProfile:
    """The device with the budget of the policy put over its own."""
    budget = policy.budget.model_dump(exclude_none=True)
    return device.model_copy(update={"budget": device.budget.model_copy(update=budget)})


def with_private_seed(options: Options) -> Options:
    """`options` with a seed that an attacker cannot foresee, unless somebody has chosen one."""
    chosen = "seed" in load_recipe(_recipe_name(options)).model_fields_set
    if chosen or options.seed is not None or options.dry_run:
        return options
    return replace(options, seed=_private_seed(options.model))


def _private_seed(model: Path) -> int:
    """A seed that nobody outside can foresee, and that stays the same here for this model.

    A report that is published gives away the seed of its own model and of no other.
    """
    from qdeploy.formats.opening import model_digest

    return private_number(model_digest(model))


def _recipe_name(options: Options) -> str:
    return options.recipe or f"int{options.bits or 4}"


def _recipe(options: Options) -> Recipe:
    recipe = load_recipe(_recipe_name(options))
    table = recipe.model_dump()
    if options.bits is not None:
        table["bits"] = int(options.bits)
    if options.seed is not None:
        table["seed"] = options.seed
    if options.calibration_images is not None:
        table["calibration"] = {**table["calibration"], "images": options.calibration_images}
    if options.test_images is not None:
        table["validation"] = {**table["validation"], "images": options.test_images}
    if options.activation_bits is not None:
        bits = 8 if options.activation_bits == "8" else "none"
        table["activations"] = {**table["activations"], "bits": bits}
    table["rounding"] = _rounding(options, table["rounding"])
    return validate(table, Recipe, where="options")


def _rounding(options: Options, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe's rounding, or another method with its own defaults."""
    kind, solver = options.rounding or given["kind"], options.solver
    if solver is not None and solver not in SOLVERS.get(kind, ()):
        raise UsageError(f"--solver {solver} is not a solver of {kind}")
    wanted = method(f"{kind}-{solver}" if solver is not None else kind)
    unchanged = kind == given["kind"] and solver in {None, given.get("solver")}
    return given if unchanged else wanted.model_dump()


def _device(device: DeviceProfile, options: Options, recipe: Recipe) -> DeviceProfile:
    if options.weight_storage is None:
        return device
    if recipe.bits != 4 and options.weight_storage == "int4":
        raise UsageError(f"--weight-storage int4 cannot hold {recipe.bits}-bit weights")
    table = device.model_dump()
    table["weights"]["storage"] = {**table["weights"]["storage"], "4": options.weight_storage}
    return validate(table, DeviceProfile, where="options")


def _sources(options: Options) -> Sources:
    given = Given(
        card=options.card,
        architecture=options.arch,
        arguments=parse_arguments(options.arch_args),
        input_shape=_shape(options.input_shape),
        calibration=options.calibration,
        test=options.test,
        triggers=tuple(options.trigger or ()),
        data_roots=tuple(options.data_root or ()),
    )
    sources = resolve(options.model, given)
    refuse_overlaps(tuple(_written(options)), _read(options, sources))
    return sources


def _written(options: Options) -> Iterator[Named]:
    """Every place that a command may write to, but its run directories."""
    if options.out != Path() and not options.out.is_dir():
        out = options.out
        yield "--out", out
        for word in ("rejected", "unverified", "previous", "student"):
            yield f"--out ({word})", out.with_name(f"{out.stem}.{word}{out.suffix}")
    yield from (("--report", path) for path in options.report or ())


def _read(options: Options, sources: Sources) -> Iterator[Named]:
    """Every file that the command line or the model card names to be read."""
    yield "the model", options.model
    if options.file != Path():
        yield "the file", options.file
    if sources.card_path is not None:
        yield "the model card", sources.card_path
    for name, place in (("calibration data", sources.calibration), ("test data", sources.test)):
        if place is not None:
            yield f"the {name}", place.path
    settings = (options.recipe, options.policy, options.device, *(options.trigger or ()))
    files = [Path(text) for text in settings if text is not None and text.endswith(".toml")]
    images = (options.cleaning_images, options.unlabelled)
    for path in (options.reference, options.made_by, *images, *files):
        if path is not None and path != Path():
            yield "what is read from", path


def parse_arguments(texts: list[str] | None) -> Mapping[str, Any] | None:
    """`width=16` and `width=16,classes=10` as arguments; values as in TOML, else text."""
    if not texts:
        return None
    arguments: dict[str, Any] = {}
    for pair in (pair for text in texts for pair in text.split(",")):
        key, separator, value = pair.partition("=")
        if not separator or not key.strip().isidentifier():
            raise UsageError(f"--arch-args {pair!r} is not name=value")
        try:
            arguments[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            arguments[key.strip()] = value.strip()
    return arguments


def _shape(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    try:
        channels, height, width = (int(size) for size in text.split(","))
    except ValueError:
        raise UsageError(f"--input-shape {text!r} is not channels,height,width") from None
    if min(channels, height, width) < 1:
        raise UsageError(f"--input-shape {text!r} has a size below 1")
    return channels, height, width
