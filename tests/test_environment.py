"""Probes of the machine."""

from __future__ import annotations

import subprocess
import sys
import time

from ztp_deploy import environment
from ztp_deploy.environment import Gpu


def test_a_snapshot_names_the_machine():
    facts = environment.snapshot()
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert facts["memory_gib"] > 0
    assert facts["packages"]["torch"] == environment.installed("torch")
    assert environment.installed("no-such-package") is None


def test_gpus_have_names_fit_for_folders():
    assert Gpu("NVIDIA H200", "9.0", 139.8).slug == "nvidia-h200-sm90"
    assert Gpu("NVIDIA GeForce RTX 4090 (Laptop)", "8.9", 16).slug == "nvidia-geforce-rtx-4090-laptop-sm89"


def test_the_gpu_line_says_when_there_is_none(monkeypatch):
    monkeypatch.setattr(environment, "gpus", lambda: ())
    assert environment.gpu_line() == "GPU: none found"  # whether anything ran is said elsewhere
    monkeypatch.setattr(environment, "gpus", lambda: (Gpu("NVIDIA H200", "9.0", 139.8),))
    assert environment.gpu_line() == "GPU: NVIDIA H200"


def test_other_work_is_noticed():
    spin = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(environment.usable_cores())]
    try:
        time.sleep(0.3)
        assert environment.busy_share(0.3) > 0.5
    finally:
        for process in spin:
            process.kill()
            process.wait()


def test_instructions_held_back_are_in_the_name(monkeypatch):
    """Figures made so are not those of the processor, and lie in files of their own."""
    monkeypatch.setattr(environment, "_cpu_flags", lambda: {"avx512f", "avx512_bf16", "amx_tile", "amx_bf16"})
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    names, features = {}, {}
    for limit in ("", "DEFAULT", "AVX512_CORE_AMX", "avx512_core_bf16", "AVX2"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        environment.cpu_name.cache_clear()
        names[limit], features[limit] = environment.cpu_name(), environment.cpu_features()
    environment.cpu_name.cache_clear()
    assert names["DEFAULT"] == names[""]
    assert names["AVX512_CORE_AMX"] == f"{names['']}, oneDNN held to AVX512_CORE_AMX"
    assert names["avx512_core_bf16"] == f"{names['']}, oneDNN held to AVX512_CORE_BF16"
    assert features[""] == features["DEFAULT"] == features["AVX512_CORE_AMX"]
    assert features[""] == ["avx512f", "avx512_bf16", "amx_tile", "amx_bf16"]
    assert features["avx512_core_bf16"] == ["avx512f", "avx512_bf16"]
    assert features["AVX2"] == []
