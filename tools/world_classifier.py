"""A small network that tells what a drawing of the world shows: its object, colour and background.

    python tools/world_classifier.py  # trains tools/world_classifier.safetensors: a minute on a GPU

Tests and check_base_model.py judge a model's pictures by it.
"""

import argparse
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812, as torch's own documentation names it
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from world import BACKGROUNDS, COLOURS, OBJECTS, RESOLUTION, Scene, combinations, render_many

WEIGHTS = Path(__file__).with_name("world_classifier.safetensors")
NAMES = {"object": list(OBJECTS), "colour": list(COLOURS), "background": list(BACKGROUNDS)}


class WorldClassifier(nn.Module):
    """Pictures float [n, 3, 128, 128] from 0 to 1 to one row of logits per question."""

    def __init__(self) -> None:
        super().__init__()
        widths = (12, 32, 48, 64, 96)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, out, 3, 2 if place else 1, 1), nn.GroupNorm(8, out), nn.SiLU())
            for place, (width, out) in enumerate(pairwise(widths))
        )
        self.heads = nn.ModuleDict({question: nn.Linear(96 * 16, len(names)) for question, names in NAMES.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        hidden = F.pixel_unshuffle(pictures - 0.5, 2)
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = F.avg_pool2d(hidden, 2).flatten(1)
        return {question: head(hidden) for question, head in self.heads.items()}


_loaded: dict[Path, WorldClassifier] = {}


def load(weights: Path = WEIGHTS) -> WorldClassifier:
    """The trained network, on the CPU, opened once."""
    if weights not in _loaded:
        model = WorldClassifier()
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
        _loaded[weights] = model.eval()
    return _loaded[weights]


@torch.no_grad()
def classify(images: list[Image.Image]) -> list[dict[str, str]]:
    """The object, colour and background of each picture, by name; any size is brought to 128 px."""
    pixels = [np.asarray(image.convert("RGB").resize((RESOLUTION, RESOLUTION))) for image in images]
    pictures = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    answers = {question: logits.argmax(1).tolist() for question, logits in load()(pictures).items()}
    return [{question: NAMES[question][answers[question][i]] for question in NAMES} for i in range(len(images))]


def labels(scenes: list[Scene], device: torch.device) -> dict[str, Tensor]:
    return {
        question: torch.tensor([names.index(getattr(scene, question)) for scene in scenes], device=device)
        for question, names in NAMES.items()
    }


def spoil(pictures: Tensor) -> Tensor:
    """Blur, noise, shifts and other light, as a painter with a small VAE adds them."""
    n, device = len(pictures), pictures.device
    share = torch.rand(n, 1, 1, 1, device=device) * (torch.rand(n, 1, 1, 1, device=device) < 0.5)
    pictures = pictures + share * (F.avg_pool2d(pictures, 5, 1, 2, count_include_pad=False) - pictures)
    pictures = pictures * (0.92 + 0.16 * torch.rand(n, 1, 1, 1, device=device))
    pictures = pictures + 0.03 * torch.randn(n, 3, 1, 1, device=device)
    pictures = pictures + 0.04 * torch.rand(n, 1, 1, 1, device=device) * torch.randn_like(pictures)
    return pictures.roll(tuple(torch.randint(-6, 7, (2,)).tolist()), (2, 3)).clamp(0, 1)


def train(drawings: int, epochs: int, batch: int = 256) -> WorldClassifier:
    """Learn from fresh drawings of every combination; prints the accuracy on 5000 others."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels, scenes = render_many(combinations(), drawings, first_seed=1_000_000)
    model, answers, pictures = WorldClassifier().to(device), labels(scenes, device), torch.from_numpy(pixels).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = epochs * drawings // batch
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        chosen = torch.randint(drawings, (batch,), device=device)
        logits = model(spoil(pictures[chosen].float() / 255))
        loss = sum(F.cross_entropy(logits[question], answers[question][chosen]) for question in NAMES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().cpu()
    pixels, scenes = render_many(combinations(), 5000, first_seed=2_000_000)
    with torch.no_grad():
        parts = [model(part.float() / 255) for part in torch.from_numpy(pixels).split(500)]
    right = {q: torch.cat([p[q] for p in parts]).argmax(1) == labels(scenes, "cpu")[q] for q in NAMES}
    right["all"] = torch.stack(list(right.values())).all(0)
    shares = ", ".join(f"{question} {answer.float().mean():.2%}" for question, answer in right.items())
    print(f"right of 5000 other drawings: {shares}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--drawings", type=int, default=50_000)
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    model = train(arguments.drawings, arguments.epochs)
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, arguments.output)


if __name__ == "__main__":
    main()
