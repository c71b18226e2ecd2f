"""What is taken where nobody asked for anything else; light enough for `ztp --help`."""

from __future__ import annotations

from pathlib import Path

EXPORT_ROOT = Path("export")
ENGINES_ROOT = Path("engines")
METHOD = "zero_tprune"
BATCH = "1:8:64"
ENGINE_SECONDS = 12.0
"""Of measuring a batch size where the figures accompany a build, …"""
BENCH_SECONDS = 60.0
"""… and where they are what was asked for."""
