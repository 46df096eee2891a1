"""Class pictures: what the model drew before, so that it goes on drawing it (Ruiz et al. 2022, section 3.3)."""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeAlias

from sdtune import events
from sdtune.errors import DatasetError
from sdtune.methods.dreambooth import DreamBooth, DreamBoothLora
from sdtune.methods.layouts import check_source
from sdtune.methods.ledger import Layout
from sdtune.methods.peft import PeftDreamBoothLora
from sdtune.training.components.dataset import Picture
from sdtune.training.components.fetch import folder_here, source_of
from sdtune.training.components.files import publish
from sdtune.training.components.models import Parts
from sdtune.training.components.sampling import draw
from sdtune.training.run import Run

AT_ONCE = 8
CLASS_SEED = 1_000_000
"""Far from the samples' seeds, so that no sample shows a class picture."""


PriorMethod: TypeAlias = DreamBooth | DreamBoothLora | PeftDreamBoothLora


def class_pictures(method: PriorMethod, parts: Parts, run: Run) -> list[Picture]:
    """The class pictures of a run, none without prior preservation: those given, and as many drawn as are missing.

    Drawn ones are kept in the output and used again only by a run that would draw the same.
    """
    if not method.with_prior_preservation or method.class_prompt is None:
        return []
    given = _given(method)
    if missing := max(0, method.num_class_images - len(given)):
        given += _drawn(method, method.class_prompt, missing, parts, run)
    run.record.class_pictures = method.num_class_images
    return given[: method.num_class_images]


def _given(method: PriorMethod) -> list[Picture]:
    if method.class_data_dir is None or method.class_prompt is None:
        return []
    folder = folder_here(method.class_data_dir, "class_data_dir")
    try:
        ledger = check_source(source_of(folder), Layout.IMAGES, decode=False)
        ledger.raise_for_errors()
    except DatasetError as error:
        raise DatasetError(f"class_data_dir: {error}") from None
    return [Picture.of(folder, example, method.class_prompt) for example in ledger.examples]


def _drawn(method: PriorMethod, prompt: str, count: int, parts: Parts, run: Run) -> list[Picture]:
    drawing: dict[str, Any] = {
        "base_model": method.base_model,
        "revision": method.revision,
        "class_prompt": prompt,
        "resolution": method.resolution or parts.resolution,
        "seed": method.seed,
        "sample_steps": method.sample_steps,
        "guidance_scale": method.guidance_scale,
        "clip_skip": method.clip_skip,
        "max_token_length": method.max_token_length,
        "mixed_precision": run.mixed_precision,
    }
    name = hashlib.sha256(json.dumps(drawing, sort_keys=True).encode()).hexdigest()[:12]
    folder = run.output / "class_pictures" / name
    paths = [folder / f"{number:05}.png" for number in range(count)]
    run.tell(events.Phase("class", f"Drawing {count} class pictures of “{prompt}”"))
    for start in range(0, count, AT_ONCE):
        batch = paths[start : start + AT_ONCE]
        if start // AT_ONCE % run.share_of_machine.of != run.share_of_machine.number:
            continue  # another process of this machine draws these
        # A picture is whole or not there, so what an interrupted run has drawn need not be drawn again.
        if not all(path.exists() for path in batch):
            seeds = [method.seed + CLASS_SEED + start + number for number in range(len(batch))]
            for path, picture in zip(batch, draw(parts, prompt, seeds, method, run), strict=True):
                with publish(path) as temporary:
                    picture.save(temporary, format="PNG")
        run.tell(events.Progress("class", start + len(batch), count))
    run.accelerator.wait_for_everyone()
    return [Picture(path, prompt, (drawing["resolution"],) * 2) for path in paths]
