"""Engines that several tests of evidence read."""

from __future__ import annotations

import pytest

import ztp_deploy as ztp


@pytest.fixture(scope="session")
def several_streams(artifact, tmp_path_factory):
    """An OpenVINO engine as `engines/cpu_throughput.toml` asks for one, with two streams whatever the machine."""
    settings = {"hint": "throughput", "streams": 2}
    folder = tmp_path_factory.mktemp("engines") / "streams"
    return ztp.build(artifact, "openvino", batch=(1, 4, 8), directory=folder, settings=settings)
