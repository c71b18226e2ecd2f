"""Reading a back end's settings: defaults filled in, wrong ones named."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from ztp_deploy.errors import BadRequest


def parse(schema: type[BaseModel], settings: dict[str, Any], backend: str) -> dict[str, Any]:
    """The settings with defaults. Raises BadRequest that names the first wrong one."""
    try:
        return schema.model_validate(settings).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadRequest(
            f"Back end {backend} does not take {where}={first.get('input')!r}: {first['msg']}.",
            f"Its settings are: {', '.join(schema.model_fields)}.",
        ) from error
