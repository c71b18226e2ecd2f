"""A process in which only what serves engines can be imported: the base requirements and an engine's library.

Run as a script it is that process: it reads from stdin what it may not import and the code to run.
"""

from __future__ import annotations

import builtins
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

LOAD = """
import warnings
import ztp_deploy as ztp

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        ztp.load_engine(engine).close()
    except ztp.ZtpError as error:
        print(type(error).__name__, error)
for warning in caught:
    print(warning.category.__name__, warning.message)
"""
"""Opens `engine`; prints a refusal and warnings."""


def canonical(requirement: str) -> str:
    """The package that a requirement names, as indexes write it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


BASE = frozenset(map(canonical, PROJECT["dependencies"]))


def closure(packages: Iterable[str]) -> set[str]:
    """Packages that are installed here, with all that they require."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    left = [canonical(package) for package in packages]
    while left:
        package = left.pop()
        try:
            wanted = metadata.requires(package) or []
        except metadata.PackageNotFoundError:
            continue
        if package not in found:
            found.add(package)
            parsed = map(Requirement, wanted)
            left += [canonical(one.name) for one in parsed if not one.marker or one.marker.evaluate({"extra": ""})]
    return found


@cache
def owners() -> dict[str, set[str]]:
    """By module the packages that bring it."""
    return {module: set(map(canonical, names)) for module, names in metadata.packages_distributions().items()}


@dataclass(frozen=True)
class Ended:
    """How the process ended; `imported`: modules of others that this package's own code imported."""

    code: int
    out: str
    err: str
    imported: frozenset[str]


def run(code: str, *libraries: str, **names: object) -> Ended:
    """Runs code, which finds `names` as globals, where besides the base requirements only `libraries` are installed."""
    allowed = closure({*BASE, *libraries})
    forbidden = [module for module, packages in owners().items() if not packages & allowed and module != "ztp_deploy"]
    hidden = sorted(set().union(*owners().values()) - allowed - {"ztp-deploy"})
    read, write = os.pipe()
    told = {"code": code, "names": names, "forbidden": forbidden, "hidden": hidden, "imported": write}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(told, default=str),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        pass_fds=[write],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    os.close(write)
    with open(read, encoding="utf-8") as stream:
        imported = stream.read().split()
    return Ended(done.returncode, done.stdout, done.stderr, frozenset(imported))


class _Without:
    """A finder that finds neither these modules nor these packages."""

    def __init__(self, finder: Any, forbidden: set[str], hidden: set[str]) -> None:
        self._finder, self._forbidden, self._hidden = finder, forbidden, hidden

    def find_spec(self, name: str, *where: Any) -> Any:
        return None if name.partition(".")[0] in self._forbidden else self._finder.find_spec(name, *where)

    def find_distributions(self, context: metadata.DistributionFinder.Context) -> Iterator[metadata.Distribution]:
        if hasattr(self._finder, "find_distributions") and not (
            context.name and canonical(context.name) in self._hidden
        ):
            yield from self._finder.find_distributions(context)


def main() -> None:
    """The process itself."""
    told = json.load(sys.stdin)
    # What Python itself loads when it starts, such as setuptools' own hook, stays.
    forbidden = set(told["forbidden"]) - {name.partition(".")[0] for name in sys.modules}
    sys.meta_path[:] = [_Without(finder, forbidden, set(told["hidden"])) for finder in sys.meta_path]
    sys.path.remove(str(ROOT / "tests"))  # a script's own folder: `tests.golden` is no `golden`
    imported: set[str] = set()
    genuine = builtins.__import__

    def watched(name: str, importer: Any = None, *rest: Any, **named: Any) -> Any:
        module = genuine(name, importer, *rest, **named)
        if importer and str(importer.get("__name__")).partition(".")[0] == "ztp_deploy":
            imported.add(name.partition(".")[0])
        return module

    builtins.__import__ = watched
    try:
        exec(compile(told["code"], "slim", "exec"), told["names"])  # noqa: S102
    finally:
        with open(told["imported"], "w", encoding="utf-8") as stream:
            stream.write(" ".join(imported - {"ztp_deploy"} - sys.stdlib_module_names))


if __name__ == "__main__":
    main()
