"""What is AOTInductor's own: fixed batches, lower precision, the CPU it was compiled for, a missing compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import zipfile

import numpy as np
import pytest
import torch

import ztp_deploy as ztp
from tests import slim, tiny
from ztp_deploy import environment
from ztp_deploy.backends import aotinductor
from ztp_deploy.backends.settings import parse
from ztp_deploy.errors import BadRequest, BuildFailed, MissingSoftware


@pytest.fixture(scope="module")
def dense():
    """The smallest thing there is to compile: two blocks, nothing pruned."""
    model = tiny.model(size=tiny.SIZE.model_copy(update={"depth": 2}))
    return ztp.prune(model, ztp.make_plan(model, "dense"))


@pytest.fixture(scope="module")
def half(dense, tmp_path_factory):
    return ztp.export(dense, "torch_export", tmp_path_factory.mktemp("half") / "a", precision="bf16")


def test_a_fixed_batch_in_bf16_on_one_thread(dense, half, tmp_path, monkeypatch, capfd):
    place = tmp_path / "a place"  # compilers are called by command lines that are split at spaces
    place.mkdir()
    monkeypatch.chdir(place)
    before = set(os.listdir(tempfile.gettempdir()))
    engine = ztp.build(
        half, "aotinductor", device="cpu", precision="bf16", batch=1, directory="engine", settings={"threads": 1}
    )
    threads = torch.get_num_threads()
    images = tiny.images(1)
    try:
        with ztp.load_engine(engine.directory) as session:
            assert torch.get_num_threads() == 1
            logits = session.run(images)
            with pytest.raises(BadRequest, match="range 1 to 1"):
                session.run(tiny.images(2))
    finally:
        torch.set_num_threads(threads)
    with torch.inference_mode():
        expected = dense(torch.from_numpy(images)).numpy()
    assert 0 < np.abs(logits - expected).max() / expected.std() < 0.1
    assert engine.manifest.built["isa"]
    assert "--version" not in engine.manifest.built["compiler"]
    # Nothing on the terminal, nothing beside the engine, no compiler's litter.
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in place.iterdir()] == ["engine"]
    assert {path.name for path in (place / "engine").iterdir()} == {"model.pt2", "manifest.json"}
    assert not {
        name
        for name in set(os.listdir(tempfile.gettempdir())) - before
        if name.startswith(("torchinductor", "compile-"))
    }


def test_an_engine_for_another_cpu_is_refused_before_it_runs(aotinductor_engine, tmp_path):
    flags = aotinductor_engine.manifest.built["cpu_flags"]
    assert set(flags) == environment.instruction_flags()
    copy = tmp_path / "copy"
    shutil.copytree(aotinductor_engine.directory, copy)
    tiny.reseal(copy, built={**aotinductor_engine.manifest.built, "cpu_flags": [*flags, "avx4096"]})
    with pytest.raises(MissingSoftware, match="compiled for a CPU with avx4096, which this one lacks"):
        ztp.load_engine(copy)


def test_without_a_compiler_it_is_one_sentence(half, tmp_path):
    from torch._inductor import config

    without = config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with without, pytest.raises(MissingSoftware, match="no working compiler"):
        ztp.build(half, "aotinductor", device="cpu", precision="bf16", directory=tmp_path / "e")
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_gives_up_is_one_sentence(half, tmp_path, capfd):
    """A compiler that answers to its version and then fails, as a broken installation does."""
    from torch._inductor import config

    fake = tmp_path / "bin" / "g++"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\ncase "$1" in --version|-v) exec /usr/bin/g++ "$@";; esac\necho many lines >&2; exit 1\n'
    )
    fake.chmod(0o755)
    with config.patch({"cpp.cxx": (None, str(fake))}), pytest.raises(BuildFailed, match="could not compile"):
        ztp.build(half, "aotinductor", device="cpu", precision="bf16", batch=1, directory=tmp_path / "e")
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]
    assert capfd.readouterr() == ("", "")


def test_settings():
    defaults = {"threads": 0, "max_autotune": False, "cuda_graph": False, "kernels": True}
    assert parse(aotinductor.Settings, {}, "aotinductor") == defaults
    with pytest.raises(BadRequest, match="aotinductor does not take cache"):
        parse(aotinductor.Settings, {"cache": 1}, "aotinductor")


@pytest.mark.parametrize("setting, named", [("cuda_graph", "cuda_graph=true"), ("kernels", "kernels=false")])
def test_settings_for_a_gpu_need_one(setting, named, half, tmp_path):
    with pytest.raises(BadRequest, match=f"{named} was asked for on the CPU"):
        ztp.build(
            half,
            "aotinductor",
            device="cpu",
            precision="bf16",
            settings={setting: setting == "cuda_graph"},
            directory=tmp_path / "e",
        )
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_copies_its_library_is_made_to_share_this_process_one(tmp_path, monkeypatch):
    from torch._inductor import cpp_builder

    if shutil.which("g++") is None:
        pytest.skip("needs g++ (apt-get install g++)")
    copying = tmp_path / "copying"
    copying.write_text('#!/bin/sh\ncase " $* " in *" -shared "*) set -- "$@" -static-libstdc++;; esac\nexec g++ "$@"\n')
    copying.chmod(0o755)
    source = tmp_path / "say.cpp"
    source.write_text('#include <iostream>\nvoid say() { std::cout << "so"; }\n')

    def compiled(compiler, *how):
        subprocess.run([compiler, "-fPIC", *how, source, "-o", tmp_path / "say"], check=True)
        return b"libstdc++.so" in (tmp_path / "say").read_bytes()

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    assert aotinductor._sharing(tmp_path) == {}
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: str(copying))
    [(name, (first, wrapper))] = aotinductor._sharing(tmp_path).items()
    assert (name, first) == ("cpp.cxx", None)
    assert not compiled(copying, "-shared")
    assert compiled(wrapper, "-shared")
    assert not compiled(wrapper, "-c")  # what is not linked needs no library, and is no error


@pytest.mark.parametrize(
    "needs, does, refused",
    [
        (b"libstdc++.so.6", "kill -SEGV $$", None),
        (b"", "kill -SEGV $$", r"crashes when it opens what g\+\+ 1 compiled"),
        (b"", "exit 1", None),
        (b"", "exec sleep 60", r"did not open what g\+\+ 1 compiled within 1 s"),
    ],
    ids=["the library is shared", "opening it crashes", "opening it fails, which is told later", "opening it hangs"],
)
def test_code_that_crashes_with_a_library_of_its_own_is_refused(needs, does, refused, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("model/data/weights", b"")
        archive.writestr("model/data/wrapper.so", b"\x7fELF" + needs + b"libtorch.so")
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{does}\n")
    python.chmod(0o755)
    monkeypatch.setattr(aotinductor.sys, "executable", str(python))
    monkeypatch.setattr(aotinductor, "_OPENING_S", 1)
    if refused:
        with pytest.raises(MissingSoftware, match=refused):
            aotinductor._check_opens(tmp_path / "model.pt2", "g++ 1")
    else:
        aotinductor._check_opens(tmp_path / "model.pt2", "g++ 1")


def test_replayed_outputs_are_the_callers(aotinductor_engine, monkeypatch):
    """The recording writes to the same buffers again and again; what was handed out must not change with them."""

    class Recorder:
        def __init__(self, compute):
            self.compute, self.buffers = compute, None

        def __call__(self, images):
            fresh = self.compute(images)
            self.buffers = self.buffers or tuple(value.clone() for value in fresh)
            for buffer, value in zip(self.buffers, fresh, strict=True):
                buffer.copy_(value)
            return self.buffers

    load, opened = torch._inductor.aoti_load_package, []

    def recorded_load(package, **how):
        opened.append(how)
        return load(package, **how)

    monkeypatch.setattr(torch._inductor, "aoti_load_package", recorded_load)
    monkeypatch.setattr(aotinductor, "Recorder", Recorder)
    manifest = aotinductor_engine.manifest
    replaying = manifest.model_copy(update={"settings": {**manifest.settings, "cuda_graph": True}})
    runner = aotinductor.open_runner(aotinductor_engine.directory, replaying)
    # What torch asks the device for other threads' sake cannot be recorded.
    assert opened == [{"run_single_threaded": True, "device_index": -1}]
    one, two = tiny.images(4)[:2], tiny.images(4)[2:]
    first = runner.run(one)["logits"]
    kept = first.copy()
    second = runner.run(two)["logits"]
    with ztp.load_engine(aotinductor_engine.directory) as session:
        np.testing.assert_array_equal(first, session.run(one))
        np.testing.assert_array_equal(second, session.run(two))
    np.testing.assert_array_equal(first, kept)
    runner.close()


def test_an_engine_for_a_gpu_is_opened_on_the_first(aotinductor_engine, monkeypatch):
    """Whichever device is the thread's own: tensors of the first are what it takes."""
    opened = []
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda package, **how: opened.append(how["device_index"]))
    monkeypatch.setattr(aotinductor.torch_device, "prepare", lambda provider: None)
    on_gpu = aotinductor_engine.manifest.model_copy(update={"device": "cuda", "provider": "cuda:0"})
    aotinductor.open_runner(aotinductor_engine.directory, on_gpu)
    assert opened == [0]


def test_it_is_opened_by_torch_and_what_torch_does_not_name(aotinductor_engine):
    lacking = slim.run(slim.LOAD, "torch", engine=aotinductor_engine.directory)
    assert lacking.out == (
        "MissingSoftware torch needs packaging to open AOTInductor engines, and it is not installed. "
        "pip install packaging\n"
    )
    assert slim.run(slim.LOAD, "torch", "packaging", engine=aotinductor_engine.directory).out == ""
