"""Calls of the GPU report: minutes that end, processes that are killed, tries that are made again."""

from __future__ import annotations

import time
from itertools import pairwise
from types import SimpleNamespace

import pytest

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy import backends, environment
from ztp_deploy.backends.base import OnGpu
from ztp_deploy.defaults import GPU_PRECISIONS
from ztp_deploy.errors import MissingSoftware
from ztp_deploy.gpu_report import cell, ledger, runtimes
from ztp_deploy.gpu_report.grid import Grid
from ztp_deploy.gpu_report.measure import measure_gpu
from ztp_deploy.gpu_report.rows import GpuReport
from ztp_deploy.gpu_report.runtimes import RUNTIMES, calibrated_on, unavailable
from ztp_deploy.gpu_report.table import render_gpu_report
from ztp_deploy.methods.slice import twin_of

MODEL = tiny.model("deit_t", tiny.SIZE.model_copy(update={"depth": 2}))
PRUNED = ztp.make_plan(MODEL, ratio=0.7, sites=[1], options={"rounds": 2})
PLANS = {"dense": ztp.make_plan(MODEL, "dense"), "pruned": PRUNED, "slice": twin_of(PRUNED)}
METHODS = {plan.method: label for label, plan in PLANS.items()}
CALIBRATION = "64 crops of scikit-learn's sample photographs (max, nvidia-modelopt 0.47.0)"


class Machine:
    """A machine whose clock runs only while it works: builds take `builds` seconds, a cell 20."""

    def __init__(self, path):
        self.path = path
        self.now = 0.0
        self.builds = 10.0
        self.loads = 0.0
        self.loaded = 0
        self.killed_loading = False
        self.faults = {}
        self.versions = dict.fromkeys(RUNTIMES, "1")
        self.unavailable = {}
        self.packages = {"torch": "2"}
        self.killed_at = self.interrupted_at = None
        self.standing = set()
        self.opened = []

    def open(self, job):
        plan = METHODS[job.plan.method]
        step = (job.runtime, job.precision, plan)
        self.opened.append(step)
        if step == self.interrupted_at:
            raise KeyboardInterrupt
        if step == self.killed_at:
            self.left = self.path.read_bytes()
            raise KeyboardInterrupt
        if plan in self.faults:
            raise self.faults[plan]
        self.now += 1.0 if step in self.standing else self.builds
        if job.runtime not in runtimes.IN_PROCESS:
            self.standing.add(step)
        return SimpleNamespace(
            run=lambda images: None,
            edges=lambda images: [SimpleNamespace(faults=[], worst_logit=0.01)],
            close=lambda: None,
            calibration=CALIBRATION if job.precision in ("int8", "fp8") else None,
        )

    def load(self, name, weights):
        self.loaded += 1
        if self.killed_loading:
            self.left = self.path.read_bytes()
            raise KeyboardInterrupt
        self.now += self.loads
        return MODEL

    def interleave(self, opened, *rest, settling):
        self.now += 20.0
        return {label: [0.008 if label == "dense" else 0.004] * 30 for label in opened}

    def call(self, runtimes, precisions=("fp32",), **options):
        """A call from the plans' opening on; one that is killed leaves the file as it was then, and no answer."""
        self.opened = []
        grid = Grid(
            models=("deit_t",),
            runtimes=runtimes,
            precisions=precisions,
            batches=(1, 8),
            device="cpu",
            load=self.load,
            plans=lambda model: PLANS,
        )
        try:
            return measure_gpu(grid, self.path, **options)
        except KeyboardInterrupt:
            if self.killed_at or self.killed_loading:
                self.path.write_bytes(self.left)
            return None

    def statuses(self):
        report = GpuReport.model_validate_json(self.path.read_bytes())
        return {(row.runtime, row.precision, row.batch, row.plan): row.status for row in report.latest()}

    def reasons(self):
        return {row.reason for row in GpuReport.model_validate_json(self.path.read_bytes()).latest()}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    one = Machine(tmp_path / "r.json")
    clock = SimpleNamespace(monotonic=lambda: one.now, strftime=time.strftime, gmtime=time.gmtime)
    monkeypatch.setattr(ledger, "time", clock)
    monkeypatch.setattr(cell, "interleave", one.interleave)
    monkeypatch.setattr(runtimes, "open_job", one.open)
    monkeypatch.setattr(runtimes, "version_of", lambda runtime: one.versions[runtime])
    monkeypatch.setattr(runtimes, "unavailable", lambda *wanted: one.unavailable.get(wanted))
    monkeypatch.setattr(environment, "versions", lambda: dict(one.packages))
    return one


def test_int8_and_fp8_are_tensorrts_alone():
    groups = Grid(models=("deit_s",)).groups()
    assert [(runtime, precision) for _, runtime, precision in groups if precision in ("int8", "fp8")] == [
        *(("tensorrt", "int8"), ("tensorrt", "fp8"), ("tensorrt_rtx", "int8"), ("tensorrt_rtx", "fp8")),
    ]
    assert len(groups) == 6 * 3 + 4
    assert Grid.precisions == GPU_PRECISIONS == ("fp32", "fp16", "bf16", "int8", "fp8")


def test_back_ends_say_themselves_how_the_report_takes_them(monkeypatch):
    assert RUNTIMES == ("eager", "torch_compile", "aotinductor", "onnxruntime", "tensorrt", "tensorrt_rtx")
    alone = [runtime for runtime in RUNTIMES if runtimes.treatment_of(runtime).built_alone]
    assert alone == ["eager", "tensorrt"]
    recording = [runtime for runtime in RUNTIMES if runtimes.treatment_of(runtime).records]
    assert recording == ["aotinductor", "onnxruntime", "tensorrt", "tensorrt_rtx"]
    monkeypatch.setattr(backends.get("onnxruntime"), "GPU_REPORT", OnGpu())
    assert not runtimes.treatment_of("onnxruntime").records
    assert [name for name in backends.BACKENDS if not backends.get(name).GPU_REPORT] == ["openvino", "torchscript"]


@pytest.mark.parametrize(
    "capability, precision, reason",
    [
        ("8.6", "fp16", None),
        ("8.6", "int8", None),
        (
            *("8.6", "fp8"),
            "fp8 needs a GPU of compute capability 8.9 or newer; this is NVIDIA Test (8.6). Use int8 or fp16.",
        ),
        ("8.9", "fp8", None),
        ("10.0", "fp8", None),
    ],
)
def test_fp8_needs_a_gpu_that_has_it(capability, precision, reason, monkeypatch):
    gpu = environment.Gpu("NVIDIA Test", capability, 24.0)
    monkeypatch.setattr(environment, "gpus", lambda: (gpu,))
    monkeypatch.setattr(environment, "installed", lambda package: "0.47.0")
    monkeypatch.setattr(backends.get("tensorrt"), "missing", lambda: None)
    assert unavailable("tensorrt", precision) == reason
    monkeypatch.setattr(environment, "installed", lambda package: None)
    lacking = "int8 and fp8 are calibrated by NVIDIA's ModelOpt, which is not installed."
    wanted = {"fp16": None, "int8": f'{lacking} pip install "ztp_deploy[modelopt]"'}
    if precision in wanted:
        assert unavailable("tensorrt", precision) == wanted[precision]


def test_what_int8_was_calibrated_on_is_said(machine):
    built = {"calibration": {"tool": "nvidia-modelopt 0.47.0", "method": "max", "images": 64}}
    assert (calibrated_on(built), calibrated_on({})) == (CALIBRATION, None)
    report = machine.call(("eager", "tensorrt"), ("fp16", "int8", "fp8")).report
    assert {(row.precision, row.calibration) for row in report.rows} == {
        ("fp16", None),
        ("int8", CALIBRATION),
        ("fp8", CALIBRATION),
    }
    text = render_gpu_report(report)
    assert f"- int8 and fp8: calibrated on {CALIBRATION}; accuracy takes images of your own." in text
    assert "| deit_t | tensorrt | int8 | 8 | 1.000 | **2.00 ×**" in text
    assert "eager | int8" not in text


def test_a_failed_cell_is_tried_again_where_it_is_asked_for(machine):
    machine.faults = {"pruned": RuntimeError("CUDA error")}
    progress = machine.call(("eager", "tensorrt"))
    failed = {place: status for place, status in machine.statuses().items() if status != "measured"}
    assert failed == {
        (runtime, "fp32", batch, "pruned"): "failed" for runtime in ("eager", "tensorrt") for batch in (1, 8)
    }
    assert progress.lines() == ["4 of 4 cells are done.", "Rows failed: 4; --retry tries them again."]
    first = machine.path.read_bytes()
    assert (machine.call(("eager", "tensorrt")).done, machine.opened) == (4, [])
    assert machine.path.read_bytes() == first
    machine.faults = {}
    seen = []

    def look(title):  # nothing measured is ever missing from the file
        seen.append({place for place, status in machine.statuses().items() if status == "measured"})

    progress = machine.call(("eager", "tensorrt"), retry=True, advance=look)
    assert set(machine.statuses().values()) == {"measured"}
    assert progress.lines() == ["4 of 4 cells are done."]
    assert len(seen[0]) == 8
    assert all(earlier <= later for earlier, later in pairwise(seen))
    assert {row.session for row in progress.report.rows} == {1}
    assert (machine.call(("eager", "tensorrt"), retry=True).done, machine.opened) == (4, [])


def test_a_retry_that_fails_takes_nothing_away(machine):
    machine.faults = {"pruned": RuntimeError("CUDA error")}
    machine.call(("eager",))
    machine.faults = {"pruned": RuntimeError("CUDA error again"), "slice": RuntimeError("out of memory")}
    rows = machine.call(("eager",), retry=True).report.latest()
    assert {(row.plan, row.status, row.session, row.reason) for row in rows} == {
        ("dense", "measured", 1, None),
        ("slice", "measured", 0, None),
        ("pruned", "failed", 1, "RuntimeError: CUDA error again"),
    }


def test_retries_take_their_turn_over_calls(machine):
    """The next call with --retry begins with what this one did not come to."""
    machine.faults = {plan: RuntimeError("no") for plan in PLANS}
    machine.call(("eager", "tensorrt", "aotinductor"))
    machine.faults = {"pruned": RuntimeError("no")}
    machine.builds = 100.0
    progress = machine.call(("eager", "tensorrt", "aotinductor"), retry=True, minutes=4)
    assert (progress.done, progress.cells) == (2, 6)
    assert [step[0] for step in machine.opened] == ["eager"] * 3
    machine.call(("eager", "tensorrt", "aotinductor"), retry=True, minutes=4)
    assert machine.opened[0][0] == "tensorrt"


def test_a_library_that_has_come_is_used_without_being_asked(machine):
    machine.versions["tensorrt"] = ""
    machine.unavailable["tensorrt", "fp32"] = "pip install tensorrt."
    machine.call(("tensorrt",))
    assert set(machine.statuses().values()) == {"missing"}
    progress = machine.call(("tensorrt",), retry=True)
    assert machine.opened == []
    again = "Rows missing: 6; they are tried again once the software that they name is here."
    assert progress.lines() == ["2 of 2 cells are done.", again]  # no --retry, which would try nothing
    machine.versions["tensorrt"], machine.unavailable = "1", {}
    machine.call(("tensorrt",))
    assert set(machine.statuses().values()) == {"measured"}
    measured = machine.path.read_bytes()
    machine.versions["tensorrt"], machine.unavailable["tensorrt", "fp32"] = "", "pip install tensorrt."
    assert machine.call(("tensorrt",), retry=True).done == 2
    assert machine.path.read_bytes() == measured  # taken away again, it takes no figure with it


def test_what_other_code_measured_is_measured_again(machine, monkeypatch):
    machine.call(("tensorrt",))
    machine.call(("tensorrt",))
    assert machine.opened == []
    hashed = []
    monkeypatch.setattr(ledger, "sources_sha256", lambda *given: hashed.extend(given) or "of tomorrow")
    machine.faults = {"pruned": RuntimeError("out of memory")}
    machine.call(("tensorrt",))
    rows = GpuReport.model_validate_json(machine.path.read_bytes()).rows
    assert {row.sources for row in rows if row.plan == "dense"} == {"of tomorrow"}
    timing = {"gpu_report/cell.py", "gpu_report/grid.py", "gpu_report/runtimes.py", "evidence/latency.py"}
    assert timing < set(hashed)
    # What cannot be measured now leaves the figure of then, and is the last word.
    assert [row.status for row in rows if row.plan == "pruned" and row.batch == 1] == ["measured", "failed"]
    machine.call(("tensorrt",))
    assert machine.opened == []


@pytest.mark.parametrize("known_before", [True, False])
def test_a_package_beside_the_library_that_has_come_is_used_too(known_before, machine):
    """ModelOpt, known of before a build, or a compiler's package that a build finds missing."""
    if known_before:
        machine.unavailable["tensorrt", "int8"] = "pip install modelopt."
    machine.faults = dict.fromkeys(PLANS, MissingSoftware("It needs a package.", "pip install it"))
    machine.call(("tensorrt",), ("int8",))
    assert set(machine.statuses().values()) == {"missing"}
    machine.faults = {}
    machine.call(("tensorrt",), ("int8",))
    assert machine.opened == []
    machine.packages = {"torch": "2", "nvidia-modelopt": "0.47.0"}
    machine.call(("tensorrt",), ("int8",))
    assert (machine.opened == []) == known_before  # what still says that it is missing is not asked further
    machine.unavailable = {}
    machine.call(("tensorrt",), ("int8",))
    assert set(machine.statuses().values()) == {"measured"}


def test_a_build_is_not_begun_in_less_time_than_one_took(machine):
    machine.builds = 200.0
    progress = machine.call(("tensorrt",))
    assert [plan for *_, plan in machine.opened] == ["dense", "pruned"]
    assert progress.lines() == [
        "0 of 2 cells are done. Build and prove deit_t slice · tensorrt fp32: about 200 s are needed and 140 s are "
        "left. Run the same command again to go on."
    ]
    assert machine.now == 400.0
    progress = machine.call(("tensorrt",))
    assert machine.now == 400.0 + 1 + 1 + 200 + 20 + 20
    assert progress.lines() == ["2 of 2 cells are done."]
    assert progress.report.efforts[0].builds == {"dense": 200.0, "pruned": 200.0, "slice": 200.0}
    assert progress.report.efforts[0].cells == {1: 20.0, 8: 20.0}


def test_what_starts_over_is_not_begun_for_a_part(machine):
    """Three compilations and a cell took 170 s: they are not begun with 110 s left."""
    machine.builds = 50.0
    progress = machine.call(("torch_compile",), ("fp32", "fp16"), minutes=5)
    assert (progress.done, machine.now) == (2, 190.0)
    assert progress.because == "Measure deit_t · torch_compile fp16: about 170 s are needed and 110 s are left."
    assert machine.call(("torch_compile",), ("fp32", "fp16"), minutes=5).done == 4


def test_what_never_fits_becomes_a_row_that_says_so(machine):
    machine.builds = 250.0
    runtimes = ("torch_compile", "eager")
    for _ in range(2):  # cut off, and tried with all nine minutes
        progress = machine.call(runtimes)
        assert progress.because == "The 9 minutes are spent."
        assert progress.report.rows == []
    machine.builds = 10.0
    progress = machine.call(runtimes)
    assert {step[0] for step in machine.opened} == {"eager"}
    assert progress.done == progress.cells == 4
    reason = (
        "It does not fit in 9 minutes: 2 calls ended before it was done, the last with all of them for it. "
        "`ztp gpu-report --retry --minutes 18` gives it more."
    )
    assert {(row.status, row.reason) for row in progress.report.rows if row.runtime == "torch_compile"} == {
        ("failed", reason)
    }
    assert f"- torch_compile fp32, failed (6 rows): {reason}" in render_gpu_report(progress.report)
    machine.call(runtimes, minutes=18)
    assert machine.opened == []
    machine.builds = 250.0
    machine.call(runtimes, minutes=18, retry=True)
    assert set(machine.statuses().values()) == {"measured"}


@pytest.mark.parametrize("killed", [False, True])
def test_a_model_that_never_loads_becomes_rows_that_say_so(killed, machine):
    """Loading takes longer than the call, which ends at the next step, or is killed over it."""
    machine.loads, machine.killed_loading = 600.0, killed
    machine.unavailable["tensorrt", "fp32"] = "pip install tensorrt."
    wanted = ("eager", "tensorrt", "onnxruntime")
    for _ in range(2):  # all nine minutes both times
        progress = machine.call(wanted)
        assert machine.opened == []
        if not killed:
            assert (progress.because, progress.report.rows) == ("The 9 minutes are spent.", [])
    assert machine.loaded == 2
    progress = machine.call(wanted)
    assert (machine.loaded, progress.done, progress.cells) == (2, 6, 6)
    reason = (
        "Loading the model does not fit in 9 minutes: 2 calls ended before it was done, the last with all of them for it. "
        "`ztp gpu-report --retry --minutes 18` gives it more."
    )
    assert [(row.runtime, row.batch, row.plan, row.status, row.reason) for row in progress.report.rows] == [
        *(("eager", batch, "dense", "failed", reason) for batch in (1, 8)),
        *(("tensorrt", batch, "dense", "missing", "pip install tensorrt.") for batch in (1, 8)),
        *(("onnxruntime", batch, "dense", "failed", reason) for batch in (1, 8)),
    ]
    assert f"- eager fp32, failed (2 rows): {reason}" in render_gpu_report(progress.report)
    assert (machine.call(wanted).done, machine.loaded) == (6, 2)  # until it is asked for
    machine.killed_loading = False
    progress = machine.call(wanted, minutes=18, retry=True)
    assert (machine.loaded, progress.done) == (3, 6)
    statuses = machine.statuses()
    assert {statuses[runtime, "fp32", 1, plan] for runtime in ("eager", "onnxruntime") for plan in PLANS} == {
        "measured"
    }
    assert {row.weights for row in progress.report.rows if row.status == "measured"} == {"random"}
    assert "" not in {effort.runtime for effort in progress.report.efforts}


def test_a_model_that_loads_in_time_leaves_no_word(machine):
    """Loading takes most of a call, a build the rest: it is the build that calls end over."""
    machine.loads, machine.builds = 500.0, 200.0
    progress = machine.call(("torch_compile",))
    assert progress.report.rows == []
    assert [(effort.runtime, effort.tries, effort.minutes) for effort in progress.report.efforts] == [
        ("torch_compile", 1, 9.0)
    ]
    machine.loads = 600.0
    machine.call(("torch_compile",), minutes=60)
    assert set(machine.statuses().values()) == {"measured"}


def test_a_call_with_more_minutes_tries_what_was_cut_off(machine):
    machine.builds = 250.0
    for _ in range(2):
        machine.call(("torch_compile",))
    machine.call(("torch_compile",), minutes=18)
    assert set(machine.statuses().values()) == {"measured"}


def test_a_killed_build_is_tried_with_the_whole_call_and_then_given_up(machine):
    machine.killed_at = ("tensorrt", "fp32", "pruned")
    runtimes = ("eager", "tensorrt", "aotinductor")
    assert machine.call(runtimes) is None
    [effort] = [effort for effort in GpuReport.model_validate_json(machine.path.read_bytes()).efforts if effort.tries]
    assert (effort.runtime, effort.tries, effort.minutes) == ("tensorrt", 1, 0.0)  # eager's work came first
    assert set(machine.statuses().values()) == {"measured"}
    assert machine.call(runtimes) is None
    assert machine.opened == [("tensorrt", "fp32", "dense"), ("tensorrt", "fp32", "pruned")]  # before aotinductor
    progress = machine.call(runtimes)
    assert {step[0] for step in machine.opened} == {"aotinductor"}
    assert progress.done == 6
    assert {row.reason for row in progress.report.rows if row.runtime == "tensorrt"} == {
        "It does not fit in 9 minutes: 2 calls ended before it was done, the last with all of them for it. "
        "`ztp gpu-report --retry --minutes 18` gives it more."
    }


def test_a_build_that_is_killed_once_is_only_done_later(machine):
    machine.killed_at = ("tensorrt", "fp32", "pruned")
    machine.call(("tensorrt",))
    machine.killed_at = None
    progress = machine.call(("tensorrt",))
    assert set(machine.statuses().values()) == {"measured"}
    assert progress.report.efforts[0].tries == 0


def test_ctrl_c_is_no_proof_that_it_does_not_fit(machine):
    machine.interrupted_at = ("torch_compile", "fp32", "pruned")
    for _ in range(4):
        assert machine.call(("torch_compile",)) is None
        assert len(machine.opened) == 2
    machine.interrupted_at = None
    assert machine.call(("torch_compile",)).done == 2
