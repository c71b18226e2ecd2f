"""`ztp` and `python -m ztp_deploy`: the command line, and an answer to Ctrl-C while it is still being imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from ztp_deploy.errors import INTERRUPTED


def main() -> None:
    """Runs the command line; interrupted before it has begun, it exits with 130 and one sentence."""
    signal.signal(signal.SIGINT, _leave)
    from ztp_deploy.cli.app import main as run

    run()


def _leave(number: int, frame: FrameType | None) -> None:
    sys.stderr.write("Interrupted; nothing was begun.\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
