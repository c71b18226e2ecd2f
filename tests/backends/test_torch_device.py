"""Where tensors must lie for an engine to take them."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ztp_deploy.backends import torch_device
from ztp_deploy.errors import BadRequest


@pytest.mark.parametrize(
    "lies, wanted, refused",
    [
        ("cpu", "cpu", None),
        ("cuda:0", "cuda:0", None),
        ("cuda:1", "cuda:0", "tensors on cuda:0; got one on cuda:1"),
        ("cpu", "cuda:0", "tensors on cuda:0; got one on cpu"),
        ("cuda:0", "cpu", "tensors on cpu; got one on cuda:0"),
    ],
)
def test_a_tensor_elsewhere_is_refused(lies, wanted, refused):
    images = SimpleNamespace(device=torch.device(lies))
    if refused is None:
        torch_device.require(images, wanted)
    else:
        with pytest.raises(BadRequest, match=f"This engine takes {refused}"):
            torch_device.require(images, wanted)


@pytest.mark.parametrize(
    "before", ["", "torch.set_float32_matmul_precision('high')", "torch.backends.cuda.matmul.fp32_precision = 'tf32'"]
)
def test_float32_is_float32_on_a_gpu(before):
    """In a process of its own, as it holds for the process; what torch reads back must not have become an error."""
    code = f"""
import torch
from ztp_deploy.backends import torch_device
{before}
torch.cuda.is_available = lambda: True
torch_device.prepare("cuda:0")
assert not torch.backends.cuda.matmul.allow_tf32
assert not torch.backends.cudnn.allow_tf32
assert torch.get_float32_matmul_precision() == "highest"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
