"""Contracts over the registries: whatever is listed has the face its kind promises, and works end to end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy import backends, exporters, methods, models
from ztp_deploy.backends.base import Backend
from ztp_deploy.errors import BadRequest
from ztp_deploy.evidence.exported import RUNNERS, open_exported
from ztp_deploy.exporters import Exporter
from ztp_deploy.methods.base import Method, MethodOptions
from ztp_deploy.models import Family

ROOT = Path(__file__).parents[2]
KINDS = [
    *((methods.get(name), Method) for name in methods.METHODS),
    *((models.family(name), Family) for name in models.FAMILIES),
    *((exporters.get(name), Exporter) for name in exporters.FORMATS),
    *((backends.get(name), Backend) for name in backends.BACKENDS),
]


@pytest.mark.parametrize("module, face", KINDS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_modules_have_the_names_of_their_face(module, face):
    promised = {name for name in (*face.__annotations__, *vars(face)) if not name.startswith("_")}
    assert promised
    missing = {name for name in promised if not hasattr(module, name)}
    assert not missing
    assert module.__doc__


def test_mypy_holds_every_module_to_its_face(tmp_path):
    """By `get` alone it takes each for what it should be: what a registry names by a text is cast."""
    faces = {
        "ztp_deploy.methods.base.Method": methods.METHODS,
        "ztp_deploy.models.Family": models.FAMILIES,
        "ztp_deploy.exporters.Exporter": exporters.FORMATS,
        "ztp_deploy.backends.base.Backend": backends.BACKENDS,
    }
    lines = []
    for i, (face, registry) in enumerate(faces.items()):
        lines.append("from {} import {} as Face{}".format(*face.rsplit(".", 1), i))
        for k, place in enumerate(registry.values()):
            package, _, name = place.replace(":", ".").rpartition(".")
            lines += [f"from {package} import {name} as seen{i}_{k}", f"held{i}_{k}: Face{i} = seen{i}_{k}"]
    source = tmp_path / "faces.py"

    def mypy(text):
        source.write_text(text)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(source)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    held = "\n".join(lines) + "\n"
    assert mypy(held).startswith("Success")
    assert "Incompatible types" in mypy(f"{held}other: Face0 = seen1_0\n")


@pytest.mark.parametrize("name", exporters.FORMATS)
def test_every_format_is_run_as_it_stands_or_says_that_it_is_not(name, model, tmp_path):
    artifact = ztp.export(ztp.prune(model, ztp.make_plan(model, ratio=0.6)), name, tmp_path / "artifact")
    if name not in RUNNERS:
        with pytest.raises(BadRequest, match=f"Nothing runs a {name} graph"):
            open_exported(artifact)
        return
    runner = open_exported(artifact)
    outputs, scores = runner.run(tiny.images(3)), runner.audit(tiny.images(3))
    assert {*artifact.manifest.outputs} <= outputs.keys()
    assert {*artifact.manifest.outputs, *artifact.manifest.audit} <= scores.keys()
    assert outputs["logits"].shape == (3, 10)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_traces_with_its_counts_and_replays_its_selection(name, model):
    plan = ztp.make_plan(model, method=name, ratio=0.6, options=tiny.OPTIONS.get(name))
    assert plan.counts == sorted(plan.counts, reverse=True)
    pruned = ztp.prune(model, plan)
    images = torch.from_numpy(tiny.images(2))
    with torch.inference_mode():
        outputs = pruned.run(images)
    rule = methods.get(name)
    options = methods.parse_options(name, plan.options)
    assert isinstance(options, MethodOptions)
    entering = torch.arange(plan.patch_tokens, dtype=torch.int32).expand(2, -1)
    for index, (stage, kept, scores) in enumerate(zip(plan.stages, outputs.kept, outputs.scores, strict=True)):
        assert tuple(scores) == rule.score_names(stage)
        assert kept.shape == (2, stage.tokens_out)
        replay = rule.replay(stage, scores, pruned.host.geometry, options)
        made_anew = torch.full_like(entering[:, :1], plan.patch_tokens + index)
        slots = (replay.kept.expand(2, -1) if replay.goes is None else replay.goes).long()
        for image, candidates in enumerate(torch.cat([entering, made_anew], dim=1)):
            assert set(candidates[slots[image][slots[image] >= 0]].tolist()) == set(kept[image].tolist())
        entering = kept
    merges = rule.merges(options)
    for trace, stage in zip(ztp.trace_tokens(pruned, images), plan.stages, strict=True):
        for carried in trace.assignment:
            assert set(carried[carried >= 0].tolist()) == set(range(stage.tokens_out))
            assert merges or (carried >= 0).sum() == stage.tokens_out


class HostCopies(TorchFunctionMode):
    """The calls that would copy from the host to a GPU, made while the module is on a device that is not the CPU."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.__setitem__)

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        tensors = [value for value in tree_leaves((arguments, keywords)) if isinstance(value, torch.Tensor)]
        if function in self.MAKERS or any(tensor.device.type == "cpu" for tensor in tensors):
            self.found.append(getattr(function, "__name__", str(function)))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("name", methods.METHODS)
def test_no_method_copies_from_the_host(name, model):
    """A copy would make a GPU wait for the host in every run, and no CUDA graph can record it."""
    plan = ztp.make_plan(model, method=name, ratio=0.6, options=tiny.OPTIONS.get(name))
    pruned = ztp.prune(model, plan).to("meta")
    with torch.inference_mode(), HostCopies() as copies:
        pruned.run(torch.empty(2, 3, 96, 96, device="meta"))
    assert copies.found == []


@pytest.mark.parametrize(
    "copy",
    [
        lambda: torch.ones(3).to("meta"),
        lambda: torch.tensor([1, 2], device="meta"),
        lambda: torch.ones(3, device="meta").__setitem__(0, 2.0),
    ],
)
def test_a_copy_from_the_host_is_noticed(copy):
    with HostCopies() as copies:
        copy()
    assert len(copies.found) == 1


@pytest.mark.parametrize("backend", [name for name in backends.BACKENDS if "cpu" in backends.get(name).DEVICES])
def test_every_back_end_passes_the_gate(backend, model, tmp_path, request):
    if backend == "aotinductor":  # compiled once, a minute's work
        engine = request.getfixturevalue("aotinductor_engine")
    else:
        pruned = ztp.prune(model, ztp.make_plan(model, ratio=0.6))
        artifact = ztp.export(pruned, backends.get(backend).FORMAT, tmp_path / "artifact")
        engine = ztp.build(artifact, backend, device="cpu", batch=(1, 4, 8), directory=tmp_path / "engine")
    assert ztp.check_parity(engine, model, tiny.images(5)).require().passed


@pytest.mark.parametrize("name", ["deit_t_distilled", "augreg_vit_t"])
def test_models_with_other_heads_pass_the_gate(name, tmp_path):
    model = tiny.model(name)
    pruned = ztp.prune(model, ztp.make_plan(model, ratio=0.7))
    engine = ztp.build(
        ztp.export(pruned, "onnx", tmp_path / "a"), "onnxruntime", device="cpu", directory=tmp_path / "e"
    )
    assert ztp.check_parity(engine, model, tiny.images(5)).require().passed


ON_GPU = [(name, "fp32", {}) for name in backends.BACKENDS if "cuda" in backends.get(name).DEVICES]
ON_GPU += [(name, "fp16", {"cuda_graph": True}) for name in ("onnxruntime", "aotinductor", "tensorrt")]


@pytest.mark.gpu
@pytest.mark.parametrize("backend, precision, settings", ON_GPU, ids=[f"{name}-{low}" for name, low, _ in ON_GPU])
def test_every_back_end_passes_the_gate_on_a_gpu(backend, precision, settings, model, tmp_path):
    from ztp_deploy import environment

    if not environment.gpus():
        pytest.skip("needs an NVIDIA GPU and its driver; none was found on this machine")
    if package := backends.get(backend).missing():
        pytest.skip(f"{package} is not installed beside this GPU: pip install {package}")
    gpu = environment.gpus()[0]
    if backend == "tensorrt_rtx" and gpu.compute_capability.split(".")[0] in ("9", "10"):
        pytest.skip(
            f"TensorRT-RTX needs a GPU of compute capability 7.5, 8.6, 8.9 or 12; {gpu.name} has {gpu.compute_capability}"
        )
    pruned = ztp.prune(model, ztp.make_plan(model, ratio=0.6))
    artifact = ztp.export(pruned, backends.get(backend).FORMAT, tmp_path / "artifact", precision=precision)
    engine = ztp.build(
        artifact, backend, device="cuda", precision=precision, settings=settings, directory=tmp_path / "engine"
    )
    assert engine.manifest.device == "cuda"
    assert ztp.check_parity(engine, model, tiny.images(5)).require().passed
    with ztp.load_engine(engine.directory) as session:
        for batch in (3, 1, 3):
            images = torch.from_numpy(tiny.images(batch, seed=batch))
            # Computed on the way there: an engine that does not wait for the caller's stream would read too early.
            logits = session.run(images.cuda().mul(3).div(3))
            assert logits.is_cuda
            torch.testing.assert_close(
                logits.cpu(), torch.from_numpy(session.run(images.numpy())), rtol=1e-3, atol=1e-3
            )
        with pytest.raises(BadRequest, match="takes tensors on cuda"):
            session.run(images)


@pytest.mark.gpu
@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_can_be_replayed_from_a_cuda_graph(name, model):
    from ztp_deploy import environment
    from ztp_deploy.backends.cuda_graph import Recorder

    if not environment.gpus():
        pytest.skip("needs an NVIDIA GPU and its driver; none was found on this machine")
    plan = ztp.make_plan(model, method=name, ratio=0.6, options=tiny.OPTIONS.get(name))
    pruned = ztp.prune(model, plan).to("cuda")
    one, two = torch.from_numpy(tiny.images(4)).to("cuda").chunk(2)
    with torch.inference_mode():
        replay = Recorder(pruned)
        replay(one)
        torch.testing.assert_close(replay(two), pruned(two), rtol=1e-4, atol=1e-4)
