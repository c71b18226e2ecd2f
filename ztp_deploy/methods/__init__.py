"""Pruning methods, one file each; a method knows no backbone."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

from pydantic import ValidationError

from ztp_deploy.errors import BadRequest, first_fault, suggestion
from ztp_deploy.methods.base import Method, MethodOptions
from ztp_deploy.plan import Geometry, Plan

METHODS: dict[str, str] = {
    "zero_tprune": "ztp_deploy.methods.zero_tprune",
    "tome": "ztp_deploy.methods.tome",
    "diffrate": "ztp_deploy.methods.diffrate",
    "evit": "ztp_deploy.methods.evit",
    "dynamicvit": "ztp_deploy.methods.dynamicvit",
    "random": "ztp_deploy.methods.random",
    "ats": "ztp_deploy.methods.ats",
    "avit": "ztp_deploy.methods.avit",
    "slice": "ztp_deploy.methods.slice",
}


WEIGHTS: dict[str, str] = {
    "dynamicvit": r"score_predictor\..+",
    "ats": r"blocks\.\d+\.attn\.out_zero_mask",
}
"""Keys in official checkpoints that belong to a method and not to the backbone, as patterns."""


def get(name: str) -> Method:
    """The method of that name. Raises BadRequest with the suggestion names."""
    if not isinstance(name, str) or name not in METHODS:
        raise BadRequest(f"There is no method {name!r}.", suggestion(name, [*METHODS, "dense"]))
    return cast(Method, import_module(METHODS[name]))


def untrained(plan: Plan) -> str | None:
    """Why predictions of a model pruned by this plan mean nothing, although its latency does; None where they do."""
    if not plan.stages:
        return None
    return get(plan.method).untrained(parse_options(plan.method, plan.options))


def pairs(models: Mapping[str, Geometry]) -> dict[str, dict[str, str | None]]:
    """Per method and model name, why the method cannot prune that model with its default options; None where it can."""
    return {
        name: {model: get(name).refuses(geometry, parse_options(name, {})) for model, geometry in models.items()}
        for name in METHODS
    }


def parse_options(name: str, options: Mapping[str, Any]) -> MethodOptions:
    """The method's options with defaults filled in. Raises BadRequest that names the wrong one."""
    schema = get(name).Options
    if not isinstance(options, Mapping):
        raise BadRequest(f"options={options!r} are not options.", "Give a dict, such as {'rounds': 8}.")
    try:
        return schema.model_validate(dict(options))
    except ValidationError as error:
        where, why = first_fault(error, "options", depth=1)
        raise BadRequest(
            f"Method {name} does not take {where}={options.get(where, options)!r}: {why}.",
            f"Its options are: {', '.join(schema.model_fields) or 'none'}.",
        ) from error
