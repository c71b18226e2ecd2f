"""Data flows one way: no room imports from a later one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    "errors extras quiet atomic environment recipes defaults source preprocessing"
    " pruning.tokens pruning.merge pruning.assignment reference.canvases reference.model",
    "plan",
    "models",
    "methods",
    "planning pruning manifest",
    "exporters",
    "backends",
    "console",
    "evidence",
    "workflow",
    "gpu_report",
    "show",
    "tune",
    "entrypoint",
    "reference",
    "cli",
    "__main__",
)
"""Rooms as CONTRIBUTING lists them; a file of a room may stand earlier than the room, if it needs that little itself."""
EXCEPTIONS = {
    ("reference.canvases", "entrypoint"): "It is a command, too; the shape of `vit_digits` needs three numbers of it.",
    ("models.weights", "methods"): "Checkpoints carry weights of methods; the registry says which keys these are.",
}


def place(module: str) -> int:
    """The number of a module's room: of the longest entry in `ORDER` that its name begins with."""
    found = {
        entry: number
        for number, room in enumerate(ORDER)
        for entry in room.split()
        if f"{module}.".startswith(f"{entry}.")
    }
    assert found, f"{module} has no place in the order of rooms"
    return found[max(found, key=len)]


def imported(path: Path, package: Path) -> set[str]:
    """The modules that a file imports from the package, inside functions too and by a name in a text."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{name}" for name in names]
        if isinstance(node, ast.Constant) and re.fullmatch(r"ztp_deploy(\.\w+)+(:\w+)?", str(node.value)):
            names = [node.value.partition(":")[0]]  # what is imported by its name, when it is asked for
        for name in names:
            top, *parts = name.split(".")
            if top != package.name:
                continue
            while parts and not (
                (package / Path(*parts)).is_dir() or (package / Path(*parts)).with_suffix(".py").is_file()
            ):
                parts.pop()
            if parts:
                found.add(".".join(parts))
    return found


def backward(package: Path) -> set[tuple[str, str]]:
    """Every import of a later room, as importing and imported module."""
    found = set()
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if module:  # the package's own face names everything, and loads it only when asked
            found |= {(module, other) for other in imported(path, package) if place(other) > place(module)}
    return found


def test_no_room_imports_a_later_one():
    assert backward(ROOT / "ztp_deploy") == set(EXCEPTIONS)


@pytest.mark.parametrize(
    "text, found",
    [
        ("from ztp_deploy.workflow.steps import load\n", {("backends.mine", "workflow.steps")}),
        ("def late():\n    from ztp_deploy.evidence import images\n", {("backends.mine", "evidence.images")}),
        ("import ztp_deploy.cli.app\n", {("backends.mine", "cli.app")}),
        ("LATER = 'ztp_deploy.workflow.steps:load'\n", {("backends.mine", "workflow.steps")}),
        ("from ztp_deploy import plan\nfrom ztp_deploy.errors import BadRequest\nimport json\n", set()),
    ],
)
def test_an_import_of_a_later_room_is_noticed(text, found, tmp_path):
    package = tmp_path / "ztp_deploy"
    for file in ("errors.py", "plan.py", "workflow/steps.py", "cli/app.py", "evidence/images.py", "backends/mine.py"):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(text if "mine" in file else "")
    assert backward(package) == found


def reads_the_command_line(text):
    """Whether code asks how its process was started, which in a notebook says a kernel's path."""
    return any(
        isinstance(node, ast.Attribute) and (node.attr, ast.unparse(node.value)) == ("argv", "sys")
        for node in ast.walk(ast.parse(text))
    )


def test_only_commands_read_the_command_line():
    package = ROOT / "ztp_deploy"
    paths = [path for path in package.rglob("*.py") if reads_the_command_line(path.read_text(encoding="utf-8"))]
    assert {str(path.relative_to(package)) for path in paths} == {"__main__.py", "cli/options.py", "entrypoint.py"}
    assert reads_the_command_line("import sys\ndef line():\n    return ' '.join(sys.argv)\n")
    assert not reads_the_command_line("script = 'sys.argv'\n")


def test_a_module_without_a_place_is_noticed():
    with pytest.raises(AssertionError, match=r"newroom\.file has no place"):
        place("newroom.file")
