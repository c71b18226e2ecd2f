"""The bases of every evidence file: named schema, JSON keys as documented, every number readable again."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

SUMMARY_FILE, HTML_FILE = "report.json", "report.html"
"""Where an engine's `report.summary.Summary` lies, and its page; named here, so that they are found without what makes them."""


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


E = TypeVar("E", bound=EvidenceFile)


def stored(path: Path, kind: type[E]) -> E | None:
    """An evidence file; None where there is none that can be read."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
