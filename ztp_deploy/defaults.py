"""What is taken where nobody asked for anything else; light enough for `ztp --help`."""

from __future__ import annotations

from pathlib import Path

EXPORT_ROOT = Path("export")
ENGINES_ROOT = Path("engines")
PICTURES_ROOT = Path("pictures")
METHOD = "zero_tprune"
BATCH = "1:8:64"
ENGINE_SECONDS = 12.0
"""Of measuring a batch size where the figures accompany a build, …"""
BENCH_SECONDS = 60.0
"""… and where they are what was asked for."""
CHECK_IMAGES = 64
EAGER_BATCH = 32
"""Images a run of an evaluation in eager PyTorch."""
MAX_DECODERS = 8
"""Threads that decode its images, at most."""
DEMO_CANVASES = 1194
"""Two of each scan for tests."""

TUNE_TRIALS = 60
TUNE_IMAGES = 256
TUNE_SECONDS = 10.0
"""Of one measurement, where the budget is a latency."""

GPU_MODELS = ("deit_s", "deit_b")
GPU_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
GPU_BATCHES = (1, 8, 64, 256)
GPU_MINUTES = 9.0
GPU_SECONDS = 4.0
"""Of measuring a cell."""
GPU_WORKERS = 6
"""Processes that build engines side by side, at most."""
