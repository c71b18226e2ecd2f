"""Backbones: families adapted once each, and `load_model`, which gives a model its weights and its source."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from pydantic import ValidationError
from torch import Tensor, nn

from ztp_deploy.errors import BadRequest, MissingSoftware, first_fault, nearest
from ztp_deploy.models import weights as weights_module
from ztp_deploy.models.base import Host
from ztp_deploy.plan import Geometry
from ztp_deploy.preprocessing import adapted
from ztp_deploy.source import ModelSize, Preprocessing, Source, Weights, check_labels

FAMILIES: dict[str, str] = {
    "timm_vit": "ztp_deploy.models.timm_vit",
    "mae": "ztp_deploy.models.mae",
    "swag": "ztp_deploy.models.swag",
    "lvvit": "ztp_deploy.models.lvvit",
    "t2t_vit": "ztp_deploy.models.t2t_vit",
    "timm_eva": "ztp_deploy.models.timm_eva",
}


NAMED_WEIGHTS = ("auto", "pretrained", "random")
"""Weights that are not a file of the user's; they hold a backbone and nothing for a method."""


class RandomWeightsWarning(UserWarning):
    """The model has random weights: its latency is real, its predictions mean nothing."""


class Family(Protocol):
    """The face of a module in `models/` that adapts one family of backbones."""

    SUMMARY: str
    NAMES: dict[str, str]

    def architecture_of(self, name: str) -> str | None:
        """The timm architecture behind a name of this family, else None."""

    def build(self, architecture: str, size: ModelSize, device: str = "cpu") -> nn.Module:
        """The untrained model."""

    def translate(self, model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's state dict, where it has an official layout of this family, in the module's own keys."""

    def adapts(self, model: nn.Module) -> bool:
        """Whether the family's host is the one for this module."""

    def host(self, model: nn.Module) -> Host:
        """The module taken apart; raises BadRequest with the reason where it cannot be."""


def family(name: str) -> Family:
    """The family module registered under that name."""
    return cast(Family, import_module(FAMILIES[name]))


def model_names() -> dict[str, str]:
    """Our model names and the timm architectures behind them, over all families."""
    return {name: architecture for key in FAMILIES for name, architecture in family(key).NAMES.items()}


def examples() -> dict[str, str]:
    """One model name of every family that has names, by family."""
    return {key: next(iter(family(key).NAMES)) for key in FAMILIES if family(key).NAMES}


def host_of(model: nn.Module) -> Host:
    """The host that takes this module apart. Raises BadRequest where no family carries it."""
    return family(_family_of(model)).host(model)


def describe(model_or_name: nn.Module | str, overrides: ModelSize | None = None) -> tuple[str, Geometry]:
    """Name and geometry of a model; a name is built without memory for its weights."""
    if isinstance(model_or_name, str):
        return model_or_name, host_of(_skeleton(model_or_name, overrides)).geometry
    source = getattr(model_or_name, "source", None)
    name = source.name if isinstance(source, Source) else type(model_or_name).__name__
    return name, host_of(model_or_name).geometry


def load_model(
    name_or_module: str | nn.Module,
    weights: str | Path | Mapping[str, Any] = "auto",
    overrides: ModelSize | Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
) -> nn.Module:
    """A model in evaluation mode with a frozen `.source`.

    `name_or_module`: a name of ours, a timm ViT's name, or a timm module of your own (copied; it keeps
    its weights). `weights`: "auto" (pre-trained where they can be had, else random with a
    RandomWeightsWarning), "pretrained" (refuses otherwise), "random" (seeded), the path of a
    checkpoint (with `:state_dict_ema` behind it where it holds several), or a state dict with
    official keys. `overrides` change sizes: a `ModelSize`, or its fields in a dict. `labels`: the names of
    its classes, in their order. `preprocessing`: how a picture becomes its input where that is not as the
    model was first trained, a `Preprocessing`, or its fields that differ in a dict.
    Raises BadRequest (unknown name, weights, labels or preprocessing that do not fit) and MissingSoftware (no
    pre-trained weights).
    """
    if not isinstance(name_or_module, (str, nn.Module)):
        raise BadRequest(
            f"load_model takes a name or a module; got {type(name_or_module).__name__}.", "See `ztp list`."
        )
    if isinstance(name_or_module, nn.Module):
        if overrides is not None or weights != "auto":
            raise BadRequest(
                "A module of your own comes with its weights and sizes.", "Leave weights and overrides out."
            )
        return _own_module(name_or_module, labels, preprocessing)
    key, architecture = _resolve(name_or_module)
    if not isinstance(weights, (str, Path, Mapping)):
        raise BadRequest(
            f"weights={weights!r} are not weights.",
            "Give auto, pretrained, random, the path of a checkpoint, or a state dict.",
        )
    size = _size(overrides)
    model = family(key).build(architecture, size)
    brought = _brought(model, _usual(model, size), labels, preprocessing)  # refused before weights are looked for
    record = _give_weights(model, key, architecture, size, weights)
    model.source = Source(  # type: ignore[assignment]
        name=name_or_module, family=key, architecture=architecture, size=size, weights=record, **brought
    )
    return model


def _usual(model: nn.Module, size: ModelSize) -> dict[str, Any]:
    """What a source says of a model whose user says nothing: its preprocessing and its class names."""
    labels = None if size.num_classes else _labels(model)
    return {"preprocessing": _preprocessing(model), "labels": labels, "own": ()}


def _brought(
    model: nn.Module,
    usual: Mapping[str, Any],
    labels: Sequence[str] | None,
    preprocessing: Preprocessing | Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The same with what the user gave in its place. Raises BadRequest for what does not fit the model."""
    found = dict(usual)
    if labels is not None:
        found["labels"] = check_labels(labels, host_of(model).geometry.num_classes)
    if preprocessing is not None:
        found["preprocessing"] = adapted(usual["preprocessing"], preprocessing)
    changed = {name for name in ("labels", "preprocessing") if found[name] != usual[name]}
    return found | {"own": tuple(sorted(changed | set(usual["own"])))}


def _skeleton(name: str, overrides: ModelSize | None) -> nn.Module:
    """The model of that name without memory for its weights."""
    key, architecture = _resolve(name)
    return family(key).build(architecture, _size(overrides), device="meta")


def _size(overrides: object) -> ModelSize:
    """Raises BadRequest that names the wrong one."""
    if overrides is None or isinstance(overrides, ModelSize):
        return overrides or ModelSize()
    if not isinstance(overrides, Mapping):
        raise BadRequest(f"overrides={overrides!r} are not sizes.", "Give a dict, such as {'num_classes': 5}.")
    try:
        return ModelSize(**overrides)
    except ValidationError as error:
        where, why = first_fault(error, "overrides")
        raise BadRequest(
            f"A model has no size {where}={overrides.get(where)!r}: {why}.",
            f"Its sizes are: {', '.join(ModelSize.model_fields)}.",
        ) from error


def check_request(
    name: str,
    weights: str,
    overrides: ModelSize | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
) -> None:
    """Refuses, before anything is loaded, what `load_model` refuses of these, and a checkpoint that is not there."""
    skeleton = _skeleton(name, overrides)
    _brought(skeleton, _usual(skeleton, _size(overrides)), labels, preprocessing)
    if weights not in NAMED_WEIGHTS:
        weights_module.check_file(weights_module.user_path(weights)[0])


def reload_model(source: Source) -> nn.Module:
    """The model a manifest's source describes, with the very same weights, class names and preprocessing.

    Raises BadRequest where they cannot be had again (a state dict or module given in Python) or differ.
    """
    kind = source.weights.kind
    if kind == "given" or source.architecture is None:
        raise BadRequest(
            f"The weights of {source.name} were handed over in Python and are not on disk.",
            "Check from Python: ztp.check_parity(engine, model, images).",
        )
    model = load_model(source.name, source.weights.origin if kind == "file" else kind, source.size)
    found = source_of(model)
    if found.weights.sha256 != source.weights.sha256:
        raise BadRequest(
            f"The weights of {source.name} ({source.weights.origin}) are not the ones this was built from.",
            "Rebuild, or put the old weights back.",
        )
    kept = {name: getattr(source, name) for name in ("preprocessing", "labels", "own")}
    model.source = found.model_copy(update=kept)  # type: ignore[assignment]
    return model


def source_of(model: nn.Module) -> Source:
    """The model's `.source`; for a timm module without one, a source of kind "given"."""
    source = getattr(model, "source", None)
    if isinstance(source, Source):
        return source
    return Source(
        name=type(model).__name__,
        family=_family_of(model),
        architecture=None,
        weights=_record(model, "given", "in memory"),
        preprocessing=_preprocessing(model),
        labels=_labels(model),
    )


def method_weights_of(model: nn.Module, method: str) -> Mapping[str, Tensor]:
    """What the model's checkpoint carried for a method, by official names; empty where nothing."""
    own: Mapping[str, Mapping[str, Tensor]] = getattr(model, "method_weights", {})
    return own.get(method, {})


def _own_module(
    module: nn.Module, labels: Sequence[str] | None, preprocessing: Preprocessing | Mapping[str, Any] | None
) -> nn.Module:
    host_of(module)
    source = source_of(module)
    usual = {name: getattr(source, name) for name in ("preprocessing", "labels", "own")}
    brought = _brought(module, usual, labels, preprocessing)
    model = copy.deepcopy(module).eval()
    model.source = source.model_copy(update=brought)  # type: ignore[assignment]
    return model


def _family_of(model: nn.Module) -> str:
    for key in FAMILIES:
        if family(key).adapts(model):
            return key
    raise BadRequest(
        f"No family here carries a {type(model).__name__}.", "`ztp list` shows the families; a timm ViT works."
    )


def _resolve(name: str) -> tuple[str, str]:
    for key in reversed(FAMILIES):  # timm_vit takes every timm name that no other family knows
        architecture = family(key).architecture_of(name)
        if architecture:
            return key, architecture
    import timm

    known = [*model_names(), *timm.list_models()]
    raise BadRequest(f"There is no model {name!r}.", f"Did you mean: {nearest(name, known)}? `ztp list` shows all.")


def _give_weights(
    model: nn.Module, key: str, architecture: str, size: ModelSize, weights: str | Path | Mapping[str, Any]
) -> Weights:
    if isinstance(weights, Mapping):
        weights_module.load_given(model, weights, "The state dict", family(key).translate)
        return _record(model, "given", "state dict", _licence_of_others(model))
    if weights in ("auto", "pretrained"):
        try:
            return _pretrained(model, key, architecture, size)
        except MissingSoftware as missing:
            if weights == "pretrained":
                raise
            warnings.warn(
                f"{missing.problem} Random weights are used: latency is real, predictions mean nothing.",
                RandomWeightsWarning,
                stacklevel=3,
            )
            weights = "random"
    if weights == "random":
        weights_module.fill_random(model)
        return _record(model, "random", f"seed {weights_module.RANDOM_SEED}")
    path, container = weights_module.user_path(weights)
    weights_module.load_given(model, weights_module.read_file(path), str(path), family(key).translate, container)
    origin = f"{path.resolve()}:{container}" if container else str(path.resolve())
    return _record(model, "file", origin, _licence_of_others(model))


def _record(
    model: nn.Module, kind: Literal["pretrained", "random", "file", "given"], origin: str, licence: str | None = None
) -> Weights:
    """Where the model's weights came from, with the hash of those it has now."""
    sha256 = weights_module.digest(weights_module.state_of(model))
    return Weights(kind=kind, origin=origin, licence=licence, sha256=sha256)


def _licence_of_others(model: nn.Module) -> str | None:
    """The licence of a checkpoint that was handed over; known where only the authors of the model give any out."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    return None if config.get("hf_hub_id") else config.get("license")


def _pretrained(model: nn.Module, key: str, architecture: str, size: ModelSize) -> Weights:
    if size.given():
        raise MissingSoftware(
            f"There are no pre-trained weights for {architecture} with sizes {json.dumps(size.given())}.",
            "Leave the overrides out, or use weights='random'.",
        )
    config: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    if shipped := config.get("file"):
        if not Path(shipped).is_file():
            raise MissingSoftware(
                f"No trained weights of {architecture} lie in this installation.",
                "Train it (python -m ztp_deploy.reference.train --out FILE) and give their path: --weights FILE.",
            )
        weights_module.load_given(model, weights_module.read_file(Path(shipped)), architecture, family(key).translate)
        return _record(model, "pretrained", "ztp_deploy", config.get("license"))
    repository = config.get("hf_hub_id")
    if not repository and "origin_url" in config:
        raise MissingSoftware(
            f"The {key} weights of {architecture} are on no hub: they come from {config['origin_url']} "
            f"and are licensed {config['license']}.",
            "Download the checkpoint there and give its path: --weights path.",
        )
    if not repository:
        raise MissingSoftware(f"timm knows no pre-trained weights for {architecture}.", "Give a checkpoint file.")
    path = weights_module.find_pretrained(str(repository))
    weights_module.load_given(model, weights_module.read_file(path), str(repository), family(key).translate)
    return _record(model, "pretrained", str(repository), config.get("license"))


def _preprocessing(model: nn.Module) -> Preprocessing:
    import timm.data

    geometry = host_of(model).geometry
    config = timm.data.resolve_data_config({}, model=model)
    config["input_size"] = (3, geometry.image_size, geometry.image_size)
    return Preprocessing(**{key: config[key] for key in Preprocessing.model_fields})


def _labels(model: nn.Module) -> tuple[str, ...] | None:
    import timm.data

    geometry = host_of(model).geometry
    config: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    if names := config.get("label_names"):
        return tuple(names) if len(names) == geometry.num_classes else None
    subset = timm.data.infer_imagenet_subset(model)
    if subset is None:
        return None
    names = tuple(timm.data.ImageNetInfo(subset).label_descriptions())
    return names if len(names) == geometry.num_classes else None
