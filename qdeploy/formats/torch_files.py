"""Torch files as modules, with the unpickler that only knows tensors."""

from __future__ import annotations

import io
import re
import sys
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module, util
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 - the exception alone
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from qdeploy.architectures import build_named, construct
from qdeploy.errors import InputError, UsageError, foreign_reader
from qdeploy.values import ARCHITECTURE_HINT, Architecture

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
PARALLEL_PREFIX = "module."


def checkpoint(path: Path, data: bytes, *, unpickle: bool = False) -> Any:
    """What torch saved as `data`, found at `path`: tensors and plain containers, unless `unpickle`.

    Raises:
        InputError: the file is damaged, or holds pickled objects.
    """
    with _reading(path):
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=not unpickle)  # noqa: TID251
        except UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            name = f" ({found[1]})" if found else ""
            raise InputError(
                f"model {path}: holds pickled Python objects{name}, which can run any code when"
                " loaded",
                hint="save model.state_dict() instead and give --arch, or export to ONNX; if you"
                " trust its author, give --run-code-from-model",
            ) from error


def safetensors(path: Path, data: bytes) -> Any:
    """The tensors of a safetensors file.

    Raises:
        InputError: the file is damaged.
    """
    with _reading(path):
        return load_tensors(data)


def script(path: Path, data: bytes) -> torch.jit.ScriptModule:
    """TorchScript. Loading it runs code from the file.

    Raises:
        InputError: the file is damaged.
    """
    with _reading(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch advises against TorchScript
        return torch.jit.load(io.BytesIO(data), map_location="cpu").eval()


def exported_program(path: Path, data: bytes) -> torch.export.ExportedProgram:
    """What `torch.export.save` wrote. Loading it runs code from the file.

    Raises:
        InputError: the file is damaged.
    """
    with _reading(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.export.load(io.BytesIO(data))


def _reading(path: Path) -> AbstractContextManager[None]:
    return foreign_reader(f"model {path}: damaged or truncated")


def module_of(saved: Any, path: Path, architecture: Architecture | None) -> nn.Module:
    """The module that `saved` is, or whose weights it holds; in eval mode.

    Raises:
        InputError: `saved` is no state dict, or does not fit the architecture.
    """
    if isinstance(saved, nn.Module):
        for key, value in saved.state_dict().items():
            if isinstance(value, Tensor):
                _require_plain(key, value, path)
        return saved.eval()
    state = _state_dict(saved, path)
    if architecture is None:
        raise InputError(
            f"model {path}: is a state dict, which needs an architecture",
            hint=ARCHITECTURE_HINT,
        )
    module = build(architecture)
    _load_state(module, state, path, architecture.name)
    return module.eval()


def build(architecture: Architecture) -> nn.Module:
    """The module that an architecture's factory makes.

    Raises:
        UsageError: there is no such factory.
        InputError: it fails.
    """
    source, _, factory = architecture.name.rpartition(":")
    if source in {"torchvision", "timm", "qdeploy"} or not architecture.trusted:
        return build_named(architecture.name, architecture.arguments)
    if not source or not factory:
        name = architecture.name
        raise UsageError(
            f"--arch {name!r} is not package.module:factory or file.py:factory",
            hint=f"one of this program's own is --arch qdeploy:{name}, of a library"
            f" --arch timm:{name} or torchvision:{name}",
        )
    namespace = _import_file(Path(source)) if source.endswith(".py") else _import_name(source)
    make = getattr(namespace, factory, None)
    if not callable(make):
        raise UsageError(f"--arch {architecture.name}: {source} has no function {factory!r}")
    return construct(make, architecture.arguments, architecture.name)


def _state_dict(saved: Any, path: Path) -> dict[str, Tensor]:
    """The tensors in `saved`, out of the wrappers that training scripts put around them."""
    for key in WRAPPERS:
        if isinstance(saved, Mapping) and isinstance(saved.get(key), Mapping):
            saved = saved[key]
            break
    if not isinstance(saved, Mapping) or not saved:
        raise InputError(f"model {path}: holds a {type(saved).__name__}, not a state dict")
    strange = [key for key, value in saved.items() if not isinstance(value, Tensor)]
    if strange:
        raise InputError(
            f"model {path}: entry {strange[0]!r} is a {type(saved[strange[0]]).__name__}, so this "
            "is not a state dict",
            hint="save model.state_dict()",
        )
    for key, value in saved.items():
        _require_plain(key, value, path)
        _check_claim(key, value, path)
    if all(str(key).startswith(PARALLEL_PREFIX) for key in saved):
        return {str(key).removeprefix(PARALLEL_PREFIX): value for key, value in saved.items()}
    return {str(key): value for key, value in saved.items()}


def _require_plain(key: str, value: Tensor, path: Path) -> None:
    """Only dense tensors of real numbers can become weights without a loss."""
    kinds = (
        (value.is_meta, "has a shape and no values"),
        (value.layout is not torch.strided, "is sparse"),
        (value.is_quantized, "is quantized"),
        (value.is_complex(), "is of complex numbers"),
    )
    for holds, what in kinds:
        if holds:
            raise InputError(
                f"model {path}: tensor {key!r} {what}",
                hint="save dense tensors of real numbers, such as float32",
            )


def _check_claim(key: str, value: Tensor, path: Path) -> None:
    """A tensor is as large as its storage: a small file cannot claim to be a huge model."""
    claimed, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if claimed > held:
        raise InputError(
            f"model {path}: tensor {key!r} claims {claimed} bytes but its storage has {held}"
        )


def _load_state(module: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    wanted = module.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    misfits = [k for k in wanted.keys() & state.keys() if wanted[k].shape != state[k].shape]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", extra))
        if keys
    ]
    if misfits:
        key = min(misfits)
        have, need = (tuple(d[key].shape) for d in (state, wanted))
        problems.append(f"{len(misfits)} of another shape ({key} is {have}, not {need})")
    if problems:
        raise InputError(
            f"model {path}: does not fit architecture {name}: tensors " + "; ".join(problems),
            hint="check --arch and --arch-args",
        )
    module.load_state_dict(state)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"--arch: no such file {path}")
    spec = util.spec_from_file_location(f"qdeploy_arch_{path.stem}", path)
    assert spec is not None  # noqa: S101 - the suffix is .py
    assert spec.loader is not None  # noqa: S101
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"--arch {path}: {type(error).__name__}: {error}") from error
    return module


def _import_name(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(f"--arch: cannot import {name}: {error}") from error
