"""Exact numbers to meet: arrays produced by official implementations and by an independent float64 oracle.

`manifest.json` says, per case, what was run with which arguments; `weights.py` regenerates weights and inputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
CASES: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text())["cases"]


def arrays(name: str) -> dict[str, np.ndarray]:
    """The stored arrays of a case."""
    with np.load(FOLDER / CASES[name]["file"]) as stored:
        return {key: stored[key] for key in stored.files}
