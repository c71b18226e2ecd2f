"""Where tensors must lie for an engine to take them."""

from __future__ import annotations

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
        ("cuda:1", "cuda:0", "tensors on cuda:0; one on cuda:1 came"),
        ("cpu", "cuda:0", "tensors on cuda:0; one on cpu came"),
        ("cuda:0", "cpu", "tensors on cpu; one on cuda:0 came"),
    ],
)
def test_a_tensor_elsewhere_is_refused(lies, wanted, refused):
    images = SimpleNamespace(device=torch.device(lies))
    if refused is None:
        torch_device.require(images, wanted)
    else:
        with pytest.raises(BadRequest, match=f"This engine takes {refused}"):
            torch_device.require(images, wanted)
