"""TensorRT-RTX's provider for ONNX Runtime, with stand-ins for the plugin and its devices: it has never run here."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy import environment, exporters
from ztp_deploy.backends.onnxruntime import backend, rtx
from ztp_deploy.errors import BadRequest, BuildFailed, MissingSoftware

GPU = environment.Gpu("NVIDIA RTX 4090", "8.9", 24.0)
SETTINGS = {"provider": "tensorrt_rtx"}


@pytest.fixture(scope="module")
def half(artifact, tmp_path_factory):
    return exporters.convert(artifact, "fp16", tmp_path_factory.mktemp("half") / "a")


class Machine:
    """An RTX machine as ONNX Runtime shows it; the session itself is one on the CPU."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.registered: list[tuple[str, str]] = []
        self.given: list[tuple[list[str], dict[str, str]]] = []
        self.entries: dict[str, str] = {}
        self.running = [rtx.PROVIDER, "CPUExecutionProvider"]
        self.devices = [SimpleNamespace(ep_name=name) for name in ("CPUExecutionProvider", rtx.PROVIDER, rtx.PROVIDER)]
        rtx.register.cache_clear()
        patch.setattr(environment, "gpus", lambda: (GPU,))
        patch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
        plugin = SimpleNamespace(get_library_path=lambda: "/plugin/libprovider.so")
        patch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
        patch.setattr(ort, "register_execution_provider_library", lambda *names: self.registered.append(names))
        patch.setattr(ort, "get_ep_devices", lambda: self.devices)
        patch.setattr(
            ort.SessionOptions,
            "add_provider_for_devices",
            lambda options, devices, profile: self.given.append(([one.ep_name for one in devices], profile)),
        )

    def pretend_to_open(self, patch: pytest.MonkeyPatch) -> None:
        machine, real = self, ort.InferenceSession

        class Session:
            def __init__(self, graph, options, providers, enable_fallback):
                assert (providers, enable_fallback) == (None, 0)
                machine.entries["cpu"] = options.get_session_config_entry("session.disable_cpu_ep_fallback")
                self.session = real(graph, providers=["CPUExecutionProvider"])

            def get_providers(self):
                return machine.running

            def disable_fallback(self):
                machine.entries["fallback"] = "disabled"

            def run(self, names, feed):
                return self.session.run(names, feed)

        patch.setattr(ort, "InferenceSession", Session)


@pytest.fixture
def machine(monkeypatch):
    yield Machine(monkeypatch)
    rtx.register.cache_clear()


def build(artifact, directory, **arguments):
    return ztp.build(
        artifact,
        "onnxruntime",
        precision=artifact.manifest.precision,
        batch=(1, 4, 8),
        directory=directory,
        **{"settings": SETTINGS} | arguments,
    )


def test_the_engine_is_the_graph_on_the_plugins_first_device(half, machine, tmp_path, monkeypatch):
    machine.pretend_to_open(monkeypatch)
    engine = build(half, tmp_path / "e")
    assert (engine.manifest.provider, engine.manifest.device) == (rtx.PROVIDER, "cuda")
    assert engine.manifest.settings["provider"] == "tensorrt_rtx"
    assert "provider" not in engine.manifest.built
    images = tiny.images(3)
    with ztp.load_engine(engine.directory) as session:
        logits = session.run(images)
        assert np.array_equal(session.audit(images)["logits"], logits)
    assert machine.registered == [(rtx.PROVIDER, "/plugin/libprovider.so")]  # once a process
    profile = {f"nv_profile_{name}_shapes": f"images:{n}x3x96x96" for name, n in (("min", 1), ("opt", 4), ("max", 8))}
    # Opened by the build, by us, and for the audit.
    assert machine.given == [([rtx.PROVIDER], profile)] * 3
    assert machine.entries == {"cpu": "1", "fallback": "disabled"}


def test_another_provider_than_asked_for_is_an_error(half, machine, tmp_path, monkeypatch):
    machine.pretend_to_open(monkeypatch)
    machine.running = ["CUDAExecutionProvider"]
    with pytest.raises(MissingSoftware, match=f"fell back to CUDAExecutionProvider although {rtx.PROVIDER}"):
        build(half, tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_nodes_that_the_plugin_leaves_are_not_run_on_the_cpu(half, machine, tmp_path):
    """ONNX Runtime's own session, to which the stand-in gave no provider: all nodes would go to the CPU."""
    with pytest.raises(BuildFailed, match="fallback to CPU EP has been explicitly disabled"):
        build(half, tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_gpu_is_named(half, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "gpus", lambda: ())
    with pytest.raises(MissingSoftware, match="needs an NVIDIA RTX GPU, and none was found"):
        build(half, tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(half, machine, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(MissingSoftware, match="pip install onnxruntime-ep-nv-tensorrt-rtx"):
        build(half, tmp_path / "e")


def test_an_old_onnxruntime_is_named(half, machine, tmp_path, monkeypatch):
    monkeypatch.delattr(ort, "register_execution_provider_library")
    with pytest.raises(MissingSoftware, match="takes no plugins"):
        build(half, tmp_path / "e")


def test_a_library_that_does_not_load_says_why(tmp_path, monkeypatch):
    """ONNX Runtime itself is asked, for a library that is not there."""
    monkeypatch.setattr(environment, "gpus", lambda: (GPU,))
    plugin = SimpleNamespace(get_library_path=lambda: str(tmp_path / "libprovider.so"))
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    for _ in range(2):  # a failure is not remembered
        with pytest.raises(MissingSoftware, match=r"cannot load TensorRT-RTX's provider: .*libprovider\.so"):
            rtx.device()


def test_a_gpu_that_the_plugin_does_not_take_is_named(half, machine, tmp_path):
    machine.devices = machine.devices[:1]
    with pytest.raises(MissingSoftware, match=r"takes none of this machine's GPUs \(NVIDIA RTX 4090\)"):
        build(half, tmp_path / "e")


@pytest.mark.parametrize("source, arguments", [("artifact", {}), ("half", {"device": "cpu"})])
def test_what_it_cannot_promise_is_refused(source, arguments, request, machine, tmp_path):
    with pytest.raises(BadRequest, match=r"computes in fp16 or bf16 on cuda \(its fp32 may be TF32\)"):
        build(request.getfixturevalue(source), tmp_path / "e", **arguments)


def test_the_setting_has_two_values(half, tmp_path):
    with pytest.raises(BadRequest, match="provider='cuda'"):
        build(half, tmp_path / "e", settings={"provider": "cuda"})
    assert backend.Settings().provider == "auto"
