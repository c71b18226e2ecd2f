"""The command line: its commands in the order of `ztp --help`, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from ztp_deploy.cli.bench import bench
from ztp_deploy.cli.build import build
from ztp_deploy.cli.check import check
from ztp_deploy.cli.classify import classify
from ztp_deploy.cli.compare import compare
from ztp_deploy.cli.demo import demo
from ztp_deploy.cli.doctor import doctor
from ztp_deploy.cli.engine import engine
from ztp_deploy.cli.eval import eval_
from ztp_deploy.cli.export import export
from ztp_deploy.cli.gpu_report import gpu_report
from ztp_deploy.cli.inspect import inspect
from ztp_deploy.cli.list import list_
from ztp_deploy.cli.plan import plan
from ztp_deploy.cli.report import report
from ztp_deploy.cli.selftest import selftest
from ztp_deploy.cli.show import show
from ztp_deploy.cli.tune import tune
from ztp_deploy.console import out
from ztp_deploy.entrypoint import run_and_exit

COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "export": export,
    "build": build,
    "check": check,
    "bench": bench,
    "compare": compare,
    "engine": engine,
    "demo": demo,
    "eval": eval_,
    "inspect": inspect,
    "report": report,
    "tune": tune,
    "gpu-report": gpu_report,
    "selftest": selftest,
    "classify": classify,
    "show": show,
    "list": list_,
    "doctor": doctor,
}

app = typer.Typer(
    name="ztp",
    help="Token-pruned Vision Transformers in production: plan, export, build, prove, measure, serve.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        import ztp_deploy

        out.print(f"ztp {ztp_deploy.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Entry point: runs a command, turns every refusal into one sentence and its exit code."""
    run_and_exit(lambda: app(standalone_mode=False))
