"""Where weights come from: the hub, a file, the caller, or a seeded draw that behaves like a trained model."""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ztp_deploy.errors import BadRequest, MissingSoftware

RANDOM_SEED = 0
HUB_TIMEOUT_SECONDS = 5.0
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_CONTAINERS = ("model", "model_ema", "module", "state_dict", "state_dict_ema")
_LISTED = 5
_POSITIONS = re.compile(r"pos(ition)?_embed(ding)?s?$")


def digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in name order. Raises BadRequest for tensors without values."""
    if bare := [name for name in sorted(state) if state[name].is_meta]:
        raise BadRequest(
            f"{bare[0]} of the model is on torch's meta device and has no values.", "Load its weights first."
        )
    sha = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        sha.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        sha.update(value.view(torch.uint8).numpy().data if value.numel() and value.dim() else value.numpy().tobytes())
    return sha.hexdigest()


def fill_random(model: nn.Module, seed: int = RANDOM_SEED) -> None:
    """Draws all parameters in place from `seed`, each from its own name, the same on every machine.

    Unlike a fresh initialisation the attention has contrast (queries and keys are scaled up, more so
    towards the last heads) and positions matter, so that token scores spread as in a trained model.
    """
    filled = {name: _draw(name, tuple(value.shape), seed) for name, value in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in filled.items()})


def _draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, np.dtype[Any]]:
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    normal = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
    if last == "running_var":
        scale, shift = 0.2, 1.0
        normal = np.abs(normal)
    elif last.endswith("bias") or last == "running_mean":
        scale, shift = 0.02, 0.0
    elif last.endswith(("_token", "pos_embed")):
        scale, shift = 0.5, 0.0
    elif last == "w":  # a performer's random features: rows of norm √rows
        scale, shift = float(shape[0] / shape[1]) ** 0.5, 0.0
    elif len(shape) <= 1:
        scale, shift = 0.1, 1.0
    else:
        scale, shift = float(np.prod(shape[1:])) ** -0.5, 0.0
    drawn = normal * np.float32(scale) + np.float32(shift)
    if name.endswith("qkv.weight"):
        third = shape[0] // 3
        contrast = np.linspace(0.9, 1.5, third, dtype=np.float32)[:, None]
        drawn[: 2 * third] *= np.concatenate([contrast, contrast])
    elif name.endswith(("q_proj.weight", "k_proj.weight")):
        drawn *= np.linspace(0.9, 1.5, shape[0], dtype=np.float32)[:, None]
    if name.endswith("kqv.weight"):  # a performer's keys and queries: its exponentials must not vanish
        drawn[: 2 * (shape[0] // 3)] *= np.float32(0.3)
    if name.split(".")[0].startswith("head"):
        drawn *= np.float32(2)
    return drawn


Translate = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]
"""An official layout's state dict → the module's own keys and shapes."""


def load_given(
    model: nn.Module, state: Mapping[str, Any], origin: str, translate: Translate, container: str | None = None
) -> None:
    """Loads a state dict in an official layout: flat, or under the one of `_CONTAINERS` that is there, or `container`.

    What wrappers put before every key (`module.`, `model.`, `_orig_mod.`) is taken off; weights that belong to a pruning
    method go to `model.method_weights`. Raises BadRequest that lists missing, unexpected and misshapen keys, the
    containers to choose from, or a prefix that only some keys have.
    """
    nested = [str(name) for name, value in state.items() if isinstance(value, Mapping)]
    chosen = [name for name in nested if name in _CONTAINERS] if container is None else [container]
    if container not in (None, *nested):
        raise BadRequest(
            f"{origin} has nothing under {container!r}; it has {', '.join(nested) or 'no containers'}.",
            "Name one that is there, or none where the weights lie flat.",
        )
    if len(chosen) > 1:
        raise BadRequest(
            f"{origin} holds several sets of weights: {', '.join(chosen)}.",
            f"Choose one: the path with :{chosen[-1]} behind it, or that part of the state dict.",
        )
    if nested and not chosen:
        raise BadRequest(
            f"{origin} has no weights where they are looked for; it has dicts under {', '.join(nested)}.",
            f"Weights are found at the top or under {', '.join(_CONTAINERS)}; "
            f"name another: the path with :{nested[0]} behind it, or that part of the state dict.",
        )
    for name in chosen:
        state = state[name]
    expected = model.state_dict()
    found = _unwrapped({str(name): _tensor(name, value, origin) for name, value in state.items()}, expected, origin)
    found, model.method_weights = _split(found)  # type: ignore[assignment]
    found = translate(model, found)
    check_keys(model, expected, found, origin)
    model.load_state_dict(found)


_HUGGING_FACE = re.compile(r"(vit|deit)\.embeddings\.")
"""The first key, in order, of a checkpoint of Hugging Face's without a classifier: no wrapper has added its beginning."""


def _unwrapped(found: dict[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """The weights without the first components that all their keys share and none of the model's begins with.

    Raises BadRequest where the model's weights lie under a prefix that other keys do not have.
    """
    own = {name.partition(".")[0] for name in expected}
    while True:
        parts = [name.partition(".") for name in found]
        firsts = {first for first, _, _ in parts}
        if len(firsts) != 1 or firsts & own or not all(rest for _, _, rest in parts) or _HUGGING_FACE.match(min(found)):
            break
        found = {rest: found[first + dot + rest] for first, dot, rest in parts}
    prefixes = Counter(name.removesuffix(rest) for name in found for rest in _inner(name) if rest in expected)
    for prefix, count in prefixes.most_common(1):
        others = [name for name in found if not name.startswith(prefix)]
        whole = expected.keys() <= {name.removeprefix(prefix) for name in found}
        # A few keys that look like it may belong to another model: that is told by listing what does not fit.
        if others and prefix.partition(".")[0] not in own and (whole or 2 * count >= len(expected)):
            raise BadRequest(
                f"In {origin} {len(found) - len(others)} of {len(found)} keys begin with {prefix!r}, and the others, "
                f"such as {others[0]}, do not: what belongs to the model is not guessed.",
                "Save the state dict of the model alone; a prefix that all keys have is taken off.",
            )
    return found


def _inner(name: str) -> list[str]:
    """What is left of a key without its first component, without its first two, and so on."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def check_keys(model: nn.Module, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], origin: str) -> None:
    """Raises BadRequest that lists missing, unexpected and misshapen keys, and names the sizes they tell of.

    `expected` and `found` are in one layout, the module's own or a publisher's.
    """
    problems = misfits(expected, found)
    if not problems:
        return
    others = [name for name in sorted(expected.keys() & found.keys()) if found[name].shape != expected[name].shape]
    heads = [name for name in others if re.fullmatch(r"(aux_)?head\w*\.bias", name)]
    sizes = [f"--num-classes {len(found[heads[0]])}"] if heads else []
    positions = [name for name in others if _other_positions(expected[name], found[name]) and _POSITIONS.search(name)]
    said, more = "", ""
    if positions:
        name = positions[0]
        # Patches of another size change the number of positions, too: then it tells nothing of the images.
        alone = all(other in positions or "head" in other or "classifier" in other for other in others)
        side = _image_side(model, expected[name], found[name]) if alone else None
        if side:
            sizes.append(f"--img-size {side}")
            said = f" It is for images of {side} pixels: positions are not resampled here."
        else:
            said = " It has positions for another number of patches: positions are not resampled here."
        more = " Or resample the positions when fine-tuning."
    given = " ".join(sizes) or "--num-classes or --img-size"
    raise BadRequest(
        f"{origin} does not fit the model. {problems}.{said}",
        f"Check the model name, or say what sizes it has: {given}, in Python overrides=ModelSize(…).{more}",
    )


def _other_positions(expected: Tensor, found: Tensor) -> bool:
    """Whether two position embeddings differ in how many they are, and in nothing else."""
    return (
        expected.dim() == found.dim()
        and sum(map(int.__ne__, expected.shape, found.shape)) == 1
        and (expected.shape[-1] == found.shape[-1])
    )


def _image_side(model: nn.Module, expected: Tensor, found: Tensor) -> int | None:
    """The side in pixels of the images that a checkpoint's positions are for; None where these make no square."""
    from ztp_deploy.models import host_of

    geometry = host_of(model).geometry
    tokens, theirs = (math.prod(value.shape[:-1]) for value in (expected, found))
    rows, own = math.isqrt(max(0, theirs - tokens + geometry.patch_tokens)), math.isqrt(geometry.patch_tokens)
    fits = rows**2 == theirs - tokens + geometry.patch_tokens and own**2 == geometry.patch_tokens
    return rows * geometry.image_size // own if rows and fits and geometry.image_size % own == 0 else None


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Missing, unexpected and misshapen keys, of each kind the first five and how many more; empty where there are none."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & found.keys())
            if found[name].shape != expected[name].shape
        ],
    }
    return "; ".join(f"{kind}: {_first_few(keys)}" for kind, keys in problems.items() if keys)


def _first_few(keys: Sequence[str]) -> str:
    more = len(keys) - _LISTED
    return ", ".join(keys[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The backbone's weights, and those that a checkpoint carries for a method, by method."""
    from ztp_deploy.methods import WEIGHTS

    own: dict[str, dict[str, Tensor]] = {}
    for method, pattern in WEIGHTS.items():
        mine = {name: value for name, value in state.items() if re.fullmatch(pattern, name)}
        if mine:
            own[method] = mine
    taken = {name for weights in own.values() for name in weights}
    return {name: value for name, value in state.items() if name not in taken}, own


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights together with those it carries for methods."""
    own: Mapping[str, Mapping[str, Tensor]] = getattr(model, "method_weights", {})
    return {**model.state_dict(), **{name: value for weights in own.values() for name, value in weights.items()}}


def user_path(text: str | Path) -> tuple[Path, str | None]:
    """The path with `~` expanded where that can be done, and the container that is named behind it: `file.pth:model`."""
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        path = Path(text)
    file, colon, container = str(path).rpartition(":")
    if colon and not path.exists() and Path(file).is_file():
        return Path(file), container
    return path, None


def check_file(path: Path) -> None:
    """Raises BadRequest where there is no such file."""
    if not path.is_file():
        raise BadRequest(
            f"weights={str(path)!r} is not a file.", "Give auto, pretrained, random, or the path of a checkpoint."
        )


def _tensor(name: object, value: object, origin: str) -> Tensor:
    """A dense, finite tensor. Raises BadRequest for anything else under a name."""
    if not isinstance(value, (Tensor, np.ndarray)):
        reason = f"{type(value).__name__}, not a tensor"
    elif isinstance(value, np.ndarray) and (value.dtype.kind not in "biufc" or not value.dtype.isnative):
        reason = f"{value.dtype}, no numbers of torch's"
    else:
        tensor = torch.as_tensor(value)
        if tensor.is_meta or tensor.layout is not torch.strided:
            reason = "a tensor without plain values"
        elif tensor.is_complex():
            reason = "complex numbers"
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            reason = "NaN or infinite values"
        else:
            return tensor
    raise BadRequest(f"{origin} holds {reason} under {name!r}.", "Give a plain state dict of finite tensors.")


def from_jax(state: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """JAX's arrays in torch's order: heads joined, [in, out] as [out, in], [h, w, in, out] as [out, in, h, w]."""
    turned = {}
    for name, value in state.items():
        if name.endswith("/out/kernel") and value.ndim == 3:
            value = value.reshape(-1, value.shape[-1])
        elif re.search("/(query|key|value)/", name) and value.ndim >= 2:
            value = value.reshape(*value.shape[:-2], -1)
        if name.endswith("kernel"):
            value = np.moveaxis(value, (-1, -2), (0, 1))
        turned[name] = value
    return turned


def read_file(path: Path) -> dict[str, Any]:
    """A state dict from `.safetensors`, `.npz`, or a torch file, read without running any code in it."""
    check_file(path)
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return from_jax(dict(arrays))
        except Exception as error:  # numpy and zlib raise what they like on a foreign file
            raise BadRequest(f"{path} cannot be read as arrays of numpy.", "Is the file complete?") from error
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise BadRequest(f"{path} cannot be read as safetensors: {error}.", "Is the file complete?") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on old pickle protocols; what cannot be read is refused below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise anything
        raise BadRequest(
            f"{path} cannot be read as a plain torch checkpoint: it is damaged, or holds more than tensors.",
            "Save its state dict alone with torch.save or safetensors.",
        ) from error
    if not isinstance(loaded, dict):
        raise BadRequest(f"{path} holds a {type(loaded).__name__}, not a state dict.", "Save model.state_dict().")
    return loaded


def cache_directory() -> Path | None:
    """Where downloaded weights are kept: `$ZTP_CACHE/weights`, or None for the hub's own cache."""
    root = os.environ.get("ZTP_CACHE")
    return Path(root) / "weights" if root else None


def find_pretrained(repository: str) -> Path:
    """The weights file of a hub repository: from the cache, else downloaded.

    A look-up that cannot succeed gives up after `HUB_TIMEOUT_SECONDS`. Raises MissingSoftware.
    """
    import huggingface_hub as hub

    cache = cache_directory()
    for filename in HUB_FILES:
        cached = hub.try_to_load_from_cache(repository, filename, cache_dir=cache)
        if isinstance(cached, str):
            return Path(cached)
    try:
        for filename in HUB_FILES:
            if _exists(repository, filename):
                return Path(hub.hf_hub_download(repository, filename, cache_dir=cache))
    except Exception as error:  # the client's transport errors changed class with each of its HTTP libraries
        raise MissingSoftware(
            f"The weights {repository} are not in the cache and the hub did not give them ({type(error).__name__}).",
            "Connect and try again, give a checkpoint file (--weights path), or use random ones (--weights random).",
        ) from error
    raise MissingSoftware(
        f"The hub has no weights under {repository}.",
        "Give a checkpoint file (--weights path), or use random ones (--weights random).",
    )


def _exists(repository: str, filename: str) -> bool:
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, filename), timeout=HUB_TIMEOUT_SECONDS)
    except EntryNotFoundError:
        return False
    return True
