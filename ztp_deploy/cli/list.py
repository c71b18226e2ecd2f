"""`ztp list`: what there is."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ztp_deploy.cli import options
from ztp_deploy.console import out, print_json, warn


def list_(as_json: options.AsJson = False) -> None:
    """Models, methods, formats and back ends; what is missing for each and how to get it."""
    from ztp_deploy import extras

    lacks = extras.lacking()
    known: dict[str, list[dict[str, Any]]] = ({} if lacks else _making()) | {"backends": _backends()}
    examples, pairs = ({}, {}) if lacks else _pairs()
    if pairs:
        known["pairs"] = [
            {"method": method, "model": model, "status": "refused" if reason else "OK", "because": reason}
            for method, reasons in pairs.items()
            for model, reason in reasons.items()
        ]
    if lacks:
        warn(f"Models, methods and formats are not listed: {lacks} is not installed here. {extras.install()}")
    if as_json:
        print_json(known)
        return
    for title, rows in known.items():
        if title == "pairs":
            _print_pairs(pairs, examples)
            continue
        if title == "models":
            names = Table(title="models", title_justify="left", title_style="bold", show_header=False, box=None)
            for row in rows:
                names.add_row(row["name"], row["timm"])
            out.print(names)
            out.print("and any timm ViT made of plain blocks, by its timm name.\n")
            continue
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column()
        for row in rows:
            table.add_row(row["name"], str(row.get("status", "")), row["about"])
        out.print(table)
        out.print()


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


def _pairs() -> tuple[dict[str, str], dict[str, dict[str, str | None]]]:
    """One model of every family, and per method and model why it cannot be pruned; None where it can."""
    from ztp_deploy import methods, models

    examples = models.examples()
    return examples, methods.pairs({name: models.describe(name)[1] for name in examples.values()})


def _print_pairs(pairs: dict[str, dict[str, str | None]], examples: dict[str, str]) -> None:
    """Methods against one model of each family: OK, or a number that stands for the reason below."""
    reasons = list(dict.fromkeys(reason for row in pairs.values() for reason in row.values() if reason))
    table = Table(title="which method prunes which family", title_justify="left", title_style="bold", box=None)
    table.add_column("")
    for family in examples:
        table.add_column(family)
    for method, row in pairs.items():
        cells = (f"no ({reasons.index(why) + 1})" if (why := row[model]) else "OK" for model in examples.values())
        table.add_row(method, *cells)
    out.print(table)
    out.print(f"Asked of one model per family: {', '.join(examples.values())}. `ztp plan` asks for any other.")
    for number, reason in enumerate(reasons, start=1):
        out.print(f"({number}) {reason}")
