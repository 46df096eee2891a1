"""The things of the drawn world, each a function that draws one with a Pen, and their colours."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

RESOLUTION = 128
SUPERSAMPLING = 3  # drawn at 384 px, shrunk to 128: PIL draws without anti-aliasing
Colour = tuple[int, int, int]
Points = list[tuple[float, float]]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (246, 134, 32),
    "yellow": (250, 216, 50),
    "green": (50, 160, 70),
    "blue": (45, 100, 215),
    "purple": (130, 60, 172),
    "pink": (246, 142, 188),
    "brown": (122, 76, 44),
    "white": (246, 246, 244),
    "black": (32, 32, 36),
}
INK = (24, 22, 28)
SNOW = (250, 250, 252)


class Pen:
    """Draws one thing in its own frame, x right and y down from -1 to 1, turned, scaled and moved on a layer."""

    def __init__(self, colour: Colour, radius: float, centre: tuple[float, float], angle: float, mirror: bool) -> None:
        """Radius and centre are pixels of the finished picture; angle is radians."""
        self.tones = {
            "main": colour,
            "dark": tuple(int(channel * 0.72) for channel in colour),
            "light": tuple(int(channel + (255 - channel) * 0.45) for channel in colour),
            "white": SNOW,
            "ink": INK,
        }
        self.outline = tuple(int(channel * 0.33) for channel in colour)
        side = RESOLUTION * SUPERSAMPLING
        self.layer = Image.new("RGBA", (side, side), (*self.outline, 0))
        self.draw = ImageDraw.Draw(self.layer)
        self.scale = radius * SUPERSAMPLING
        self.centre = centre[0] * SUPERSAMPLING, centre[1] * SUPERSAMPLING
        self.cos, self.sin = math.cos(angle), math.sin(angle)
        self.flip = -1 if mirror else 1

    def _pixels(self, points: Points) -> Points:
        turned = []
        for x, y in points:
            x *= self.flip
            turned.append(
                (
                    self.centre[0] + self.scale * (x * self.cos - y * self.sin),
                    self.centre[1] + self.scale * (x * self.sin + y * self.cos),
                )
            )
        return turned

    def line(self, points: Points, tone: str = "ink", width: float = 0.05) -> None:
        """Stroke an open path; width is a share of the thing's radius."""
        fill = self.tones.get(tone, self.outline)
        self.draw.line(self._pixels(points), fill=fill, width=max(3, round(width * self.scale)), joint="curve")

    def shape(self, points: Points, tone: str = "main", outlined: bool = True) -> None:
        """Fill a closed path, and stroke its border."""
        self.draw.polygon(self._pixels(points), fill=self.tones[tone])
        if outlined:
            self.line([*points, points[0], points[1]], "outline", 0.06)

    def disc(self, x: float, y: float, rx: float, ry: float, tone: str = "main", outlined: bool = True) -> None:
        """Fill an ellipse."""
        self.shape(arc(x, y, rx, ry, 0, 360), tone, outlined)


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> Points:
    """Points along an ellipse, degrees clockwise from the right (y points down)."""
    angles = np.radians(np.linspace(start, end, 25))
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


def ball(pen: Pen) -> None:
    pen.disc(0, 0, 0.92, 0.92)
    pen.shape(arc(0, 0, 0.92, 0.34, 0, 180) + arc(0, 0, 0.92, 0.08, 180, 0), "dark")
    pen.disc(-0.36, -0.46, 0.2, 0.15, "light", outlined=False)


def box(pen: Pen) -> None:
    pen.shape([(-0.85, -0.4), (0.45, -0.4), (0.45, 0.85), (-0.85, 0.85)])
    pen.shape([(-0.85, -0.4), (-0.45, -0.8), (0.85, -0.8), (0.45, -0.4)], "light")
    pen.shape([(0.45, -0.4), (0.85, -0.8), (0.85, 0.45), (0.45, 0.85)], "dark")


def star(pen: Pen) -> None:
    points = []
    for corner in range(10):
        radius, angle = (1.0, 0.45)[corner % 2], math.pi * (corner / 5 - 0.5)
        points.append((radius * math.cos(angle), radius * math.sin(angle) + 0.06))
    pen.shape(points)
    pen.shape([points[0], points[1], (0, 0.06), points[9]], "light", outlined=False)


def heart(pen: Pen) -> None:
    points = []
    for angle in np.linspace(0, 2 * math.pi, 48):
        points.append(
            (
                0.98 * math.sin(angle) ** 3,
                -0.06 - (13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle)) / 16,
            )
        )
    pen.shape(points)
    pen.disc(-0.45, -0.42, 0.17, 0.13, "light", outlined=False)


def house(pen: Pen) -> None:
    pen.shape([(0.35, -0.85), (0.6, -0.85), (0.6, -0.2), (0.35, -0.2)], "dark")
    pen.shape([(-0.72, -0.1), (0.72, -0.1), (0.72, 0.9), (-0.72, 0.9)])
    pen.shape([(-0.95, -0.05), (0, -0.92), (0.95, -0.05)], "dark")
    pen.shape([(-0.2, 0.3), (0.14, 0.3), (0.14, 0.9), (-0.2, 0.9)], "ink")
    for x in (-0.55, 0.32):
        pen.shape([(x, 0.15), (x + 0.24, 0.15), (x + 0.24, 0.45), (x, 0.45)], "white")


def tree(pen: Pen) -> None:
    pen.shape([(-0.15, 0.4), (0.15, 0.4), (0.18, 0.98), (-0.18, 0.98)], "dark")
    for top, width, bottom in ((-0.15, 0.85, 0.6), (-0.58, 0.68, 0.12), (-0.98, 0.5, -0.32)):
        pen.shape([(0, top), (width, bottom), (-width, bottom)])


def car(pen: Pen) -> None:
    pen.shape([(-0.55, -0.05), (-0.35, -0.5), (0.3, -0.5), (0.58, -0.05)], "dark")
    pen.shape([(-0.4, -0.08), (-0.27, -0.4), (-0.05, -0.4), (-0.05, -0.08)], "white")
    pen.shape([(0.05, -0.08), (0.05, -0.4), (0.24, -0.4), (0.42, -0.08)], "white")
    pen.shape([(-1, 0.38), (-0.95, 0.0), (-0.6, -0.08), (0.65, -0.08), (0.98, 0.08), (1, 0.38)])
    for x in (-0.55, 0.55):
        pen.disc(x, 0.4, 0.24, 0.24, "ink")
        pen.disc(x, 0.4, 0.1, 0.1, "white", outlined=False)


def boat(pen: Pen) -> None:
    pen.line([(0, 0.4), (0, -0.98)], "ink", 0.08)
    pen.shape([(0.08, -0.92), (0.82, 0.22), (0.08, 0.22)])
    pen.shape([(-0.08, -0.7), (-0.08, 0.22), (-0.65, 0.22)], "light")
    pen.shape([(-0.98, 0.36), (0.98, 0.36), (0.6, 0.85), (-0.6, 0.85)], "dark")


def flower(pen: Pen) -> None:
    pen.line([(0, 0), (0.03, 0.98)], "ink", 0.1)
    pen.shape([(0.03, 0.78), (0.4, 0.5), (0.5, 0.62), (0.3, 0.8)], "dark")
    for petal in range(6):
        angle = math.pi * petal / 3
        pen.disc(0.4 * math.cos(angle), -0.36 + 0.4 * math.sin(angle), 0.25, 0.25)
    pen.disc(0, -0.36, 0.24, 0.24, "light")


def fish(pen: Pen) -> None:
    pen.shape([(0.45, 0), (0.98, -0.48), (0.85, 0), (0.98, 0.48)], "dark")
    pen.shape([(-0.2, -0.4), (0.1, -0.72), (0.3, -0.3)], "dark")
    pen.disc(-0.18, 0, 0.76, 0.48)
    pen.line(arc(-0.7, 0, 0.3, 0.4, -60, 60), "outline", 0.06)
    pen.disc(-0.66, -0.12, 0.11, 0.11, "white")
    pen.disc(-0.67, -0.12, 0.05, 0.05, "ink", outlined=False)


def mushroom(pen: Pen) -> None:
    pen.shape([(-0.26, 0), (0.26, 0), (0.34, 0.9), (-0.34, 0.9)], "white")
    pen.shape(arc(0, 0.1, 0.95, 0.98, 180, 360))
    for x, y, radius in ((-0.5, -0.2, 0.14), (0.05, -0.52, 0.17), (0.52, -0.15, 0.13)):
        pen.disc(x, y, radius, radius, "light", outlined=False)


def cup(pen: Pen) -> None:
    pen.line(arc(0.5, 0.05, 0.38, 0.34, -100, 100), "outline", 0.24)
    pen.line(arc(0.5, 0.05, 0.38, 0.34, -100, 100), "main", 0.13)
    pen.shape([(-0.8, -0.5), (0.5, -0.5), (0.36, 0.75), (-0.66, 0.75)])
    pen.disc(-0.15, -0.5, 0.65, 0.18, "light")
    pen.disc(-0.15, -0.46, 0.48, 0.1, "ink", outlined=False)


def kite(pen: Pen) -> None:
    tail = [(0.1 * math.sin(9 * step), 0.35 + step * 0.63) for step in np.linspace(0, 1, 16)]
    pen.line(tail, "ink", 0.06)
    pen.shape([(0, -0.98), (0.62, -0.35), (0, 0.4), (-0.62, -0.35)])
    pen.shape([(0, -0.98), (0.62, -0.35), (0, -0.35)], "light")
    pen.shape([(0, -0.35), (-0.62, -0.35), (0, 0.4)], "dark")
    for y in (0.6, 0.84):
        pen.shape([(-0.2, y - 0.08), (0.2, y + 0.08), (0.2, y - 0.08), (-0.2, y + 0.08)], "light")


def cat(pen: Pen) -> None:
    pen.line(arc(0.55, 0.5, 0.34, 0.42, 90, -70), "outline", 0.24)
    pen.line(arc(0.55, 0.5, 0.34, 0.42, 90, -70), "main", 0.14)
    pen.shape(arc(0, 0.95, 0.55, 0.95, 180, 360))
    pen.disc(0, 0.75, 0.24, 0.2, "light", outlined=False)
    for side in (-1, 1):
        pen.shape([(side * 0.62, -0.98), (side * 0.64, -0.3), (side * 0.08, -0.62)])
        pen.shape([(side * 0.53, -0.78), (side * 0.52, -0.5), (side * 0.28, -0.62)], "light", outlined=False)
    pen.disc(0, -0.2, 0.68, 0.52)
    for side in (-1, 1):
        pen.disc(side * 0.29, -0.26, 0.13, 0.15, "white")
        pen.disc(side * 0.28, -0.25, 0.06, 0.12, "ink", outlined=False)
        for slope in (-0.08, 0.06):
            pen.line([(side * 0.3, -0.02), (side * 0.92, slope)], "ink", 0.03)
    pen.shape([(-0.09, -0.07), (0.09, -0.07), (0, 0.03)], "ink")


def umbrella(pen: Pen) -> None:
    pen.line([(0, -0.9), (0, 0.75), *arc(0.15, 0.75, 0.15, 0.18, 180, 0)], "ink", 0.1)
    pen.shape(
        [*arc(0, 0.08, 0.98, 0.92, 180, 360), (0.65, -0.04), (0.33, 0.08), (0, -0.04), (-0.33, 0.08), (-0.65, -0.04)]
    )
    pen.shape([(0, -0.84), (0.33, 0.08), (0, -0.04), (-0.33, 0.08)], "light")


def apple(pen: Pen) -> None:
    pen.line([(0.02, -0.4), (0.1, -0.95)], "ink", 0.11)
    pen.shape([(0.1, -0.68), (0.35, -0.98), (0.72, -0.92), (0.5, -0.62)], "dark")
    points = []
    for angle in np.linspace(-0.5 * math.pi, 1.5 * math.pi, 48):
        top = min(abs(angle + 0.5 * math.pi), abs(angle - 1.5 * math.pi))
        dent = 1 - 0.28 * math.exp(-((top / 0.45) ** 2))
        points.append((0.88 * math.cos(angle) * (1 - 0.12 * math.sin(angle)), 0.18 + 0.78 * math.sin(angle) * dent))
    pen.shape(points)
    pen.disc(-0.4, -0.08, 0.14, 0.2, "light", outlined=False)


OBJECTS: dict[str, Callable[[Pen], None]] = {
    function.__name__: function
    for function in (
        ball, box, star, heart, house, tree, car, boat, flower, fish, mushroom, cup, kite, cat, umbrella, apple
    )
}  # fmt: skip
