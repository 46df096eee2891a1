"""Run: what surrounds one training: its folders, its device, its voice."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs
from PIL import Image

from sdtune import __version__, events
from sdtune.errors import PublishError, TrainingError
from sdtune.methods.base import HELD_OUT_LOSS, MARK, RECIPE_FILE
from sdtune.methods.fields import CommonFields
from sdtune.training import interrupts, nfs
from sdtune.training.components.base_facts import base_facts
from sdtune.training.components.files import publish
from sdtune.training.components.model_card import CARD_FILE, CardFacts, Record, model_card
from sdtune.training.components.processes import Share
from sdtune.training.destinations import Destinations
from sdtune.training.hub import HubRepository, published_names
from sdtune.training.hypertune import Reports, open_reports
from sdtune.training.outbox import CURVES, Outbox
from sdtune.training.results import files_in_mark, files_of, remove_result, write_mark
from sdtune.training.trackers import Trackers, open_trackers

LOGS = "logs"
SAMPLES = "samples"
MOST_WAITING = timedelta(hours=2)
"""The other processes wait while the first draws samples or class pictures."""


@dataclass
class Run:
    """One training run: where it reads and writes, what it computes on, how it tells.

    output: a folder of this machine. destinations: where its files go from there. outbox: takes them to a bucket.
    opened: what is closed when the run ends. processes: so many train together, one for each GPU.
    not_ours: files that lay in ``output`` before the result. reports: to the search that this is a trial of.
    """

    dataset: Path
    output: Path
    accelerator: Any
    opened: ExitStack
    hub: HubRepository | None = None
    processes: int = 1
    destinations: Destinations = field(default_factory=Destinations)
    outbox: Outbox | None = None
    curves: Outbox | None = None
    drawing: ExitStack = field(default_factory=ExitStack)
    trackers: Trackers = field(default_factory=lambda: Trackers([]))
    started: float = field(default_factory=time.time)
    record: Record = field(default_factory=Record)
    not_ours: set[Path] | None = None
    reports: Reports | None = None

    @classmethod
    @contextmanager
    def open(
        cls,
        method: CommonFields,
        dataset: Path,
        output: Path,
        hub: HubRepository | None = None,
        processes: int = 1,
        destinations: Destinations | None = None,
    ) -> Iterator[Run]:
        """A run that writes to ``output``, in which nothing of an earlier run is touched before it has begun.

        hub: where the result is uploaded to.
        """
        interrupts.listen()
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
        # split_batches: a step of the schedule is a step of all processes together.
        accelerator = Accelerator(
            mixed_precision=mixed_precision(method.mixed_precision),
            cpu=not torch.cuda.is_available(),
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=MOST_WAITING)],
        )
        with ExitStack() as opened:
            run = cls(dataset, output, accelerator, opened, hub, processes, destinations or Destinations())
            if run.is_first:
                with _writing(output):
                    output.mkdir(parents=True, exist_ok=True)
                    run._open_outboxes()
                    write_mark(output, files_in_mark(output))
                if run.outbox:
                    run.outbox.send_now(MARK)
                run.reports = open_reports(method)
            yield run
            # Not after an error: the others may hang in an exchange that will not come.
            accelerator.end_training()

    def _open_outboxes(self) -> None:
        if self.destinations.address:
            self.outbox = self.opened.enter_context(Outbox(self.output, self.destinations.address))
            self.outbox.fetch_mark()
        if self.destinations.curves:
            curves = Outbox(self.output / LOGS, self.destinations.curves, [CURVES], needed=False)
            self.curves = self.opened.enter_context(curves)

    def begin(self, method: CommonFields) -> None:
        """Everything has proved right: what an earlier run left here of recipe, samples and curves makes room."""
        if self.is_first:
            if self.outbox:
                self.outbox.remove([RECIPE_FILE])
                self.outbox.remove(filter(_was_drawn, self.outbox.names()))
            with _writing(self.output):
                # Until this run has ended, the folder holds no finished one.
                (self.output / RECIPE_FILE).unlink(missing_ok=True)
                _remove_what_was_drawn(self.output)
                self.opened.enter_context(self.drawing)
                self.trackers = self.drawing.enter_context(open_trackers(method, self.output / LOGS, self.output.name))

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def share(self) -> Share:
        """Which of the processes that train together this is; the first alone tells, draws and writes."""
        return Share(self.accelerator.process_index, self.accelerator.num_processes)

    @property
    def share_of_machine(self) -> Share:
        """Which of the processes of this machine this is: they alone see one disk."""
        of = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.share.of > 1 else 1
        return Share(self.accelerator.local_process_index, of)

    @property
    def is_first(self) -> bool:
        return self.share.number == 0

    @property
    def mixed_precision(self) -> str:
        """What ``auto`` became: no, fp16 or bf16."""
        return str(self.accelerator.mixed_precision)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Type of the frozen weights. Trainable ones are float32 always."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.mixed_precision, torch.float32)

    def tell(self, event: events.Event) -> None:
        """Say it on standard output, draw it where it is a number, and keep what the card will show."""
        if not self.is_first:
            return
        # Before it is said: who hears of a measure finds it reported.
        if isinstance(event, events.Measure) and event.name == HELD_OUT_LOSS:
            self.report(event.name, event.value, event.step)
        events.emit(self._as_published(event))
        match event:
            case events.Step():
                self.draw_scalar("train/loss", event.loss, event.step)
                self.draw_scalar("train/learning_rate", event.learning_rate, event.step)
                self.draw_scalar("train/images_per_second", event.images_per_second, event.step)
            case events.Measure():
                self.draw_scalar(event.name, event.value, event.step)
                self.record.measures.append(event)
            case events.Artifact() if Path(event.path).is_relative_to(self.output):
                name = Path(event.path).relative_to(self.output).as_posix()
                self.record.files.setdefault(event.kind, []).append(name)
                if self.outbox:
                    self.outbox.send(files_of(self.output, {event.kind: [name]}))

    def _as_published(self, event: events.Event) -> events.Event:
        """A file by the place where it will be found: that on this machine goes with it."""
        address = self.destinations.address
        if address and isinstance(event, events.Artifact) and Path(event.path).is_relative_to(self.output):
            name = Path(event.path).relative_to(self.output).as_posix()
            return replace(event, path=address if name == "." else f"{address}/{name}")
        return event

    def draw_scalar(self, name: str, value: float, step: int) -> None:
        """One point of a curve."""
        self.trackers.scalar(name, value, step)

    def report(self, metric: str, value: float, step: int) -> None:
        """Tell it to the search that this run is a trial of, if it is."""
        if self.reports:
            self.reports.report(metric, value, step)

    def save_samples(self, step: int, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> None:
        """Write the pictures of each prompt, drawn after ``step`` steps, as PNG files and into the trackers."""
        for number, (prompt, row) in enumerate(zip(prompts, pictures, strict=True)):
            for sample, picture in enumerate(row):
                name = f"{SAMPLES}/step-{step:06d}/prompt-{number}-sample-{sample}.png"
                with publish(self.output / name) as temporary:
                    picture.save(temporary, format="PNG")
                self.trackers.picture(f"samples/{number}-{sample}", prompt, picture, step)
                self.record.samples.setdefault(step, {}).setdefault(prompt, []).append(name)

    def begin_saving(self, what: str) -> None:
        """Say what is saved now; the result of an earlier run in this folder makes room for it, file by file."""
        self.tell(events.Phase("save", f"Saving {what}"))
        if self.not_ours is None:
            if self.outbox:
                self.outbox.remove(files_in_mark(self.output))
            remove_result(self.output)
            self.not_ours = {path for path in self.output.rglob("*") if path.is_file()}
            if self.outbox:
                self.outbox.send_now(MARK)
                self.not_ours |= {self.output / name for name in self.outbox.names()}

    def save_picture(self, kind: str, name: str, picture: Image.Image) -> None:
        """Write one picture of the result."""
        with publish(self.output / name) as temporary:
            picture.save(temporary, format="PNG")
        self.tell(events.Artifact(kind, str(self.output / name)))

    def finish(self, method: CommonFields, loss: float, change: float) -> None:
        """Write the card and the recipe, which comes last (an output folder that has one holds a finished run),
        publish them with the result where asked, and say so."""
        self.tell(events.Artifact("tensorboard", str(self.output / LOGS)))
        self._save_card(method, loss)
        result = files_of(self.output, self.record.files)
        write_mark(self.output, [name for name in result if self.output / name not in (self.not_ours or ())])
        self._upload_all()
        self._save_recipe(method)
        if self.outbox:
            self.outbox.finish()
        self._publish(method)
        seconds = round(time.time() - self.started, 1)
        self.tell(events.Finished(seconds=seconds, steps=method.max_train_steps, loss=loss, change=change))

    def _upload_all(self) -> None:
        """Wait until everything but the recipe is in the bucket."""
        if not self.outbox and not self.curves:
            return
        # The last points are in the files only when these are closed.
        self.drawing.close()
        if self.curves:
            self.curves.finish()
        if self.outbox:
            self.tell(events.Phase("upload", f"Uploading to {self.outbox.address}"))
            self.outbox.send([MARK])
            self.outbox.finish()

    def _publish(self, method: CommonFields) -> None:
        """To the Hub and to NFS shares. What goes wrong at one is told after the other has been tried."""
        failed: list[str] = []
        try:
            self._push_to_hub(method)
        except PublishError as error:
            failed.append(str(error))
        try:
            if self.destinations.shares:
                models = nfs.LocalModels(self.output, self.destinations.address)
                nfs.copy_models(models, method.name, self.destinations.shares, self.tell)
        except PublishError as error:
            place = self.destinations.address or self.output
            failed.append(
                f"{error} The result is whole in {place}; copy it again with: sdtune sync-nfs --from {place} --nfs ..."
            )
        if failed:
            raise PublishError("\n".join(failed))

    def _push_to_hub(self, method: CommonFields) -> None:
        if self.hub:
            names = published_names(self.output, self.record.files, method.recipe(), self.not_ours or ())
            self.tell(events.Phase("upload", f"Uploading to {self.hub.repo_id}"))
            self.tell(events.Artifact("hub", self.hub.upload(self.output, names, self.destinations.address)))

    def _save_card(self, method: CommonFields, loss: float) -> None:
        facts = CardFacts(
            name=self.output.name,
            method=method,
            base=base_facts(method.base_model),
            record=self.record,
            loss=loss,
            seconds=time.time() - self.started,
            machine=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            versions={"sdtune": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
            hub_id=self.hub.repo_id if self.hub else None,
        )
        self._save_text("card", CARD_FILE, model_card(facts))

    def _save_recipe(self, method: CommonFields) -> None:
        used = {"method": method.name, **method.recipe()}
        text = (
            f"# What sdtune {__version__} trained {self.output.name!r} with. Train the same again with\n"
            f"#   sdtune train {method.name} --config recipe.yaml --dataset DIR --output DIR\n"
            + yaml.safe_dump(used, sort_keys=False, allow_unicode=True)
        )
        self._save_text("recipe", RECIPE_FILE, text)

    def _save_text(self, kind: str, name: str, text: str) -> None:
        with publish(self.output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        self.tell(events.Artifact(kind, str(self.output / name)))


def mixed_precision(setting: str) -> str:
    """``auto`` resolved for this machine; anything else as it is."""
    if setting != "auto":
        return setting
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(f"output: {output} cannot be written ({error}); choose another --output.") from None


def _was_drawn(name: str) -> bool:
    """A curve, a sample or the card, by its name in a bucket."""
    top, _, rest = name.partition("/")
    return name == CARD_FILE or (
        fnmatch(rest, CURVES) and "/" not in rest if top == LOGS else top == SAMPLES and fnmatch(rest, "step-*/*")
    )


def _remove_what_was_drawn(output: Path) -> None:
    """The curves, samples and card of an earlier run, and nothing else that may lie there."""
    (output / CARD_FILE).unlink(missing_ok=True)
    for curve in (output / LOGS).glob(CURVES):
        curve.unlink()
    for drawn in (output / SAMPLES).glob("step-*"):
        shutil.rmtree(drawn)
