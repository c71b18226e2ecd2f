"""How commands end: the exit code of what became of them, and one sentence where they are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from ztp_deploy.ending import end
from ztp_deploy.errors import BadRequest, GateFailed, MissingSoftware, first_line


def refuse(error):
    raise error


@pytest.mark.parametrize(
    "command, code, sentence",
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (lambda: refuse(GateFailed("It does not hold.", "Look.")), 1, "error: It does not hold. Look.\n"),
        (lambda: refuse(BadRequest("It is [wrong].", "Ask else.")), 2, "error: It is [wrong]. Ask else.\n"),
        (lambda: refuse(MissingSoftware("It is not here.")), 3, "error: It is not here.\n"),
        (lambda: open("/no/such/file"), 2, "error: /no/such/file: No such file or directory. Check the path.\n"),  # noqa: SIM115
    ],
)
def test_exit_codes_and_sentences(command, code, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        end(command)
    assert ended.value.code == code
    assert capsys.readouterr().err == sentence


def test_a_fault_of_ours_is_no_refusal():
    with pytest.raises(ZeroDivisionError):
        end(lambda: 1 / 0)


def test_the_answer_to_ctrl_c_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        end(lambda: signal.getsignal(signal.SIGINT) is before and refuse(AssertionError("nobody listens")))
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_is_130_even_where_a_library_wraps_it():
    script = """
import os, signal
from ztp_deploy.ending import end

def command():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt as error:
        raise RuntimeError("something went wrong inside") from error

end(command)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env={**os.environ, "NO_COLOR": "1"}
    )
    assert (done.returncode, done.stderr) == (130, "Interrupted; nothing half-written was left.\n")


@pytest.mark.parametrize(
    "message, told", [("", "ValueError"), ("\n \n", "ValueError"), ("\nbroken.\nmore", "broken"), ("so", "so")]
)
def test_foreign_errors_are_told_in_a_line_whatever_they_say(message, told):
    assert first_line(ValueError(message)) == told
