"""Recipes and profiles: TOML files that say what is particular to a model, and what to a build."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ztp_deploy.defaults import BATCH, ENGINES_ROOT, EXPORT_ROOT, METHOD
from ztp_deploy.errors import BadRequest, first_fault

_PACKAGE = Path(__file__).parent
# A wheel has them within the package, a checkout beside it.
_SHIPPED = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent


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
    """A recipe by path, or by its name in `export/` here or among those that come with the package. Raises BadRequest."""
    return _read(name, EXPORT_ROOT, Recipe, "recipe")


def read_profile(name: str) -> Profile:
    """A profile by path, or by its name in `engines/` here or among those that come with the package. Raises BadRequest."""
    return _read(name, ENGINES_ROOT, Profile, "profile")


def _read(name: str, folder: Path, kind: type[T], noun: str) -> T:
    folders = [folder, _SHIPPED / folder.name]
    paths = [Path(name)] if name.endswith(".toml") else [place / f"{name}.toml" for place in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        there = sorted({found.stem for place in folders for found in place.glob("*.toml")})
        raise BadRequest(
            f"There is no {noun} {paths[0]}.", f"Give a path that ends in .toml, or one of {', '.join(there)}."
        )
    try:
        return kind.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} is not valid TOML: {error}.", "Correct the file.") from error
    except ValidationError as error:
        where, why = first_fault(error, "the file", depth=1)
        raise BadRequest(f"{path} is not valid {noun}: {where}: {why}.", "Correct the file.") from error
