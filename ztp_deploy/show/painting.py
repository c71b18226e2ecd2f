"""Pictures of what pruning did: patches painted by their fate, heat maps of scores, and the strip that holds them.

Pillow and numpy alone, matplotlib for its colour map and its font; nothing here knows a method or an engine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ztp_deploy.errors import BadRequest
from ztp_deploy.source import Preprocessing

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]

SIMILARITY, IMPORTANCE = "similarity", "importance"
CONTRARY, UNSCORED, UNKNOWN = "against_scores", "unscored", "unknown"
"""Why a patch went, where no decision of the method says: its scores would have kept it, the method scores nothing, or
no scores could be had."""

# Hues that photographs seldom have, and that colour-blind eyes tell apart.
COLOURS: dict[str, Colour] = {
    SIMILARITY: (0, 165, 255),
    CONTRARY: (255, 225, 0),
    UNSCORED: (255, 140, 0),
    UNKNOWN: (255, 140, 0),
}
OTHER_COLOUR: Colour = (240, 20, 150)
"""Of importance and of whatever else a method goes by."""
GONE: Colour = (125, 125, 125)
"""What patches that are out fade to: neither a dark background nor a bright sky that was kept looks like it."""
_MERGED: Colour = (150, 120, 90)

SMALLEST_PANEL = 224
_HEAT_MAP = "plasma"
_COLUMNS = 6
_GAP, _LINE, _BAR = 14, 20, 10
_LABELS = {
    CONTRARY: "dropped against its scores",
    UNSCORED: "dropped unseen",
    UNKNOWN: "dropped, reason unknown",
    "halted": "dropped: halted",
    "halting": "dropped: halted",
    "sampled": "dropped: not sampled",
}
_PAPER, _INK, _FAINT, _ALARM = (255, 255, 255), (20, 20, 20), (95, 95, 95), (190, 30, 20)


@dataclass(frozen=True)
class StagePicture:
    """What one stage did with one image of P patches.

    `tokens_in` and `kept` [k] (positions, ascending) are what really was there, without masked slots. `carried` [P]:
    for every patch the number of the token that carries it afterwards, -1 where it is out. `dropped`: the patches that
    went at this stage by the reason; `earlier`: those that were out before. `heat` [P]: the score each patch's token
    was ranked by, called `heat_name`, NaN where it had none; None where no scores could be had. `merges`: whether
    tokens carry several patches.
    """

    stage: int
    block: int
    tokens_in: int
    kept: NDArray[Any]
    carried: NDArray[Any]
    dropped: dict[str, NDArray[Any]]
    earlier: NDArray[Any]
    heat: NDArray[Any] | None
    heat_name: str | None
    merges: bool

    @property
    def groups(self) -> list[list[int]]:
        """The patches of every token that carries more than one, by their first patch."""
        members: dict[int, list[int]] = {}
        for patch, token in enumerate(self.carried.tolist()):
            if token >= 0:
                members.setdefault(token, []).append(patch)
        return [patches for patches in members.values() if len(patches) > 1]


# --- photographs and patches -------------------------------------------------------------------


def photograph(pixels: NDArray[Any], preprocessing: Preprocessing) -> Pixels:
    """A model's input [3, H, W], float32 normalised or uint8, as the photograph [H, W, 3] it was made from."""
    upright = np.moveaxis(pixels, 0, -1)
    if upright.dtype == np.uint8:
        return np.ascontiguousarray(upright)
    values = (upright * np.array(preprocessing.std) + np.array(preprocessing.mean)) * 255
    photo: Pixels = np.rint(values).clip(0, 255).astype(np.uint8)
    return photo


def patch_map(size: int, patches: int) -> NDArray[Any]:
    """Per pixel [size, size] the patch it belongs to, in raster order; -1 for a rest at the right and the bottom.

    Raises BadRequest where the patches make no square.
    """
    side = math.isqrt(patches)
    if side * side != patches or not 0 < side <= size:
        raise BadRequest(
            f"{patches} patches make no square in an image of {size} × {size} pixels.",
            "Pictures are drawn for square grids of patches.",
        )
    lines = np.arange(size) // (size // side)
    grid = lines[:, None] * side + lines[None, :]
    inside = lines < side
    return np.where(inside[:, None] & inside[None, :], grid, -1)


def panel_scale(size: int) -> int:
    """How often every pixel is repeated in each direction, so that a panel is legible."""
    return max(1, -(-SMALLEST_PANEL // size))


def enlarge(pixels: Pixels, scale: int) -> Pixels:
    """Every pixel repeated `scale` times in each direction: nothing is invented between two of them."""
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


# --- panels ------------------------------------------------------------------------------------


def tint(pixels: Pixels, colour: Colour) -> Pixels:
    """Pixels […, 3] in shades of a colour: three parts of it to two of their own brightness."""
    tinted: Pixels = ((_grey(pixels)[..., None] * 2 + np.array(colour) * 3 + 2) // 5).astype(np.uint8)
    return tinted


def fade(pixels: Pixels) -> Pixels:
    """Pixels […, 3] as greys near `GONE`: a fifth of their own brightness is left."""
    faded: Pixels = ((_grey(pixels)[..., None] + np.array(GONE) * 4 + 2) // 5).astype(np.uint8)
    return faded


def colour_of(reason: str) -> Colour:
    """The colour of a reason for dropping."""
    return COLOURS.get(reason, OTHER_COLOUR)


def paint_stage(photo: Pixels, picture: StagePicture) -> Pixels:
    """The photograph [H, W, 3] with the patches that are out greyed and those that went at this stage tinted and framed.

    What is kept stays as it is; of tokens that carry several patches these take their mean colour and an outline.
    """
    where = patch_map(len(photo), len(picture.carried))
    painted = photo.copy()
    out = (where < 0) | np.isin(where, picture.earlier)
    painted[out] = fade(photo[out])
    for reason, positions in picture.dropped.items():
        here = np.isin(where, positions)
        painted[here] = tint(photo[here], colour_of(reason))
        painted[here & _edges(here)] = colour_of(reason)
    if picture.merges:
        edge = _edges(np.where(where < 0, -1, picture.carried[where]))
        for patches in picture.groups:
            here = np.isin(where, patches)
            mean = np.rint(photo[here].mean(axis=0)).astype(np.uint8)
            painted[here] = mean
            painted[here & edge] = outline_of(mean)
    return painted


def outline_of(mean: Pixels) -> Colour:
    """Black on a light group, white on a dark one."""
    return (0, 0, 0) if _grey(mean) > 127 else (255, 255, 255)


def paint_heat(photo: Pixels, picture: StagePicture) -> Pixels:
    """The stage's scores as a heat map [H, W, 3], from the lowest to the highest of this image.

    Patches without a score are greyed as those that are out.
    """
    assert picture.heat is not None
    where = patch_map(len(photo), len(picture.carried))
    scored = np.isfinite(picture.heat)
    painted = fade(photo)
    colours = np.zeros((len(scored), 3), dtype=np.uint8)
    colours[scored] = heat_colours(_spread(picture.heat[scored]))
    here = (where >= 0) & scored[where]
    painted[here] = colours[where[here]]
    return painted


def heat_colours(values: NDArray[Any]) -> Pixels:
    """Values [n] from 0 to 1 → colours [n, 3]."""
    from matplotlib import colormaps

    return np.asarray(colormaps[_HEAT_MAP](values, bytes=True))[..., :3]


def _spread(values: NDArray[Any]) -> NDArray[Any]:
    """Values [n] to [0, 1]; all the same: the middle."""
    if not values.size or values.max() == values.min():
        return np.full(values.shape, 0.5)
    spread: NDArray[Any] = (values - values.min()) / (values.max() - values.min())
    return spread


def _grey(pixels: Pixels) -> NDArray[Any]:
    """Brightness […] of pixels […, 3] in whole numbers, weighted as in JPEG."""
    grey: NDArray[Any] = (pixels.astype(np.int64) * (299, 587, 114)).sum(-1) // 1000
    return grey


def _edges(areas: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels [H, W] that touch a pixel of another area, or the border of the image."""
    around = np.pad(areas.astype(np.int64), 1, constant_values=-2)
    edge = np.zeros(areas.shape, dtype=bool)
    for rows, columns in ((0, 1), (2, 1), (1, 0), (1, 2)):
        height, width = areas.shape
        edge |= around[rows : rows + height, columns : columns + width] != areas
    return edge


# --- the strip ---------------------------------------------------------------------------------


def label_of(reason: str, pictures: Sequence[StagePicture]) -> str:
    """A reason in the words of the legend."""
    if reason == SIMILARITY:
        return "dropped by similarity (S)"
    if reason == IMPORTANCE and any(SIMILARITY in picture.dropped for picture in pictures):
        return "dropped by importance (I)"
    return _LABELS.get(reason, f"dropped by {reason.replace('_', ' ')}")


def render_strip(
    photo: Pixels, pictures: Sequence[StagePicture], *, title: str, subtitle: str = "", notes: Sequence[str] = ()
) -> Image.Image:
    """One picture: the photograph [H, W, 3] with a legend, then every stage, its heat map below it.

    `notes` are what a reader must not miss. Stages come in rows of six at most.
    """
    scale = panel_scale(len(photo))
    side = len(photo) * scale
    captions = [_caption(picture) for picture in pictures]
    column = max([side, *(_width(line, bold=True) for line in captions)])
    heats = any(picture.heat is not None for picture in pictures)
    cell = 2 * _LINE + side + ((_LINE + side + _BAR + _LINE) if heats else 0)
    columns = min(len(pictures), _COLUMNS)
    rows = -(-len(pictures) // _COLUMNS)
    legend = _legend(pictures)
    width = _GAP + (column + _GAP) * (columns + 1)
    header = [(line, _INK, True) for line in _wrapped(title, width - 2 * _GAP, bold=True)]
    header += [(line, _FAINT, False) for line in _wrapped(subtitle, width - 2 * _GAP)]
    header += [(line, _ALARM, False) for note in notes for line in _wrapped(note, width - 2 * _GAP)]
    top = _GAP + len(header) * _LINE + _GAP // 2
    left = 2 * _LINE + side + _GAP // 2 + len(legend) * _LINE
    height = top + max(rows * (cell + _GAP), left + _GAP)
    page = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(page)
    for number, (line, ink, bold) in enumerate(header):
        pen.text((_GAP, _GAP + number * _LINE), line, fill=ink, font=_font(bold))
    pen.text((_GAP, top), "what the model sees", fill=_INK, font=_font(bold=True))
    page.paste(Image.fromarray(enlarge(photo, scale)), (_GAP, top + 2 * _LINE))
    for number, (colour, line) in enumerate(legend):
        _swatch(pen, _GAP, top + 2 * _LINE + side + _GAP // 2 + number * _LINE, colour, line)
    for index, picture in enumerate(pictures):
        x = _GAP + (column + _GAP) * (1 + index % _COLUMNS)
        y = top + index // _COLUMNS * (cell + _GAP)
        pen.text((x, y), captions[index], fill=_INK, font=_font(bold=True))
        along = x
        for reason, positions in picture.dropped.items():
            along = _swatch(pen, along, y + _LINE, colour_of(reason), str(len(positions))) + _GAP
        if picture.merges:
            count = len(picture.groups)
            _swatch(pen, along, y + _LINE, _MERGED, f"{count} group{'s' if count != 1 else ''}")
        page.paste(Image.fromarray(enlarge(paint_stage(photo, picture), scale)), (x, y + 2 * _LINE))
        if picture.heat is not None:
            _place_heat(page, pen, (x, y + 2 * _LINE + side), enlarge(paint_heat(photo, picture), scale), picture)
    return page


def _caption(picture: StagePicture) -> str:
    return f"stage {picture.stage} · block {picture.block} · {picture.tokens_in} → {len(picture.kept)}"


def _legend(pictures: Sequence[StagePicture]) -> list[tuple[Colour, str]]:
    """Colours and words for what occurs in the pictures."""
    reasons = dict.fromkeys(reason for picture in pictures for reason in picture.dropped)
    lines = [(colour_of(reason), label_of(reason, pictures)) for reason in reasons]
    greys = {
        "dropped before": any(picture.earlier.size for picture in pictures),
        "no score": any(picture.heat is not None and np.isnan(picture.heat).any() for picture in pictures),
    }
    if any(greys.values()):
        lines.append((GONE, " or ".join(words for words, occurs in greys.items() if occurs)))
    if any(picture.groups for picture in pictures if picture.merges):
        lines.append((_MERGED, "merged: the group's mean"))
    return lines


def _place_heat(
    page: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int], heat: Pixels, picture: StagePicture
) -> None:
    """A heat map with its name above it and its scale below."""
    assert picture.heat is not None
    x, y = corner
    side = len(heat)
    pen.text((x, y + 2), picture.heat_name or "score", fill=_INK, font=_font())
    page.paste(Image.fromarray(heat), (x, y + _LINE))
    scored = picture.heat[np.isfinite(picture.heat)]
    if not scored.size:
        return
    bar = heat_colours(np.linspace(0, 1, side))[None].repeat(_BAR - 4, axis=0)
    page.paste(Image.fromarray(np.ascontiguousarray(bar)), (x, y + _LINE + side + 4))
    low, high = f"{scored.min():.3g}", f"{scored.max():.3g}"
    below = y + _LINE + side + _BAR
    pen.text((x, below), low, fill=_FAINT, font=_font())
    pen.text((x + side - _width(high), below), high, fill=_FAINT, font=_font())


def _swatch(pen: ImageDraw.ImageDraw, x: int, y: int, colour: Colour, line: str) -> int:
    """A square of a colour and words beside it; returns where they end."""
    pen.rectangle((x, y + 3, x + 11, y + 14), fill=colour)
    pen.text((x + 17, y), line, fill=_INK, font=_font())
    return x + 17 + _width(line)


@functools.cache
def _font(bold: bool = False) -> ImageFont.FreeTypeFont:
    # Pillow's own default has no arrow and no accents; this one travels with matplotlib.
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", name)), size=13)


def _width(line: str, bold: bool = False) -> int:
    return math.ceil(_font(bold).getlength(line))


def _wrapped(text: str, width: int, bold: bool = False) -> list[str]:
    """The text in lines of at most `width` pixels, broken between words where there are any."""
    lines: list[str] = []
    for word in text.split():
        if lines and _width(f"{lines[-1]} {word}", bold) <= width:
            lines[-1] = f"{lines[-1]} {word}"
            continue
        while _width(word, bold) > width:
            fits = next(count for count in range(len(word), 0, -1) if _width(word[:count], bold) <= width or count == 1)
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    return lines
