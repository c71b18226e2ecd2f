"""What the parity gate found, as records, and whether that still proves an engine: read where nothing can be compared."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ztp_deploy.backends import PARITY_FILE, Engine
from ztp_deploy.errors import GateFailed
from ztp_deploy.evidence.schema import EvidenceFile, EvidencePart, stored
from ztp_deploy.evidence.tolerances import TOLERANCES, Tolerance
from ztp_deploy.manifest import manifest_sha256


class Fault(EvidencePart):
    """One reason why an edge does not hold."""

    kind: Literal["selection", "weights", "near_ties"]
    image: str | None
    stage: int | None
    detail: str


class StageAgreement(EvidencePart):
    """How often two runs keep the same tokens at one stage."""

    stage: int
    block: int
    tokens: int
    images_agreeing: int
    token_agreement: float


class NearTie(EvidencePart):
    """A tolerated difference: the image's logits are held against eager PyTorch on the same tokens."""

    image: str
    stage: int
    decision: str
    gap: float
    tokens: list[int]


class Edge(EvidencePart):
    """Reference against candidate over all images; Δlogit in units of each image's logit σ."""

    reference: str
    candidate: str
    tolerance: Tolerance
    images: int
    stages: list[StageAgreement]
    near_ties: list[NearTie]
    compared_logits: int
    top1_equal: int
    worst_logit: float
    faults: list[Fault]

    @property
    def holds(self) -> bool:
        """Whether the edge passes the gate."""
        return not self.faults


class Agreement(EvidencePart):
    """What pruning itself changes, dense against pruned in eager PyTorch: reported, never gated."""

    images: int
    top1_equal: float
    mean_kl: float


class ParityReport(EvidenceFile):
    """The gate's finding for one engine (`evidence/parity.json`)."""

    schema_: Literal["ztp.parity/1"] = Field(default="ztp.parity/1", alias="schema")
    engine: str
    manifest_sha256: str
    images: str
    images_sha256: str
    precision: str
    tolerance: Tolerance
    passed: bool
    edges: list[Edge]
    notes: list[str]
    dense_to_pruned: Agreement | None
    environment: dict[str, Any]

    @property
    def verdict(self) -> str:
        """What reports say of it: within which bounds, and that the exported graph was not there to be compared."""
        if not self.passed:
            return "FAILS"
        bounds = "" if self.precision == "fp32" else f" within the bounds of {self.precision}"
        only = " (eager → engine only: the exported graph was not checked)" if self.notes else ""
        return f"holds{bounds}{only}"

    def require(self) -> ParityReport:
        """Itself where the gate is passed; raises GateFailed with edge, kind and first fault otherwise."""
        for edge in self.edges:
            if edge.faults:
                fault = edge.faults[0]
                raise GateFailed(
                    f"Parity fails between {edge.reference} and {edge.candidate}: {fault.kind} fault, {fault.detail}"
                    f"{f' ({len(edge.faults)} faults in all)' if len(edge.faults) > 1 else ''}.",
                    "Do not ship this engine; build it again, and see evidence/parity.json.",
                )
        return self


def proof_of(engine: Engine) -> ParityReport | None:
    """The report of the gate that this engine has passed as it stands, by the bounds of today; None where there is none."""
    report = stored(engine.evidence / PARITY_FILE, ParityReport)
    if report is None or not report.passed or report.manifest_sha256 != manifest_sha256(engine.directory):
        return None
    return report if report.tolerance == TOLERANCES.get(report.precision) else None
