"""Recipes and profiles: TOML files that say what is particular to a model, and what to a build."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ztp_deploy.defaults import BATCH, ENGINES_ROOT, EXPORT_ROOT, METHOD
from ztp_deploy.errors import BadRequest, first_fault


class Recipe(BaseModel):
    """What is particular to a model (`export/<recipe>.toml`): method, amount, sites, options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    method: str = METHOD
    ratio: float | None = None
    flops: float | None = None
    keep: list[int | float] | None = None
    sites: list[int] | None = None
    options: dict[str, Any] = {}


class Profile(BaseModel):
    """What is particular to a build (`engines/<profile>.toml`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str = "auto"
    device: str = "auto"
    precision: str = "fp32"
    batch: str = BATCH
    input: Literal["float32", "uint8"] = "float32"
    settings: dict[str, Any] = {}


T = TypeVar("T", Recipe, Profile)


def read_recipe(name: str) -> Recipe:
    """A recipe by its name in `export/` or by path. Raises BadRequest."""
    return _read(name, EXPORT_ROOT, Recipe, "recipe")


def read_profile(name: str) -> Profile:
    """A profile by its name in `engines/` or by path. Raises BadRequest."""
    return _read(name, ENGINES_ROOT, Profile, "profile")


def _read(name: str, folder: Path, kind: type[T], noun: str) -> T:
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not path.is_file():
        there = ", ".join(sorted(found.stem for found in folder.glob("*.toml"))) or "none"
        raise BadRequest(f"There is no {noun} {path}.", f"In {folder}/ there are: {there}.")
    try:
        return kind.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} is no valid TOML: {error}.", "Correct the file.") from error
    except ValidationError as error:
        where, why = first_fault(error, "the file", depth=1)
        raise BadRequest(f"{path} is no valid {noun}: {where}: {why}.", "Correct the file.") from error
