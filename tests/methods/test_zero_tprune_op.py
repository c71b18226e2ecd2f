"""The whole stage as one operator: what it covers, what it computes, and its kernels for a GPU, interpreted and compiled."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch.export import Dim

import ztp_deploy as ztp
from tests import tiny
from ztp_deploy import environment
from ztp_deploy.exporters import torch_export
from ztp_deploy.exporters.graph import InferenceGraph
from ztp_deploy.exporters.lower import join_stages, lower
from ztp_deploy.methods import zero_tprune as zt
from ztp_deploy.methods import zero_tprune_op as op
from ztp_deploy.plan import Stage

triton = pytest.importorskip("triton", reason="torch came without Triton (pip install triton)")

# batch, heads, patches, width, special tokens, dropped by S, rounds, kept, options
CASES = {
    "deit_s": (2, 3, 196, 64, 1, 29, 1, 137, {}),
    "second stage, three rounds": (1, 6, 137, 64, 1, 21, 3, 95, {}),
    "published": (1, 3, 96, 64, 1, 15, 8, 66, {"renormalise": True}),
    "no S-stage": (2, 3, 49, 32, 2, 0, 1, 30, {}),
    "no S-stage, two rounds": (1, 3, 49, 32, 2, 0, 2, 30, {}),
    "no class token, mean of all heads, products": (
        2, 4, 66, 48, 0, 10, 2, 40, {"start": "uniform", "heads": "mean", "variance_bounds": None, "metric": "dot"},
    ),
    "one head": (1, 1, 16, 16, 1, 4, 1, 8, {}),
}  # fmt: skip


def arguments(batch, heads, patches, width, special, similar, rounds, kept, chosen, device="cpu", dtype=torch.float16):
    """The operator's arguments for seeded queries, keys and values, laid out as a projection leaves them."""
    options = zt.Options(**chosen)
    generator = torch.Generator().manual_seed(patches)
    tokens = patches + special
    projected = [torch.randn(batch, tokens, heads * width, generator=generator) * 1.2 for _ in range(3)]
    parts = [values.to(device, dtype).unflatten(2, (heads, -1)).transpose(1, 2) for values in projected]
    stage = Stage(
        block=1, place="after_block", tokens_in=patches, tokens_out=kept, static={"similar": similar, "rounds": rounds}
    )
    starts = zt.Starts.of(stage, special, 0 if special else None, options)
    low, high = options.variance_bounds or (0.0, op._ALL)
    flags = (options.heads == "mean", options.renormalise, options.metric == "cosine")
    return (
        *parts, starts.everyone.to(device), starts.survivors.to(device), width**-0.5, special, similar, rounds, kept,
        low, high, *flags,
    )  # fmt: skip


def in_float32(given):
    """What torch's own operators say of the same numbers, multiplied in float32."""
    return op.Outcome(*op._plain(*(value.float() for value in given[:3]), *given[3:]))


def assert_same(found, expected, similar, ordered=True):
    """The same tokens, the same scores, and values to half precision."""
    sort = (lambda kept: kept) if ordered else (lambda kept: kept.sort(1).values)
    assert torch.equal(sort(found.kept), sort(expected.kept))
    for name in ("pre_score", "pre_spread", "similarity", "score", "spread") if similar else ("score", "spread"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found.mixed.float(), expected.mixed, rtol=2e-2, atol=5e-3)
    assert found.mixed.transpose(1, 2).is_contiguous()


def run_kernels(given):
    """The kernels on the CPU, in a process where Triton interprets."""
    from ztp_deploy.methods import zero_tprune_triton

    zero_tprune_triton.wrap_triton = lambda kernel: kernel  # torch 2.11 wraps none that are interpreted
    return [value.clone() for value in zero_tprune_triton.run(*given)]


@pytest.fixture(scope="module")
def interpreted():
    """`run_kernels`, in a process of its own: Triton looks once, when it is imported, whether to interpret."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, get_context("spawn"))
        pool.submit(torch.zeros, 1).result()
    with pool:
        yield lambda given: op.Outcome(*pool.submit(run_kernels, given).result())


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_choose_what_the_method_chooses(name, interpreted):
    given = arguments(*CASES[name])
    assert_same(interpreted(given), in_float32(given), similar=CASES[name][5])


def test_the_kernels_give_ties_to_the_lower_index(interpreted):
    given = arguments(*CASES["deit_s"])
    alike = [torch.ones_like(part) for part in given[:3]]
    found = interpreted((*alike, *given[3:]))
    # All alike: I′ ranks by index, S drops the first of the later half. (A processor's own products of equal numbers
    # need not be equal: what torch keeps of them says nothing.)
    assert found.kept.tolist() == [[*range(98), *range(127, 166)]] * 2
    torch.testing.assert_close(found.pre_score, in_float32((*alike, *given[3:])).pre_score, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("renormalise", [False, True])
def test_rows_of_very_low_logits_vote_as_others_do(renormalise, interpreted):
    """Their exponentials, brought to the row's sum, must not reach columns beyond the last token."""
    given = list(arguments(1, 3, 49, 32, 1, 10, 1, 30, {"renormalise": renormalise}))
    given[:2] = [part.clone() for part in given[:2]]
    given[0][..., 0], given[1][..., 0] = 25, -25
    expected = in_float32(given)
    assert float(expected.score.max()) < 10
    found = interpreted(given)
    assert torch.equal(found.kept.sort(1).values, expected.kept.sort(1).values)
    torch.testing.assert_close(found.score, expected.score, rtol=1e-3, atol=1e-3)


def test_what_is_no_number_stays_within_its_image(interpreted):
    given = list(arguments(*CASES["deit_s"]))
    given[0] = given[0].clone()
    given[0][0, :, 100] = float("inf")
    given[1] = given[1].clone()
    given[1][0, 1, 150] = float("nan")
    found, expected = interpreted(given), in_float32(given)
    assert not expected.mixed[0].isfinite().all()
    for kept in found.kept:
        assert len(set(kept.tolist())) == 137
        assert 0 <= kept.min() <= kept.max() < 196
    assert torch.equal(found.kept[1], expected.kept[1])
    torch.testing.assert_close(found.score[1], expected.score[1], rtol=2e-5, atol=2e-5)


def test_the_kernels_take_any_layout(interpreted):
    given = arguments(*CASES["no S-stage"])
    turned = [part.transpose(2, 3).contiguous().transpose(2, 3) for part in given[:3]]
    assert turned[0].stride(3) != 1
    assert_same(interpreted((*turned, *given[3:])), in_float32(given), similar=0)


def test_the_heads_that_count_are_those_of_the_bounds(interpreted):
    given = list(arguments(*CASES["deit_s"]))
    given[0] = given[0] * torch.tensor([0.2, 1.0, 4.0], dtype=torch.float16).reshape(1, 3, 1, 1)
    spread = in_float32(given).spread
    variances = (spread.square() / (197 - 29)).flatten(1)
    given[10:12] = [float(variances[:, 0].max()) * 1.5, float(variances[:, 2].min()) / 1.5]
    within = (variances > given[10]) & (variances < given[11])
    assert within.tolist() == [[False, True, False]] * 2
    found = interpreted(given)
    assert_same(found, in_float32(given), similar=29)
    given[10:12] = [0.0, op._ALL]
    assert not torch.equal(in_float32(given).kept, found.kept)


LAUNCHES = {"deit_s": 4, "no S-stage": 2, "no S-stage, two rounds": 3}
PLAIN_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


@pytest.fixture
def launches(monkeypatch):
    """Kernels as they are called for a case, instead of run."""
    from ztp_deploy.methods import zero_tprune_triton

    def record(case, dtype, capability=(8, 0)):
        called = []

        class Recorder:
            def __init__(self, kernel):
                self.kernel = kernel

            def __getitem__(self, grid):
                return lambda *given, **named: called.append((self.kernel, grid, given, named))

        monkeypatch.setattr(zero_tprune_triton, "wrap_triton", Recorder)
        monkeypatch.setattr(zero_tprune_triton, "_capability", lambda device: capability)
        zero_tprune_triton.run(*arguments(*CASES[case], dtype=dtype))
        return called

    return record


def test_a_stage_is_as_few_kernels_as_it_needs(launches):
    assert {case: len(launches(case, torch.float16)) for case in LAUNCHES} == LAUNCHES
    grids = [grid for _, grid, _, _ in launches("deit_s", torch.float16)]
    assert grids == [(6,), (2,), (6,), (2,)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "capability, dtype, case",
    [
        (80, torch.bfloat16, "deit_s"),
        (89, torch.float16, "published"),
        (90, torch.float16, "deit_s"),
        (120, torch.float16, "deit_s"),
    ],
)
def test_the_kernels_compile_for_a_gpu_and_fit_it(capability, dtype, case, launches, monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for kernel, _, given, named in launches(case, dtype, divmod(capability, 10)):
        values = dict(zip(kernel.arg_names, given, strict=False)) | named
        options = {name: values.pop(name) for name in ("num_warps", "num_stages")}
        signature, constants, aligned = {}, {}, {}
        for place, name in enumerate(kernel.arg_names):
            value = values[name]
            if isinstance(value, torch.Tensor):
                signature[name] = f"*{PLAIN_TYPES[value.dtype]}"
            elif kernel.params[place].is_constexpr:
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "fp64" if isinstance(value, float) else "i32"
            if signature[name].startswith("*") or (signature[name] == "i32" and value % 16 == 0):
                aligned[place,] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.metadata.shared <= 99 * 1024  # of a GeForce's processor
        (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
        )
        assert re.search(r"STACK:0 ", usage.stdout), f"{kernel.__name__} spills registers: {usage.stdout}"


@pytest.fixture(scope="module")
def small():
    """Three blocks, two stages."""
    model = tiny.model(size=tiny.SIZE.model_copy(update={"depth": 3}))
    return ztp.prune(model, ztp.make_plan(model, ratio=0.6, sites=[1, 2]))


def exported(pruned, precision):
    """A program as the torch.export format writes it, unsaved."""
    return torch_export._traced(join_stages(lower(InferenceGraph(pruned, "float32"), precision)), 2)


def kinds(program):
    """How often the program calls each operator."""
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def test_programs_in_half_precision_hold_stages_by_name(small):
    assert kinds(exported(small, "fp16"))["ztp.zero_tprune.default"] == 2
    single = kinds(exported(small, "fp32"))
    assert single["ztp.zero_tprune.default"] == 0
    assert single["aten.softmax.int"] == 2


def test_joined_stages_keep_what_open_ones_keep(small):
    graph = lower(InferenceGraph(small, "float32"), "fp16")
    images = torch.from_numpy(tiny.images(3))
    with torch.inference_mode():
        apart, joined = graph.audited(images), join_stages(graph).audited(images)
    assert len(apart) == len(joined) == 3 + 2 * 5
    for one, other in zip(apart, joined, strict=True):
        assert torch.equal(one, other)
    assert not any(stage.joined for stage in graph.pruned.stages.values())


@pytest.mark.parametrize(
    "options, misfit",
    [
        ({}, None),
        ({"renormalise": True, "heads": "mean", "variance_bounds": None, "metric": "dot", "rounds": 3}, None),
        ({"partition": "alternate"}, "important half"),
        ({"partition": "none"}, "important half"),
        ({"metric": "euclidean"}, "by products"),
        ({"features": "values"}, "compare keys"),
        ({"feature_heads": "averaged"}, "all heads together"),
        ({"temperature": 2.0}, "mixes the values"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_options_without_kernels_stay_open(options, misfit):
    model = tiny.model(size=tiny.SIZE.model_copy(update={"depth": 1}))
    pruned = ztp.prune(model, ztp.make_plan(model, ratio=0.6, sites=[1], options=options))
    found = kinds(exported(pruned, "bf16"))
    assert found["ztp.zero_tprune.default"] == (misfit is None)
    reason = op.misfit(attention_of(17, 32), zt.Options(**options))
    assert (reason is None) if misfit is None else misfit in reason


def attention_of(tokens, width, dtype=torch.float16, bias=None):
    """Attention of one head whose numbers nobody reads."""
    from ztp_deploy.models.base import Attention

    part = torch.zeros(1, 1, tokens, width, dtype=dtype)
    return Attention(part[0], part, part, part, 1.0, bias)


@pytest.mark.parametrize(
    "attention, misfit",
    [
        (attention_of(256, 64), None),
        (attention_of(257, 64), "256 tokens"),
        (attention_of(256, 65), "64 wide"),
        (attention_of(32, 64, torch.float32), "half precision"),
        (attention_of(32, 64, bias=torch.zeros(1, 1, 1, 32)), "bias"),
    ],
    ids=["fits", "too many tokens", "too wide", "float32", "bias"],
)
def test_attention_without_kernels_stays_open(attention, misfit):
    reason = op.misfit(attention, zt.Options())
    assert (reason is None) if misfit is None else misfit in reason


def test_the_operator_keeps_its_word_to_torch():
    torch.library.opcheck(op.zero_tprune, arguments(*CASES["deit_s"]))
    torch.library.opcheck(op.zero_tprune, arguments(*CASES["no S-stage"]))


def test_a_compiler_gets_stages_written_out(small):
    program = exported(small, "fp16")
    module = program.module()
    assert op.write_out(module, kernels=False)
    images = torch.from_numpy(tiny.images(2))
    with torch.inference_mode():
        for one, other in zip(module(images), program.module()(images), strict=True):
            assert torch.equal(one, other)
    plain = kinds(torch_export.export_module(module, images, Dim("batch", min=1)))
    assert (plain["ztp.zero_tprune.default"], plain["aten.sort.stable"]) == (0, 6)
    assert not op.write_out(module, kernels=False)

    module = program.module()
    assert op.write_out(module, kernels=True)
    kernels = torch_export.export_module(module, images, Dim("batch", min=1)).run_decompositions({})
    found = kinds(kernels)
    assert (found["triton_kernel_wrapper_functional"], found["aten.sort.stable"], found["aten.softmax.int"]) == (
        8,
        0,
        0,
    )


def test_old_gpus_and_processors_have_no_kernels(monkeypatch):
    assert not op.has_kernels(torch.device("cpu"))
    for capability, has in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert op.has_kernels(torch.device("cuda:0")) == has


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_on_a_gpu(name, dtype):
    if not environment.gpus():
        pytest.skip("needs an NVIDIA GPU and its driver; none was found on this machine")
    given = arguments(*CASES[name], device="cuda", dtype=dtype)
    found = op.Outcome(*op.zero_tprune(*given))
    again = op.Outcome(*op.zero_tprune(*given))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    assert_same(found, in_float32(given), similar=CASES[name][5], ordered=False)
