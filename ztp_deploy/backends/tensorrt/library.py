"""Loading the library, and its one logger: TensorRT keeps the first logger of a process for good."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ztp_deploy.backends.base import loading
from ztp_deploy.errors import BadRequest, MissingSoftware


@dataclass(frozen=True)
class Library:
    """`module` is what Python imports, `package` what pip installs.

    A `portable` library builds without a GPU, for all that it supports, and keeps no timings.
    """

    module: str
    package: str
    title: str
    portable: bool

    def found(self) -> str | None:
        """The module that holds the interface, None where the library is not installed."""
        # The package proper only passes on the names of its bindings, and these can stand alone.
        return next((name for name in (self.module, f"{self.module}_bindings") if find_spec(name)), None)

    def load(self) -> Any:
        """The imported module. Raises MissingSoftware with the reason."""
        name = self.found()
        if name is None:
            raise MissingSoftware(f"{self.title} is not installed.", f"pip install {self.package}")
        with loading(self.title, self.package):
            if find_spec(f"{self.module}_libs"):
                import_module(f"{self.module}_libs")
            return import_module(name)


STANDARD = Library("tensorrt", "tensorrt", "TensorRT", portable=False)
RTX = Library("tensorrt_rtx", "tensorrt-rtx", "TensorRT-RTX", portable=True)

Listener = Callable[[str, str], None]
"""Takes a message's severity (`verbose`, `info`, `warning`, `error`, `internal_error`) and its text."""


_PREFIX = re.compile(r"^(?:\[?[\w./]+::?[\w:]+\]?:? )?(?:Error Code \d+: )?")
_PLACE = re.compile(r"\s*In \w+ at \S+\.cpp:\d+|\s*\(In \w+ at [^)]*\)?")
_OWN = threading.local()


@cache
def logger(trt: Any) -> Any:
    """The process's logger for this library.

    What it hears of a thread that overhears itself stays there; all else goes to the one listener, or nowhere.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.listener: Listener | None = None

        def log(self, severity: Any, message: str) -> None:
            own, kind = getattr(_OWN, "errors", None), severity.name.lower()
            if own is None:
                if self.listener is not None:
                    self.listener(kind, message)
            elif "error" in kind:
                own.append(message)

    return Logger()


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def forwarding_log(trt: Any, listener: Listener) -> Iterator[Any]:
    """The logger, with its messages going to `listener`; other threads' builds wait."""
    log = logger(trt)
    with _ONE_AT_A_TIME:
        previous, log.listener = log.listener, listener
        try:
            yield log
        finally:
            log.listener = previous


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """The errors that this thread's calls bring meanwhile; another thread's build hears nothing of them."""
    previous, _OWN.errors = getattr(_OWN, "errors", None), []
    try:
        yield _OWN.errors
    finally:
        _OWN.errors = previous


def started(make: Any, log: Any, library: Library, errors: list[str]) -> Any:
    """A builder or a runtime. Raises MissingSoftware with the reason, as where the driver is too old."""
    try:
        return make(log)
    except (TypeError, RuntimeError) as error:  # the bindings' way of saying that none was created
        reason = sentence(errors[0]) if errors else str(error)
        raise MissingSoftware(f"{library.title} cannot start: {reason}.", "See `ztp doctor`.") from error


def sentence(message: str) -> str:
    """The message without source locations of the library's own code."""
    return _PLACE.sub("", _PREFIX.sub("", message)).strip(" .\n") or message.strip()


def member(enumeration: Any, name: str, what: str) -> Any:
    """A flag looked up by name, since values moved between releases. Raises BadRequest where this release lacks it."""
    found = getattr(enumeration, name, None)
    if found is None:
        raise BadRequest(
            f"{what} needs {enumeration.__name__}.{name}, which this release of the library does not have.",
            "Leave the setting out, or install another release.",
        )
    return found
