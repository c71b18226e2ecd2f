"""The base of every evidence file: named schema, JSON keys as documented."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class EvidenceFile(BaseModel):
    """A report that is written to a JSON file; subclasses pin `schema_` (JSON key `schema`)."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    def to_json(self) -> str:
        """Indented JSON with a final newline."""
        return self.model_dump_json(indent=2) + "\n"
