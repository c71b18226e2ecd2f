"""TensorRT's tests; what builds needs TensorRT-RTX, which needs no GPU to build."""

import pytest

from ztp_deploy import environment
from ztp_deploy.backends.tensorrt.library import RTX

needs_rtx = pytest.mark.skipif(
    not RTX.found(),
    reason="tensorrt-rtx is not installed: make setup installs it on x86-64 Linux, the only platform with wheels to pin",
)
needs_modelopt = pytest.mark.skipif(
    environment.installed("nvidia-modelopt") is None,
    reason="nvidia-modelopt, which calibrates int8 and fp8, is not installed: make setup, or pip install nvidia-modelopt",
)
