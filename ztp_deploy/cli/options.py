"""What several commands have in common: their options, and the requests that these make."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, overload

import typer

from ztp_deploy.defaults import BATCH, ENGINES_ROOT, EXPORT_ROOT, METHOD
from ztp_deploy.errors import BadRequest

if TYPE_CHECKING:
    from ztp_deploy.workflow.requests import BuildRequest, PlanRequest

T = TypeVar("T", int, float)

# Help stands in panels: what is pruned, how, what is built, and what shows that it is right and fast.
MODEL_PANEL = "Model"
_PANELS = MODEL_PANEL, "Plan", "Engine", "Proof and latency"
_model, _plan, _build, _proof = (partial(typer.Option, rich_help_panel=panel) for panel in _PANELS)

_MODEL = "Model name: deit_s, augreg_vit_b … or a timm ViT (`ztp list`)"
Model = Annotated[str, _model("--model", "-m", metavar="NAME", help=f"{_MODEL}.")]
ModelOrRecipe = Annotated[
    str | None, _model("--model", "-m", metavar="NAME", help=f"{_MODEL}; a --recipe brings its own.")
]
Method = Annotated[
    str | None, _plan(metavar="NAME", help=f"Pruning method (`ztp list`), or dense for none.  \\[default: {METHOD}]")
]
Ratio = Annotated[
    float | None,
    _plan("--ratio", "-r", metavar="SHARE", help="Share that each stage keeps of the tokens that reach it, in (0, 1]."),
]
FlopShare = Annotated[
    float | None, _plan("--flops", metavar="SHARE", help="Share of the dense model's multiply-accumulates.")
]
Keep = Annotated[
    str | None, _plan(metavar="N,N,…", help="Per stage a count or a share, such as 137,95,66 or 0.9,0.8,0.7.")
]
Sites = Annotated[
    str | None, _plan(metavar="N,N,…", help="Blocks that carry the stages, counted from 1, such as 3,6,9.")
]
Option = Annotated[
    list[str] | None,
    _plan("--option", "-o", metavar="NAME=VALUE", help="A method's option as name=value (JSON value); repeatable."),
]
Weights = Annotated[
    str,
    _model(
        metavar="WHICH",
        help="auto (pre-trained, else random), pretrained, random, or a checkpoint's path (path:state_dict_ema of several).",
    ),
]
NumClasses = Annotated[
    int | None,
    _model(min=2, metavar="N", help="Classes that the model tells apart, where your checkpoint has another head."),
]
ImageSize = Annotated[
    int | None,
    _model("--img-size", min=1, metavar="PIXELS", help="Side of the model's images in pixels, where it is another."),
]
Labels = Annotated[
    Path | None,
    _model(metavar="FILE", help="Text file with the names of your classes, one a line, in the order of classes."),
]
Preprocess = Annotated[
    list[str] | None,
    _model(
        metavar="NAME=VALUE",
        help="How your checkpoint's pictures were prepared, where it differs: mean=0.5,0.5,0.5, std=…, crop_pct=1.0, "
        "interpolation=bicubic or crop_mode=squash; repeatable.",
    ),
]
TrainedWeights = Annotated[
    str, _model(metavar="WHICH", help="auto or pretrained (from the hub or its cache), or a checkpoint's path.")
]
SameWeights = Annotated[
    str | None,
    typer.Option("--weights", help="Where the checkpoint of the engine's weights lies now, if it was moved."),
]
Recipe = Annotated[
    str | None, _plan(metavar="NAME", help="A recipe: name in export/ or path of a .toml; options given here win.")
]
Profile = Annotated[
    str | None,
    _build(metavar="NAME", help="A build profile: name in engines/ or path of a .toml; options given here win."),
]
BackendName = Annotated[
    str | None,
    _build("--backend", "-b", metavar="NAME", help="auto, or one of those that `ztp list` shows.  \\[default: auto]"),
]
DeviceName = Annotated[
    str | None, _build(metavar="NAME", help="auto (a GPU where there is one), cpu or cuda.  \\[default: auto]")
]
Precision = Annotated[
    str | None,
    _build(metavar="NAME", help="fp32, fp16, bf16, int8 or fp8, where the back end has it.  \\[default: fp32]"),
]
GraphPrecision = Annotated[
    str | None,
    _build("--precision", metavar="NAME", help="fp32, fp16 or bf16, where the format has it.  \\[default: fp32]"),
]
Batch = Annotated[
    str | None, _build(metavar="RANGE", help=f"Batch range min:opt:max, or one number.  \\[default: {BATCH}]")
]
InputType = Annotated[
    str | None,
    _build(
        "--input",
        metavar="TYPE",
        help="float32 (normalised) or uint8 (pixels; normalisation in the graph).  \\[default: float32]",
    ),
]
ExportRoot = Annotated[Path, _build(metavar="FOLDER", help="Where artifacts go.")]
EnginesRoot = Annotated[Path, _build(metavar="FOLDER", help="Where engines go.")]
EngineDir = Annotated[Path, typer.Option("--engine", "-e", help="An engine folder.")]
Images = Annotated[
    str | None,
    _proof(
        metavar="FOLDER",
        help="Folder of pictures for the proof, and to calibrate int8 and fp8; by default crops of scikit-learn's photographs.",
    ),
]
ProofImages = Annotated[
    str | None,
    _proof(
        "--images",
        metavar="FOLDER",
        help="Folder of pictures for the proof; by default crops of scikit-learn's photographs.",
    ),
]
Batches = Annotated[
    str | None,
    _proof(
        metavar="N,N,…",
        help="Batch sizes to measure; by default 1 and 8 if the engine takes them, else its optimal one.",
    ),
]
Seconds = Annotated[float, _proof(metavar="SECONDS", help="Seconds of measuring a batch size.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


PLAN_OPTIONS = frozenset(
    {"method", "ratio", "flops", "keep", "sites", "option", "weights", "recipe"}
    | {"num_classes", "img_size", "labels", "preprocess"}
)
BUILD_OPTIONS = frozenset({"profile", "backend", "device", "precision", "batch", "input"})
"""Parameters of commands that decide a plan, and those that decide a build: what stands already heeds neither."""


def plan_request(
    *,
    model: str | None,
    method: str | None = None,
    ratio: float | None = None,
    flops: float | None = None,
    keep: str | None = None,
    sites: str | None = None,
    option: list[str] | None = None,
    weights: str = "auto",
    recipe: str | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    labels: Path | None = None,
    preprocess: list[str] | None = None,
) -> PlanRequest:
    """The plan that these options ask for; a recipe fills in what they leave out, the model too.

    Raises BadRequest for options that cannot be read, for no model, and for another model than the recipe's.
    """
    from ztp_deploy.recipes import read_recipe
    from ztp_deploy.source import read_labels
    from ztp_deploy.workflow.requests import PlanRequest

    asked = dict(read_recipe(recipe)) if recipe else {}
    if model and asked.get("model", model) != model:
        raise BadRequest(
            f"The recipe {recipe} is for {asked['model']}, and --model {model} was given.",
            f"Leave --model out to follow the recipe, or --recipe to plan for {model}.",
        )
    amounts = {"ratio": ratio, "flops": flops, "keep": listed("keep", keep, _amount, "137,95,66 or 0.9,0.8,0.7")}
    if any(value is not None for value in amounts.values()):
        asked |= amounts  # one of them replaces whichever the recipe has
    asked["options"] = asked.get("options", {}) | dict(_option(text) for text in option or ())
    given = {"model": model, "method": method, "sites": listed("sites", sites, int, "3,6,9")}
    asked |= {name: value for name, value in given.items() if value is not None}
    if not asked.get("model"):
        raise BadRequest("No model was named.", "Give --model, such as --model deit_s, or a --recipe, which names one.")
    return PlanRequest(
        **asked,
        weights=weights,
        num_classes=num_classes,
        img_size=img_size,
        labels=None if labels is None else read_labels(labels),
        preprocessing=_preprocessing(preprocess or []) or None,
    )


def asked_plan(context: typer.Context) -> PlanRequest:
    """The plan that a command was asked for by those of `PLAN_OPTIONS` it has. Raises what `plan_request` raises."""
    return plan_request(**{name: value for name, value in context.params.items() if name in PLAN_OPTIONS | {"model"}})


def asked_build(
    context: typer.Context, *, export_root: Path = EXPORT_ROOT, engines_root: Path = ENGINES_ROOT
) -> BuildRequest:
    """The build that a command with some of `BUILD_OPTIONS` was asked for; a profile fills in what they leave out.

    What neither says is not in its `model_fields_set`. Raises BadRequest for options that cannot be read.
    """
    from ztp_deploy import backends
    from ztp_deploy.manifest import BatchRange
    from ztp_deploy.recipes import read_profile
    from ztp_deploy.workflow.requests import BuildRequest

    given = {name: context.params.get(name) for name in BUILD_OPTIONS}
    profile = given.pop("profile")
    if given["input"] not in (None, "float32", "uint8"):
        raise BadRequest(f"--input {given['input']} is unknown.", "Use float32 or uint8.")
    asked = read_profile(profile).model_dump(exclude_unset=True) if profile else {}
    asked |= {name: value for name, value in given.items() if value is not None}
    request = BuildRequest(**asked, export_root=export_root, engines_root=engines_root)
    BatchRange.parse(request.batch)
    backends.get(backends.choose(request.backend))
    return request


def command_line() -> str:
    """The command as typed, without the interpreter's and the machine's paths."""
    return shlex.join(["ztp", *sys.argv[1:]])


def engine_or_model(engine: object, model: str | None, recipe: str | None, example: str) -> None:
    """Raises BadRequest unless just one was given: engine folders, or what names a model."""
    if bool(engine) == bool(model or recipe):
        raise BadRequest(
            "Give either an engine folder (--engine) or a model (--model, or a --recipe, which names one).",
            f"For example: {example}.",
        )


def refuse_idle(context: typer.Context, names: Iterable[str], beside: str, fix: str) -> None:
    """Raises BadRequest for the first of these parameters that was typed, since it would change nothing there.

    Names that the command has no parameter of are passed over, so that commands can share one list.
    """
    wanted = set(names)
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in wanted and source is not None and source.name != "DEFAULT":
            option = max(parameter.opts, key=len)
            raise BadRequest(f"{option} makes no sense with {beside}.", fix)


@overload
def listed(name: str, text: str, kind: Callable[[str], T], example: str = ...) -> list[T]: ...


@overload
def listed(name: str, text: str | None, kind: Callable[[str], T], example: str = ...) -> list[T] | None: ...


def listed(name: str, text: str | None, kind: Callable[[str], T], example: str = "1,8") -> list[T] | None:
    """Numbers with commas between them, given for the option `name`; None where it was not given. Raises BadRequest."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        noun = "whole numbers" if kind is int else "numbers"
        raise BadRequest(
            f"--{name} {text!r} is not a list of {noun}.", f"Write them with commas: {example}."
        ) from error


def _amount(text: str) -> int | float:
    """A count or a share."""
    return float(text) if "." in text else int(text)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise BadRequest(f"--option {text!r} has no value.", "Write name=value, such as rounds=8.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _preprocessing(texts: Iterable[str]) -> dict[str, Any]:
    """Fields and values of `Preprocessing`, lists where there are commas; what they may be is the model's to say."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise BadRequest(f"--preprocess {text!r} has no value.", "Write name=value, such as crop_pct=1.0.")
        if name in found:
            raise BadRequest(f"--preprocess gives {name} twice.", "Leave one of them out.")
        found[name] = value.split(",") if "," in value else value
    return found
