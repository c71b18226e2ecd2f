"""libtriton_ztp.so in a real Triton Inference Server, asked over HTTP: Python's results, and refusals one can act on."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ztp_deploy as ztp
from tests import tiny
from tests.cpp import toys
from tests.cpp.conftest import FLAGS, SOURCE, command, manifest_of, needs_onnxruntime, require_tools
from ztp_deploy.evidence.selftest import write_selftest
from ztp_deploy.manifest import manifest_sha256

pytestmark = pytest.mark.slow

SERVER = Path(sys.prefix) / "triton-server/pytriton/tritonserver/bin/tritonserver"
"""The server of NVIDIA's wheel nvidia-pytriton, of which nothing else is used."""
TYPES = {"FP32": np.float32, "UINT8": np.uint8, "INT32": np.int32}


class Refused(Exception):
    """A server's refusal: HTTP status and sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(status, sentence)
        self.status, self.sentence = status, sentence


@dataclass(frozen=True)
class Server:
    """A running server, by its HTTP address and its log."""

    address: str
    log: Path

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[dict[str, Any], bytes]:
        """The JSON of an answer, and the bytes that follow it."""
        request = urllib.request.Request(f"{self.address}/v2/{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                said = error.read()
            raise Refused(error.code, json.loads(said)["error"] if said else "") from None
        length = int(answer.headers.get("Inference-Header-Content-Length", len(content)))
        return json.loads(content[:length] or b"{}"), content[length:]

    def infer(self, model: str, images: np.ndarray, *outputs: str, padding: str = "") -> dict[str, np.ndarray]:
        """One request, images and outputs as raw bytes; those named, else all. `padding` shifts where the bytes begin."""
        kind = {np.dtype(array): name for name, array in TYPES.items()}[images.dtype]
        entry = {"name": "images", "shape": images.shape, "datatype": kind}
        entry["parameters"] = {"binary_data_size": images.nbytes}
        asked: dict[str, Any] = {"id": padding, "inputs": [entry], "parameters": {"binary_data_output": True}}
        if outputs:
            asked["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
        header = json.dumps(asked).encode()
        length = {"Inference-Header-Content-Length": str(len(header))}
        told, raw = self.ask(f"models/{model}/infer", header + images.tobytes(), **length)
        found, start = {}, 0
        for output in told["outputs"]:
            size = output["parameters"]["binary_data_size"]
            values = np.frombuffer(raw[start : start + size], TYPES[output["datatype"]])
            found[output["name"]] = values.reshape(output["shape"])
            start += size
        return found

    def refusal(self, model: str) -> str:
        """Why a model was not loaded."""
        listed, _ = self.ask("repository/index", b"{}")
        entry = next(entry for entry in listed if entry["name"] == model)
        assert entry["state"] == "UNAVAILABLE"
        return str(entry["reason"])

    def runs(self, model: str) -> dict[int, int]:
        """How often a model has run, by images answered in one run."""
        told, _ = self.ask(f"models/{model}/stats")
        return {entry["batch_size"]: entry["compute_infer"]["count"] for entry in told["model_stats"][0]["batch_stats"]}


def add(repository: Path, name: str, engine: Path, configuration: str = "") -> Path:
    """An engine folder as version 1 of a model; returns the copy."""
    (repository / name).mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(f'backend: "ztp"\n{configuration}', encoding="utf-8")
    return Path(shutil.copytree(engine, repository / name / "1"))


@pytest.fixture(scope="module")
def repository(runtime, shared_engine, openvino_engine, artifact, tmp_path_factory) -> Path:
    """Models that can be served and models that cannot."""
    needs_onnxruntime(runtime)
    made, root = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("repository")
    like = shared_engine.directory
    for back_end in ("onnxruntime", "openvino"):
        for dtype in ("float32", "uint8"):
            name = f"{back_end}_{dtype}"
            add(root, name, toys.toy(back_end, made / name, like, dtype))
    toy = made / "openvino_float32"
    # What waits five seconds for more images runs at once when its batch is full.
    waiting = "max_batch_size: 3\ndynamic_batching { max_queue_delay_microseconds: 5000000 }\n"
    add(root, "waiting", toy, waiting)
    add(root, "one_by_one", toy, "max_batch_size: 8\ninstance_group [{ kind: KIND_CPU count: 2 }]\n")

    proved = add(
        root, "proved", openvino_engine, 'parameters { key: "self_test" value { string_value: "required" } }\n'
    )
    record = write_selftest(proved, tiny.images(2))
    changed = load_file(record)
    changed["logits"][0, 0] += 1
    said = {"manifest_sha256": manifest_sha256(proved), "tolerance": "0.0001"}
    for name, wish in {"disproved": "", "unproved": "off"}.items():
        parameter = f'parameters {{ key: "self_test" value {{ string_value: "{wish}" }} }}\n' if wish else ""
        copy = add(root, name, proved, parameter)
        save_file(changed, copy / record.relative_to(proved), said)

    failed = add(root, "failed_check", toy)
    (failed / "evidence").mkdir()
    report = {"passed": False, "manifest_sha256": manifest_sha256(failed), "edges": []}
    (failed / "evidence" / "parity.json").write_text(json.dumps(report), encoding="utf-8")
    add(root, "brittle", toys.brittle_toy(made / "brittle", like))

    damaged = add(root, "damaged", toy)
    (damaged / "model.bin").write_bytes(b"\0" * (damaged / "model.bin").stat().st_size)
    add(root, "empty", toy)
    shutil.rmtree(root / "empty" / "1")
    (root / "empty" / "1").mkdir()
    add(root, "unrecorded", toy, 'parameters { key: "self_test" value { string_value: "required" } }\n')
    add(root, "misspelt", toy, 'parameters { key: "self_test" value { string_value: "maybe" } }\n')
    add(root, "too_large", toy, "max_batch_size: 9\n")
    add(root, "other_input", toy, 'input [{ name: "images" data_type: TYPE_UINT8 dims: [3, 16, 16] }]\n')
    add(root, "other_output", toy, 'output [{ name: "logits" data_type: TYPE_FP32 dims: [4] }]\n')
    add(root, "some_output", toy, 'output [{ name: "logits" data_type: TYPE_FP32 dims: [-1] }]\n')
    return root


@pytest.fixture(scope="module")
def server(runtime, repository, tmp_path_factory) -> Iterator[Server]:
    if not SERVER.exists():
        pytest.skip(f"Triton's server is not in {SERVER.parents[3]}: make setup puts it there on x86-64 Linux")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--model-repository", repository, "--backend-directory", runtime.prefix / "backends"]
    options += ["--http-address", "127.0.0.1", "--http-port", port, "--allow-grpc", "0", "--allow-metrics", "0"]
    options += [
        "--exit-on-error",
        "0",
        "--strict-readiness",
        "0",
        "--model-control-mode",
        "explicit",
        "--load-model",
        "*",
    ]
    with log.open("wb") as written:
        process = subprocess.Popen([str(word) for word in (SERVER, *options)], stdout=written, stderr=written)
    try:
        running = Server(f"http://127.0.0.1:{port}", log)
        deadline = time.monotonic() + 120
        while True:
            try:
                running.ask("health/ready")
                break
            except (Refused, OSError):
                assert process.poll() is None, log.read_text(errors="replace")
                assert time.monotonic() < deadline, log.read_text(errors="replace")
                time.sleep(0.1)
        yield running
    finally:
        process.terminate()
        assert process.wait(60) == 0, log.read_text(errors="replace")


def noise(batch: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Images for the toys."""
    random = np.random.default_rng([batch, seed])
    shape = (batch, 3, toys.SIZE, toys.SIZE)
    if dtype == "uint8":
        return random.integers(0, 256, shape, np.uint8)
    return random.standard_normal(shape, dtype=np.float32)


def check(found: dict[str, np.ndarray], images: np.ndarray) -> None:
    logits, kept = toys.expected(images)
    np.testing.assert_allclose(found["logits"], logits, rtol=1e-5, atol=1e-5)
    assert found["kept_1"].tolist() == kept.tolist()


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("back_end", ["onnxruntime", "openvino"])
def test_every_back_end_and_type_answers_whatever_the_bytes_alignment(server, back_end, dtype):
    for shift in range(4):
        images = noise(1 + shift, dtype)
        check(server.infer(f"{back_end}_{dtype}", images, padding="x" * shift), images)


def test_a_pruned_model_answers_as_python_does(server, openvino_engine):
    images = tiny.images(3, seed=5)
    found = server.infer("proved", images)
    with ztp.load_engine(openvino_engine) as session:
        np.testing.assert_allclose(found["logits"], session.run(images), rtol=1e-4, atol=1e-4)
        stages = {"kept": session.kept(), "assignment": session.assignment()}
    for kind, tokens in stages.items():
        for i, stage in enumerate(tokens, start=1):
            assert found[f"{kind}_{i}"].tolist() == stage.tolist()
    assert len(found) == 1 + 2 * len(stages["kept"])


def test_only_the_outputs_asked_for_come(server):
    images = noise(2)
    found = server.infer("openvino_float32", images, "kept_1")
    assert list(found) == ["kept_1"]
    check(server.infer("some_output", images, "logits") | found, images)


def test_the_configuration_is_the_engines(server, openvino_engine):
    told, _ = server.ask("models/proved/config")
    manifest = manifest_of(openvino_engine)
    assert told["max_batch_size"] == manifest.batch.max == 8
    assert "dynamic_batching" in told
    assert [(entry["name"], entry["data_type"], entry["dims"]) for entry in told["input"]] == [
        ("images", "TYPE_FP32", [3, 96, 96])
    ]
    assert {entry["name"]: entry["dims"] for entry in told["output"]} == {
        "logits": [10],
        **{f"kept_{i}": [count] for i, count in enumerate((25, 17, 11), start=1)},
        **{f"assignment_{i}": [36] for i in (1, 2, 3)},
    }
    assert [(group["kind"], group["count"]) for group in told["instance_group"]] == [("KIND_CPU", 1)]
    chosen, _ = server.ask("models/one_by_one/config")
    assert "dynamic_batching" not in chosen
    assert chosen["instance_group"][0]["count"] == 2


def test_requests_that_wait_together_run_as_one_batch_and_get_their_own_rows(server):
    before = server.runs("waiting")
    images = [noise(1, seed=seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda each: server.infer("waiting", each), images))
    for found, each in zip(answers, images, strict=True):
        check(found, each)
    assert server.runs("waiting").get(3, 0) == before.get(3, 0) + 1


@pytest.mark.parametrize("served", ["onnxruntime_float32", "openvino_float32", "one_by_one"])
def test_many_clients_at_once_each_get_their_own(server, served):
    images = [noise(1 + seed % 5, seed=seed) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda each: server.infer(served, each), images))
    for found, each in zip(answers, images, strict=True):
        check(found, each)


def test_pixels_that_are_not_finite_fail_for_their_own_client_alone(server):
    before = server.runs("waiting")
    images = [noise(1, seed=seed) for seed in range(3)]
    images[1][0, 2, 3, 4] = np.nan

    def ask(each: np.ndarray) -> Any:
        try:
            return server.infer("waiting", each)
        except Refused as error:
            return error.args

    with ThreadPoolExecutor(3) as pool:
        first, second, third = pool.map(ask, images)
    check(first, images[0])
    check(third, images[2])
    assert second == (400, "1 of the pixels are NaN or infinite. Check where the images come from.")
    assert server.runs("waiting").get(2, 0) == before.get(2, 0) + 1  # all three came together, two were answered


def test_a_model_is_unloaded_and_loaded_again(server):
    images = noise(1)
    server.ask("repository/models/onnxruntime_float32/unload", b"{}")
    deadline = time.monotonic() + 60
    while True:
        listed, _ = server.ask("repository/index", b"{}")
        entry = next(entry for entry in listed if entry["name"] == "onnxruntime_float32")
        if entry["state"] == "UNAVAILABLE" and entry["reason"] == "unloaded":
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(Refused):
        server.infer("onnxruntime_float32", images)
    server.ask("repository/models/onnxruntime_float32/load", b"{}")
    check(server.infer("onnxruntime_float32", images), images)


def test_the_wrong_type_and_shape_are_the_clients_fault(server):
    for images in (noise(1, "uint8"), noise(1)[:, :, :8], noise(9), noise(1)[:0]):
        with pytest.raises(Refused) as caught:
            server.infer("openvino_float32", images)
        assert caught.value.status == 400


# --- the server's log --------------------------------------------------------------------------


def logged(server: Server, level: str) -> list[str]:
    """The server's log lines of that level."""
    return [line for line in server.log.read_text(errors="replace").splitlines() if line.startswith(level)]


def test_an_engine_that_failed_its_check_is_served_with_a_warning(server, repository):
    images = noise(1)
    check(server.infer("failed_check", images), images)
    folder = repository / "failed_check" / "1"
    [said] = [line for line in logged(server, "W") if "failed its last parity check" in line]
    expected = f"{folder} (fp32) failed its last parity check: do not rely on its answers. "
    assert f"{expected}Run `ztp check --engine {folder}`, and build it again." in said


def test_what_a_library_says_is_in_the_servers_log(server):
    images = noise(1)
    check(server.infer("brittle", images), images)
    assert not any("ONNX Runtime: " in line for line in logged(server, "E"))
    images[0, 0, 0, 0] = 9
    with pytest.raises(Refused) as caught:
        server.infer("brittle", images)
    assert caught.value.status == 400
    assert any("ONNX Runtime: Non-zero status code returned" in line for line in logged(server, "E"))


# --- refusals ----------------------------------------------------------------------------------

TENSORS = "kept_1 TYPE_INT32 [2], assignment_1 TYPE_INT32 [36]"
REFUSALS = {
    "damaged": "model.bin",
    "empty": "is not an engine folder",
    "unrecorded": "self-test",
    "misspelt": 'The parameter self_test in config.pbtxt is "maybe". Choose if_recorded, which is the default, required or off.',
    "too_large": "max_batch_size in config.pbtxt is 9; this engine takes batches of 1 to 8. "
    "Leave it out, or write 8 or less.",
    "other_input": "config.pbtxt names the input images TYPE_UINT8 [3, 16, 16]; "
    "this engine has images TYPE_FP32 [3, 16, 16]. Leave inputs and outputs out: they are filled in from the engine.",
    "other_output": "config.pbtxt names the output logits TYPE_FP32 [4]; "
    f"this engine has logits TYPE_FP32 [3], {TENSORS}. Leave inputs and outputs out: they are filled in from the engine.",
    "disproved": "σ",
}


@pytest.mark.parametrize("refused", REFUSALS)
def test_what_cannot_be_served_is_not_loaded_and_says_why(server, refused):
    assert REFUSALS[refused] in server.refusal(refused)


def test_a_self_test_that_is_switched_off_refuses_nothing(server):
    images = tiny.images(1)
    assert server.infer("unproved", images, "logits")["logits"].shape == (1, 10)


def test_without_a_servers_headers_it_is_left_out_or_refused(tmp_path):
    require_tools()
    configure = ["cmake", "-G", "Ninja", "-S", SOURCE, "-B", tmp_path, *FLAGS, f"-DTRITON_ROOT={tmp_path}"]
    configure += [f"-DZTP_WITH_{name}=OFF" for name in ("OPENVINO", "ONNXRUNTIME", "AOTINDUCTOR", "TENSORRT")]
    configure += ["-DZTP_WITH_TENSORRT_RTX=OFF", "-DZTP_BUILD_RUN=OFF"]
    missing = "no triton/core/tritonbackend.h: set TRITON_ROOT to a server's folder"
    assert f"libtriton_ztp.so: no ({missing})" in command(*configure).stdout
    refused = command(*configure, "-DZTP_BUILD_TRITON=ON")
    assert refused.returncode != 0
    assert f"but there is {missing}" in " ".join(refused.stderr.split())
