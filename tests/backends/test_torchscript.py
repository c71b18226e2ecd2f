"""What of a trace is bound to the device it was made on."""

from __future__ import annotations

import pytest
import torch

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy import methods
from ztp_deploy.backends.torchscript import point_at_device
from ztp_deploy.exporters.torchscript import GRAPH_FILE, nodes_of


def devices(module):
    """The devices that a traced module names, by method."""
    return {
        method: [
            node.output().toIValue()
            for node in nodes_of(module._c._get_method(method).graph)
            if node.kind() == "prim::Constant" and node.output().type().kind() == "DeviceObjType"
        ]
        for method in ("forward", "audited")
    }


def test_every_device_that_a_trace_names_becomes_the_engines(torchscript_artifact):
    module = torch.jit.load(torchscript_artifact.directory / GRAPH_FILE)
    before = devices(module)
    assert all(before.values())
    assert {device for named in before.values() for device in named} == {torch.device("cpu")}
    point_at_device(module, "cuda:1")
    assert devices(module) == {method: [torch.device("cuda:1")] * len(named) for method, named in before.items()}


@pytest.mark.parametrize("name", methods.METHODS)
def test_no_number_of_a_trace_lies_on_the_host_where_a_tensor_meets_it(name, model, tmp_path):
    # Sides of a shape become tensors on the host in a trace, which most operators take for numbers and clamp does not.
    plan = ztp.make_plan(model, method=name, ratio=0.6, options=tiny.OPTIONS.get(name))
    artifact = ztp.export(ztp.prune(model, plan), "torchscript", tmp_path / "artifact")
    module = torch.jit.load(artifact.directory / GRAPH_FILE)
    for method in ("forward", "audited"):
        nodes = list(nodes_of(module._c._get_method(method).graph))
        clamps = [node for node in nodes if node.kind() in ("aten::clamp", "aten::clamp_min", "aten::clamp_max")]
        assert clamps or name not in ("zero_tprune", "avit", "ats")
        for node in clamps:
            bounds = [value.type().kind() for value in list(node.inputs())[1:]]
            assert set(bounds) <= {"IntType", "FloatType", "NoneType"}, node
