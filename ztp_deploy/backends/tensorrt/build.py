"""From graph to plan: one network built, its log listened to, its outcome proved."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from ztp_deploy.backends import torch_device
from ztp_deploy.backends.tensorrt import config as configuration
from ztp_deploy.backends.tensorrt import network as networks
from ztp_deploy.backends.tensorrt.graph import QUANTISED, attentions, low_products
from ztp_deploy.backends.tensorrt.layers import Fusion, Layer, check_engine_precision, fusion, read_layers
from ztp_deploy.backends.tensorrt.library import Library, forwarding_log, sentence, started
from ztp_deploy.backends.tensorrt.progress import Progress, interruptible, monitor
from ztp_deploy.backends.tensorrt.settings import Settings
from ztp_deploy.errors import BadRequest, BuildFailed
from ztp_deploy.manifest import BatchRange

if TYPE_CHECKING:
    import tensorrt


@dataclass(frozen=True)
class Order:
    """One plan to build. `graph` is where `model` came from; `timings` where timings are kept, None for nowhere."""

    library: Library
    model: onnx.ModelProto
    graph: Path
    precision: str
    batch: BatchRange
    stages: int
    settings: Settings
    timings: Path | None

    @property
    def computes_in(self) -> tuple[str, ...]:
        """The precision asked for and, where that quantises, what the rest of the tokens' way is computed in."""
        return (self.precision, self.settings.float_precision) if self.precision in QUANTISED else (self.precision,)


@dataclass(frozen=True)
class BuiltPlan:
    """A serialised engine, and what is known of it without running it."""

    data: Any
    layers: list[Layer]
    products: int

    def proofs(self, order: Order) -> tuple[Fusion, dict[str, int] | None]:
        """What fused, and which matrix products run in the precision asked for. Raises GateFailed."""
        found = [
            check_engine_precision(self.layers, low_products(order.model, precision), precision)
            for precision in order.computes_in
        ]
        return fusion(self.layers, attentions(order.model), order.stages), found[0]


@dataclass
class _Heard:
    """What of the log matters afterwards."""

    errors: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)

    def __call__(self, severity: str, message: str) -> None:
        if severity in ("error", "internal_error"):
            self.errors.append(message)
        elif severity == "warning" and "is unsupported in" in message:
            self.unsupported.append(message)
        elif "LayerType: " in message:
            self.layers += read_layers(message)


def build_plan(order: Order, progress: Progress) -> BuiltPlan:
    """Parses, configures and builds. Raises BadRequest, BuildFailed, GateFailed, MissingSoftware; Ctrl-C cancels."""
    trt = order.library.load()
    heard = _Heard()
    with torch_device.first_gpu(), forwarding_log(trt, heard) as log:
        builder: tensorrt.Builder = started(trt.Builder, log, order.library, heard.errors)
        network, parser = networks.parse(trt, builder, log, order.model, order.graph)
        counts = [networks.check_precision(trt, network, order.model, precision) for precision in order.computes_in]
        config: tensorrt.IBuilderConfig = builder.create_builder_config()
        configuration.configure(trt, order.library, config, order.settings)
        if heard.unsupported:
            raise BadRequest(f"{order.library.title}: {heard.unsupported[0]}", "Leave the setting out.")
        configuration.add_profile(builder, network, config, order.batch)
        if order.timings is not None:
            configuration.use_timings(config, order.timings)
        config.progress_monitor = monitor(trt, progress)
        heard.errors.clear()
        data = interruptible(lambda: builder.build_serialized_network(network, config), progress)
        del parser  # lived until here: the network's weights are its own
        if data is None:
            raise _failure(order.library, heard.errors)
        if order.timings is not None:
            configuration.keep_timings(config, order.timings)
    progress.complete()
    return BuiltPlan(data, heard.layers, counts[0])


def _failure(library: Library, errors: list[str]) -> BuildFailed:
    reason = sentence(errors[-1]) if errors else "it gave no reason"
    return BuildFailed(
        f"{library.title} could not build the engine: {reason}.",
        "Nothing was kept. Check what the message names: an operator's limits, the memory, or a setting.",
    )
