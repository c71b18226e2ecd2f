"""The bases of every evidence file: named schema, JSON keys as documented, every number readable again."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class EvidencePart(BaseModel):
    """What an evidence file is made of.

    What is not finite is written as "NaN" or "Infinity" and read back: engines that overflow need their evidence most.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")


class EvidenceFile(EvidencePart):
    """A report that is written to a JSON file; subclasses pin `schema_` (JSON key `schema`)."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    def to_json(self) -> str:
        """Indented JSON with a final newline."""
        return self.model_dump_json(indent=2) + "\n"
