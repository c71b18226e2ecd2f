"""Reading a back end's settings: defaults filled in, wrong ones named."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from ztp_deploy.errors import BadRequest, first_fault


def parse(schema: type[BaseModel], settings: dict[str, Any], backend: str) -> dict[str, Any]:
    """The settings with defaults. Raises BadRequest that names the first wrong one."""
    try:
        return schema.model_validate(settings).model_dump()
    except ValidationError as error:
        where, why = first_fault(error, "settings", depth=1)
        raise BadRequest(
            f"Back end {backend} does not take {where}={settings.get(where, settings)!r}: {why}.",
            f"Its settings are: {', '.join(schema.model_fields)}.",
        ) from error
