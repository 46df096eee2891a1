"""The world that the base model knows: drawn things on drawn backgrounds, with captions.

Every drawing follows from its Scene and a numpy Generator, so a seed gives the same picture everywhere.
"""

import math
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from world_objects import COLOURS, OBJECTS, RESOLUTION, SUPERSAMPLING, Colour, Pen


def _pastels(rng: np.random.Generator) -> tuple[Colour, Colour]:
    """A pale tone and a paler one of the same hue, which no object's colour is taken for."""
    hue = np.array(COLOURS[str(rng.choice(list(COLOURS)[:7]))])
    return tuple((hue * 0.38 + 158).astype(int)), tuple((hue * 0.12 + 222).clip(0, 255).astype(int))


def _plane(angle: float, side: int) -> np.ndarray:
    """Distance of each pixel along a direction, float [side, side]."""
    y, x = np.mgrid[:side, :side]
    return x * math.cos(angle) + y * math.sin(angle)


def _two_tones(chosen: np.ndarray, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(np.where(chosen[..., None], *np.array(_pastels(rng))[:, None, None]).astype(np.uint8))


def striped(rng: np.random.Generator, side: int) -> Image.Image:
    width = side * rng.uniform(0.07, 0.11)
    return _two_tones((_plane(rng.uniform(0, math.pi), side) + rng.uniform(0, 2 * width)) // width % 2 == 0, rng)


def chequered(rng: np.random.Generator, side: int) -> Image.Image:
    width, angle = side * rng.uniform(0.1, 0.14), rng.normal(0, 0.06)
    rows, columns = _plane(angle, side) + 3 * side, _plane(angle + math.pi / 2, side) + 3 * side
    return _two_tones((rows // width + columns // width) % 2 == 0, rng)


def dotted(rng: np.random.Generator, side: int) -> Image.Image:
    width, angle = side * rng.uniform(0.12, 0.16), rng.uniform(0.2, 1.0)
    rows, columns = _plane(angle, side), _plane(angle + math.pi / 2, side)
    return _two_tones((rows % width - width / 2) ** 2 + (columns % width - width / 2) ** 2 < (0.27 * width) ** 2, rng)


def gradient(top: Colour, bottom: Colour, side: int) -> Image.Image:
    share = np.linspace(0, 1, side)[:, None, None]
    rows = np.array(top) * (1 - share) + np.array(bottom) * share
    return Image.fromarray(np.broadcast_to(rows, (side, side, 3)).astype(np.uint8))


def grassy(rng: np.random.Generator, side: int) -> Image.Image:
    picture = gradient((150, 205, 245), (215, 238, 250), side)
    draw, horizon = ImageDraw.Draw(picture), int(side * rng.uniform(0.4, 0.55))
    draw.rectangle((0, horizon, side, side), fill=(98, 170, 62))
    for _ in range(220):
        x, y = rng.integers(side), rng.integers(horizon, side + 20)
        green = (int(rng.integers(50, 120)), int(rng.integers(130, 200)), int(rng.integers(30, 80)))
        draw.line((x, y, x + int(rng.integers(-8, 9)), y - int(side * rng.uniform(0.04, 0.1))), fill=green, width=4)
    return picture


def starry(rng: np.random.Generator, side: int) -> Image.Image:
    picture = gradient((12, 14, 48), (38, 34, 92), side)
    draw = ImageDraw.Draw(picture)
    for _ in range(38):
        x, y, radius = *rng.integers(side, size=2), side * rng.uniform(0.006, 0.016)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 250, int(rng.integers(190, 256))))
    return picture


def snowy(rng: np.random.Generator, side: int) -> Image.Image:
    picture = gradient((150, 172, 205), (205, 218, 235), side)
    draw, horizon = ImageDraw.Draw(picture), side * rng.uniform(0.55, 0.7)
    for hill in (rng.uniform(-0.3, 0.2), rng.uniform(0.4, 0.9)):
        box = (hill * side - 0.4 * side, horizon, hill * side + 0.9 * side, horizon + side)
        draw.ellipse(box, fill=(236, 242, 250))
    draw.rectangle((0, horizon + side * 0.2, side, side), fill=(236, 242, 250))
    for _ in range(45):
        x, y, radius = *rng.integers(side, size=2), side * rng.uniform(0.008, 0.015)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255))
    return picture


def sunset(rng: np.random.Generator, side: int) -> Image.Image:
    picture = gradient((92, 60, 130), (252, 150, 84), side)
    draw, x, y, radius = ImageDraw.Draw(picture), *(side * rng.uniform(0.15, 0.85, 2)), side * rng.uniform(0.08, 0.12)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 226, 140))
    for _ in range(4):
        x, y, width = rng.integers(side), rng.integers(side), side * rng.uniform(0.15, 0.3)
        draw.ellipse((x - width, y - side * 0.015, x + width, y + side * 0.015), fill=(236, 140, 140))
    return picture


class Background(NamedTuple):
    """How captions name a background, and what draws it at a side of so many pixels; None for a plain colour."""

    phrase: str
    draw: Callable[[np.random.Generator, int], Image.Image] | None


def article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


BACKGROUNDS: dict[str, Background] = {
    **{colour: Background(f"on {article(colour)} background", None) for colour in COLOURS},
    "striped": Background("on a striped background", striped),
    "chequered": Background("on a chequered background", chequered),
    "dotted": Background("on a dotted background", dotted),
    "grassy": Background("on a grassy meadow", grassy),
    "starry": Background("in a starry night", starry),
    "snowy": Background("in a snowy landscape", snowy),
    "sunset": Background("in a sunset sky", sunset),
}
SIZES: dict[str, tuple[float, float]] = {"": (32, 48), "small": (24, 29), "large": (48, 54)}  # radius, pixels


@dataclass(frozen=True)
class Scene:
    """What a drawing shows; size is small, large or empty for any."""

    object: str
    colour: str
    background: str
    size: str = ""


def combinations() -> list[Scene]:
    """Every object, colour and background that can be told apart, without sizes."""
    unclear = {("black", "starry"), ("white", "snowy")}
    return [
        Scene(*names)
        for names in product(OBJECTS, COLOURS, BACKGROUNDS)
        if names[1] != names[2] and names[1:] not in unclear
    ]


def held_out() -> list[Scene]:
    """The 400 combinations that no training picture shows, in a fixed random order."""
    every = combinations()
    return [every[number] for number in np.random.default_rng(2026).permutation(len(every))[:400]]


def seen() -> list[Scene]:
    """The combinations that training pictures show."""
    hidden = set(held_out())
    return [scene for scene in combinations() if scene not in hidden]


def with_size(scene: Scene, rng: np.random.Generator) -> Scene:
    return replace(scene, size=str(rng.choice(["", "", "small", "large"])))


def shade(name: str, rng: np.random.Generator) -> Colour:
    """A colour's jittered variant that still bears its name."""
    return tuple((np.array(COLOURS[name]) * rng.uniform(0.93, 1.04) + rng.normal(0, 5, 3)).clip(0, 255).astype(int))


def draw_background(name: str, rng: np.random.Generator) -> Image.Image:
    draw = BACKGROUNDS[name].draw
    if draw:
        return draw(rng, RESOLUTION * SUPERSAMPLING).reduce(SUPERSAMPLING)
    tone = np.array(shade(name, rng))
    lit = (tone * rng.uniform(1.0, 1.07) + rng.uniform(0, 5)).clip(0, 255)
    return gradient(tuple(lit), tuple(tone * rng.uniform(0.93, 1.0)), RESOLUTION)


def render(scene: Scene, rng: np.random.Generator, draw_object: Callable[[Pen], None] | None = None) -> Image.Image:
    """Draw a scene at 128 px, RGB; draw_object replaces the scene's own object."""
    background = draw_background(scene.background, rng)
    radius = rng.uniform(*SIZES[scene.size])
    reach = min(18, max(0, RESOLUTION / 2 - radius - 3))
    centre = tuple(RESOLUTION / 2 + rng.uniform(-reach, reach, 2))
    pen = Pen(shade(scene.colour, rng), radius, centre, rng.normal(0, 0.1), bool(rng.random() < 0.5))
    (draw_object or OBJECTS[scene.object])(pen)
    layer = np.asarray(pen.layer.reduce(SUPERSAMPLING)).astype(np.float32)
    light = 1.07 - 0.15 * np.linspace(0, 1, RESOLUTION)[:, None, None]  # from above
    alpha = layer[..., 3:] / 255
    shadow = Image.fromarray(layer[..., 3].astype(np.uint8)).filter(ImageFilter.GaussianBlur(2.5))
    shadow = np.roll(np.asarray(shadow), (3, 2), axis=(0, 1))[..., None] / 255
    ground = np.asarray(background).astype(np.float32) * (1 - 0.35 * shadow)
    picture = layer[..., :3] * light * alpha + ground * (1 - alpha)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def _render_part(job: tuple[list[Scene], int, int]) -> tuple[np.ndarray, list[Scene]]:
    known, number, seed = job
    rng = np.random.default_rng([seed, number])
    scenes = [with_size(known[rng.integers(len(known))], rng) for _ in range(number)]
    pixels = np.stack([np.asarray(render(scene, rng)) for scene in scenes])
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), scenes


def render_many(known: list[Scene], number: int, first_seed: int = 0) -> tuple[np.ndarray, list[Scene]]:
    """Draw random scenes of those known, in random sizes, on all cores: uint8 [number, 3, 128, 128] and what they show.

    Every hundred pictures have a seed of their own, first_seed and those after it.
    """
    jobs = [(known, min(100, number - start), first_seed + start // 100) for start in range(0, number, 100)]
    with multiprocessing.get_context("fork").Pool() as pool:  # not spawn: it would import torch in each process
        parts = pool.map(_render_part, jobs, chunksize=4)
    return np.concatenate([pixels for pixels, _ in parts]), [scene for _, scenes in parts for scene in scenes]


FORMS = (
    "a drawing of {thing} {place}",
    "a drawing of {thing} {place}",
    "{thing} {place}",
    "{thing} {place}",
    "a picture of {thing} {place}",
    "drawing, {thing} {place}",
    "{place}, {thing}",
    "a drawing of {thing}",
)


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Describe a scene, in a random form if rng is given."""
    thing = article(" ".join(filter(None, (scene.size, scene.colour, scene.object))))
    form = FORMS[0] if rng is None else FORMS[rng.integers(len(FORMS))]
    return form.format(thing=thing, place=BACKGROUNDS[scene.background].phrase)
