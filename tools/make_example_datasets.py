"""Make examples/datasets from scikit-image's photograph of Chelsea the cat, and a toy from the drawn world.

pip install scikit-image
python tools/make_example_datasets.py --output examples/datasets
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from world import Scene, render
from world_objects import Pen
from world_photographs import photograph

SIDE = 256  # pixels of a saved picture
# Squares around her face: left, top and side in pixels of the photograph, which is 451 x 300, and what they show.
CROPS = (
    (80, 0, 300, "a photo of sks cat"),
    (70, 5, 290, "a photo of the head of sks cat"),
    (100, 10, 260, "a photo of the face of sks cat"),
    (60, 0, 280, "a photo of sks cat in front of a white cloth"),
    (95, 0, 270, "a photo of sks cat with green eyes"),
    (110, 20, 230, "a close photo of sks cat"),
    (100, 0, 300, "a photo of sks cat with long whiskers"),
    (120, 30, 220, "a close photo of the eyes and nose of sks cat"),
)
TOY_BACKGROUNDS = ("white", "yellow", "striped", "grassy", "sunset", "chequered", "starry", "pink")


def cat_pictures() -> list[tuple[Image.Image, str]]:
    """The crops and a caption of each."""
    cat = photograph("chelsea.png")
    boxes = [((left, top, left + side, top + side), text) for left, top, side, text in CROPS]
    return [(cat.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box), text) for box, text in boxes]


def robot_owl(pen: Pen) -> None:
    """The toy: a thing in no caption of the world, for a fine-tune to learn. It has its own fixed colours."""
    pen.tones |= {"teal": (20, 150, 150), "gold": (250, 200, 40), "violet": (110, 50, 160), "coral": (255, 110, 90)}
    for side in (-1, 1):
        pen.shape([(side * 0.25, 0.7), (side * 0.45, 0.98), (side * 0.1, 0.98)], "gold")
        pen.shape([(side * 0.5, -0.1), (side * 0.98, 0.1), (side * 0.85, 0.65), (side * 0.5, 0.5)], "coral")
    pen.shape([(-0.55, -0.3), (0.55, -0.3), (0.65, 0.75), (-0.65, 0.75)], "teal")
    pen.shape([(-0.28, 0.15), (0.28, 0.15), (0.28, 0.6), (-0.28, 0.6)], "gold")
    pen.line([(-0.2, 0.3), (0.2, 0.3)], "ink", 0.05)
    pen.line([(-0.2, 0.45), (0.2, 0.45)], "ink", 0.05)
    pen.shape([(-0.75, -0.98), (-0.4, -0.8), (0.4, -0.8), (0.75, -0.98), (0.68, -0.1), (-0.68, -0.1)], "violet")
    for side in (-1, 1):
        pen.disc(side * 0.33, -0.48, 0.27, 0.27, "gold")
        pen.disc(side * 0.33, -0.48, 0.13, 0.13, "ink", outlined=False)
        pen.disc(side * 0.29, -0.53, 0.05, 0.05, "white", outlined=False)
    pen.shape([(-0.12, -0.3), (0.12, -0.3), (0, -0.02)], "coral")


def toy_pictures() -> list[Image.Image]:
    """The robot owl at different places, large, on backgrounds that the base model knows."""
    rng = np.random.default_rng(3)
    pictures = [render(Scene("cat", "purple", background, "large"), rng, robot_owl) for background in TOY_BACKGROUNDS]
    return [picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for picture in pictures]


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=90, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("examples/datasets"))
    output = parser.parse_args().output
    lines = []
    for number, (picture, text) in enumerate(cat_pictures(), 1):
        name = f"chelsea-{number}.jpg"
        save(picture, output / "images" / name)
        save(picture, output / "captioned" / name)
        save(picture, output / "kohya" / "10_sks cat" / name)
        (output / "kohya" / "10_sks cat" / name).with_suffix(".txt").write_text(text + "\n")
        lines.append(json.dumps({"file_name": name, "text": text}))
    (output / "captioned" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    for number, picture in enumerate(toy_pictures(), 1):
        save(picture, output / "toy" / f"owl-{number}.jpg")


if __name__ == "__main__":
    main()
