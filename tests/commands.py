"""The command line in this process, as it is typed."""

from __future__ import annotations

import sys

import pytest

from ztp_deploy.cli import app


def typed(patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """`ztp` with these arguments: exit code, stdout and stderr."""
    patch.setattr(sys, "argv", ["ztp", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        app.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err
