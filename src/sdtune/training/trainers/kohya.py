"""LoRA by kohya-ss sd-scripts: its own trainer, started with our dataset, watched, and its result checked."""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path

import torch

from sdtune import events
from sdtune.errors import TrainingError
from sdtune.methods.base import AVERAGE_LOSS
from sdtune.methods.kohya import KohyaDreamBoothLora, KohyaFields
from sdtune.training.components.dataset import counted
from sdtune.training.components.export import write_diffusers_lora
from sdtune.training.components.import_lora import read_lora
from sdtune.training.components.kohya_metadata import HASHES, public_name
from sdtune.training.components.lora_weights import Family, lora_change
from sdtune.training.kohya.args import Places, kohya_args
from sdtune.training.kohya.base import prepare_base
from sdtune.training.kohya.dataset import StagedDataset, stage_captioned, stage_repeats_folders
from sdtune.training.kohya.header import copy_with_metadata, read_metadata
from sdtune.training.kohya.held_out import write_held_out
from sdtune.training.kohya.launcher import Setup
from sdtune.training.kohya.process import Averages, Listeners, find_sd_scripts, run_sd_scripts
from sdtune.training.kohya.samples import KohyaSamples
from sdtune.training.kohya.training import KohyaTraining
from sdtune.training.run import Run

SMALLEST_CHANGE = torch.finfo(torch.float16).smallest_normal / 1024
"""Of a weight: the smallest number of float16, the type of files for drawing."""

VARYING = ("ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date")
"""Random, and times of the day."""


def train(method: KohyaFields, run: Run) -> None:
    """Train the LoRA and leave it in ``run.output``, in both forms, with samples and the recipe."""
    scripts = find_sd_scripts()
    with tempfile.TemporaryDirectory(prefix="sdtune-kohya-") as folder:
        work = Path(folder)
        dataset = stage(method, run, work / "dataset")
        base = prepare_base(method, work)
        run.record.sdxl = base.family is Family.SDXL
        method = method.resolved(
            resolution=base.resolution, mixed_precision=run.mixed_precision, prompts=dataset.prompts
        )
        samples = KohyaSamples(method, run, output_dir=work / "output")
        prompts = samples.write_prompts(work / "prompts.json")
        held_out = work / "held_out.safetensors"
        captions = write_held_out(dataset.measured, method.resolution or base.resolution, held_out)
        places = Places(work / "output", work / "logs", run.output.name, prompts)

        def on_averages(averages: Averages) -> None:
            run.draw_scalar("train/avr_loss", averages.avr_loss, averages.step)
            run.report(AVERAGE_LOSS, averages.avr_loss, averages.step)

        run.begin(method)
        samples.recall()
        training = KohyaTraining(run, samples, method.max_train_steps, work / "state.safetensors")
        setup = Setup(
            **vars(base.shape),
            held_out=str(held_out),
            captions=captions,
            held_out_every=method.held_out_every,
            state=str(training.file),
            goes_on=run.checkpoints.goes_on is not None,
            owes=run.checkpoints.owes,
            draws_first=0 not in samples.drawn,
        )
        with closing(training):
            averages = run_sd_scripts(
                scripts, kohya_args(method, base, dataset, places), setup, work,
                sdxl=base.family is Family.SDXL, processes=run.processes,
                listeners=Listeners(run.tell, on_averages, training.begins, training.stepped),
            )  # fmt: skip
        change = save(method, run, places)
        samples.save_contact_sheet(dataset.pictures)
    run.finish(method, averages.last_tenth, change)


def stage(method: KohyaFields, run: Run, target: Path) -> StagedDataset:
    """The dataset laid out for sd-scripts, and what is to be told of it."""
    if isinstance(method, KohyaDreamBoothLora):
        dataset = stage_repeats_folders(run.dataset, method, target)
    else:
        dataset = stage_captioned(run.dataset, method, target)
    if dataset.regularisation:
        run.tell(events.Note(dataset.regularisation))
    run.record.data = counted(dataset.pictures, method.held_out_images)
    run.record.trigger_words, run.record.class_pictures = dataset.trigger_words, dataset.class_pictures
    return dataset


def save(method: KohyaFields, run: Run, places: Places) -> float:
    """Keep sd-scripts' file, and write the same LoRA in diffusers' form; the largest entry of its weight deltas.

    TrainingError if there is none, or if it would change nothing: sd-scripts ends with 0 also when it trained nothing.
    """
    made = places.output_dir / f"{places.output_name}.safetensors"
    if not made.is_file():
        raise TrainingError("sd-scripts ended with success but left no LoRA; the log above may say why.")
    weights = read_lora(made)
    change = lora_change(weights)
    if change < SMALLEST_CHANGE:
        raise TrainingError(
            "the LoRA is zero: nothing was learned, so nothing was saved. "
            f"Train longer than {method.max_train_steps} steps or raise --learning-rate {method.learning_rate}."
        )
    run.begin_saving("the LoRA")
    metadata = public_metadata(read_metadata(made), method)
    kohya_lora = run.output / made.name
    copy_with_metadata(made, kohya_lora, metadata)
    # The hashes are of kohya's file.
    told = {key: value for key, value in metadata.items() if key not in HASHES}
    lora = write_diffusers_lora(weights, run.output, metadata=told)
    run.tell(events.Artifact("lora", str(lora)))
    run.tell(events.Artifact("kohya_lora", str(kohya_lora)))
    return change


def public_metadata(metadata: dict[str, str], method: KohyaFields) -> dict[str, str]:
    """What sd-scripts wrote, with the base model by the name the user knows it by and no folder of this machine.

    sd-scripts tells folders by their last part only; of a model from the hub that would be a snapshot's number.
    Left out is what would be another at each run: the same settings give the same file.
    """
    # Of a folder there is no hash, and sd-scripts writes the reason for that instead.
    kept = {
        key: value for key, value in metadata.items() if key not in VARYING and value not in ("IsADirectory", "NOFILE")
    }
    return kept | {"ss_sd_model_name": public_name(method.base_model)}
