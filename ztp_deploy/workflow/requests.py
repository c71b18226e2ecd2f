"""What may be asked of a plan and of a build: a recipe or a profile, and what belongs to one run of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ztp_deploy import backends, models
from ztp_deploy.backends import Target
from ztp_deploy.defaults import ENGINES_ROOT, EXPORT_ROOT
from ztp_deploy.plan import Plan
from ztp_deploy.planning import make_plan
from ztp_deploy.pruning.prune import build_stages
from ztp_deploy.recipes import Profile, Recipe
from ztp_deploy.source import ModelSize


@dataclass(frozen=True)
class ModelRequest:
    """A model by its name, and what is its user's own: weights, sizes, class names, preprocessing.

    None leaves what the named model has; `preprocessing` holds the fields that differ.
    """

    name: str
    weights: str = "auto"
    size: ModelSize | None = None
    labels: tuple[str, ...] | None = None
    preprocessing: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Refuses what cannot be loaded, as far as that can be said before anything is."""
        models.check_request(self.name, self.weights, self.size, self.labels, self.preprocessing)

    def load(self) -> nn.Module:
        """The model. Raises what `models.load_model` raises."""
        return models.load_model(self.name, self.weights, self.size, self.labels, self.preprocessing)


class PlanRequest(Recipe):
    """What is asked of a plan; exactly one of ratio, flops, keep, unless the method is dense."""

    weights: str = "auto"
    num_classes: int | None = None
    img_size: int | None = None
    labels: tuple[str, ...] | None = None
    preprocessing: dict[str, Any] | None = None

    @property
    def size(self) -> ModelSize | None:
        """The sizes that differ from the named model's."""
        size = ModelSize(num_classes=self.num_classes, img_size=self.img_size)
        return size if size.given() else None

    @property
    def backbone(self) -> ModelRequest:
        """The model that the plan is for."""
        return ModelRequest(self.model, self.weights, self.size, self.labels, self.preprocessing)

    def plan(self, model: nn.Module | str) -> Plan:
        """The plan for a model or, without its weights, for its name."""
        return make_plan(
            model,
            self.method,
            ratio=self.ratio,
            flops=self.flops,
            keep=self.keep,
            sites=self.sites,
            options=self.options,
            overrides=self.size if isinstance(model, str) else None,
        )

    def check(self) -> None:
        """Refuses what cannot be done, as far as that can be said before weights are loaded."""
        plan = self.plan(self.model)
        if self.weights in models.NAMED_WEIGHTS:
            build_stages(plan, models.describe(self.model, self.size)[1], weights={})


class BuildRequest(Profile):
    """What is asked of builds, and where artifacts and engines go."""

    export_root: Path = EXPORT_ROOT
    engines_root: Path = ENGINES_ROOT

    def target(self) -> Target:
        """What it means on this machine. Raises BadRequest and MissingSoftware."""
        return backends.resolve(
            self.backend, device=self.device, precision=self.precision, batch=self.batch, settings=self.settings
        )
