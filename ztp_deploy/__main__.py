"""`ztp` and `python -m ztp_deploy`: the command line, and an answer to Ctrl-C and SIGTERM while it is still being imported."""

from __future__ import annotations

import json
import os
import signal
import sys
from types import FrameType

from ztp_deploy.errors import STOPPED


def main() -> None:
    """Runs the command line; stopped before it has begun, it exits with 130 or 143 and one sentence."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from ztp_deploy.cli.app import main as run

    run()


def _leave(number: int, frame: FrameType | None) -> None:
    code = 128 + number
    sentence = f"{STOPPED[code]}; nothing was begun."
    if "--json" in sys.argv:
        print(json.dumps({"error": {"problem": sentence, "fix": "", "exit_code": code}}), flush=True)
    else:
        print(sentence, file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    main()
