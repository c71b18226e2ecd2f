"""ztp_deploy: token-pruned Vision Transformers in production.

Prune a Vision Transformer's tokens without training (fixed counts per layer), export it, build engines,
prove that they still do what the eager model does, measure what was gained. Nothing heavy is loaded
before it is used, and serving an engine uses none of what made it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ztp_deploy.backends import Engine as Engine
    from ztp_deploy.backends import ParityWarning as ParityWarning
    from ztp_deploy.backends import build as build
    from ztp_deploy.backends import load_engine as load_engine
    from ztp_deploy.backends.base import Session as Session
    from ztp_deploy.errors import BadRequest as BadRequest
    from ztp_deploy.errors import BuildFailed as BuildFailed
    from ztp_deploy.errors import DamagedFiles as DamagedFiles
    from ztp_deploy.errors import GateFailed as GateFailed
    from ztp_deploy.errors import MissingSoftware as MissingSoftware
    from ztp_deploy.errors import WriteFailed as WriteFailed
    from ztp_deploy.errors import ZtpError as ZtpError
    from ztp_deploy.evidence.images import ImageSet as ImageSet
    from ztp_deploy.evidence.images import load_images as load_images
    from ztp_deploy.evidence.latency import LatencyReport as LatencyReport
    from ztp_deploy.evidence.latency import measure_latency as measure_latency
    from ztp_deploy.evidence.load import LoadReport as LoadReport
    from ztp_deploy.evidence.load import measure_load as measure_load
    from ztp_deploy.evidence.parity import check_parity as check_parity
    from ztp_deploy.evidence.selftest import SelfTest as SelfTest
    from ztp_deploy.evidence.selftest import repeat_selftest as repeat_selftest
    from ztp_deploy.evidence.verdict import ParityReport as ParityReport
    from ztp_deploy.exporters import Artifact as Artifact
    from ztp_deploy.exporters import export as export
    from ztp_deploy.models import RandomWeightsWarning as RandomWeightsWarning
    from ztp_deploy.models import load_model as load_model
    from ztp_deploy.plan import Plan as Plan
    from ztp_deploy.planning import make_plan as make_plan
    from ztp_deploy.pruning.prune import PrunedModel as PrunedModel
    from ztp_deploy.pruning.prune import prune as prune
    from ztp_deploy.pruning.trace import TokenTrace as TokenTrace
    from ztp_deploy.pruning.trace import trace_tokens as trace_tokens
    from ztp_deploy.source import ModelSize as ModelSize
    from ztp_deploy.source import Preprocessing as Preprocessing


def _flat(modules: dict[str, str]) -> dict[str, str]:
    """By name the module that has it."""
    return {name: module for module, names in modules.items() for name in names.split()}


_SERVING = _flat(
    {
        "ztp_deploy.backends": "Engine ParityWarning load_engine",
        "ztp_deploy.backends.base": "Session",
        "ztp_deploy.errors": "BadRequest BuildFailed DamagedFiles GateFailed MissingSoftware WriteFailed ZtpError",
        "ztp_deploy.evidence.latency": "LatencyReport measure_latency",
        "ztp_deploy.evidence.load": "LoadReport measure_load",
        "ztp_deploy.evidence.selftest": "SelfTest repeat_selftest",
        "ztp_deploy.evidence.verdict": "ParityReport",
        "ztp_deploy.exporters": "Artifact",
        "ztp_deploy.plan": "Plan",
        "ztp_deploy.source": "ModelSize Preprocessing",
    }
)
"""What needs nothing of the extra `build`: all that serving takes, and records."""

_HOMES = _SERVING | _flat(
    {
        "ztp_deploy.backends": "build",
        "ztp_deploy.evidence.images": "ImageSet load_images",
        "ztp_deploy.evidence.parity": "check_parity",
        "ztp_deploy.exporters": "export",
        "ztp_deploy.models": "RandomWeightsWarning load_model",
        "ztp_deploy.planning": "make_plan",
        "ztp_deploy.pruning.prune": "PrunedModel prune",
        "ztp_deploy.pruning.trace": "TokenTrace trace_tokens",
    }
)

if not TYPE_CHECKING:  # mypy would hide every name that no literal list has
    __all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _SERVING:
        import_module("ztp_deploy.extras").require(f"ztp.{name}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])
