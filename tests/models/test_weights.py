"""The hub: a real download against a local server, and giving up quickly where there is none."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import safetensors.torch

import ztp_deploy as ztp

REPOSITORY = "timm/deit_tiny_patch16_224.fb_in1k"


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers like the hub for one file."""

    payload = b""

    def _answer(self, body: bool) -> None:
        if not self.path.endswith("/model.safetensors"):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.payload)))
        self.send_header("ETag", '"0123456789abcdef0123456789abcdef"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if body:
            self.wfile.write(self.payload)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *arguments: object) -> None:
        pass


SCRIPT = """
import json, time, ztp_deploy as ztp
begin = time.perf_counter()
try:
    source = ztp.load_model("deit_t", weights="pretrained").source
    print(json.dumps(source.weights.model_dump()))
except ztp.ZtpError as error:
    print(json.dumps({"problem": error.problem, "code": error.exit_code, "seconds": time.perf_counter() - begin}))
"""


def run(endpoint, cache, **more):
    """Loads DeiT-T pre-trained in a process of its own, since the hub's client reads its address at import."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "ZTP_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", **more}
    environment.pop("HF_HUB_OFFLINE", None) if "HF_HUB_OFFLINE" not in more else None
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def hub():
    state = ztp.load_model("deit_t", weights="random").state_dict()
    _Hub.payload = safetensors.torch.save(state)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_pretrained_weights_are_downloaded_once_and_then_come_from_the_cache(hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    first = run(endpoint, tmp_path)
    assert first["kind"] == "pretrained"
    assert first["origin"] == REPOSITORY
    assert first["licence"] == "apache-2.0"
    assert first["sha256"] == ztp.load_model("deit_t", weights="random").source.weights.sha256
    assert list((tmp_path / "weights").rglob("model.safetensors"))
    again = run("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert again == first


def test_a_hub_that_does_not_answer_is_given_up_within_seconds(tmp_path):
    refused = run("http://127.0.0.1:9", tmp_path)
    assert refused["code"] == 3
    assert REPOSITORY in refused["problem"]
    assert refused["seconds"] < 45  # the library alone would try again for minutes
    begin = time.perf_counter()
    offline = run("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert offline["code"] == 3
    assert time.perf_counter() - begin < 60
