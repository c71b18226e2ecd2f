"""Run in a process of its own: loads one release's bindings and holds our back end's source against them.

`python -m tests.backends.tensorrt.surface <module> <release> <folder>` prints one JSON object.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import ztp_deploy.backends.tensorrt

SOURCES = sorted(Path(ztp_deploy.backends.tensorrt.__file__).parent.glob("*.py"))


def used_names() -> set[str]:
    """Every `trt.A.B` that the package's source mentions, and every `member(trt.A, "B", …)`."""
    found: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found.update(_chain(node))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "member":
                looked_in, name = node.args[:2]
                assert isinstance(name, ast.Constant)
                [chain] = _chain(looked_in)
                found.add(f"{chain}.{name.value}")
    return found


def _chain(node: ast.AST) -> Iterator[str]:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if parts and isinstance(node, ast.Name) and node.id == "trt":
        yield ".".join(reversed(parts))


def lacking(module: ModuleType, names: set[str]) -> list[str]:
    """Those names that the bindings do not have."""

    def has(name: str) -> bool:
        here: object = module
        for part in name.split("."):
            if not hasattr(here, part):
                return False
            here = getattr(here, part)
        return True

    return sorted(name for name in names if not has(name))


def write_stubs(compiled: str, folder: Path) -> None:
    """Type stubs of the compiled bindings as a package `tensorrt`, made of the signatures they carry."""
    from mypy import stubgenc

    target = folder / "tensorrt" / "__init__.pyi"
    stubgenc.generate_stub_for_c_module(compiled, str(target), known_modules=[compiled])
    # Dims and host memory are sequences and buffers to Python, which the signatures do not say.
    text = re.sub(r"(: |-> )Dims\b", r"\1typing.Sequence[int]", target.read_text(encoding="utf-8"))
    text = text.replace("class IHostMemory:", "class IHostMemory(bytes):  # type: ignore")
    lines = text.splitlines()
    while True:  # a few signatures are no Python: an argument without a default after one with
        try:
            ast.parse("\n".join(lines))
            break
        except SyntaxError as error:
            lines.pop((error.lineno or 1) - 1)
    target.write_text("import typing\n" + "\n".join(lines), encoding="utf-8")


def type_errors(folder: Path, sources: list[Path]) -> list[str]:
    """What mypy finds in the sources, `tensorrt` being those stubs and everything else unknown."""
    options = ["--config-file=", "--follow-imports=skip", "--ignore-missing-imports", "--no-error-summary"]
    files = [*map(str, sources), str(folder / "tensorrt" / "__init__.pyi")]
    command = [sys.executable, "-m", "mypy", *options, f"--cache-dir={folder / 'cache'}", *files]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"MYPYPATH": str(folder), "PATH": "/usr/bin:/bin"}, check=False
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if ": error: " in line and "__init__.pyi" not in line]


def main(name: str, release: str, folder: Path) -> None:
    if name == "tensorrt":
        from tests.backends.tensorrt import harness

        major = int(release)
        module = harness.load(harness.bindings_folder(major), major)
        compiled = "tensorrt_bindings.tensorrt"
    else:
        import_module("tensorrt_rtx_libs")
        module = import_module("tensorrt_rtx_bindings")
        compiled = "tensorrt_rtx_bindings.tensorrt_rtx"
    write_stubs(compiled, folder)
    wrong = folder / "wrong.py"
    wrong.write_text(
        "from __future__ import annotations\n"
        "import tensorrt\n"
        "def configure(config: tensorrt.IBuilderConfig, builder: tensorrt.Builder) -> None:\n"
        "    config.set_flags(1)\n"
        "    builder.create_network(1, 2)\n"
        "    config.builder_optimization_level = 'high'\n"
    )
    answer = {
        "version": module.__version__,
        "lacking": lacking(module, used_names()),
        "invented": lacking(module, {"BuilderFlag.FASTER", "IBuilderConfig.set_flag"}),
        "errors": type_errors(folder, SOURCES),
        "mistakes_found": len(type_errors(folder, [wrong])),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
