"""Trains the reference classifier: `python -m ztp_deploy.reference.train --out FILE`.

Three stages of one schedule: windows of 49 patches around the digit, which cost a fifth of a canvas and in which the
model learns to read; windows of 100 patches; then whole canvases, in which it learns to find. A second head, thrown
away afterwards, says of every patch which digit it belongs to or that it belongs to none (token labelling, Jiang et
al. 2021).
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import start_processes

from ztp_deploy.atomic import write_bytes
from ztp_deploy.entrypoint import run_and_exit
from ztp_deploy.errors import BadRequest
from ztp_deploy.reference import canvases
from ztp_deploy.reference.model import MEAN, STD, WIDTH, vit_digits

GRID = canvases.SIDE // canvases.PATCH
NO_DIGIT = 10
SAY_EVERY, SAVE_EVERY = 50, 200

Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Normalised images [B, 3, SIDE, SIDE], labels [B] and coverage [B, patches]."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides a training."""

    seed: int = 0
    processes: int = 2
    canvases: int = 40_000
    small_windows: int = 200_000
    large_windows: int = 70_000
    whole_canvases: int = 60_000
    batch: int = 64
    muon_rate: float = 0.02
    adam_rate: float = 1e-3
    warm_up: float = 0.02
    weight_decay: float = 0.05
    patch_loss: float = 0.5
    smoothing: float = 0.05
    enough: float = 0.7
    ease_step: float = 0.004

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(7, self.small_windows, ease=1.0),
            Stage(10, self.large_windows, ease=0.4),
            Stage(GRID, self.whole_canvases, ease=0.3),
        )


@dataclass(frozen=True, slots=True)
class Stage:
    """Part of the schedule: so many images, `side` patches wide, and how plain they are at its start."""

    side: int
    images: int
    ease: float

    @property
    def cost(self) -> float:
        """Of one image, in whole canvases: what a token costs hardly depends on how many there are."""
        return self.side**2 / GRID**2


class Canvases:
    """Training canvases drawn ahead of time: pixels and plain [N, SIDE, SIDE, 3], labels [N], coverage [N, patches].

    The pixels are shared with the processes it is passed to.
    """

    def __init__(self, count: int) -> None:
        shape = (count, canvases.SIDE, canvases.SIDE, 3)
        self.pixels, self.plain = torch.empty((2, *shape), dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        self.labels = torch.empty(count, dtype=torch.int64)
        self.coverage = torch.empty((count, GRID * GRID))
        with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for index, canvas in enumerate(pool.map(partial(canvases.draw, "train"), range(count), chunksize=64)):
                self.pixels[index], self.plain[index] = torch.from_numpy(canvas.pixels), torch.from_numpy(canvas.plain)
                self.labels[index], self.coverage[index] = canvas.label, torch.from_numpy(canvas.coverage)

    def batch(self, chosen: Tensor, ease: float) -> Batch:
        """Those canvases, `ease` of the way to plain."""
        pixels = self.pixels[chosen].float()
        if ease:
            pixels.lerp_(self.plain[chosen].float(), ease)
        images = pixels.div_(255).sub_(MEAN).div_(STD).permute(0, 3, 1, 2).contiguous()
        return images, self.labels[chosen], self.coverage[chosen]


class Ease:
    """How plain canvases are: plain at first, and less so whenever most are read right."""

    def __init__(self, start: float, enough: float, step: float) -> None:
        self.value, self.enough, self.step, self.accuracy = start, enough, step, 0.0

    def update(self, accuracy: float) -> None:
        self.accuracy += 0.05 * (accuracy - self.accuracy)
        if self.accuracy > self.enough:
            self.value = max(0.0, self.value - self.step)


def orders(count: int, images: int, size: int, random: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Numbers of canvases, `size` at a time: all of them shuffled, again and again, until `images` were given out."""
    if images < size:
        return
    numbers = np.concatenate([random.permutation(count) for _ in range(-(-images // count))])
    for start in range(0, images - size + 1, size):
        yield numbers[start : start + size]


def windows(coverage: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Patch indices [B, side²] of a random window that holds nearly all of the digit."""
    grid = coverage.reshape(-1, 1, GRID, GRID)
    held = F.avg_pool2d(grid, side, stride=1) * side**2 / grid.sum((2, 3), keepdim=True)
    good = (held.flatten(1) >= torch.minimum(held.flatten(1).amax(1, keepdim=True), torch.tensor(0.95))).float()
    corner = torch.multinomial(good, 1, generator=generator)[:, 0]
    places = GRID - side + 1
    offsets = torch.arange(side)
    inside = (offsets[:, None] * GRID + offsets).flatten()
    return (corner // places * GRID + corner % places)[:, None] + inside


def features(model: nn.Module, images: Tensor, chosen: Tensor | None) -> Tensor:
    """Normed tokens [B, 1 + patches, dim] of a timm ViT that sees all patches or the chosen ones."""
    vit: Any = model
    patches = vit.patch_embed.proj(images).flatten(2).transpose(1, 2) + vit.pos_embed[:, 1:]
    if chosen is not None:
        patches = patches.gather(1, chosen[:, :, None].expand(-1, -1, patches.shape[2]))
    first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
    return vit.norm(vit.blocks(torch.cat([first, patches], 1)))  # type: ignore[no-any-return]


def loss_of(
    model: nn.Module, patch_head: nn.Module, recipe: Recipe, batch: Batch, chosen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss, and how many of the images were read right."""
    images, labels, coverage = batch
    tokens = features(model, images, chosen)
    logits = model.head(tokens[:, 0]).float()  # type: ignore[operator]
    part = (coverage if chosen is None else coverage.gather(1, chosen)).mul(3).clamp(0, 1)
    by_patch = patch_head(tokens[:, 1:]).float().log_softmax(-1)
    digit = by_patch.gather(2, labels[:, None, None].expand(-1, by_patch.shape[1], 1))[:, :, 0]
    found = (part * digit).sum() / part.sum() + ((1 - part) * by_patch[:, :, NO_DIGIT]).sum() / (1 - part).sum()
    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.smoothing) - recipe.patch_loss * found
    return loss, (logits.argmax(1) == labels).sum()


def initialise(model: nn.Module) -> None:
    """Positions start as sines and cosines, so that what is near is alike from the first step."""
    from timm.layers import build_sincos2d_pos_embed

    vit: Any = model
    dim = vit.embed_dim
    with torch.no_grad():
        vit.pos_embed[0, 1:] = build_sincos2d_pos_embed([GRID, GRID], dim, interleave_sin_cos=False) * 0.5


class Muon(torch.optim.Optimizer):
    """Steps of equal size in every direction of a matrix: momentum made orthogonal by Newton–Schulz (Jordan, 2024).

    As `torch.optim.Muon` with its first rule of step sizes, in float32 and with matrices of one shape together:
    in bfloat16, which torch's is fixed to, a processor without it takes twenty times as long.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for (rows, columns), matrices in by_shape.items():
                gradient = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
                state = self.state[matrices[0]]
                momentum = state.setdefault("momentum", torch.zeros_like(gradient))
                momentum.lerp_(gradient, 1 - 0.95)
                rate = group["lr"] * math.sqrt(max(1, rows / columns))
                for matrix, update in zip(matrices, orthogonal(gradient.lerp(momentum, 0.95)), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [N, R, C] with their singular values brought near 1 (about 0.7 to 1.2)."""
    tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT if tall else matrices
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), found, beta=3.4445)
    return found.mT if tall else found


def optimisers(model: nn.Module, patch_head: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else."""
    matrices = [value for name, value in model.named_parameters() if name.startswith("blocks.") and value.dim() == 2]
    taken = {id(value) for value in matrices}
    rest = [value for value in [*model.parameters(), *patch_head.parameters()] if id(value) not in taken]
    return [
        Muon(matrices, recipe.muon_rate, recipe.weight_decay),
        torch.optim.AdamW(rest, lr=recipe.adam_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)),
    ]


def train(recipe: Recipe, out: Path) -> None:
    """Trains from the recipe's seed and writes the weights to `out`, every so often and at the end.

    Each of `recipe.processes` computes its part of every batch on one thread. Runs on processors of one kind agree;
    on others rounding in bfloat16 takes them apart. Raises BadRequest for a recipe that trains nothing and for an `out`
    that is a folder.
    """
    check(recipe, out)
    begin = time.monotonic()
    drawn = Canvases(recipe.canvases)
    print(f"{recipe.canvases} canvases drawn in {time.monotonic() - begin:.0f} s", flush=True)
    if recipe.processes == 1:
        _train(0, recipe, drawn, out, None)
        return
    with tempfile.TemporaryDirectory() as meeting:
        start_processes(_train, (recipe, drawn, out, f"file://{meeting}/rank"), recipe.processes)  # type: ignore[no-untyped-call]


def check(recipe: Recipe, out: Path) -> None:
    """Raises BadRequest for what would fail only once canvases are drawn or a first part of the training is done."""
    if out.is_dir():
        raise BadRequest(f"--out {out} is a folder.", "Give the name of a file in it.")
    for name in ("processes", "canvases", "batch"):
        if (number := getattr(recipe, name)) < 1:
            raise BadRequest(f"--{name} {number} was asked for.", "Give at least 1.")
    if recipe.batch < recipe.processes:
        raise BadRequest(
            f"A --batch of {recipe.batch} has no image for each of {recipe.processes} processes.",
            "Give a larger one, or fewer --processes.",
        )
    if all(stage.images < recipe.batch for stage in recipe.stages):
        raise BadRequest(
            f"No stage has the images of one --batch of {recipe.batch}: nothing would be trained.",
            "Give more --small-windows, --large-windows or --whole-canvases.",
        )


def _train(rank: int, recipe: Recipe, drawn: Canvases, out: Path, meeting: str | None) -> None:
    begin = time.monotonic()
    torch.manual_seed(recipe.seed)
    if meeting:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group("gloo", meeting, world_size=recipe.processes, rank=rank)
    model: nn.Module = vit_digits()
    initialise(model)
    patch_head = nn.Linear(WIDTH, NO_DIGIT + 1)
    weights = [*model.parameters(), *patch_head.parameters()]
    optims = optimisers(model, patch_head, recipe)
    groups = [group for optimiser in optims for group in optimiser.param_groups]
    rates = [group["lr"] for group in groups]
    generator = torch.Generator().manual_seed(recipe.seed * recipe.processes + rank)
    random = np.random.default_rng(recipe.seed)
    # Progress is counted in work, that of a whole canvas being 1.
    total = sum(stage.images * stage.cost for stage in recipe.stages)
    done, right, seen, step = 0.0, 0.0, 0, 0
    for stage in recipe.stages:
        ease = Ease(stage.ease, recipe.enough, recipe.ease_step)
        for numbers in orders(recipe.canvases, stage.images, recipe.batch, random):
            batch = drawn.batch(torch.from_numpy(numbers[rank :: recipe.processes]), ease.value)
            share = done / total
            scale = rate_at(share, recipe.warm_up)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * scale
            chosen = windows(batch[2], stage.side, generator) if stage.side < GRID else None
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_pays()):
                loss, correct = loss_of(model, patch_head, recipe, batch, chosen)
            loss.backward()  # type: ignore[no-untyped-call]
            accuracy = share_gradients(weights, correct / len(batch[1]))
            nn.utils.clip_grad_norm_(weights, 1.0)
            for optimiser in optims:
                optimiser.step()
                optimiser.zero_grad()
            ease.update(accuracy)
            done += recipe.batch * stage.cost
            right, seen, step = right + accuracy, seen + 1, step + 1
            if rank == 0 and step % SAY_EVERY == 0:
                found = f"loss {loss.item():.3f}, accuracy {right / seen:.3f}, ease {ease.value:.2f}"
                print(f"{share:6.1%} step {step}: {found}, {time.monotonic() - begin:.0f} s", flush=True)
                right, seen = 0.0, 0
            if rank == 0 and step % SAVE_EVERY == 0:
                write_bytes(out, save(model.state_dict()))
    if rank == 0:
        write_bytes(out, save(model.state_dict()))
    if meeting:
        distributed.destroy_process_group()


def rate_at(share: float, warm_up: float) -> float:
    """The learning rate after a share of the work, as a share of the highest: a linear rise over `warm_up`, a cosine."""
    rise = min(1.0, share / warm_up + 1e-2) if warm_up else 1.0
    return rise * (0.5 + 0.5 * math.cos(math.pi * share))


def bfloat16_pays() -> bool:
    """Whether this processor multiplies in bfloat16; one that does not takes longer over it than over float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def share_gradients(weights: Sequence[nn.Parameter], accuracy: Tensor) -> float:
    """Averages the gradients of all processes in place, where there are several, and gives their mean accuracy."""
    if not distributed.is_initialized():
        return float(accuracy)
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), accuracy.float()[None]])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, part in zip(gradients, torch.split(flat[:-1], [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    return float(flat[-1])


def parser() -> argparse.ArgumentParser:
    """What the command takes: where the weights go, and all of a recipe."""
    found = argparse.ArgumentParser(description="Train the reference classifier.")
    found.add_argument("--out", type=Path, required=True, help="Where the weights go (.safetensors).")
    for name, value in asdict(Recipe()).items():
        found.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return found


def main() -> None:
    given = vars(parser().parse_args())
    run_and_exit(lambda: train(out=given.pop("out"), recipe=Recipe(**given)))


if __name__ == "__main__":
    main()
