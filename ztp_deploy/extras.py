"""What is installed: the runtime, which serves engines, or with the extra `build` also what makes and checks them."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from ztp_deploy.errors import MissingSoftware

BUILD_MODULES = (
    *("torch", "torchvision", "timm", "onnx", "onnxscript", "onnx_ir", "polygraphy", "huggingface_hub"),
    *("matplotlib", "jinja2", "sklearn", "scipy", "optuna"),
)
"""What the packages of the extra `build` are imported as; ONNX Runtime, which serves too, is asked for by its back end."""
INSTALL = 'pip install "ztp_deploy[build]"'


def lacking() -> str | None:
    """The first module that is not installed of those that make and check engines; None where all are."""
    return next((module for module in BUILD_MODULES if find_spec(module) is None), None)


@cache  # what raises is asked again
def require(what: str) -> None:
    """Raises MissingSoftware, saying that `what` needs it, where a module of the extra `build` is not installed."""
    module = lacking()
    if module:
        raise _refusal(what, module)


def refusal(error: ImportError) -> MissingSoftware | None:
    """The refusal that stands for a failed import of a module of the extra `build`; None for any other."""
    module = (error.name or "").partition(".")[0]
    return _refusal("That", module) if module in BUILD_MODULES and find_spec(module) is None else None


def _refusal(what: str, module: str) -> MissingSoftware:
    return MissingSoftware(
        f"{what} needs {module}, which is not installed here: serving engines does without it.", INSTALL
    )
