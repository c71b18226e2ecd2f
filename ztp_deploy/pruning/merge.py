"""Joining tokens in the owned op vocabulary: rows gathered in order, one-hot products for what joins what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ztp_deploy.pruning.tokens import TokenState, destinations_of, one_hot, special_ahead


@dataclass(frozen=True)
class Joining:
    """Entering patch slots that stay [B, k], in the order of the output, and that leave [B, r] to join them.

    `target` [B, r] are the output slots that the leaving ones join.
    """

    stay: Tensor
    leave: Tensor
    target: Tensor

    @property
    def order(self) -> Tensor:
        """Entering slots [B, k + r], those that stay first."""
        return torch.cat([self.stay, self.leave], dim=1)

    def destination_slots(self, count: int) -> Tensor:
        """Per entering slot [B, count] int32 the output slot it goes into, -1 where it neither stays nor joins."""
        kept = torch.arange(self.stay.shape[1], device=self.stay.device).expand_as(self.stay)
        return destination_slots(self.order, torch.cat([kept, self.target], dim=1), count)


def destination_slots(slots: Tensor, goes: Tensor, count: int) -> Tensor:
    """Per slot [B, count] int32 where it goes, by a list: `slots` [B, m] go to `goes` [B, m]; -1 for slots not in it."""
    everyone = torch.arange(count, device=slots.device)
    at = (slots.unsqueeze(-1) == everyone).to(torch.float32)  # [B, m, count]
    # Counted from 1, so that the sum over a slot that is not there is 0.
    return ((goes + 1).to(torch.float32).unsqueeze(1) @ at).squeeze(1).to(torch.int32) - 1


def directions(features: Tensor) -> Tensor:
    """Features [B, n, D] in float32, scaled to length 1; zeros stay zeros."""
    features = features.float()
    # A product, not a square: exporters write the latter as Pow, which engines run slowly.
    return features * (features * features).sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()


def join(
    rows: Tensor, target: Tensor, kept: int, special_tokens: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Replaces tokens that stay by the weighted mean of themselves and those that join them.

    rows [B, S + k + r, C]: special tokens, `kept` = k tokens that stay, r that leave for the output slots `target`
    [B, r]; weights [B, k + r] float32 (None: 1 each) → tokens [B, S + k, C] and their sums of weights [B, S + k],
    1 for special tokens.
    """
    joins = one_hot(target + special_tokens, special_tokens + kept)  # [B, S + k, r]
    own: Tensor | float = 1.0
    if weights is not None:
        own = special_ahead(weights[:, :kept], special_tokens, 1.0)
        joins = joins * weights[:, kept:].unsqueeze(1)
    total = joins.sum(2) + own
    joining = (joins / total.unsqueeze(-1)).to(rows.dtype) @ rows[:, special_tokens + kept :]
    staying = (own / total).to(rows.dtype).unsqueeze(-1) * rows[:, : special_tokens + kept]
    return staying + joining, total


def forced_joining(destinations: Tensor, state: TokenState, kept: int, leaving: int, order: Tensor) -> Joining:
    """The joining that a table of destinations asks for (`tokens.destinations_of`); never exported.

    `order` [n] lists the entering slots in the order in which those that stay leave the stage.
    """
    positions = state.positions[:, order]
    goes_by = destinations_of(destinations, state)[:, order]
    kinds = (goes_by != positions).int() + (goes_by < 0).int()  # 0 stays, 1 joins, 2 is dropped
    picked = kinds.sort(dim=1, stable=True).indices
    stay, leave = picked[:, :kept], picked[:, kept : kept + leaving]
    same = goes_by.gather(1, leave).unsqueeze(2) == positions.gather(1, stay).unsqueeze(1)
    return Joining(order[stay], order[leave], same.int().argmax(2))


def partner_margin(similarity: Tensor, leave: Tensor, partners: Tensor, count: int) -> Tensor:
    """Margins [B, n, n] of which of `partners` [B, m] each leaving slot [B, r] joins, n = `count` entering slots.

    By cosines [B, r, m]: the best one's lead over the second, and how far the others are behind it. Pairs that cannot
    be are infinitely far away.
    """
    best = similarity.argmax(2, keepdim=True)
    behind = (similarity.gather(2, best) - similarity).clamp_min(torch.finfo(similarity.dtype).tiny)
    lead = behind.scatter(2, best, torch.inf).amin(2, keepdim=True)
    pairs = (-behind).scatter(2, best, lead)
    margin = similarity.new_full((len(similarity), count, count), -torch.inf)
    images = torch.arange(len(similarity)).reshape(-1, 1, 1)
    margin[images, leave.unsqueeze(2), partners.unsqueeze(1)] = pairs
    return margin
