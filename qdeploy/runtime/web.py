"""onnxruntime-web: WASM kernels in node or in a headless browser, in a process of their own."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from qdeploy.errors import ProviderError, UsageError
from qdeploy.runtime.remote import Connection, RemoteRunner, greet, opened
from qdeploy.settings.device import RuntimeSpec

OPTIONS = frozenset({"node", "package", "browser"})
PACKAGE = "node_modules/onnxruntime-web"
HINT = "it needs node 18 or later, and: npm install onnxruntime-web"
BROWSER_HINT = 'name one of Chromium\'s kind: options = { browser = "chromium" }'


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
        browser = spec.options.get("browser")
        if browser is not None and shutil.which(browser) is None:
            raise ProviderError(f"browser {browser} is not installed", hint=BROWSER_HINT)
        with as_file(files("qdeploy.runtime")) as folder:
            agent = [str(folder / "agent.mjs"), str(package.resolve())]
            command = [spec.options.get("node", "node"), *agent, *filter(None, [browser])]
            connection = Connection("web", command, b"", hint=HINT)
            greet(connection)
        return opened(connection, model, spec)

    def kernels(self, model: bytes, spec: RuntimeSpec) -> Mapping[str, int]:  # noqa: ARG002 - it does not tell
        """Not known."""
        return {}
