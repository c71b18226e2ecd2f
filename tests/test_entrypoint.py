"""How commands end: the exit code of what became of them, and one sentence where they are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from ztp_deploy.entrypoint import run_and_exit
from ztp_deploy.errors import BadRequest, BuildFailed, GateFailed, MissingSoftware, first_line


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
        (lambda: refuse(BuildFailed("The parser refuses it.")), 4, "error: The parser refuses it.\n"),
        (lambda: open("/no/such/file"), 2, "error: /no/such/file: No such file or directory. Check the path.\n"),  # noqa: SIM115
    ],
)
def test_exit_codes_and_sentences(command, code, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        run_and_exit(command)
    assert ended.value.code == code
    assert capsys.readouterr().err == sentence


def test_a_fault_of_ours_is_no_failed_gate(capsys):
    with pytest.raises(SystemExit) as ended:
        run_and_exit(lambda: 1 / 0)
    assert ended.value.code == 70
    assert capsys.readouterr().err.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_a_gpu_that_is_full_is_a_sentence(capsys):
    with pytest.raises(SystemExit) as ended:
        run_and_exit(lambda: refuse(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")))
    assert ended.value.code == 3
    assert capsys.readouterr().err.startswith("error: The GPU's memory is too small for that. Use smaller batches")


@pytest.mark.parametrize("line", ["out.print('x')", "print('x')", "print_json(['x' * 100_000] * 10)"])
def test_output_that_nobody_reads_is_no_failed_gate(line):
    """As after `| head -1` under pipefail."""
    script = f"""
from ztp_deploy.console import out, print_json
from ztp_deploy.entrypoint import run_and_exit

def command():
    for _ in range(100_000):
        {line}

run_and_exit(command)
"""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", '"$0" -c "$1" | head -1 > /dev/null', sys.executable, script],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["plan -m deit_t -r 0.7 --json", "plan --nothing --json"])
def test_json_that_nobody_reads_is_no_failed_gate(arguments, unbuffered):
    """Through typer, which ends with 1 where a pipe is closed; so little is written only when it is flushed."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "ztp_deploy", *arguments.split()],
        stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_answer_to_a_signal_is_put_back(number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit):
        run_and_exit(lambda: signal.getsignal(number) is before and refuse(AssertionError("nobody listens")))
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    "number, code, sentence",
    [
        (signal.SIGINT, 130, "Interrupted; nothing half-written was left."),
        (signal.SIGTERM, 143, "Terminated; nothing half-written was left."),
    ],
)
def test_a_command_that_is_stopped_says_so_even_where_a_library_wraps_it(number, code, sentence):
    script = f"""
import os, signal
from ztp_deploy.entrypoint import run_and_exit

def command():
    try:
        os.kill(os.getpid(), {int(number)})
    except KeyboardInterrupt as error:
        raise RuntimeError("something went wrong inside") from error

run_and_exit(command)
"""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            capture_output=True, text=True, timeout=60, env={**os.environ, "NO_COLOR": "1"},
        )  # fmt: skip

    done = run()
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"{sentence}\n")
    done = run("--json")
    assert (done.returncode, done.stderr) == (code, "")
    assert json.loads(done.stdout) == {"error": {"problem": sentence, "fix": "", "exit_code": code}}


def test_warnings_of_this_project_are_notes():
    script = """
import warnings
from ztp_deploy import entrypoint

def command():
    warnings.warn_explicit("The engine is [old].", UserWarning, entrypoint.__file__, 1)
    warnings.warn_explicit("a library's", UserWarning, "/elsewhere/library.py", 7)

entrypoint.run_and_exit(command)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "The engine is [old]." in done.stderr
    assert "entrypoint.py:1" not in done.stderr
    assert "/elsewhere/library.py:7: UserWarning: a library's" in done.stderr


@pytest.mark.parametrize(
    "message, told", [("", "ValueError"), ("\n \n", "ValueError"), ("\nbroken.\nmore", "broken"), ("so", "so")]
)
def test_foreign_errors_are_told_in_a_line_whatever_they_say(message, told):
    assert first_line(ValueError(message)) == told
