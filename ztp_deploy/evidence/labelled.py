"""Labelled pictures: a folder with one sub-folder per class, or a CSV file; and how labels become class indices."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ztp_deploy.errors import BadRequest, nearest
from ztp_deploy.evidence.images import first_of, is_hidden, listed_files
from ztp_deploy.preprocessing import Transform, open_image

HEADER = ["file", "label"]
_AHEAD = 2
"""Batches that are decoded while one runs."""
_JPEG_END = b"\xff\xd9"
_TOGETHER = 64
"""Files that one thread looks at before it says so."""
_NAMED = 20
"""Unreadable files that a refusal names."""


@dataclass(frozen=True)
class Labelled:
    """Pictures and their class indices. `mapping` says how labels became indices, `origin` is the data's own name."""

    files: tuple[Path, ...]
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    mapping: str
    origin: str

    @cached_property
    def sha256(self) -> str:
        """Hash over names, sizes in bytes and labels: the data, wherever it lies."""
        sha = hashlib.sha256()
        for file, name, label in zip(self.files, self.names, self.labels.tolist(), strict=True):
            sha.update(f"{name}|{file.stat().st_size}|{label}\n".encode())
        return sha.hexdigest()

    @cached_property
    def written(self) -> str:
        """Hash over when each file was last written: tells a picture that was edited since, on this machine alone."""
        return hashlib.sha256(repr([file.stat().st_mtime_ns for file in self.files]).encode()).hexdigest()


def read_labelled(data: Path | str, classes: int, labels: Sequence[str] | None) -> Labelled:
    """The pictures of a folder with a sub-folder per class, or of a CSV file with the columns file,label.

    `classes` and `labels` are the model's: how many, and their names where it has any. Paths in a CSV file are
    relative to its folder; a first line `file,label` is its header, and optional. Raises BadRequest for what is
    missing, no image, listed twice or of no class.
    """
    path = Path(data)
    if path.is_dir():
        files, given = _from_folder(path)
    elif path.is_file():
        files, given = _from_csv(path)
    else:
        raise BadRequest(
            f"--data {str(path)!r} is neither a folder nor a file.",
            "Give a folder with one sub-folder per class, or a CSV file with the columns file,label.",
        )
    index, mapping = class_indices(sorted(set(given)), classes, labels)
    root = path if path.is_dir() else path.parent
    return Labelled(
        files=tuple(files),
        names=tuple(_name(file, root) for file in files),
        labels=np.array([index[label] for label in given], np.int64),
        mapping=mapping,
        origin=f"{len(files)} images of {len(index)} classes in {path.name or path.resolve().name}",
    )


def _name(file: Path, root: Path) -> str:
    """The path below the data's folder; above it, the file's own name."""
    return str(file.relative_to(root)) if file.is_relative_to(root) else file.name


def _from_folder(root: Path) -> tuple[list[Path], list[str]]:
    entries = sorted(path for path in root.iterdir() if not is_hidden(path.relative_to(root)))
    loose = [path for path in entries if not path.is_dir()]
    if loose:
        raise BadRequest(
            f"{first_of(loose)} in --data belong{'s' if len(loose) == 1 else ''} to no class: only sub-folders do.",
            "Put pictures into one sub-folder per class, and other files elsewhere.",
        )
    if not entries:
        raise BadRequest(f"--data {str(root)!r} holds no sub-folders.", "Give a folder with one sub-folder per class.")
    files: list[Path] = []
    given: list[str] = []
    for folder in entries:
        found, strange = listed_files(folder)
        if strange:
            raise BadRequest(f"{first_of(strange)} in --data: no image's name.", "Keep only pictures in the folder.")
        if not found:
            raise BadRequest(f"{folder} holds no images.", "Fill it, or take it away.")
        files += found
        given += [folder.name] * len(found)
    return files, given


def _from_csv(path: Path) -> tuple[list[Path], list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = [(number, [cell.strip() for cell in row]) for number, row in enumerate(csv.reader(stream), 1) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadRequest(f"{path} is no CSV file in UTF-8.", "Write it with the columns file,label.") from error
    first = [cell.lower() for cell in rows[0][1]] if rows else []
    if first == HEADER[::-1]:
        raise BadRequest(f"{path} has the columns label,file.", "Write them as file,label.")
    rows = rows[1:] if first == HEADER else rows
    if not rows:
        raise BadRequest(f"{path} lists no images.", "Write one line file,label an image.")
    for number, row in rows:
        if len(row) != 2 or not all(row):
            raise BadRequest(
                f"Line {number} of {path} is {','.join(row)!r}.", "Write file,label with one comma between them."
            )
    files = [path.parent / row[0] for _, row in rows]
    missing = [f"{file} (line {number})" for file, (number, _) in zip(files, rows, strict=True) if not file.is_file()]
    if missing:
        raise BadRequest(
            f"There is no file {first_of(missing)}.",
            f"Paths are relative to {path.name}'s folder; a header can only be file,label.",
        )
    seen: set[Path] = set()
    for file, (number, _) in zip(files, rows, strict=True):
        if file in seen:
            raise BadRequest(f"{file} is listed twice, again in line {number} of {path}.", "List every image once.")
        seen.add(file)
    return files, [row[1] for _, row in rows]


def class_indices(names: Sequence[str], classes: int, labels: Sequence[str] | None) -> tuple[dict[str, int], str]:
    """Labels as they were given → class indices, and a sentence on how that was decided.

    The first of these that fits decides, and it must fit every name: whole numbers are the indices themselves, unless one
    of them is the name of another class of the model; the model's own labels, whole or by their first synonym, in any case
    and with `_` for a space; WordNet ids (n01440764) where the model has ImageNet's classes; sorted order, where there are
    exactly as many names as classes. Raises BadRequest where a name fits by halves, by two classes, or not at all.
    """
    choices, mapping, hint = _reading(names, classes, labels)
    strange = [repr(name) for name in names if name not in choices]
    if strange:
        raise BadRequest(f"{mapping.removesuffix('.')}, but {first_of(strange)} is none of them.", f"{hint}.")
    several = [name for name in names if len(choices[name]) > 1]
    if several:
        raise BadRequest(
            f"{several[0]!r} may be any of the classes {', '.join(map(str, choices[several[0]]))}.",
            "Use class indices or the whole label.",
        )
    index = {name: found[0] for name, found in choices.items()}
    _check_distinct(index, classes)
    return index, mapping


def _reading(names: Sequence[str], classes: int, labels: Sequence[str] | None) -> tuple[dict[str, list[int]], str, str]:
    """What the names may mean: the classes of each that it fits; a sentence on how, and a hint for those it does not."""
    numbers = [name for name in names if re.fullmatch(r"[0-9]+", name)]
    ours = _by_label(labels or ())
    # Classes that are called 0, 1, 10, 2 … are in no order of numbers.
    renamed = any(ours.get(_plain(name), [int(name)]) != [int(name)] for name in numbers)
    if numbers and not renamed:
        hint = "Class indices are whole numbers, counted from 0"
        return {name: [int(name)] for name in numbers}, "Labels are class indices.", hint
    known = [name for name in names if _plain(name) in ours]
    if known:
        hint = f"Nearest: {_nearest(names, known, ours)}"
        return {name: ours[_plain(name)] for name in known}, "Labels were matched to the model's class names.", hint
    synsets = _synsets(labels)
    ids = [name for name in names if re.fullmatch(r"n[0-9]{8}", name)]
    if ids and synsets:
        hint = f"The model's first is {next(iter(synsets))}"
        found = {name: [synsets[name]] for name in ids if name in synsets}
        return found, "Labels are WordNet ids of ImageNet's classes.", hint
    if len(names) == classes:
        in_order = {name: [index] for index, name in enumerate(sorted(names))}
        return in_order, "Labels were no name of the model's: in sorted order they were taken as its classes.", ""
    if synsets:
        instead = "by the model's labels or WordNet ids."
    elif labels:
        instead = "by the model's labels."
    else:
        instead = "from 0."
    raise BadRequest(
        f"{first_of([repr(name) for name in names])}: not a class of the model's ({classes} classes; the data has {len(names)}).",
        f"Name them by class index, {instead}",
    )


def _check_distinct(index: dict[str, int], classes: int) -> None:
    """Raises BadRequest for a name of no class and for two of one class."""
    outside = [name for name, one in index.items() if one >= classes]
    if outside:
        raise BadRequest(
            f"Label {first_of(outside)} is out of range: the classes are 0 to {classes - 1}.",
            "Class indices count from 0.",
        )
    owner: dict[int, str] = {}
    for name, one in index.items():
        if one in owner:
            raise BadRequest(f"{owner[one]!r} and {name!r} are the same class, {one}.", "Give every class one name.")
        owner[one] = name


def _plain(name: str) -> str:
    return name.replace("_", " ").strip().lower()


def _by_label(labels: Sequence[str]) -> dict[str, list[int]]:
    """Classes by whole label, else by its first synonym; ImageNet has two cranes, so that there may be several."""
    synonyms: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        synonyms.setdefault(_plain(label.split(",")[0]), []).append(index)
    whole: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        if "," in label:
            whole.setdefault(_plain(label), []).append(index)
    return {**synonyms, **whole}


def _nearest(names: Sequence[str], known: Sequence[str], ours: dict[str, list[int]]) -> str:
    strange = next((name for name in names if name not in known), "")
    return nearest(_plain(strange), ours)


def _synsets(labels: Sequence[str] | None) -> dict[str, int]:
    """WordNet id → class index where the labels are those of one of ImageNet's sets; else empty."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": len(labels)}) if labels else None
    if subset is None or labels is None:
        return {}
    info = ImageNetInfo(subset)
    if tuple(info.label_descriptions()) != tuple(labels):
        return {}
    return {name: index for index, name in enumerate(info.label_names())}


def check_readable(data: Labelled, workers: int, advance: Callable[[int], None] = lambda count: None) -> None:
    """Raises BadRequest for pictures that cannot be read, all at once: a run would end at the first of them."""
    parts = [data.files[start : start + _TOGETHER] for start in range(0, len(data.files), _TOGETHER)]
    faults: list[tuple[Path, BadRequest]] = []
    pool = ThreadPoolExecutor(workers)
    try:
        for part, found in zip(parts, pool.map(_faults, parts), strict=True):
            faults += found
            advance(len(part))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if len(faults) == 1:
        raise faults[0][1]
    if faults:
        names = ", ".join(str(file) for file, _ in faults[:_NAMED])
        more = f" (and {len(faults) - _NAMED} more)" if len(faults) > _NAMED else ""
        raise BadRequest(
            f"{len(faults)} of {len(data.files)} pictures cannot be read: {names}{more}.",
            "Take them out, or save them again.",
        )


def _faults(files: Sequence[Path]) -> list[tuple[Path, BadRequest]]:
    found = []
    for file in files:
        if not _is_whole(file):
            try:
                open_image(file)
            except BadRequest as error:
                found.append((file, error))
    return found


def _is_whole(file: Path) -> bool:
    """Whether a file can be told to be readable without decoding it, which would take many times as long.

    A JPEG that ends as it should is, and a PNG whose checksums are right. False says only that it is not known.
    """
    try:
        with file.open("rb") as stream, Image.open(stream) as image:
            if image.format == "JPEG":
                stream.seek(-len(_JPEG_END), os.SEEK_END)
                return stream.read() == _JPEG_END
            if image.format == "PNG" and image.mode != "I":
                image.verify()
                return True
    except Exception:  # Pillow raises many kinds; decoding says which it is
        pass
    return False


def batches(data: Labelled, transform: Transform, batch: int, workers: int, first: int = 0) -> Iterator[NDArray[Any]]:
    """Prepared pictures [≤ batch, 3, H, W] from picture `first` on, decoded by several threads ahead of their use.

    Raises BadRequest for a file that is not a readable image.
    """
    starts = iter(range(first, len(data.files), batch))
    waiting: deque[list[Future[NDArray[Any]]]] = deque()
    pool = ThreadPoolExecutor(workers)

    def prepare(file: Path) -> NDArray[Any]:
        return transform(open_image(file))

    def ask() -> None:
        start = next(starts, None)
        if start is not None:
            waiting.append([pool.submit(prepare, file) for file in data.files[start : start + batch]])

    try:
        for _ in range(_AHEAD + 1):
            ask()
        while waiting:
            pictures = [future.result() for future in waiting.popleft()]
            ask()
            yield np.stack(pictures)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
