"""Exact numbers to meet: arrays produced by official implementations and by an independent float64 oracle.

`manifest.json` says, per case, what was run with which arguments; `weights.py` regenerates weights and inputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.golden import weights

FOLDER = Path(__file__).parent
CASES: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text())["cases"]


def arrays(name: str) -> dict[str, np.ndarray]:
    """The stored arrays of a case."""
    with np.load(FOLDER / CASES[name]["file"]) as stored:
        return {key: stored[key] for key in stored.files}


def state_dict(name: str) -> dict[str, torch.Tensor]:
    """The case's weights under their official keys."""
    case = CASES[name]
    filled = weights.fill({key: tuple(shape) for key, shape in case["state_dict"].items()}, case["seed"])
    if "post_scale" in case:
        filled = weights.post_scale(filled, case["post_scale"])
    return {key: torch.from_numpy(np.array(value)) for key, value in filled.items()}


def images(name: str) -> torch.Tensor:
    """The case's input [B, 3, H, W]."""
    case = CASES[name]
    return torch.from_numpy(weights.make_input(tuple(case["input_shape"]), case["input_seed"]))


def assert_matches(name: str, array: str, found: torch.Tensor | np.ndarray) -> None:
    """`found` is the stored array of the case, within the case's own tolerance (integers exactly)."""
    expected = arrays(name)[array]
    found = np.asarray(found)
    if np.issubdtype(expected.dtype, np.integer):
        np.testing.assert_array_equal(found, expected)
        return
    bounds = CASES[name]["tolerance"][array]
    np.testing.assert_allclose(found, expected, atol=bounds["atol"], rtol=bounds["rtol"])
