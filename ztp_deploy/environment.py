"""What this machine is: processors, memory, GPUs, versions. Probes, changes nothing, loads no engine."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ztp_deploy.errors import MissingSoftware

REPORTED_PACKAGES = (
    "ztp_deploy",
    "torch",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt-rtx",
    "tensorrt-rtx-cu13-libs",
    "nvidia-modelopt",
    "polygraphy",
    "numpy",
)

_INSTRUCTIONS = (
    *("sse", "ssse", "avx", "amx", "fma", "f16c", "bmi", "abm", "popcnt", "movbe", "adx", "aes", "vaes"),
    *("pclmul", "vpclmul", "gfni", "sha", "asimd", "sve", "i8mm", "bf16"),
)

_ONEDNN_LEVELS = (
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16"),
    *("AVX512_CORE_FP16", "AVX10_1_512", "AVX512_CORE_AMX"),
)
"""Values of `ONEDNN_MAX_CPU_ISA`, each with all before it; an unknown one is newer than these."""

_FEATURES = {
    "avx2": "AVX2",
    "avx_vnni": "AVX2_VNNI",
    "avx512f": "AVX512_CORE",
    "avx512_vnni": "AVX512_CORE_VNNI",
    "avx512_bf16": "AVX512_CORE_BF16",
    "amx_tile": "AVX512_CORE_AMX",
    "amx_bf16": "AVX512_CORE_AMX",
    "amx_int8": "AVX512_CORE_AMX",
    "asimd": "SSE41",
    "i8mm": "SSE41",
}
"""What oneDNN must be allowed for each; those of other processors it does not hold back."""

_GPU_STATE = (
    *("name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm"),
    *("temperature.gpu", "power.draw", "power.limit", "utilization.gpu"),
)


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as the driver names it."""

    name: str
    compute_capability: str
    memory_gib: float

    @property
    def slug(self) -> str:
        """Name for folders: `nvidia-h200-sm90`."""
        return f"{slug(self.name)}-sm{self.compute_capability.replace('.', '')}"


def slug(text: str) -> str:
    """A text in names of files and folders: `NVIDIA H200` → `nvidia-h200`."""
    words = "".join(c if c.isalnum() else "-" for c in text.lower()).split("-")
    return "-".join(filter(None, words))


@cache
def gpus() -> tuple[Gpu, ...]:
    """CUDA devices, asked of the driver itself; empty without driver or device."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_gpu(cuda, index) for index in range(count.value))


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    name = ctypes.create_string_buffer(256)
    major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    cuda.cuDeviceGetName(name, 256, index)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, index)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, index)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), index)
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}", round(memory.value / 2**30, 1))


@cache
def cpu_name() -> str:
    """The processor's model name, with family and model number where the name alone is vague.

    Where a variable holds oneDNN (OpenVINO, torch) to older instructions, it is in the name: figures are not the same.
    """
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    limit = _instruction_limit()
    return f"{name}, oneDNN held to {limit}" if limit else name


def _instruction_limit() -> str | None:
    """What `ONEDNN_MAX_CPU_ISA` says, None where it does not limit."""
    limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    return limit if limit not in ("", "ALL", "DEFAULT") else None


def cpu_features() -> list[str]:
    """The vector extensions that decide matrix speed, as far as oneDNN may use them."""
    flags = _cpu_flags()
    limit = _instruction_limit() or ""
    allowed = _ONEDNN_LEVELS.index(limit) if limit in _ONEDNN_LEVELS else len(_ONEDNN_LEVELS)
    return [name for name, level in _FEATURES.items() if name in flags and _ONEDNN_LEVELS.index(level) <= allowed]


def instruction_flags() -> set[str]:
    """The instruction sets of this CPU that a compiler may use when it compiles for it; empty where unknown."""
    return {flag for flag in _cpu_flags() if flag.startswith(_INSTRUCTIONS)}


def require_instructions(flags: Iterable[str]) -> None:
    """Raises MissingSoftware where this CPU lacks instruction sets that an engine was compiled for.

    The process would be killed by the first instruction that is not there.
    """
    lacking = set(flags) - instruction_flags()
    if lacking:
        raise MissingSoftware(
            f"This engine was compiled for a CPU with {', '.join(sorted(lacking))}, which this one lacks.",
            "Build it again on this machine.",
        )


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split())


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed(package: str) -> str | None:
    """The version of an installed package, else None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of the packages that matter here, those that are installed."""
    return {name: found for name in REPORTED_PACKAGES if (found := installed(name))}


def busy_share(seconds: float = 0.5) -> float:
    """The share of all processor time that is used while this process sleeps; 0 where the system does not tell."""

    def ticks() -> tuple[int, int]:
        fields = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return sum(fields[:8]), fields[3] + fields[4]

    try:
        total, idle = ticks()
        time.sleep(seconds)
        later_total, later_idle = ticks()
    except (OSError, ValueError, IndexError):
        return 0.0
    spent = max(1, later_total - total)
    return max(0.0, 1 - (later_idle - idle) / spent)


def snapshot() -> dict[str, Any]:
    """The environment as evidence files record it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "cpu_features": cpu_features(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": [asdict(gpu) for gpu in gpus()],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": versions(),
    }


def gpu_line() -> str:
    """One line on the GPU for reports."""
    found = gpus()
    return f"GPU: {', '.join(gpu.name for gpu in found)}" if found else "GPU: none found"


def _first_gpu() -> str:
    """The PCI address of the driver's first GPU, which nvidia-smi takes: unlike the driver it counts hidden ones, too."""
    address = ctypes.create_string_buffer(32)
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "0"
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetPCIBusId(address, len(address), 0) != 0:
        return "0"
    return address.value.decode()


def gpu_state() -> dict[str, str]:
    """Clocks (MHz), temperature (°C) and power (W) of the first GPU now; `absent` says why there is nothing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"absent": "nvidia-smi is not on this machine."}
    command = [tool, f"--query-gpu={','.join(_GPU_STATE)}", "--format=csv,noheader,nounits", f"--id={_first_gpu()}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"absent": f"nvidia-smi did not answer ({type(error).__name__})."}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if len(values) != len(_GPU_STATE):
        return {"absent": "nvidia-smi answered in a form that is not known here."}
    return dict(zip(_GPU_STATE, values, strict=True))
