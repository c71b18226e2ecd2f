"""What the golden cases hold of a backbone, read from its host block by block."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import golden
from ztp_deploy import models
from ztp_deploy.pruning.tokens import initial_state

OPEN_BLOCKS = (0, 3, 5)
"""The blocks whose attention the golden cases recorded."""


def read(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, tokens after each block, and attention received and key lengths at `OPEN_BLOCKS`, attention open."""
    host = models.host_of(model)
    found: dict[str, list[torch.Tensor]] = {"block_cls": [], "block_mean": [], "attn_colmean": [], "key_norm": []}
    with torch.inference_mode():
        tokens = host.embed(images)
        state = initial_state(images, host.geometry.patch_tokens)
        for number, block in enumerate(host.blocks):
            attention = host.attention(block, tokens, state)
            if number in OPEN_BLOCKS:
                found["attn_colmean"].append(attention.probabilities.mean(2))
                found["key_norm"].append(attention.keys.norm(dim=-1))
            tokens = host.transform(block, host.finish(block, tokens, attention.probabilities @ attention.values))
            found["block_cls"].append(tokens[:, 0])
            found["block_mean"].append(tokens[:, 1:].mean(1))
        logits = host.read_out(tokens, state)
    return {"logits": logits} | {name: torch.stack(values) for name, values in found.items()}


def assert_reads(case: str, model: torch.nn.Module) -> None:
    """The module's own logits, and everything its host shows on the way, are those of the case."""
    images = golden.images(case)
    with torch.inference_mode():
        golden.assert_matches(case, "logits", model(images))
    found = read(model, images)
    for name, expected in golden.arrays(case).items():
        golden.assert_matches(case, name, found[name][..., : expected.shape[-1]])


def change(case: str, model: torch.nn.Module) -> float:
    """How far the module's logits are from the case's, at most."""
    with torch.inference_mode():
        logits = model(golden.images(case)).numpy()
    return float(np.abs(logits - golden.arrays(case)["logits"]).max())


def assert_another_epsilon_is_seen(case: str, model: torch.nn.Module) -> None:
    """With LayerNorms of epsilon 1e-5 the module is off by as much as was recorded, and its readings fail."""
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    recorded = golden.CASES[case]["logit_change_under_mistakes"]["LayerNorm eps 1e-05"]
    assert change(case, model) == pytest.approx(recorded, rel=0.01)
    with pytest.raises(AssertionError):
        assert_reads(case, model)
