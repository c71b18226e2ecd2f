"""How every command of the project ends: with its exit code and, where it is refused, one sentence.

Exit codes: 0 what was asked holds, 1 a gate failed, 2 bad request, 3 missing software or device, 4 an engine
library could not build, 70 a fault of this program, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM).
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ztp_deploy import extras
from ztp_deploy.console import err, print_json, reader_gone, warn
from ztp_deploy.errors import FAULT, INTERRUPTED, STOPPED, BadRequest, MissingSoftware, ZtpError


class _Interrupts:
    """Remembers that Ctrl-C or SIGTERM came, since libraries wrap the exception that is raised for it."""

    code = 0

    def __call__(self, number: int, frame: object) -> None:
        self.code = 128 + number
        raise KeyboardInterrupt


def run_and_exit(command: Callable[[], object]) -> NoReturn:
    """Runs a command and ends the process with its exit code: the int it returns, else 0, or that of its refusal.

    A refusal is printed as one sentence, as JSON where `--json` stands in the command line; a fault of ours with its
    traceback, which alone Python would end with the code of a failed gate.
    """
    interrupts = _Interrupts()
    previous = {number: signal.signal(number, interrupts) for number in (signal.SIGINT, signal.SIGTERM)}
    show = warnings.showwarning
    warnings.showwarning = partial(_show, show)
    try:
        code = command()
        code = code if isinstance(code, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        code = interrupts.code or (INTERRUPTED if isinstance(error, KeyboardInterrupt) else _refuse(error))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        warnings.showwarning = show
    if code in STOPPED:
        code = interrupts.code or code  # typer makes 130 of either
        sentence = f"{STOPPED[code]}; nothing half-written was left."
        if "--json" in sys.argv:
            _print_refusal(sentence, "", code)
        else:
            err.print(sentence)
        sys.stdout.flush()
        # Python would kill itself with the signal where the interrupt once passed through an exec().
        os._exit(code)
    sys.exit(code)


def _show(others: Callable[..., None], message: Warning | str, kind: type[Warning], file: str, *where: Any) -> None:
    """This project's warnings are notes to the user; `others` shows those of libraries."""
    if issubclass(kind, UserWarning) and Path(file).is_relative_to(Path(__file__).parent):
        warn(str(message))
    else:
        others(message, kind, file, *where)


def _refuse(error: BaseException) -> int:
    """Prints a refusal, or the traceback of what is none, and returns its exit code."""
    if isinstance(error, ImportError):
        error = extras.refusal(error, _typed()) or error
    if isinstance(error, ZtpError):
        problem, fix, code = error.problem, error.fix, error.exit_code
    elif isinstance(error, BrokenPipeError):  # of a bare print
        return reader_gone()
    elif type(error).__name__ == "OutOfMemoryError":  # torch's own
        problem, code = "The GPU's memory is too small for that.", MissingSoftware.exit_code
        fix = "Use smaller batches, or free memory on the GPU (nvidia-smi)."
    elif isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        problem, fix, code = f"{named}{error.strerror or error}.", "Check the path.", BadRequest.exit_code
    elif type(error).__name__ == "Exit":
        return int(getattr(error, "exit_code", 0))
    elif type(error).__name__ == "Abort":
        return INTERRUPTED
    elif hasattr(error, "format_message"):  # how click and typer refuse a command line
        message = str(error.format_message()).rstrip(". ")
        if not message:  # no command: the help was shown
            return BadRequest.exit_code
        problem, fix, code = f"{message}.", f"See `{_path(error)} --help`.", BadRequest.exit_code
    else:
        sys.excepthook(type(error), error, error.__traceback__)
        return FAULT
    if "--json" in sys.argv:
        _print_refusal(problem, fix, code)
    else:
        err.print("error: ", style="bold red", end="")
        err.print(f"{problem} {fix}".strip(), soft_wrap=True)
    return code


def _typed() -> str:
    """The command as it was typed, without its options: `ztp report`."""
    words = itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:2])
    return " ".join([f"`{Path(sys.argv[0]).stem}", *words]) + "`"


def _path(error: BaseException) -> str:
    """The command that click or typer refused, as it is called: `ztp classify`."""
    names: list[str] = []
    context = getattr(error, "ctx", None)
    while context is not None and context.parent is not None:  # the first is named as the program was started
        names.insert(0, str(context.info_name))
        context = context.parent
    return " ".join(["ztp", *names])


def _print_refusal(problem: str, fix: str, code: int) -> None:
    print_json({"error": {"problem": problem, "fix": fix, "exit_code": code}})
