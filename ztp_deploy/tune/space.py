"""What a search may choose, and how a choice becomes a plan that meets its budget.

A choice is a *shape*: blocks that carry stages, and how strongly each prunes next to the others. One factor common
to all stages is then fitted to the budget, so that no candidate costs more than was asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import nn

from ztp_deploy import methods, models
from ztp_deploy.errors import BadRequest
from ztp_deploy.methods.base import Search
from ztp_deploy.plan import FLOP_SHARE_TOLERANCE, Geometry, Plan, Stage, share_of
from ztp_deploy.planning import make_plan

VERSION = 2
"""Of the space: a study made with another is not gone on with."""
MAX_STAGES = 4
LEAST_STRENGTH = 0.1
Cost = Callable[[Sequence[Stage]], float]
"""What stages cost, in the budget's unit; never less for more tokens."""


@dataclass(frozen=True)
class Shape:
    """A schedule up to its overall strength: the stage at `sites[i]` keeps exp(−λ · strengths[i]) of its tokens."""

    sites: tuple[int, ...]
    strengths: tuple[float, ...]

    def counts(self, tokens: int, factor: float) -> list[int]:
        """Tokens each stage keeps at λ = `factor`, rounded down, at least 1."""
        found = []
        for strength in self.strengths:
            tokens = share_of(math.exp(-factor * strength), tokens)
            found.append(tokens)
        return found


@dataclass(frozen=True)
class Space:
    """The choices for one model and method; `enough` are voting rounds by block, as `rounds.by_block` measures them."""

    model: nn.Module | str
    method: str
    enough: Mapping[int, int]

    @cached_property
    def geometry(self) -> Geometry:
        """The model's."""
        return models.describe(self.model)[1]

    @property
    def search(self) -> Search:
        """What may be chosen of the method."""
        return search_of(self.method)

    @property
    def blocks(self) -> range:
        """Blocks that may carry a stage: those that leave at least one block to fewer tokens."""
        shift = 0 if methods.get(self.method).PLACES[0] == "after_block" else 1
        return range(1 + shift, self.geometry.depth + shift)

    @property
    def most(self) -> int:
        """The largest number of stages."""
        return min(MAX_STAGES, len(self.blocks))

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's view; fixed, so that a multivariate sampler sees every choice in every trial."""
        first, last = self.blocks[0], self.blocks[-1]
        found: dict[str, BaseDistribution] = {"stages": IntDistribution(1, self.most)}
        for index in range(1, self.most + 1):
            found[f"site_{index}"] = IntDistribution(first, last)
            found[f"strength_{index}"] = FloatDistribution(LEAST_STRENGTH, 1.0)
        for name, choice in self.search.choices.items():
            words = choice.words
            found[name] = CategoricalDistribution(words) if words else FloatDistribution(0.0, 1.0, step=0.1)
        return found

    def uniform_params(self) -> dict[str, Any]:
        """The choices nearest to the method's default: default sites, equal strengths."""
        sites = methods.get(self.method).default_sites(self.geometry.depth, None)[: self.most]
        params: dict[str, Any] = {"stages": len(sites)}
        for index in range(1, self.most + 1):
            params[f"site_{index}"] = sites[min(index, len(sites)) - 1]
            params[f"strength_{index}"] = 0.5
        return params | {name: choice.usual for name, choice in self.search.choices.items()}

    def shape(self, params: Mapping[str, Any]) -> Shape:
        """The shape behind parameters; of stages that fall on one block the first counts."""
        chosen: dict[int, float] = {}
        for index in range(1, params["stages"] + 1):
            chosen.setdefault(params[f"site_{index}"], params[f"strength_{index}"])
        sites = tuple(sorted(chosen))
        return Shape(sites, tuple(chosen[site] for site in sites))

    def options(self, params: Mapping[str, Any], sites: Sequence[int]) -> dict[str, Any]:
        """The method's options behind parameters."""
        return self.search.options(params, sites, self.geometry.depth, self.enough)

    def plan(self, params: Mapping[str, Any], cost: Cost, limit: float) -> Plan | None:
        """The plan for parameters, within `limit` and at most 0.5 % below it; None where whole tokens do not allow it."""
        shape = self.shape(params)
        options = self.options(params, shape.sites)
        counts = fit(shape, self.geometry.patch_tokens, self._cost_of(shape.sites, options, cost), limit)
        if counts is None or counts[-1] == self.geometry.patch_tokens:
            return None
        return make_plan(self.model, self.method, keep=counts, sites=shape.sites, options=options)

    def uniform(self, cost: Cost, limit: float, share: float | None) -> Plan:
        """The yardstick: one ratio at the default sites, the largest within the budget.

        With a FLOP `share` it is `make_plan(flops=share)`, unless that goes for a nearest share above. Raises
        BadRequest where no schedule at these sites meets the budget.
        """
        if share is not None:
            nearest = make_plan(self.model, self.method, flops=share)
            if nearest.flops.share <= share:
                return nearest
        plan = self.plan(self.uniform_params(), cost, limit)
        if plan is not None:
            return plan
        sites = methods.get(self.method).default_sites(self.geometry.depth, None)
        least = cost(make_plan(self.model, self.method, keep=[1] * len(sites), sites=sites).stages)
        if least > limit:
            raise BadRequest(
                f"The budget {limit:g} cannot be met: at the default sites {sites} one token a stage still costs {least:.4g}.",
                "Ask for more than that.",
            )
        raise BadRequest(
            f"The budget {limit:g} is in a gap between the plans that whole tokens allow at the default sites {sites}.",
            "Ask for a slightly larger one.",
        )

    def _cost_of(
        self, sites: Sequence[int], options: Mapping[str, Any], cost: Cost
    ) -> Callable[[Sequence[int]], float]:
        rule, chosen, geometry = methods.get(self.method), methods.parse_options(self.method, options), self.geometry
        return lambda counts: cost(rule.schedule(geometry, sites, counts, chosen))


def search_of(method: str) -> Search:
    """What may be chosen of a method. Raises BadRequest for one without sites and counts to choose."""
    found = "it prunes nothing" if method == "dense" else methods.get(method).SEARCH
    if isinstance(found, Search):
        return found
    able = ", ".join(name for name in methods.METHODS if isinstance(methods.get(name).SEARCH, Search))
    raise BadRequest(f"{method} cannot be tuned: {found}.", f"Methods that can: {able}.")


def fit(shape: Shape, tokens: int, cost: Callable[[Sequence[int]], float], limit: float) -> list[int] | None:
    """The counts of a shape that cost most without passing `limit`; None where they stay more than 0.5 % below it.

    `tokens` enter the first stage. The factor is bisected down to neighbouring floats; what rounding then leaves is
    given back a token at a time, to the last stage first, where a token costs least.
    """
    low, high = 0.0, math.log(tokens + 1) / LEAST_STRENGTH
    if cost(shape.counts(tokens, high)) > limit:
        return None
    while (middle := (low + high) / 2) not in (low, high):
        if cost(shape.counts(tokens, middle)) <= limit:
            high = middle
        else:
            low = middle
    counts = shape.counts(tokens, high)
    gave = True
    while gave:
        gave = False
        for index in reversed(range(len(counts))):
            more = [count + (place == index) for place, count in enumerate(counts)]
            if more[index] <= (counts[index - 1] if index else tokens) and cost(more) <= limit:
                counts, gave = more, True
    return counts if cost(counts) >= limit * (1 - FLOP_SHARE_TOLERANCE) else None
