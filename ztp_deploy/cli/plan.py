"""`ztp plan`: token counts of every stage, nothing built."""

from __future__ import annotations

import json
from functools import partial

import typer
from rich.table import Column

from ztp_deploy.cli import options
from ztp_deploy.console import out, print_json, titled_table


def plan(
    context: typer.Context,
    model: options.ModelOrRecipe = None,
    method: options.Method = None,
    ratio: options.Ratio = None,
    flops: options.FlopShare = None,
    keep: options.Keep = None,
    sites: options.Sites = None,
    option: options.Option = None,
    img_size: options.ImageSize = None,
    recipe: options.Recipe = None,
    as_json: options.AsJson = False,
) -> None:
    """Fix the token count of every stage, and count multiply-accumulates. Nothing is built."""
    from ztp_deploy.evidence.report.markdown import macs_line

    wanted = options.asked_plan(context)
    made = wanted.plan(wanted.model)
    if as_json:
        print_json(json.loads(made.to_json()))
        return
    right = partial(Column, justify="right")
    numbers = right("stage"), right("block"), "acts", right("tokens in"), right("tokens out")
    table = titled_table(f"{made.model} · {made.label}", *numbers, "fixed numbers")
    for index, stage in enumerate(made.stages, start=1):
        static = ", ".join(f"{key} {value}" for key, value in stage.static.items())
        table.add_row(
            str(index),
            str(stage.block),
            stage.place.replace("_", " "),
            str(stage.tokens_in),
            str(stage.tokens_out),
            static,
        )
    out.print(table if made.stages else f"{made.model}: the dense model, {made.patch_tokens} patch tokens throughout.")
    out.print(macs_line(made.flops))
