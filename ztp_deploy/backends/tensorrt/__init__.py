"""TensorRT and TensorRT-RTX: one code path over two libraries with the same Python interface."""

from __future__ import annotations

from ztp_deploy.backends.tensorrt.backend import TensorRT
from ztp_deploy.backends.tensorrt.library import RTX, STANDARD

TENSORRT = TensorRT(STANDARD, "TensorRT: engines for the NVIDIA GPU they are built on")
TENSORRT_RTX = TensorRT(RTX, "TensorRT-RTX: portable engines for RTX GPUs, built with or without one")
