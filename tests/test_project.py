"""The project's face: README, Makefile, lock file, public names."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import ztp_deploy as ztp
from ztp_deploy.evidence.latency import LatencyReport
from ztp_deploy.evidence.load import LoadReport
from ztp_deploy.evidence.methods import MethodsReport
from ztp_deploy.evidence.report.comparison import render_comparison
from ztp_deploy.evidence.report.load import render_load
from ztp_deploy.evidence.report.markdown import render_tables
from ztp_deploy.evidence.report.methods import render_methods
from ztp_deploy.evidence.report.summary import Summary
from ztp_deploy.gpu_report.rows import GpuReport
from ztp_deploy.gpu_report.table import render_gpu_report
from ztp_deploy.models import source_of
from ztp_deploy.recipes import Profile, Recipe, read_profile, read_recipe
from ztp_deploy.reference.study import read_study, render_study

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SUMMARIES = [path for path in (ROOT / "engines" / "evidence").glob("*.json") if ".samples" not in path.name]
METHODS_MEASURED = list((ROOT / "engines" / "evidence").glob("*--methods--*.samples.json"))
GPU_REPORTS = list((ROOT / "engines" / "evidence" / "gpu").glob("*.json"))
GPU_PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
LOADS = [path for kind in ("load", "rate") for path in (ROOT / "engines" / "evidence").glob(f"*--{kind}*.samples.json")]
COMPARISONS = list((ROOT / "engines" / "evidence").glob("*--comparison*.samples.json"))


PAGES = [ROOT / name for name in subprocess.run(
    ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.splitlines()]  # fmt: skip


def fences(text):
    """The fenced blocks of a page in order: (kind, its lines), "" for plain ones. A fence left open is an error."""
    found, kind, lines = [], None, []
    for line in text.splitlines():
        if not line.startswith("```"):
            lines.append(line)
        elif kind is None:
            kind, lines = line[3:].strip(), []
        else:
            assert line.strip() == "```", f"{line} inside a block"
            found.append((kind, lines))
            kind, lines = None, []
    assert kind is None, f"the block of {kind!r} is not closed"
    return found


def documented(command):
    """(page, line) for every line of a page's plain blocks that starts with this command; comments are cut off."""
    return [
        (page.relative_to(ROOT), line.split(" #")[0].strip())
        for page in PAGES
        for kind, lines in fences(page.read_text(encoding="utf-8"))
        for line in lines
        if kind == "" and line.startswith(command)
    ]


def test_fences_are_paired_and_told_apart():
    assert fences("a\n```\nmake b\n```\nmake c\n```python\nd\n```") == [("", ["make b"]), ("python", ["d"])]
    for broken in ("```\na", "```\na\n```python\nb\n```"):
        with pytest.raises(AssertionError, match=r"not closed|inside a block"):
            fences(broken)


def own_types(function):
    """Names of this project's classes in a function's annotations."""
    words = re.findall(r"\w+", " ".join(map(str, function.__annotations__.values())))
    found = {word: getattr(sys.modules[function.__module__], word, None) for word in words}
    return {word for word, one in found.items() if inspect.isclass(one) and one.__module__.startswith("ztp_deploy")}


def test_every_public_name_is_documented_and_annotated():
    for name in ztp.__all__:
        value = getattr(ztp, name)
        assert inspect.getdoc(value), name
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            assert signature.return_annotation is not inspect.Signature.empty, name
            assert all(p.annotation is not p.empty for p in signature.parameters.values()), name
            assert own_types(value) <= set(ztp.__all__), name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ztp.no_such_name


def test_type_checkers_find_every_public_name_where_it_is():
    body = ast.parse(Path(ztp.__file__).read_text(encoding="utf-8")).body
    [block] = [one.body for one in body if isinstance(one, ast.If) and ast.unparse(one.test) == "TYPE_CHECKING"]
    found = {(alias.name, alias.asname, line.module) for line in block for alias in line.names}
    assert found == {(name, name, module) for name, module in ztp._HOMES.items()}


def test_every_error_is_a_public_name_and_of_one_tree():
    from ztp_deploy import errors

    classes = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
    found = {name: value for name, value in classes.items() if issubclass(value, Exception)}
    assert {name: value.exit_code for name, value in found.items()} == {
        "ZtpError": 2, "BadRequest": 2, "DamagedFiles": 2, "WriteFailed": 2, "MissingSoftware": 3, "GateFailed": 1,
        "BuildFailed": 4,
    }  # fmt: skip
    assert all(getattr(ztp, name) is value and issubclass(value, ztp.ZtpError) for name, value in found.items())


def test_the_readmes_python_runs(monkeypatch, tmp_path):
    """The lines of the README, on DeiT-T with random weights instead of a download."""
    from PIL import Image

    [script] = ["\n".join(lines) for kind, lines in fences(README) if kind == "python"]
    monkeypatch.chdir(tmp_path)
    for path in (Path("photo.jpg"), Path("photos/one.jpg"), Path("photos/two.jpg")):
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((300, 200), 80).convert("RGB").save(path)
    script = script.replace('ztp.load_model("deit_s")', 'ztp.load_model("deit_t", weights="random")')
    names: dict[str, object] = {}
    exec(compile(script, "README", "exec"), names)  # noqa: S102
    assert names["logits"].shape == (1, 1000)
    assert [k.shape for k in names["kept"]] == [(1, 137), (1, 95), (1, 66)]


def test_documented_commands_exist():
    from typer.main import get_command

    from ztp_deploy.cli.app import app

    commands = get_command(app).commands
    used = documented(".venv/bin/ztp ")
    assert len(used) >= 10
    for page, line in used:
        command, *words = shlex.split(line.removeprefix(".venv/bin/ztp "))
        assert command in commands, page
        known = {option for parameter in commands[command].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, line


def option_of(variable):
    return variable.lower().replace("_", "-")


def variables_arrive(line):
    """Asserts that make takes a documented line and that every variable's value reaches the command, by its option."""
    target, *variables = shlex.split(line.removeprefix("make "))
    done = make("-n", "-o", ".venv/.ready", target, *variables)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    typed = shlex.split(done.stdout.replace("\\\n", ""), comments=True)
    for name, value in (variable.split("=", 1) for variable in variables):
        assert value in typed, f"{line}: {done.stdout}"
        assert typed[typed.index(value) - 1] == f"--{option_of(name)}", done.stdout


def test_documented_make_lines_reach_the_command_whole():
    lines = documented("make ")
    assert {page.name for page, _ in lines} >= {"README.md", "methods.md", "tensorrt.md"}
    for _, line in lines:
        variables_arrive(line)
    with pytest.raises(AssertionError, match="does not use BATCH"):
        variables_arrive("make export BATCH=8")


def anchors(text):
    """What GitHub calls a page's headings: small letters, hyphens for spaces, no other signs, repeats numbered."""
    slugs, found = [], []
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6} +(.+?)[ #]*$", outside, re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.append(f"{slug}-{slugs.count(slug)}" if slug in slugs else slug)
        slugs.append(slug)
    return found


def dead_links(page):
    """The links of a page that lead to no file, or to no heading of the page that they name."""
    dead = []
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    assert dead_links(ROOT / page) == []


def test_links_that_lead_nowhere_are_noticed(tmp_path):
    (tmp_path / "other.md").write_text("# Int8 and `fp8`, [once](x.md)\n## A ##\n## A\n```\n# no heading\n```\n")
    assert anchors((tmp_path / "other.md").read_text()) == ["int8-and-fp8-once", "a", "a-1"]
    live = "[1](#here) [2](other.md) [3](other.md#int8-and-fp8-once) [4](other.md#a-1) [5](https://x.y/#z)"
    dead = ("#there", "none.md", "none.md#a", "other.md#a-2", "other.md#no-heading", "other.md#A")
    page = tmp_path / "page.md"
    page.write_text("\n".join(["# Here", live, *(f"[x]({target})" for target in dead)]))
    assert dead_links(page) == list(dead)


def test_the_readmes_table_is_the_recorded_one():
    """What stands in the README is the rendering of a committed measurement, letter by letter."""
    shown = README.split("<!-- bench -->")[1].split("<!-- /bench -->")[0].strip()
    recorded = {
        render_tables(Summary.model_validate_json(path.read_text(encoding="utf-8"))).strip() for path in SUMMARIES
    }
    assert shown in recorded


def test_the_readmes_comparison_is_the_recorded_one():
    shown = blocks("comparison", [README])
    assert len(shown) == len(COMPARISONS) > 0
    recorded = {
        render_comparison(LatencyReport.model_validate_json(path.read_text(encoding="utf-8"))).strip()
        for path in COMPARISONS
    }
    assert set(shown) == recorded
    for path in COMPARISONS:
        assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text(encoding="utf-8"))


def blocks(name, texts):
    """What stands between <!-- name --> and <!-- /name --> in these texts."""
    return [part.split(f"<!-- /{name} -->")[0].strip() for text in texts for part in text.split(f"<!-- {name} -->")[1:]]


def test_tables_of_engines_under_load_are_the_recorded_ones():
    """Every recorded one stands on a page, letter by letter, and no other does."""
    shown = blocks("load", (page.read_text(encoding="utf-8") for page in PAGES))
    texts = [path.read_text(encoding="utf-8") for path in LOADS]
    assert sorted(shown) == sorted(render_load(LoadReport.model_validate_json(text)).strip() for text in texts)
    for text in texts:
        assert not re.search(r"/(home|root|work|tmp|Users)/", text)


def test_blocks_are_found():
    pages = [
        "a\n<!-- load -->\n| 1 |\n<!-- /load -->\nb",
        "no block",
        "<!-- load -->\nc\n<!-- /load --><!-- load -->d<!-- /load -->",
    ]
    assert blocks("load", pages) == ["| 1 |", "c", "d"]


def test_the_readmes_methods_are_the_recorded_ones():
    shown = README.split("<!-- methods -->")[1].split("<!-- /methods -->")[0].strip()
    reports = [MethodsReport.model_validate_json(path.read_text(encoding="utf-8")) for path in METHODS_MEASURED]
    assert shown in {render_methods(report).strip() for report in reports}
    for path in METHODS_MEASURED:
        assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text(encoding="utf-8"))


def test_the_page_on_gpus_shows_the_recorded_reports():
    shown = [part.split("<!-- /gpu -->")[0].strip() for part in GPU_PAGE.split("<!-- gpu -->")[1:]]
    assert len(shown) == len(GPU_REPORTS) > 0
    texts = [path.read_text(encoding="utf-8") for path in GPU_REPORTS]
    assert set(shown) == {render_gpu_report(GpuReport.model_validate_json(text)).strip() for text in texts}
    for text in texts:
        assert not re.search(r"/(home|root|work|tmp|Users)/", text)


def test_the_page_on_openvino_shows_the_recorded_figures():
    """Both tables by hand, each cell one recorded ratio: what selection costs, and pruned over dense."""
    recorded = {
        ("held back" if "held-to" in path.name else path.name.partition("--intel")[0]): path for path in SUMMARIES
    }
    pruned = "deit_s--zero_tprune-0.7--openvino"
    one = "deit_s--zero_tprune-flops0.623-24e2c3--openvino-bf16"
    names = {
        ("fp32", "batch 1 to 64"): [f"{pruned}-fp32"] * 2,
        ("bf16, by AMX", "batch 1 to 64"): [f"{pruned}-bf16"] * 2,
        ("bf16, by AMX", "batch 1 to 64, compiled stages"): [f"{pruned}-bf16-s8a5515"] * 2,
        ("bf16, by AMX", "fixed batch"): [f"{pruned}-bf16-b{batch}" for batch in (1, 8)],
        ("bf16, by AMX", "fixed batch, compiled stages"): [f"{pruned}-bf16-b{batch}-s8a5515" for batch in (1, 8)],
        ("bf16, by AMX", "fixed batch, one stage"): [f"{one}-b{batch}" for batch in (1, 8)],
        ("bf16, AMX held back", "batch 1 to 64"): ["held back"] * 2,
    }
    page = (ROOT / "docs" / "openvino.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    costs = {(row[0], row[1]): row[2:] for row in rows if len(row) == 4 and row[0] in {key[0] for key in names}}
    gains = {row[0]: row[1:] for row in rows if len(row) == 3 and row[0] in {key[1] for key in names}}
    assert set(costs) == set(names)
    assert set(gains) == {engine for precision, engine in names if precision == "bf16, by AMX"}
    for (precision, engine), places in names.items():
        for column, (name, batch) in enumerate(zip(places, (1, 8), strict=True)):
            text = recorded[name].with_suffix(".md").read_text(encoding="utf-8")
            [cost] = re.findall(
                rf"Selection costs (.*) of the pruned engine's time at batch {batch} \(interval (.*)\)", text
            )
            assert costs[precision, engine][column] == "{} ({})".format(*cost)
            if precision == "bf16, by AMX":
                [gain, unsure] = re.search(
                    rf"\| {batch} \| pruned .*\*\*(\S+ ×)\*\* \(\S+\)( inconclusive)?", text
                ).groups()
                assert gains[engine][column] == gain + (" (inconclusive)" if unsure else "")


def test_the_studies_on_the_page_of_accuracies_are_the_recorded_ones():
    page = "".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("accuracy", "vit_digits"))
    shown = dict(re.findall(r"<!-- (vit_digits--\S+) -->\n(.*?)<!-- / -->", page, flags=re.DOTALL))
    recorded = {path.stem: path for path in (ROOT / "docs" / "accuracy").glob("*.json")}
    assert shown.keys() == recorded.keys()
    for stem, table in shown.items():
        study = read_study(recorded[stem])
        assert table.strip() == render_study(study).strip(), stem
        assert study.weights_sha256 == source_of(ztp.load_model("vit_digits", weights="pretrained")).weights.sha256, (
            stem
        )
        assert not re.search(r"/(home|root|work|tmp|Users)/", recorded[stem].read_text(encoding="utf-8"))


def test_recorded_evidence_names_machines_not_paths():
    assert SUMMARIES
    for path in SUMMARIES:
        summary = json.loads(path.read_text(encoding="utf-8"))
        assert summary["machine"]["cpu"]
        samples = json.loads(path.with_suffix(".samples.json").read_text(encoding="utf-8"))
        assert samples["command"] == summary["command"]
        for text in (path.read_text(encoding="utf-8"), path.with_suffix(".samples.json").read_text(encoding="utf-8")):
            assert not re.search(r"/(home|root|work|tmp|Users)/", text)


def test_the_lock_is_hashed_names_no_index_and_holds_every_dependency():
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    assert "index" not in lock.lower()
    requirements = re.split(r"\n(?=[a-z])", lock.strip())
    assert all("--hash=sha256:" in requirement for requirement in requirements)
    locked = {re.match(r"[a-z0-9-]+", requirement)[0] for requirement in requirements}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted, unread = set(project["dependencies"]), ["dev"]
    while unread:
        for requirement in extras[unread.pop()]:
            own = re.fullmatch(r"ztp_deploy\[([\w,-]+)\]", requirement)
            unread += own[1].split(",") if own else []
            wanted |= set() if own else {requirement}
    assert wanted >= {*extras["build"], *extras["openvino"], *extras["modelopt"], extras["nncf"][-1]}
    assert {re.match(r"[a-z0-9-]+", w.lower())[0] for w in wanted} <= locked
    # The two ONNX Runtimes would overwrite each other: serving alone brings neither, and their markers exclude one another.
    both = [one for one in wanted if one.startswith("onnxruntime")]
    assert len(both) == 2
    assert not set(both) & set(project["dependencies"])
    gpu = next(r for r in requirements if r.startswith("onnxruntime-gpu=="))
    plain = next(r for r in requirements if r.startswith("onnxruntime=="))
    assert "== 'linux'" in gpu
    assert "!= 'linux'" in plain


@pytest.mark.parametrize("path", sorted((ROOT / "export").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_valid(path):
    assert isinstance(read_recipe(str(path)), Recipe)


@pytest.mark.parametrize("path", sorted((ROOT / "engines").glob("*.toml")), ids=lambda path: path.stem)
def test_profiles_are_valid(path):
    from ztp_deploy import backends

    profile = read_profile(str(path))
    assert isinstance(profile, Profile)
    backends.get(backends.choose(profile.backend)).Settings(**profile.settings)


def test_recipes_and_profiles_are_found_from_everywhere(tmp_path, monkeypatch):
    """One in the current directory comes before one of the same name that comes with the package."""
    monkeypatch.chdir(tmp_path)
    assert read_recipe("deit_s_paper").model == "deit_s"
    assert read_profile("gpu_fp16").precision == "fp16"
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "deit_s_paper.toml").write_text('model = "deit_b"\nratio = 0.5\n')
    (tmp_path / "export" / "mine.toml").write_text('model = "deit_t"\nratio = 0.5\n')
    assert read_recipe("deit_s_paper").model == "deit_b"
    with pytest.raises(
        ztp.BadRequest, match=r"no recipe export/other.toml.*one of deit_s_one_stage, deit_s_paper, mine"
    ):
        read_recipe("other")


def make(*arguments, cwd=ROOT):
    # Run by make itself, the tests must not hand its flags on.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


VARIABLES = (
    *("MODEL", "METHOD", "RATIO", "FLOPS", "KEEP", "SITES", "RECIPE", "WEIGHTS", "PROFILE", "BACKEND", "PRECISION"),
    *("BATCH", "IMAGES", "METHODS", "ENGINE", "DATA", "BUDGET", "TRIALS", "BESIDE", "NUM_CLASSES", "IMG_SIZE"),
    *("LABELS", "CLIENTS", "RATE", "THREADS"),
)


def test_make_prints_its_own_help():
    done = make()
    assert done.returncode == 0
    for target in ("engine", "test", "bench", "clean", "MODEL=deit_s", *(f"{name}=" for name in VARIABLES)):
        assert target in done.stdout


def test_make_leaves_to_profile_and_recipe_what_nobody_asked_for():
    """A default on the command line would win over both."""
    quiet = ("-n", "-o", ".venv/.ready")
    line = make(*quiet, "engine", "PROFILE=cpu_int8", "RECIPE=deit_s_paper").stdout
    assert '--profile "cpu_int8"' in line
    assert '--recipe "deit_s_paper"' in line
    assert not re.search("--(backend|precision|batch|method|ratio)", line)
    line = make(*quiet, "bench", "PROFILE=cpu_int8", "BATCH=8", "BACKEND=openvino", "PRECISION=bf16").stdout
    assert '--backend "openvino" --precision "bf16" --batch "8"' in line


def test_make_passes_variables_on():
    wanted = ("MODEL=deit_b", "KEEP=100,50,20", "METHOD=slice", "IMAGES=my photos", "BATCH=1:4:4")
    done = make("-n", "-o", ".venv/.ready", "engine", *wanted)
    line = done.stdout.strip().splitlines()[-1]
    for words in (
        '--model "deit_b"',
        '--keep "100,50,20"',
        '--method "slice"',
        '--images "my photos"',
        '--batch "1:4:4"',
    ):
        assert words in line
    assert "--ratio" not in line
    assert '--ratio "0.7"' in make("-n", "-o", ".venv/.ready", "engine").stdout
    assert "--ratio" not in make("-n", "-o", ".venv/.ready", "engine", "METHOD=dense").stdout


# What each target hands to `ztp` under another name than the variable's, and what it takes beside an ENGINE.
RENAMED = {("gpu-report", "PRECISION"): "--precisions", ("report", "IMAGES"): "--pictures"}
PLAIN = {("classify", "IMAGES"), ("show", "IMAGES")}
TARGETS = (
    "engine",
    "demo",
    "export",
    "check",
    "bench",
    "compare",
    "eval",
    "tune",
    "gpu-report",
    "classify",
    "show",
    "report",
)


@pytest.mark.parametrize("target", [*TARGETS, "test", "list", "clean"])
def test_make_passes_a_variable_on_or_stops_at_it(target):
    """One variable at a time: its value is in the command, or make says so in one line and runs nothing."""
    passed = set()
    for name in VARIABLES:
        done = make("-n", "-o", ".venv/.ready", target, f"{name}=some")
        if done.returncode == 0:
            words = shlex.split(done.stdout.replace("\\\n", ""))
            option = RENAMED.get((target, name), f"--{option_of(name)}")
            before = words[words.index("some") - 1]
            assert before == (target if (target, name) in PLAIN else option), done.stdout
            passed.add(name)
        else:
            assert done.returncode == 2
            assert done.stdout == ""
            [line] = done.stderr.splitlines()
            assert f"make {target} does not use {name}" in line
    assert bool(passed) == (target in TARGETS)
    assert ("MODEL" in passed) == (
        target in {"engine", "bench", "export", "compare", "eval", "tune", "gpu-report", "show"}
    )


@pytest.mark.parametrize(
    "line, words",
    [
        ("eval ENGINE=e DATA=d RATIO=0.5", "make eval does not use RATIO beside ENGINE"),
        ("tune IMAGES=i BUDGET=flops=0.6 PRECISION=fp16", "make tune does not use PRECISION"),
        ("engine RATO=0.5", "make engine does not use RATO"),
    ],
)
def test_make_stops_at_what_makes_no_sense_together(line, words):
    done = make("-n", "-o", ".venv/.ready", *line.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_make_heeds_the_environment(monkeypatch):
    monkeypatch.setenv("DATA", "d")
    assert "does not use DATA" in make("-n", "-o", ".venv/.ready", "engine").stderr
    assert make("-n", "-o", ".venv/.ready", "lint").returncode == 0  # it was not meant for what takes no variables


def test_make_takes_the_model_from_a_recipe():
    quiet = ("-n", "-o", ".venv/.ready", "engine")
    assert "--model" not in make(*quiet, "RECIPE=mine").stdout
    assert '--model "deit_b"' in make(*quiet, "RECIPE=mine", "MODEL=deit_b").stdout  # ztp holds one against the other
    assert '--model "deit_s"' in make(*quiet).stdout


@pytest.fixture
def checkout(tmp_path):
    """A copy of what set-up reads, without a .venv."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_an_old_python_is_one_sentence(checkout):
    old = checkout / "oldpython"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make("setup", f"PYTHON={old}", cwd=checkout)
    assert done.returncode != 0
    sentence = done.stderr.splitlines()[0]
    assert "Python 3.11 or newer" in sentence
    assert not (checkout / ".venv").exists()
    assert "Python 3.11 or newer" in make("setup", "PYTHON=", cwd=checkout).stderr


def test_a_missing_venv_module_is_one_sentence(checkout):
    python = checkout / "python"
    python.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = make("setup", f"PYTHON={python}", cwd=checkout)
    assert done.returncode != 0
    assert "apt-get install python3-venv" in done.stderr.splitlines()[0]
    assert not (checkout / ".venv").exists()


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", str(tmp_path), str(ROOT)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("ztp_deploy-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"ztp_deploy/py.typed", "ztp_deploy/cli/app.py", "ztp_deploy/evidence/report/summary.py"} <= set(names)
    assert {"ztp_deploy/evidence/report/report.html.jinja", "ztp_deploy/reference/vit_digits.safetensors"} <= set(names)
    assert {"ztp_deploy/cpp/CMakeLists.txt", "ztp_deploy/cpp/include/ztp/session.h"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ztp_deploy"}
    shipped = {name.removeprefix("ztp_deploy/shipped/") for name in names if name.startswith("ztp_deploy/shipped/")}
    assert shipped == {
        f"{folder}/{path.name}" for folder in ("export", "engines") for path in (ROOT / folder).glob("*.toml")
    }


@pytest.mark.parametrize(
    "engine, ending",
    [
        ("b1-8-64--random", ""),
        ("b8-8-8--random", "-b8"),
        ("b1-8-64--s58160a", "-s58160a"),
        ("b1-1-1--s58160a", "-b1-s58160a"),
        ("b1-1-1--s58160a--c0123ab", "-b1-s58160a-c0123ab"),
    ],
)
def test_evidence_of_particular_engines_lies_in_files_of_its_own(engine, ending, tmp_path):
    from ztp_deploy.evidence.records import record_summary

    path = min(SUMMARIES)
    summary = Summary.model_validate_json(path.read_text(encoding="utf-8"))
    latency = LatencyReport.model_validate_json(path.with_suffix(".samples.json").read_text(encoding="utf-8"))
    summary = summary.model_copy(update={"engine": f"engines/somewhere/deit_s--dense--fp32--{engine}"})
    record_summary(summary, latency, tmp_path)
    [written] = [file.name for file in tmp_path.glob("*.json") if ".samples" not in file.name]
    start, machine = f"{summary.model}--{summary.label}--{summary.backend.split()[0]}", path.name.split("--")[-1]
    assert written == f"{start}-{summary.precision}{ending}--{machine}"
