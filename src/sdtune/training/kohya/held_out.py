"""What the held-out loss of the kohya methods is measured on: the same squares, noise and timesteps as elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file

from sdtune.training.components.dataset import Picture, open_cut
from sdtune.training.components.held_out import DRAWS, fixed_draws
from sdtune.training.kohya.shape import LATENT_CHANNELS, TIMESTEPS, VAE_SCALE


def write_held_out(pictures: Sequence[Picture], resolution: int, target: Path) -> list[str]:
    """Write for ``measure.py`` what it measures; the captions of the pictures in it.

    pixels: uint8 [pictures, 3, resolution, resolution], at most as many as there are draws; the rest as ``Draws``.
    """
    shown = pictures[:DRAWS]
    side = resolution // VAE_SCALE
    draws = fixed_draws([(LATENT_CHANNELS, side, side)] * len(shown), TIMESTEPS)
    pixels = numpy.stack([numpy.array(open_cut(picture.path, (resolution, resolution))) for picture in shown])
    save_file(
        {
            "pixels": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
            "pictures": draws.pictures,
            "noise": torch.stack(draws.noise),
            "timesteps": draws.timesteps,
        },
        target,
    )
    return [picture.caption for picture in shown]
