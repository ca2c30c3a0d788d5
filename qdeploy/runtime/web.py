"""onnxruntime-web in node: the WASM kernels that browsers run, in a process of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from qdeploy.errors import ProviderError, UsageError
from qdeploy.runtime.remote import Connection, RemoteRunner, greet, opened
from qdeploy.settings.device import RuntimeSpec

OPTIONS = frozenset({"node", "package"})
PACKAGE = "node_modules/onnxruntime-web"
HINT = "it needs node 18 or later, and: npm install onnxruntime-web"


@dataclass(frozen=True, slots=True)
class Web:
    """A runtime of `qdeploy.runtime.known`, on one thread, as pages without isolation have it."""

    def open(
        self,
        model: bytes,
        spec: RuntimeSpec,
        *,
        spinning: bool = True,  # noqa: ARG002 - it has one thread
        saturating: bool = False,  # noqa: ARG002 - WASM adds products exactly
    ) -> RemoteRunner:
        """See `qdeploy.runtime.known.Runtime`."""
        unknown = sorted(set(spec.options) - OPTIONS)
        if unknown:
            raise UsageError(
                f"device: runtime web has no option {unknown[0]}",
                hint=f'options = {{ node = "node", package = "{PACKAGE}" }}',
            )
        package = Path(spec.options.get("package", PACKAGE))
        if not (package / "package.json").is_file():
            raise ProviderError(f"onnxruntime-web is not in {package}", hint=HINT)
        with as_file(files("qdeploy.runtime").joinpath("agent.mjs")) as agent:
            command = [spec.options.get("node", "node"), str(agent), str(package.resolve())]
            connection = Connection("web", command, b"", hint=HINT)
            greet(connection)
        return opened(connection, model, spec)

    def kernels(self, model: bytes, spec: RuntimeSpec) -> Mapping[str, int]:  # noqa: ARG002 - it does not tell
        """Not known."""
        return {}
