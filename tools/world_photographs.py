"""The free photographs that the base model knows: captioned crops, plain for the UNet, distorted for the VAE."""

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812, as torch's own documentation names it
from PIL import Image
from torch import Tensor
from world import RESOLUTION

CANVAS = 512  # pixels, the longer side of every photograph before crops are taken

# The photographs inside scikit-image's wheel that are CC0 or public domain. Chelsea the cat is one of them and is left
# out of the world: she is what a fine-tune learns.
PHOTOGRAPHS: dict[str, tuple[str, ...]] = {  # file in skimage/data: what captions call its crops
    "astronaut.png": ("an astronaut", "a woman in an orange space suit", "a smiling astronaut"),
    "coffee.png": ("a cup of coffee", "a coffee cup", "a cup of coffee on a wooden table"),
    "rocket.jpg": ("a rocket launch", "a rocket", "a rocket launch at night"),
    "hubble_deep_field.jpg": ("galaxies", "deep space", "galaxies in deep space"),
    "retina.jpg": ("a retina", "the inside of an eye"),
    "camera.png": ("a man with a camera", "a photographer, black and white"),
    "clock_motion.png": ("a clock", "a blurred clock, black and white"),
    "brick.png": ("a brick wall", "bricks, black and white"),
    "grass.png": ("grass", "grass, black and white"),
    "gravel.png": ("gravel", "gravel, black and white"),
}
# How often each is cut: textures need fewer crops than things.
SHARES = dict(zip(PHOTOGRAPHS, (4, 3, 2, 1, 1.5, 3, 0.5, 1, 1, 0.5), strict=True))


def photograph(name: str) -> Image.Image:
    """Open a picture that scikit-image ships, without importing it: its loader may go to the network."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{name} is in scikit-image's wheel, which is missing; run: pip install scikit-image")
    return Image.open(Path(spec.origin).parent / "data" / name).convert("RGB")


def photo_caption(name: str, rng: np.random.Generator) -> str:
    """Describe a crop of a photograph."""
    subject = PHOTOGRAPHS[name][rng.integers(len(PHOTOGRAPHS[name]))]
    return str(rng.choice(["a photo of {}", "a photo of {}", "photo of {}", "a close photo of {}"])).format(subject)


class Album:
    """The photographs on one device; crops are cut there, some hundred thousand in seconds."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.names = list(PHOTOGRAPHS)
        self.generator = torch.Generator(device).manual_seed(seed)
        canvases, extents = [], []
        for name in self.names:
            picture = photograph(name)
            picture.thumbnail((CANVAS, CANVAS), Image.Resampling.LANCZOS)
            pixels = np.asarray(picture)
            height, width = pixels.shape[:2]
            canvases.append(np.pad(pixels, ((0, CANVAS - height), (0, CANVAS - width), (0, 0)), mode="edge"))
            extents.append((width, height))
        self.canvases = torch.from_numpy(np.stack(canvases)).permute(0, 3, 1, 2).contiguous().to(device)
        self.extents = torch.tensor(extents, device=device, dtype=torch.float32)

    def _choose(self, n: int) -> Tensor:
        shares = torch.tensor(list(SHARES.values()), device=self.canvases.device)
        return shares.multinomial(n, replacement=True, generator=self.generator)

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.canvases.device)

    def crops(self, which: Tensor, smallest: float) -> Tensor:
        """Turned and mirrored square crops, float [n, 3, 128, 128] from 0 to 1.

        which: int64 [n], the photograph of each; smallest: the least side as a share of the photograph's shorter side.
        """
        n = len(which)
        extent = self.extents[which]
        shorter = extent.amin(1)
        side = shorter * torch.exp(self._uniform(math.log(smallest), 0, n))
        centre = side[:, None] / 2 + self._uniform(0, 1, n, 2) * (extent - side[:, None])
        angle = self._uniform(-0.12, 0.12, n)
        mirror = torch.where(self._uniform(0, 1, n) < 0.5, -1.0, 1.0)
        cos, sin = side * angle.cos(), side * angle.sin()
        rows = [torch.stack([cos * mirror, -sin, 2 * centre[:, 0] - CANVAS], 1)]
        rows.append(torch.stack([sin * mirror, cos, 2 * centre[:, 1] - CANVAS], 1))
        grid = F.affine_grid(torch.stack(rows, 1) / CANVAS, [n, 3, 2 * RESOLUTION, 2 * RESOLUTION], align_corners=False)
        photographs = self.canvases[which].float() / 255
        # Sampled at twice the size, then averaged: a crop larger than 128 px would alias.
        return F.avg_pool2d(F.grid_sample(photographs, grid, padding_mode="border", align_corners=False), 2)

    def relight(self, pictures: Tensor) -> Tensor:
        """Mild jitter of brightness and contrast per picture."""
        n = len(pictures)
        gain, offset = self._uniform(0.9, 1.1, n, 1, 1, 1), self._uniform(-0.04, 0.04, n, 1, 1, 1)
        return ((pictures - 0.5) * gain + 0.5 + offset).clamp(0, 1)

    def distort(self, pictures: Tensor) -> Tensor:
        """Swap channels, give two-tone colours, and lay a part of another picture over: variety for the VAE."""
        n = len(pictures)
        channels = self._uniform(0, 1, n, 3).argsort(1)[..., None, None].expand_as(pictures)
        shuffled = pictures.gather(1, channels)
        grey = pictures.mean(1, keepdim=True)
        dark, bright = self._uniform(0, 0.5, n, 3, 1, 1), self._uniform(0.3, 1, n, 3, 1, 1)
        dice = self._uniform(0, 1, n, 1, 1, 1)
        mixed = torch.where(dice < 0.3, shuffled, torch.where(dice < 0.6, dark + (bright - dark) * grey, pictures))
        axis = torch.linspace(-1, 1, RESOLUTION, device=pictures.device)
        x, y = self._uniform(-1, 1, 2, n, 1, 1, 1)
        distance = ((axis - x) ** 2 + (axis[:, None] - y) ** 2).sqrt()
        inside = torch.sigmoid((self._uniform(0.2, 0.9, n, 1, 1, 1) - distance) * self._uniform(4, 80, n, 1, 1, 1))
        inside = inside * (self._uniform(0, 1, n, 1, 1, 1) < 0.5)
        gain = self._uniform(0.7, 1.3, n, 1, 1, 1)
        return ((mixed * (1 - inside) + mixed.roll(1, 0) * inside - 0.5) * gain + 0.5).clamp(0, 1)

    def plain(self, n: int) -> tuple[Tensor, Tensor]:
        """Recognisable crops, uint8 [n, 3, 128, 128], and the photograph of each, int64 [n]."""
        which = self._choose(n)
        pieces = [self.relight(self.crops(part, 0.5)) for part in which.split(256)]
        return torch.cat([(piece * 255).round().byte() for piece in pieces]), which

    def varied(self, n: int) -> Tensor:
        """Crops of all sizes in all colours, uint8 [n, 3, 128, 128]."""
        which = self._choose(n)
        pieces = [self.distort(self.crops(part, 0.25)) for part in which.split(256)]
        return torch.cat([(piece * 255).round().byte() for piece in pieces])
