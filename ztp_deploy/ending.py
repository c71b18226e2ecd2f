"""How every command of the project ends: with its exit code and, where it is refused, one sentence.

Exit codes: 0 what was asked holds, 1 a gate failed, 2 bad request, 3 missing software or device, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from ztp_deploy.console import err, print_json
from ztp_deploy.errors import INTERRUPTED, BadRequest, ZtpError


class _Interrupts:
    """Remembers that Ctrl-C was pressed, since libraries wrap the exception it raises."""

    pressed = False

    def __call__(self, number: int, frame: object) -> None:
        self.pressed = True
        raise KeyboardInterrupt


def end(command: Callable[[], object]) -> NoReturn:
    """Runs a command and ends the process with its exit code: the int it returns, else 0, or that of its refusal.

    A refusal is printed as one sentence, as JSON where `--json` stands in the command line. What is a fault of ours is
    raised.
    """
    interrupts = _Interrupts()
    previous = signal.signal(signal.SIGINT, interrupts)
    try:
        code = command()
        code = code if isinstance(code, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        pressed = interrupts.pressed or isinstance(error, KeyboardInterrupt)
        code = INTERRUPTED if pressed else _refuse(error)
    finally:
        signal.signal(signal.SIGINT, previous)
    if code == INTERRUPTED:
        err.print("Interrupted; nothing half-written was left.")
        sys.stdout.flush()
        # Python would kill itself with the signal where the interrupt once passed through an exec().
        os._exit(INTERRUPTED)
    sys.exit(code)


def _refuse(error: BaseException) -> int:
    """Prints a refusal and returns its exit code; raises what is none."""
    if isinstance(error, ZtpError):
        problem, fix, code = error.problem, error.fix, error.exit_code
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
        problem, fix, code = f"{message}.", "See `ztp --help`.", BadRequest.exit_code
    else:
        raise error
    if "--json" in sys.argv:
        print_json({"error": {"problem": problem, "fix": fix, "exit_code": code}})
    else:
        err.print("error: ", style="bold red", end="")
        err.print(f"{problem} {fix}".strip(), soft_wrap=True)
    return code
