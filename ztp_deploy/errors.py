"""The one error tree: every refusal says what was asked or found, and what to do next."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

GATE_FAILED = 1
BAD_REQUEST = 2
MISSING = 3
BUILD_FAILED = 4
FAULT = 70
INTERRUPTED = 130
TERMINATED = 143
STOPPED = {INTERRUPTED: "Interrupted", TERMINATED: "Terminated"}


class ZtpError(Exception):
    """A refusal that ends the command.

    `problem` states what was asked and what was found, `fix` what to type or change next; both are
    whole sentences. `exit_code` is what the command line returns: 1 gate failed, 2 bad request,
    3 missing software or device, 4 an engine library could not build.
    """

    exit_code = BAD_REQUEST

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(f"{problem} {fix}".strip())
        self.problem = problem
        self.fix = fix


class BadRequest(ZtpError):
    """What was asked cannot be done: a wrong name, number, shape, file or combination."""


class DamagedFiles(ZtpError):
    """An artifact or engine folder is incomplete or differs from what its manifest records."""


class WriteFailed(ZtpError):
    """The operating system refused a write (full disk, no permission); nothing partial is left."""


class MissingSoftware(ZtpError):
    """A package, a device or a download that the request needs is not there."""

    exit_code = MISSING


class GateFailed(ZtpError):
    """A check ran and what it checks does not hold."""

    exit_code = GATE_FAILED


class BuildFailed(ZtpError):
    """A parser, compiler or quantiser of an engine library could not make the engine; nothing was kept."""

    exit_code = BUILD_FAILED


def nearest(name: str, known: Iterable[str]) -> str:
    """Up to three of the known names that look like `name`, as readable text; the first few if none do."""
    names = list(known)
    return ", ".join(_close(name, names) or names[:6])


def suggestion(name: object, known: Iterable[str]) -> str:
    """What to type instead of a name that is not known: those that look like it, or all."""
    names = list(known)
    close = _close(str(name), names)
    return f"Did you mean: {', '.join(close)}?" if close else f"There are: {', '.join(names)}."


def _close(name: str, names: list[str]) -> list[str]:
    return difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.55)


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's message, without its full stop; the error's type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def first_fault(error: ValidationError, whole: str, depth: int | None = None) -> tuple[str, str]:
    """Where the first thing lies that pydantic refuses, and all that it says of that place.

    A place is a path of names and indices, `stages.0.block`, or `whole` where no single field is at fault. `depth` 1
    takes fields whole: what has several types is refused by each of them, under paths of its own.
    """
    faults = error.errors()
    place = faults[0]["loc"][:depth]
    said = dict.fromkeys(
        fault["msg"].removeprefix("Value error, ") for fault in faults if fault["loc"][:depth] == place
    )
    return ".".join(map(str, place)) or whole, "; or: ".join(said)


def write_failed(what: str, error: OSError) -> WriteFailed:
    """The `WriteFailed` that says why the operating system refused to write `what`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return WriteFailed(
            f"{what} could not be written: the disk (or its quota) is full.",
            "Free some space or choose another folder, then run the same command again; nothing partial was left.",
        )
    return WriteFailed(
        f"{what} could not be written: {error.strerror or error}.",
        "Choose a folder you may write to, then run the same command again; nothing partial was left.",
    )
