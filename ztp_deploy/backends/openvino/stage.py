"""Zero-TPrune's stages as one compiled operator each: found in OpenVINO's graph, built with g++, put in their place.

As a graph a stage is some fifty operations on a few numbers each, and OpenVINO takes microseconds to start every one.
The operator, `cpp/openvino_stage/stage.cpp`, is compiled for the very processor that builds, into the engine's folder:
it is code, load only what you built. Its scores are the audit's, so that parity asks the very code that ships.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ztp_deploy import environment
from ztp_deploy.atomic import ask_for_room
from ztp_deploy.backends.openvino.attention import is_attention
from ztp_deploy.errors import MissingSoftware
from ztp_deploy.plan import Plan, Stage

if TYPE_CHECKING:
    from ztp_deploy.methods import zero_tprune

METHOD = "zero_tprune"
LIBRARY_FILE = "stage.so"
SOURCE = Path(__file__).parents[2] / "cpp" / "openvino_stage" / "stage.cpp"
OPERATOR = "ZeroTPruneStage"
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-shared", "-fPIC", "-fvisibility=hidden", "-DOV_THREAD=OV_THREAD_TBB_ADAPTIVE"),
    # A compiled model may outlive the core that loaded the operator.
    "-Wl,-z,nodelete",
)
_VECTOR_FLAGS = ("-mprefer-vector-width=512",)
_RANK_BEYOND_JIT = 7
"""Axes of a value that OpenVINO no longer compiles into one kernel with what made it, in another precision."""


def compile_library(directory: Path) -> str:
    """Writes the operator's library into `directory`; the compiler's version.

    Raises MissingSoftware without a compiler, or with one that cannot compile it.
    """
    version = compiler_version()
    include, libraries = _development_files()
    vectors = _VECTOR_FLAGS if "avx512f" in environment.instruction_flags() else ()
    command = [*_compiler(), *_FLAGS, *vectors, "-isystem", str(include), str(SOURCE), *map(str, libraries)]
    done = subprocess.run([*command, "-o", str(directory / LIBRARY_FILE)], capture_output=True, text=True, check=False)
    if done.returncode:
        ask_for_room(directory)
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("collect2")]
        reason = next((line for line in said if "error" in line), said[0] if said else "no reason given")
        raise MissingSoftware(
            f"{version} does not compile the operator of stage=compiled: {reason}.",
            "Name another compiler in the variable CXX, or leave the setting out.",
        )
    return version


def compiler_version() -> str:
    """What the C++ compiler says of itself. Raises MissingSoftware without one."""
    try:
        told = subprocess.run([*_compiler(), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise MissingSoftware(
            f"stage=compiled compiles C++ and found no working compiler: {(said or ['no reason given'])[0]}.",
            "Install one (apt-get install g++), name it in the variable CXX, or leave the setting out.",
        ) from error
    return (told.stdout.splitlines() or _compiler())[0]


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def _development_files() -> tuple[Path, list[Path]]:
    """The headers and libraries that OpenVINO brings along. Raises MissingSoftware where it does not."""
    import openvino

    home = Path(openvino.__file__).parent
    libraries = [path for name in ("libopenvino.so*", "libtbb.so*") for path in sorted((home / "libs").glob(name))]
    if len(libraries) < 2 or not (home / "include" / "tbb").is_dir():
        raise MissingSoftware(
            "stage=compiled needs OpenVINO's headers and libraries, which this OpenVINO does not include.",
            "pip install openvino, or leave the setting out.",
        )
    return home / "include", libraries


def add_to(core: Any, directory: Path, version: str) -> None:
    """Makes the operator of an engine's folder known. Raises MissingSoftware under another release of OpenVINO."""
    try:
        core.add_extension(str(directory / LIBRARY_FILE))
    except RuntimeError as error:
        raise MissingSoftware(
            f"The stages in {directory} were compiled for OpenVINO {version}, and this one does not take them.",
            "Build the engine again.",
        ) from error


def replace(model: Any, plan: Plan, library: Path, bf16: bool) -> int:
    """Puts the operator in the place of every stage it can compute, in place; how many.

    `bf16`: whether OpenVINO is to compute in bf16 what is not marked, in which case the operator reads it as it lies.
    """
    from openvino.utils.node_factory import NodeFactory

    from ztp_deploy import methods
    from ztp_deploy.methods import zero_tprune

    if plan.method != METHOD:
        return 0
    options = methods.parse_options(plan.method, plan.options)
    assert isinstance(options, zero_tprune.Options)
    factory = NodeFactory()
    factory.add_extension(str(library))
    replaced = 0
    for number, stage in enumerate(plan.stages, start=1):
        found = _find(model, number, stage, plan.special_tokens, options)
        if found is not None:
            found.replace_by(factory, bf16)
            replaced += 1
    return replaced


class _Found:
    """A stage in the graph: what it reads, its last ranking, its scores by name and its fixed numbers."""

    def __init__(
        self, attention: Any, keys: Any, ranking: Any, scores: dict[str, Any], numbers: dict[str, Any], number: int
    ) -> None:
        self.attention, self.keys, self.ranking = attention, keys, ranking
        self.scores, self.numbers, self.number = scores, numbers, number

    def replace_by(self, factory: Any, bf16: bool) -> None:
        from openvino import opset13 as opset

        sums = _row_sums(self.attention)
        reads = [_as_it_lies(value) if bf16 else value for value in (self.attention, self.keys)]
        operator = factory.create(OPERATOR, reads, self.numbers | {"exponentials": sums is not None})
        operator.set_friendly_name(f"stage_{self.number}")
        if sums is not None:
            _redirect(sums.output(0), operator.output(0))
        spreads = {name: old for name, old in self.scores.items() if old.get_partial_shape().rank.get_length() == 3}
        scores = {name: old for name, old in self.scores.items() if name not in spreads}
        sizes = [self.numbers["kept"], *map(_size, scores.values())]
        # OpenVINO keeps in float32 all that leads to an output, up to the first product: with attention, for a while.
        # And what is saved is what leads to one: from the kept slots back every score is on the way.
        product = opset.matmul(operator.output(1), np.ones((1, 1), np.float32), False, False)
        first = opset.variadic_split(product, np.array(1), np.array([*map(_size, spreads.values()), sum(sizes)]))
        rest = opset.reshape(first.outputs()[-1], np.array([-1, sum(sizes)]), False)
        second = opset.variadic_split(rest, np.array(1), np.array(sizes))
        _redirect(self.ranking.output(1), opset.convert(second.output(0), "i64").output(0))
        parts = [*first.outputs()[:-1], *second.outputs()[1:]]
        for part, (name, old) in zip(parts, (spreads | scores).items(), strict=True):
            old.set_names(old.get_names() - {name})
            part.set_names({name})


def _find(model: Any, number: int, stage: Stage, special: int, options: zero_tprune.Options) -> _Found | None:
    """The stage of that number, None where it computes something else than the operator does."""
    from ztp_deploy.methods import zero_tprune

    if (options.temperature, options.features, options.feature_heads) != (1, "keys", "concatenated"):
        return None
    if stage.static["similar"] and (options.partition != "importance" or options.metric not in ("cosine", "dot")):
        return None
    scores = {name: _named(model, f"{name}_{number}") for name in zero_tprune.score_names(stage)}
    if any(score is None for score in scores.values()):
        return None
    tokens = stage.tokens_in + special
    rankings = [port.get_node() for port in scores["score"].get_target_inputs() if _is(port.get_node(), "TopK")]
    attention, starts = _sources(scores["score"], tokens)
    boosted = {int(start.argmax()) if start.max() > start.min() else -1 for start in starts} - {-1}
    # Without an S-stage no keys are read: attention's own shape tells that they are there.
    keys = _keys(scores["similarity"], tokens) if stage.static["similar"] else None
    if len(rankings) != 1 or attention is None or len(boosted) > 1 or (keys is None and stage.static["similar"]):
        return None
    bounds = options.variance_bounds
    numbers = {
        "kept": stage.tokens_out,
        "similar": stage.static["similar"],
        "rounds": stage.static["rounds"],
        "special": special,
        "boosted": next(iter(boosted), -1),
        "renormalise": options.renormalise,
        "mean": options.heads == "mean",
        "cosine": options.metric == "cosine",
        "bounded": bounds is not None,
        "low": bounds[0] if bounds else 0.0,
        "high": bounds[1] if bounds else 0.0,
    }
    named = {f"{name}_{number}": score for name, score in scores.items()}
    return _Found(attention, attention if keys is None else keys, rankings[0], named, numbers, number)


def _sources(score: Any, tokens: int) -> tuple[Any, list[Any]]:
    """The one attention that a score comes from (else None), and the vectors of constants on the way to it."""
    found: dict[str, Any] = {}
    starts = []
    waiting, seen = [score], set()
    while waiting:
        value = waiting.pop()
        operation = value.get_node()
        key = f"{operation.get_friendly_name()}:{value.get_index()}"
        if key in seen or not value.get_element_type().is_real():
            continue
        seen.add(key)
        if _is(operation, "Constant"):
            if operation.get_data().size == tokens:
                starts.append(operation.get_data().reshape(-1))
        elif is_attention(value) and not _is(operation, "Transpose"):
            found[operation.get_friendly_name()] = value
        else:
            waiting.extend(operation.input_values())
    [attention] = found.values() if len(found) == 1 else [None]
    return attention, starts


def _keys(similarity: Any, tokens: int) -> Any:
    """The features [B, N, D] of all tokens that a similarity compares; None where they are not found."""
    value = similarity
    while not _is(value.get_node(), "MatMul"):
        if not value.get_node().input_values():
            return None
        value = value.get_node().input_value(0)
    value = value.get_node().input_value(0)
    while _is(value.get_node(), "Reshape", "Gather"):
        value = value.get_node().input_value(0)
        shape = value.get_partial_shape()
        if shape.rank.get_length() == 3 and shape[1] == tokens:
            return value
    return None


def _row_sums(attention: Any) -> Any:
    """The product that sums the rows of exponentials; None for probabilities."""
    if _is(attention.get_node(), "Softmax"):
        return None
    readers = [port.get_node() for port in attention.get_target_inputs() if port.get_index() == 0]
    [sums] = [node for node in readers if _is(node, "MatMul") and _is(node.input_value(1).get_node(), "Constant")]
    return sums


def _as_it_lies(value: Any) -> Any:
    """A value that OpenVINO has in bf16, in a form that tells so: the plugin drops the conversion."""
    from openvino import opset13 as opset

    shape = [axis.get_length() if axis.is_static else -1 for axis in value.get_partial_shape()]
    ahead = [1] * (_RANK_BEYOND_JIT - len(shape))
    return opset.convert(opset.reshape(value, np.array([*ahead, *shape]), False), "bf16").output(0)


def passes_on(model: Any) -> set[str]:
    """Names of the operators and of what hands them values as they lie: no score among them needs a mark."""
    found = set()
    for operator in model.get_ops():
        if not _is(operator, OPERATOR):
            continue
        found.add(operator.get_friendly_name())
        for value in operator.input_values():
            while _is(value.get_node(), "Convert", "Reshape") and len(value.get_partial_shape()) == _RANK_BEYOND_JIT:
                found.add(value.get_node().get_friendly_name())
                value = value.get_node().input_value(0)
    return found


def _named(model: Any, name: str) -> Any:
    """The output that a tensor name names, None where there is none."""
    for operation in model.get_ops():
        for output in operation.outputs():
            if name in output.get_names() and not _is(operation, "Result"):
                return output
    return None


def _size(score: Any) -> int:
    """Elements of an image's score."""
    return int(np.prod([axis.get_length() for axis in list(score.get_partial_shape())[1:]]))


def _redirect(output: Any, by: Any) -> None:
    for reader in list(output.get_target_inputs()):
        reader.replace_source_output(by)


def _is(operation: Any, *kinds: str) -> bool:
    return operation.get_type_name() in kinds
