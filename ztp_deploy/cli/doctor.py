"""`ztp doctor`: this machine."""

from __future__ import annotations

from rich.table import Table

from ztp_deploy.cli import options
from ztp_deploy.console import out, print_json, warn


def doctor(as_json: options.AsJson = False) -> None:
    """Versions, devices, and what would be used on this machine."""
    from ztp_deploy import backends, environment, extras

    machine = environment.snapshot()
    uses = {
        name: particulars if status == "OK" else f"{status}: {particulars}"
        for name in backends.BACKENDS
        for status, particulars in [backends.here(name)]
    }
    lacks = extras.lacking()
    making = f"missing {lacks}: {extras.install()}" if lacks else "OK"
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if environment.installed(name)]
    problems = []
    if len(both) == 2:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: pip uninstall both, install one."
        )
    gpu = ", ".join(one.name for one in environment.gpus()) or "none found"
    busy = environment.busy_share()
    if busy > 0.1:
        problems.append(f"The machine is busy ({busy:.0%} of its processor time): latency figures will be unreliable.")
    facts = {
        "machine": machine,
        "gpu": gpu,
        "would use": uses,
        "making engines": making,
        "auto": backends.choose("auto"),
        "problems": problems,
    }
    if as_json:
        print_json(facts)
        return
    table = Table(show_header=False, box=None)
    table.add_row("processor", f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['cpu_features'])})")
    table.add_row("memory", f"{machine['memory_gib']} GiB")
    table.add_row("gpu", gpu)
    table.add_row("system", f"{machine['system']}, Python {machine['python']}")
    for name, version in machine["packages"].items():
        table.add_row(name, version)
    for name, use in uses.items():
        table.add_row(f"back end {name}", use)
    table.add_row("making engines", making)
    table.add_row("--backend auto takes", backends.choose("auto"))
    out.print(table)
    for problem in problems:
        warn(problem)
    if not problems:
        out.print("No problems found.", style="green")
