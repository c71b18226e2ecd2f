"""What a user may decide about a TensorRT build."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """`audit`: a second plan with the stage scores, for the parity gate.

    `optimization_level`: 0 (quickest build) to 5 (most thorough search). `workspace_mib`: scratch memory that kernels
    may ask for, None for all. `timing_cache`: remember kernel timings per device and version.
    `version_compatible`: the plan runs in later releases of the same major version, one of 10 also in 11.
    `hardware_compatible`: on other GPUs too (`ampere_plus`, `same_compute_capability`).
    `refit`: weights can be replaced; `strip_plan`: they are left out of the plan and put in from `model.onnx` at opening.
    `require_fusion`: an attention that did not fuse is an error, not a note.
    `cuda_graph`: record one CUDA graph per batch size and replay it.
    `calibration`: scales of int8 and fp8 from the largest values seen, or (int8) by least entropy lost.
    `float_precision`: what an int8 or fp8 engine computes in where it does not compute in those.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    audit: bool = True
    optimization_level: int = Field(default=3, ge=0, le=5)
    workspace_mib: int | None = Field(default=None, ge=1)
    timing_cache: bool = True
    version_compatible: bool = False
    hardware_compatible: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    refit: bool = False
    strip_plan: bool = False
    require_fusion: bool = False
    cuda_graph: bool = False
    calibration: Literal["max", "entropy"] = "max"
    float_precision: Literal["fp16", "bf16"] = "fp16"

    @model_validator(mode="after")
    def _one_way_to_refit(self) -> Settings:
        if self.refit and self.strip_plan:
            raise ValueError("a stripped plan is refitted by itself: give refit or strip_plan, not both")
        if self.version_compatible and (self.refit or self.strip_plan):
            raise ValueError("what runs a plan in later releases cannot refit: give version_compatible alone")
        return self
