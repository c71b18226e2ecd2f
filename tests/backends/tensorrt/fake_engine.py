"""A stand-in for a deserialised engine: the few methods the runner calls, computed by torch on the CPU.

It checks what a GPU would not forgive: addresses that were not set, shapes that were not told, two runs at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace

import torch
from torch import Tensor


class Mode(Enum):
    INPUT = 0
    OUTPUT = 1


class Kind(Enum):
    FLOAT = 0
    INT32 = 1


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.shape: tuple[int, ...] | None = None
        self.addresses: dict[str, int] = {}
        self.runs = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "images"
        if not self.engine.smallest <= shape[0] <= self.engine.largest:
            return False
        self.shape = shape
        self.engine.shapes_told += 1
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if self.shape is None:
            return (-1, 3, 96, 96)
        return {"images": self.shape, "logits": (self.shape[0], 10), "kept_1": (self.shape[0], 4)}[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name == self.engine.takes_no:
            return False
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self.engine.busy.acquire(blocking=False), "two runs at once on one engine"
        try:
            assert self.shape is not None
            assert set(self.addresses) == {"images", "logits", "kept_1"}
            self.runs += 1
            self.engine.executions += 1
            images = view(self.addresses["images"], self.shape, torch.float32)
            logits, kept = self.engine.compute(images)
            view(self.addresses["logits"], logits.shape, torch.float32).copy_(logits)
            view(self.addresses["kept_1"], kept.shape, torch.int32).copy_(kept)
        finally:
            self.engine.busy.release()
        if self.engine.fails:
            self.engine.complain("IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (an illegal access)")
        return not self.engine.fails


class FakeEngine:
    num_io_tensors = 3

    def __init__(self, compute: Callable[[Tensor], tuple[Tensor, Tensor]], smallest: int = 1, largest: int = 8) -> None:
        self.compute = compute
        self.smallest, self.largest = smallest, largest
        self.contexts: list[FakeContext] = []
        self.shapes_told = self.executions = 0
        self.busy = threading.Lock()
        self.fails = self.full = False
        self.takes_no = ""
        self.complain: Callable[[str], None] = lambda message: None

    def get_tensor_name(self, index: int) -> str:
        return ("images", "logits", "kept_1")[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name == "images" else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Kind:
        return Kind.INT32 if name.startswith("kept") else Kind.FLOAT

    def create_runtime_config(self) -> SimpleNamespace:
        return SimpleNamespace()

    def create_execution_context(self, config: SimpleNamespace | None = None) -> FakeContext | None:
        self.config = config
        if self.full:
            return None
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


def view(address: int, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """The memory at an address, as a kernel would see it."""
    import ctypes
    from math import prod

    size = prod(shape) * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).reshape(shape)
