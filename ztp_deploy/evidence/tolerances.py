"""What the parity gate allows in each precision, and the recorded run with it."""

from __future__ import annotations

from pydantic import ConfigDict

from ztp_deploy.evidence.schema import EvidencePart


class Tolerance(EvidencePart):
    """Bounds of the gate for one precision.

    `logits`: largest difference in units of the image's logit σ. `gap`: largest relative distance from the cut
    at which a token may be chosen otherwise. `near_ties`: largest share of images with such tokens. `top1`:
    whether the best class must be the same (with rounding this coarse two classes may be as good as equal).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    logits: float
    gap: float
    near_ties: float
    top1: bool


TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(logits=1e-4, gap=1e-5, near_ties=0.05, top1=True),
    "fp16": Tolerance(logits=0.02, gap=0.005, near_ties=1.0, top1=False),
    "bf16": Tolerance(logits=0.15, gap=0.05, near_ties=1.0, top1=False),
    "int8": Tolerance(logits=1.0, gap=0.25, near_ties=1.0, top1=False),
    "fp8": Tolerance(logits=1.0, gap=0.4, near_ties=1.0, top1=False),
}
"""Rounding to 11, 8, about 7 and (fp8, E4M3) 4 bits; the bounds leave room for it to add up over a model's depth.

fp8 rounds a number by up to 1/16 of itself, int8 by up to 1/254 of its tensor's largest: for numbers spread as
weights and tokens are, fp8 is two to three times as coarse. DeiT-S with random weights shows just that over 64
photographs: 0.44 against 0.17 σ in the logits, 0.17 against 0.05 in the gap. int8's bounds have room for outliers
besides, which cost int8 digits and fp8 none; so fp8 gets by with the same for logits, where 1.4 σ is what the wrong
sign of a whole layer costs a small model, and needs a wider gap.
"""
