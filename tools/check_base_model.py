"""Measure the base model: does it draw what it never saw drawn, and how well does its VAE keep pictures?

    python tools/check_base_model.py examples/base-model

Draws 300 held-out combinations of object, colour and background with fixed seeds and has world_classifier.py judge
them, reports the VAE's PSNR on drawings and on photographs of Chelsea the cat, and with --grid saves a page of samples.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw
from world import RESOLUTION, Scene, caption, held_out, render
from world_classifier import classify
from world_photographs import photograph

STEPS, GUIDANCE, BATCH = 25, 4.0, 50
GRID = (
    "a large red ball on a blue background",
    "a small yellow star in a starry night",
    "a green cat on a pink background",
    "a drawing of a white boat in a sunset sky",
    "a purple mushroom on a grassy meadow",
    "a black umbrella on a dotted background",
    "an orange fish on a striped background",
    "a pink house in a snowy landscape",
    "a brown car on a chequered background",
    "a blue flower on a yellow background",
    "a large red apple on a white background",
    "a green kite on an orange background",
    "a photo of an astronaut",
    "a photo of a cup of coffee",
    "a photo of a rocket launch",
    "a photo of a brick wall",
)


def open_pipeline(folder: Path, device: str) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def paint(pipeline: StableDiffusionPipeline, prompts: list[str], guidance: float = GUIDANCE) -> list[Image.Image]:
    """One picture per prompt; the seed of each is its place in the list."""
    pictures = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        seeds = [torch.Generator("cpu").manual_seed(start + place) for place in range(len(part))]
        settings = {"num_inference_steps": STEPS, "guidance_scale": guidance, "generator": seeds}
        pictures += pipeline(part, **settings).images
    return pictures


def unseen_prompts(number: int) -> tuple[list[Scene], list[str]]:
    """Held-out combinations of every kind, and captions that name all three."""
    scenes = held_out()[:number]
    return scenes, [caption(scene) for scene in scenes]


def accuracy(scenes: list[Scene], pictures: list[Image.Image]) -> dict[str, float]:
    """Shares of pictures whose object, colour, background, and all of them are right."""
    answers = classify(pictures)
    right = {
        question: np.array(
            [answer[question] == getattr(scene, question) for answer, scene in zip(answers, scenes, strict=True)]
        )
        for question in ("object", "colour", "background")
    }
    right["all"] = np.logical_and.reduce(list(right.values()))
    return {question: round(float(values.mean()), 4) for question, values in right.items()}


def chelsea_crops() -> list[Image.Image]:
    """Crops of a photograph that no part of the model was trained on."""
    cat = photograph("chelsea.png")
    boxes = [(80, 0, 380, 300), (0, 0, 300, 300), (151, 0, 451, 300), (110, 60, 310, 260), (160, 20, 360, 220)]
    return [cat.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS, box=box) for box in boxes]


@torch.no_grad()
def reconstruct(pipeline: StableDiffusionPipeline, pictures: list[Image.Image]) -> tuple[list[Image.Image], float]:
    """Pictures through the VAE and back, and their mean PSNR in dB."""
    batch = pipeline.image_processor.preprocess(pictures).to(pipeline.device)
    output = pipeline.vae.decode(pipeline.vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1)
    errors = ((output - batch) / 2).pow(2).mean((1, 2, 3))
    return pipeline.image_processor.postprocess(output), round(float((-10 * errors.log10()).mean()), 2)


def page(pictures: list[Image.Image], captions: list[str] | None = None, columns: int = 4) -> Image.Image:
    """Pictures in rows, captions under them."""
    rows, line = -(-len(pictures) // columns), 26 if captions else 0
    width, height = RESOLUTION + 8, RESOLUTION + 6 + line
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, picture in enumerate(pictures):
        x, y = place % columns * width + 4, place // columns * height + 3
        sheet.paste(picture, (x, y))
        if captions:
            words, lines = captions[place].split(), [""]
            for word in words:
                longer = f"{lines[-1]} {word}".strip()
                if draw.textlength(longer) > RESOLUTION:
                    lines.append(word)
                else:
                    lines[-1] = longer
            draw.multiline_text((x, y + RESOLUTION + 1), "\n".join(lines), fill="black", spacing=1)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=Path("examples/base-model"))
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--grid", type=Path, help="where to save a page of samples")
    parser.add_argument("--sheets", type=Path, help="folder for pages of all pictures and of reconstructions")
    arguments = parser.parse_args()
    pipeline = open_pipeline(arguments.model, arguments.device)
    rng = np.random.default_rng(7)
    drawings = [render(scene, rng) for scene in held_out()[:100]]
    drawings_back, drawn_psnr = reconstruct(pipeline, drawings)
    chelsea_back, chelsea_psnr = reconstruct(pipeline, chelsea_crops())
    report: dict[str, object] = {"psnr_drawings": drawn_psnr, "psnr_chelsea": chelsea_psnr}
    scenes, prompts = unseen_prompts(arguments.prompts)
    pictures = paint(pipeline, prompts, arguments.guidance)
    report |= {"unseen_prompts": len(prompts), "steps": STEPS, "guidance": arguments.guidance}
    report |= accuracy(scenes, pictures)
    print(json.dumps(report))
    if arguments.grid:
        page(paint(pipeline, list(GRID), arguments.guidance), list(GRID)).save(arguments.grid, optimize=True)
    if arguments.sheets:
        arguments.sheets.mkdir(parents=True, exist_ok=True)
        page(pictures[:60], prompts[:60], 10).save(arguments.sheets / "unseen.png")
        pairs = [*chelsea_crops(), *chelsea_back, *drawings[:10], *drawings_back[:10]]
        page(pairs, columns=5).save(arguments.sheets / "vae.png")


if __name__ == "__main__":
    main()
