"""TensorRT's Python bindings without TensorRT: for tests only.

`load(folder, major)` imports the real bindings of release 10 or 11 from `folder`, with `forward.c` in the place of the
libraries they want. Release 11 then parses and builds through TensorRT-RTX; release 10 can be looked at, no more.
Both register their classes once a process, so each is loaded in a process of its own.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from types import ModuleType

SOURCE = Path(__file__).with_name("forward.c")
LIBRARIES = ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin")


def bindings_folder(major: int) -> Path:
    """Where `make setup` puts the bindings of that release."""
    return Path(sys.prefix) / f"tensorrt-{major}"


def load(folder: Path, major: int) -> ModuleType:
    """The bindings as the module `tensorrt`."""
    import_module("tensorrt_rtx_libs")
    with tempfile.TemporaryDirectory() as built:
        for name in LIBRARIES:
            soname = f"{name}.so.{major}"
            command = ["cc", "-shared", "-fPIC", "-Wall", "-Werror", f"-Wl,-soname,{soname}", str(SOURCE), "-ldl"]
            subprocess.run([*command, "-o", f"{built}/{soname}"], check=True)
            # Whoever asks for this name later gets what is loaded already, wherever it lay.
            ctypes.CDLL(f"{built}/{soname}")
    sys.path.insert(0, str(folder))
    module = import_module("tensorrt_bindings")
    sys.modules["tensorrt"] = module
    return module
