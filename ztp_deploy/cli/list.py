"""`ztp list`: what there is."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import Any

from rich.table import Column

from ztp_deploy.cli import options
from ztp_deploy.console import out, print_json, titled_table, warn


def list_(as_json: options.AsJson = False) -> None:
    """Models, methods, formats and back ends; what is missing for each and how to get it."""
    from ztp_deploy import extras

    lacks = extras.lacking()
    known = {} if lacks else _making()
    known["backends"] = _backends()
    if lacks:
        warn(f"Models, methods and formats are not listed: {lacks} is not installed here. {extras.install()}")
    else:
        known["pairs"] = _pairs()
    if as_json:
        print_json(known)
        return
    if not lacks:
        _print_models(known["models"])
        for title in ("families", "methods", "formats"):
            _print_rows(title, known[title])
    _print_rows("backends", known["backends"])
    if not lacks:
        _print_pairs(known["pairs"])


def _making() -> dict[str, list[dict[str, Any]]]:
    """What engines are made of."""
    from ztp_deploy import exporters, methods, models

    return {
        "models": [{"name": name, "timm": arch} for name, arch in models.model_names().items()],
        "families": [{"name": name, "about": models.family(name).SUMMARY} for name in models.FAMILIES],
        "methods": [{"name": "dense", "about": "the model as it is"}]
        + [{"name": name, "about": methods.get(name).SUMMARY} for name in methods.METHODS],
        "formats": [
            {"name": name, "about": exporters.get(name).SUMMARY, "precisions": list(exporters.get(name).PRECISIONS)}
            for name in exporters.FORMATS
        ],
    }


def _backends() -> list[dict[str, Any]]:
    """What runs them, and whether it is here."""
    from ztp_deploy import backends

    return [
        {
            "name": name,
            "about": backends.get(name).SUMMARY,
            "built from": backends.get(name).FORMAT,
            "status": status if status != "missing" else f"missing: {particulars}",
        }
        for name in backends.BACKENDS
        for status, particulars in [backends.here(name)]
    ]


def _pairs() -> list[dict[str, Any]]:
    """Every method with one model of each family, and why it cannot be pruned where it cannot."""
    from ztp_deploy import methods, models

    hosts = {name: models.describe(name)[1] for name in models.examples().values()}
    return [
        {"method": method, "model": model, "status": "refused" if reason else "OK", "because": reason}
        for method, reasons in methods.pairs(hosts).items()
        for model, reason in reasons.items()
    ]


def _print_models(rows: list[dict[str, Any]]) -> None:
    table = titled_table("models", show_header=False, box=None)
    for row in rows:
        table.add_row(row["name"], row["timm"])
    out.print(table)
    out.print("and any timm ViT made of plain blocks, by its timm name.\n")


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    whole = Column(no_wrap=True), Column(no_wrap=True)
    table = titled_table(title, *whole, Column(), show_header=False, box=None)
    for row in rows:
        status, _, why = row.get("status", "").partition(": ")
        table.add_row(row["name"], status, f"{row['about']} ({why})" if why else row["about"])
    out.print(table)
    out.print()


def _print_pairs(rows: list[dict[str, Any]]) -> None:
    """Methods against one model of each family: OK, or a number that stands for the reason below."""
    from ztp_deploy import models

    examples = models.examples()
    reasons = list(dict.fromkeys(row["because"] for row in rows if row["because"]))
    table = titled_table("which method prunes which family", "", *examples, box=None)
    for method, pairs in groupby(rows, key=itemgetter("method")):
        why = {row["model"]: row["because"] for row in pairs}
        table.add_row(
            method, *(f"no ({reasons.index(why[name]) + 1})" if why[name] else "OK" for name in examples.values())
        )
    out.print(table)
    out.print(f"Asked of one model per family: {', '.join(examples.values())}. `ztp plan` asks for any other.")
    for number, reason in enumerate(reasons, start=1):
        out.print(f"({number}) {reason}")
