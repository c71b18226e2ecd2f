"""What the tests of tuning share: a small model by name with weights from a file, and pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ztp_deploy as ztp
from ztp_deploy.evidence.images import photograph_crops
from ztp_deploy.tune.run import TuneRequest

NAME = "vit_digits"
"""196 patch tokens, 8 blocks of width 144: the smallest named model."""


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Seeded weights in a file, which nobody calls random."""
    path = tmp_path_factory.mktemp("tuned-weights") / "weights.safetensors"
    save_file(ztp.load_model(NAME, weights="random").state_dict(), path)
    return path


@pytest.fixture(scope="session")
def loaded(weights) -> nn.Module:
    """The model with them."""
    torch.set_num_threads(1)
    return ztp.load_model(NAME, weights=weights)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """A folder of 16 pictures without labels: 8 to search on, 8 held out."""
    root = tmp_path_factory.mktemp("photographs")
    for index, crop in enumerate(photograph_crops(16).values()):
        crop.resize((120, 120)).save(root / f"{index:02}.png")
    return root


@pytest.fixture
def request_(weights, photographs, tmp_path):
    """A request of five trials at 65 % of the multiply-accumulates; keywords change it."""

    def make(**changes) -> TuneRequest:
        settings = {
            "model": NAME,
            "images": photographs,
            "budget": "flops=0.65",
            "weights": str(weights),
            "trials": 5,
            "device": "cpu",
            "directory": tmp_path / "tuned",
        }
        return TuneRequest(**(settings | changes))

    return make
