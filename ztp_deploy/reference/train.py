"""Trains the reference classifier: `python -m ztp_deploy.reference.train --out FILE`.

Two stages of one schedule: windows of a canvas around the digit, 49 patches and about four times as fast, in which the
model learns to read; then whole canvases, in which it learns to find. A second head, thrown away afterwards, says
of every patch which digit it belongs to or that it belongs to none (token labelling, Jiang et al. 2021).
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import start_processes

from ztp_deploy.reference import canvases
from ztp_deploy.reference.model import MEAN, STD, WIDTH, vit_digits

GRID = canvases.SIDE // canvases.PATCH
WINDOW = 7
NO_DIGIT = 10
SAY_EVERY, SAVE_EVERY = 50, 200

Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Normalised images [B, 3, SIDE, SIDE], labels [B] and coverage [B, patches]."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides a training."""

    seed: int = 0
    processes: int = 2
    canvases: int = 20_000
    window_images: int = 150_000
    canvas_images: int = 30_000
    window_batch: int = 64
    canvas_batch: int = 64
    muon_rate: float = 0.02
    adam_rate: float = 1e-3
    warm_up: float = 0.02
    weight_decay: float = 0.05
    patch_loss: float = 0.5
    smoothing: float = 0.05
    enough: float = 0.7
    ease_step: float = 0.004


class Canvases:
    """Training canvases drawn ahead of time: pixels and plain [N, SIDE, SIDE, 3], labels [N], coverage [N, patches]."""

    def __init__(self, count: int) -> None:
        self.pixels = np.empty((count, canvases.SIDE, canvases.SIDE, 3), np.uint8)
        self.plain = np.empty_like(self.pixels)
        self.labels = np.empty(count, np.int64)
        self.coverage = np.empty((count, GRID * GRID), np.float32)
        with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for index, canvas in enumerate(pool.map(partial(canvases.draw, "train"), range(count), chunksize=64)):
                self.pixels[index], self.plain[index] = canvas.pixels, canvas.plain
                self.labels[index], self.coverage[index] = canvas.label, canvas.coverage

    def batch(self, chosen: NDArray[np.int64], ease: float) -> Batch:
        """Those canvases, `ease` of the way to plain."""
        pixels = torch.from_numpy(self.pixels[chosen]).float()
        if ease:
            pixels.lerp_(torch.from_numpy(self.plain[chosen]).float(), ease)
        images = pixels.div_(255).sub_(MEAN).div_(STD).permute(0, 3, 1, 2).contiguous()
        return images, torch.from_numpy(self.labels[chosen]), torch.from_numpy(self.coverage[chosen])


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
    numbers = np.concatenate([random.permutation(count) for _ in range(-(-images // count))])
    for start in range(0, images - size + 1, size):
        yield numbers[start : start + size]


def windows(coverage: Tensor, generator: torch.Generator) -> Tensor:
    """Patch indices [B, WINDOW²] of a random window that holds nearly all of the digit."""
    grid = coverage.reshape(-1, 1, GRID, GRID)
    held = F.avg_pool2d(grid, WINDOW, stride=1) * WINDOW**2 / grid.sum((2, 3), keepdim=True)
    good = (held.flatten(1) >= torch.minimum(held.flatten(1).amax(1, keepdim=True), torch.tensor(0.95))).float()
    corner = torch.multinomial(good, 1, generator=generator)[:, 0]
    places = GRID - WINDOW + 1
    offsets = torch.arange(WINDOW)
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


def optimisers(model: nn.Module, patch_head: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else."""
    matrices = [value for name, value in model.named_parameters() if name.startswith("blocks.") and value.dim() == 2]
    taken = {id(value) for value in matrices}
    rest = [value for value in [*model.parameters(), *patch_head.parameters()] if id(value) not in taken]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=recipe.adam_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)),
    ]


def train(recipe: Recipe, out: Path) -> None:
    """Trains from the recipe's seed and writes the weights to `out`, every so often and at the end.

    Each of `recipe.processes` computes its part of every batch on one thread. Runs on processors of one kind agree;
    on others rounding in bfloat16 takes them apart.
    """
    begin = time.monotonic()
    drawn = Canvases(recipe.canvases)
    print(f"{recipe.canvases} canvases drawn in {time.monotonic() - begin:.0f} s", flush=True)
    if recipe.processes == 1:
        _train(0, recipe, drawn, out, None)
        return
    with tempfile.TemporaryDirectory() as meeting:
        start_processes(_train, (recipe, drawn, out, f"file://{meeting}/rank"), recipe.processes)  # type: ignore[no-untyped-call]


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
    # Progress is counted in work: a window costs about a quarter of a canvas.
    total = recipe.window_images / 4 + recipe.canvas_images
    done, right, seen, step = 0.0, 0.0, 0, 0
    for windowed in (True, False):
        if windowed:
            images, size, ease = recipe.window_images, recipe.window_batch, Ease(1.0, recipe.enough, recipe.ease_step)
        else:
            images, size, ease = recipe.canvas_images, recipe.canvas_batch, Ease(0.4, recipe.enough, recipe.ease_step)
        for numbers in orders(recipe.canvases, images, size, random):
            batch = drawn.batch(numbers[rank :: recipe.processes], ease.value)
            share = done / total
            scale = min(1.0, share / recipe.warm_up + 1e-2) * (0.5 + 0.5 * math.cos(math.pi * share))
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * scale
            chosen = windows(batch[2], generator) if windowed else None
            with torch.autocast("cpu", torch.bfloat16):
                loss, correct = loss_of(model, patch_head, recipe, batch, chosen)
            loss.backward()  # type: ignore[no-untyped-call]
            accuracy = share_gradients(weights, correct / len(batch[1]))
            nn.utils.clip_grad_norm_(weights, 1.0)
            for optimiser in optims:
                optimiser.step()
                optimiser.zero_grad()
            ease.update(accuracy)
            done += size / (4 if windowed else 1)
            right, seen, step = right + accuracy * size, seen + size, step + 1
            if rank == 0 and step % SAY_EVERY == 0:
                found = f"loss {loss.item():.3f}, accuracy {right / seen:.3f}, ease {ease.value:.2f}"
                print(f"{share:6.1%} step {step}: {found}, {time.monotonic() - begin:.0f} s", flush=True)
                right, seen = 0.0, 0
            if rank == 0 and step % SAVE_EVERY == 0:
                save_file(model.state_dict(), out)
    if rank == 0:
        save_file(model.state_dict(), out)
    if meeting:
        distributed.destroy_process_group()


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the reference classifier.")
    parser.add_argument("--out", type=Path, required=True, help="Where the weights go (.safetensors).")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    train(out=given.pop("out"), recipe=Recipe(**given))


if __name__ == "__main__":
    main()
