"""What every handler can reach: configuration, metrics, the router once the model's text side is loaded.

One object per app, under the key `SERVING`. Loop thread only.
"""

import hashlib
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import msgspec
from aiohttp import web

from asyncllm import __version__
from asyncllm.config import Config
from asyncllm.errors import AsyncLLMError, NotFound, Unavailable, show
from asyncllm.metrics import Metrics
from asyncllm.router.router import Router
from asyncllm.server.sse import OpenStreams


class Startup(msgspec.Struct):
    """Phases of start-up as they pass: seconds once done, None while one runs."""

    phases: dict[str, float | None] = {}
    error: str | None = None

    @property
    def phase(self) -> str:
        """The phase that runs now, or the last one."""
        return next((name for name, seconds in self.phases.items() if seconds is None), "done")


class Serving:
    """The parts of a running server."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model_name = config.model.name
        self.names = {self.model_name, *config.model.aliases}
        self.adapters = {name: number for number, name in enumerate(config.lora.adapters, 1)}  # as the engine counts
        self.metrics = Metrics(config.metrics.prefix, self.model_name)
        self.startup = Startup()
        self.streams = OpenStreams(config.api.sse_keep_alive_s, config.server.write_timeout_s)
        self.created = int(time.time())
        self.fingerprint = fingerprint(config)
        self._router: Router | None = None

    @property
    def router(self) -> Router:
        """The router. Raises Unavailable (503 with the phase) while the model's files are being opened."""
        if self._router is None:
            if self.startup.error:
                raise Unavailable("The model could not be loaded.", code="engine_dead")
            raise Unavailable(f"The model is loading: {self.startup.phase}.", code="not_ready", retry_after_s=1.0)
        return self._router

    @property
    def facts(self) -> dict[str, str]:
        """Device, precision and memory, once the engine has said so."""
        return {} if self._router is None else self._router.facts

    @property
    def attached(self) -> bool:
        """Whether there is a router yet."""
        return self._router is not None

    def attach(self, router: Router) -> None:
        """Start handing requests to this router."""
        self._router = router

    @property
    def state(self) -> str:
        """starting, ready, draining or dead."""
        if self._router is None:
            return "dead" if self.startup.error else "starting"
        return self._router.state

    def check_model(self, name: str | None) -> None:
        """Raises NotFound for a name that is not served; no name means the served model."""
        if name is not None and name not in self.names and name not in self.adapters:
            served = ", ".join(sorted([*self.names, *self.adapters]))
            raise NotFound(
                f"The model {show(name)!r} does not exist. Served here: {served}.",
                param="model",
                code="model_not_found",
            )

    @property
    def listed_names(self) -> list[str]:
        """All of them: the model's own first, then its aliases, then the adapters."""
        return [self.model_name, *sorted(self.names - {self.model_name}), *self.adapters]

    def adapter(self, name: str | None) -> int:
        """Which adapter a served name stands for; 0 = none."""
        return self.adapters.get(name, 0) if name is not None else 0


def fingerprint(config: Config) -> str:
    """Changes when an answer may change: version, torch, model, precision, adapters."""
    model = config.model
    facts = [__version__, version_of("torch"), model.path, model.revision, model.dtype, model.device]
    facts += [model.quantization, model.rope_scaling, str(model.max_context_length), str(config.lora.adapters)]
    return "asyncllm-" + hashlib.sha256("\n".join(facts).encode()).hexdigest()[:10]


def version_of(package: str) -> str:
    """The installed version, or "none"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


SERVING = web.AppKey("serving", Serving)
# How this request's API words an error; OpenAI's shape where a handler sets nothing.
ERROR_BODY: web.RequestKey[Callable[[AsyncLLMError], dict[str, Any]]] = web.RequestKey("error_body")
REQUEST_ID = web.RequestKey("request_id", str)  # the public id without the prefix of the API
