"""Run: what surrounds one training: its folders, its device, its voice."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs
from PIL import Image

from sdtune import __version__, events
from sdtune.errors import PublishError, TrainingError
from sdtune.methods.base import HELD_OUT_LOSS, MARK, RECIPE_FILE
from sdtune.methods.fields import CheckpointFields, CommonFields
from sdtune.methods.resuming import CHECKPOINTS, Asked
from sdtune.methods.settings import as_yaml
from sdtune.training import interrupts, nfs
from sdtune.training.checkpoints import Checkpoints
from sdtune.training.components.base_facts import base_facts
from sdtune.training.components.checkpoint_files import DISK, ShortLivedDisk
from sdtune.training.components.checkpoint_store import CheckpointStore, Uploads
from sdtune.training.components.files import publish
from sdtune.training.components.model_card import CARD_FILE, CardFacts, Record, model_card
from sdtune.training.components.processes import Share, share_threads
from sdtune.training.destinations import Destinations
from sdtune.training.hub import HubRepository, published_names
from sdtune.training.hypertune import Reports, open_reports
from sdtune.training.outbox import CURVES, Outbox
from sdtune.training.restarts import Beginning
from sdtune.training.results import (
    LOGS,
    SAMPLES,
    all_files,
    facts_of,
    files_in_mark,
    files_of,
    remove_result,
    remove_what_was_drawn,
    was_drawn,
    write_mark,
)
from sdtune.training.trackers import Trackers, open_trackers

MOST_WAITING = timedelta(hours=2)
"""The other processes wait while the first draws samples or class pictures."""


@dataclass
class Run:
    """One training run: where it reads and writes, what it computes on, how it tells.

    output: a folder of this machine. destinations: where its files go from there. outbox: takes them to a bucket.
    opened: what is closed when the run ends. processes: so many train together, one for each GPU.
    not_ours: files that lay in ``output`` before the result. reports: to the search that this is a trial of.
    checkpoints: what of it outlives its processes.
    """

    dataset: Path
    output: Path
    accelerator: Any
    opened: ExitStack
    checkpoints: Checkpoints
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
        beginning: Beginning | None = None,
    ) -> Iterator[Run]:
        """A run that writes to ``output``, in which nothing of an earlier run is touched before it has begun.

        hub: where the result is uploaded to. beginning: where the run begins; not given, anew.
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
            to = destinations or Destinations()
            checkpoints = Checkpoints(
                method, beginning or Beginning(Asked(str(dataset))), output / CHECKPOINTS,
                Share(accelerator.process_index, accelerator.num_processes), accelerator.device,
                str(accelerator.mixed_precision), ShortLivedDisk() if to.address else DISK,
            )  # fmt: skip
            run = cls(dataset, output, accelerator, opened, checkpoints, hub, processes, to)
            share_threads(run.device, run.share_of_machine.of)
            checkpoints.tell, checkpoints.told = run.tell, run.told
            checkpoints.agree()
            if run.is_first:
                with _writing(output):
                    output.mkdir(parents=True, exist_ok=True)
                    run._open_outboxes(method)
                    write_mark(output, files_in_mark(output), facts_of(output))
                if run.outbox:
                    run.outbox.send_now(MARK)
                run.reports = open_reports(method)
            # After what uploads them, which then waits for the last.
            opened.enter_context(checkpoints)
            yield run
            # Not after an error: the others may hang in an exchange that will not come.
            accelerator.end_training()

    def _open_outboxes(self, method: CommonFields) -> None:
        if self.destinations.checkpoints:
            store = CheckpointStore(self.destinations.checkpoints)
            limit = method.checkpoints_total_limit if isinstance(method, CheckpointFields) else 1
            uploads = Uploads(
                store, self.checkpoints.folder, limit, lambda text: events.emit(events.Note(text, "warning"))
            )
            self.checkpoints.uploads = self.opened.enter_context(uploads)
        if self.destinations.address:
            self.outbox = self.opened.enter_context(Outbox(self.output, self.destinations.address))
            self.outbox.fetch_mark()
        if self.destinations.curves:
            curves = Outbox(self.output / LOGS, self.destinations.curves, [CURVES], needed=False)
            self.curves = self.opened.enter_context(curves)

    def begin(self, method: CommonFields) -> None:
        """Everything has proved right: what an earlier run left here of recipe, samples and curves makes room.

        A run that goes on keeps what it has drawn.
        """
        earlier = self.checkpoints.goes_on
        if earlier:
            self._remember(earlier.told)
        if self.is_first:
            if self.outbox:
                self.outbox.remove([RECIPE_FILE])
                if not earlier:
                    self.outbox.remove(filter(was_drawn, self.outbox.names()))
            with _writing(self.output):
                # Until this run has ended, the folder holds no finished one.
                (self.output / RECIPE_FILE).unlink(missing_ok=True)
                if not earlier:
                    remove_what_was_drawn(self.output)
                self.checkpoints.begin()
                self.opened.enter_context(self.drawing)
                self.trackers = self.drawing.enter_context(
                    open_trackers(method, self.output / LOGS, self.output.name, earlier.step if earlier else 0)
                )

    def told(self) -> dict[str, Any]:
        """What a run that goes on must know of what was told before."""
        return {
            "measures": [asdict(measure) for measure in self.record.measures],
            "samples": {str(step): drawn for step, drawn in self.record.samples.items()},
            "seconds": time.time() - self.started,
        }

    def _remember(self, told: Mapping[str, Any]) -> None:
        """The reverse of ``told``; of samples, as far as their pictures are still to be had."""
        self.started -= told["seconds"]
        self.record.measures = [events.Measure(**measure) for measure in told["measures"]]
        drawn: dict[int, dict[str, list[str]]] = {int(step): rows for step, rows in told["samples"].items()}
        for step, rows in drawn.items():
            names = [name for row in rows.values() for name in row]
            if self.outbox:
                self.outbox.bring(names)
            if all((self.output / name).is_file() for name in names):
                self.record.samples[step] = rows

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
            self.not_ours = all_files(self.output)
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
        finished = events.Finished(self._seconds(), method.max_train_steps, loss, change)
        self._mark(finished)
        self._upload_all()
        self._save_recipe(method)
        if self.outbox:
            self.outbox.finish()
        self.checkpoints.finish()
        self._publish(method)
        if self.hub or self.destinations.shares:
            self._mark(finished, published=True)
        self.tell(replace(finished, seconds=self._seconds()))

    def _seconds(self) -> float:
        return round(time.time() - self.started, 1)

    def _mark(self, finished: events.Finished, *, published: bool = False) -> None:
        """Which files the result has, and what a process needs to know that starts the same run again."""
        result = files_of(self.output, self.record.files)
        measures = {measure.name: asdict(measure) for measure in self.record.measures}
        write_mark(
            self.output,
            [name for name in result if self.output / name not in (self.not_ours or ())],
            {
                **self.checkpoints.facts(), "finished": asdict(finished), "measures": list(measures.values()),
                "published": published,
            },
        )  # fmt: skip
        if published and self.outbox:
            self.outbox.send_now(MARK)

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
            f"#   sdtune train {method.name} --config recipe.yaml --dataset DIR --output DIR\n" + as_yaml(used)
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
