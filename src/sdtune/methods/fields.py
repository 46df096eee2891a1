"""The settings that all methods share, or all that diffusers trains, each declared once.

Type, bound, help, default, search range; method_fields.py has those of some methods.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator

from sdtune.errors import DatasetError, RecipeError
from sdtune.methods.base import Method, Tunable
from sdtune.methods.buckets import Buckets

Prompt = Annotated[str, Field(min_length=1, max_length=10_000)]


class PublishFields(Method):
    """Where a run is shown besides its output folder. None of it changes what is trained."""

    push_to_hub: Annotated[
        bool, Field(description="Upload the result to the Hugging Face Hub at the end; needs a token that may write.")
    ] = False
    hub_model_id: Annotated[
        str | None,
        Field(description="Where on the Hub: owner/name. Not given: the output folder's name, of the token's user."),
    ] = None
    hub_private: Annotated[bool, Field(description="Make a private repository on the Hub.")] = False
    wandb_project: Annotated[
        str | None,
        Field(min_length=1, max_length=128, description="Also log to this Weights & Biases project."),
    ] = None

    @field_validator("hub_model_id", "hub_private")
    @classmethod
    def _belongs_to_the_hub(cls, value: str | bool | None, info: ValidationInfo) -> str | bool | None:
        if value and not info.data.get("push_to_hub", True):
            raise ValueError(f"found {value!r}, but nothing is uploaded; add --push-to-hub or leave it out.")
        if isinstance(value, str) and not is_hub_id(value):
            raise ValueError(
                f"found {value!r}, wanted owner/name, both of letters, digits, '-', '_' and '.', at most 96 characters."
            )
        return value

    @field_validator("wandb_project")
    @classmethod
    def _is_a_project(cls, name: str | None) -> str | None:
        if name and re.search(r"[/\\#?%:]|[^\S ]", name):
            raise ValueError(f"found {name!r}, wanted a name on one line without any of / \\ # ? % :")
        return name

    def recipe(self) -> dict[str, Any]:
        """What made the result: the settings without those above, so that training it again publishes nothing."""
        return {name: value for name, value in self.settings().items() if name not in PublishFields.model_fields}


def is_hub_id(text: str) -> bool:
    """Whether the Hugging Face Hub would take it as owner/name."""
    part = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
    allowed = re.fullmatch(f"{part}/{part}", text, re.ASCII)
    return bool(allowed) and "--" not in text and ".." not in text and not text.endswith(".git")


class CommonFields(PublishFields):
    """What every method needs to know, whichever library does the work."""

    base_model: Annotated[
        str,
        Field(
            min_length=1,
            description="The model to start from: a Hugging Face id, a diffusers folder, or one .safetensors file; "
            "the latter two here or at gs://bucket/path.",
        ),
    ] = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    revision: Annotated[
        str | None,
        Field(min_length=1, description="Branch, tag or commit of a Hugging Face id. Not given: its main branch."),
    ] = None
    resolution: Annotated[
        int | None,
        Field(
            ge=64,
            le=2048,
            multiple_of=8,
            description="Side of the training pictures in pixels. Not given: the base model's own.",
        ),
    ] = None
    enable_bucket: Annotated[
        bool, Field(description="Train each picture near its own shape. Without, its middle is cut to a square.")
    ] = True
    min_bucket_reso: Annotated[
        int | None,
        Field(ge=64, multiple_of=64, description="Shortest side of a bucket. Not given: half of resolution."),
    ] = None
    max_bucket_reso: Annotated[
        int | None,
        Field(ge=64, multiple_of=64, description="Longest side of a bucket. Not given: twice resolution."),
    ] = None
    bucket_no_upscale: Annotated[bool, Field(description="Never enlarge a picture to fill its bucket.")] = False
    max_train_steps: Annotated[
        int, Field(ge=1, description="Optimizer steps to train."), Tunable(values=(200, 400, 800))
    ] = 400
    train_batch_size: Annotated[
        int, Field(ge=1, le=256, description="Pictures per step on each GPU."), Tunable(values=(1, 2, 4))
    ] = 1
    gradient_accumulation_steps: Annotated[
        int,
        Field(ge=1, description="Batches whose gradients are added up before one optimizer step."),
        Tunable(values=(1, 2, 4)),
    ] = 1
    gradient_checkpointing: Annotated[
        bool, Field(description="Recompute activations in the backward pass: less memory, slower.")
    ] = False
    mixed_precision: Annotated[
        Literal["auto", "no", "fp16", "bf16"],
        Field(description="Compute type. auto: bf16 where the GPU has it, else fp16, and no (float32) on CPU."),
    ] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32, description="Of everything random: the same seed, the same run.")] = 42

    learning_rate: Annotated[
        float,
        Field(gt=0, le=1, description="Peak learning rate of the optimizer."),
        Tunable(1e-6, 1e-3, log=True, by_default=True),
    ] = 1e-4

    lr_scheduler: Annotated[
        Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"],
        Field(description="How the learning rate moves over the run."),
        Tunable(values=("constant", "linear", "cosine")),
    ] = "constant"
    lr_warmup_steps: Annotated[
        int,
        Field(ge=0, description="Steps over which the learning rate rises from 0."),
        Tunable(
            0,
            100,
            when=("lr_scheduler", ("constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")),
        ),
    ] = 0

    sample_prompt: Annotated[
        tuple[Prompt, ...],
        Field(description="A prompt to draw before and after training; repeatable. Not given: the method's own."),
    ] = ()
    num_samples: Annotated[int, Field(ge=0, le=16, description="Pictures to draw per sample prompt; 0 draws none.")] = 4
    sample_every: Annotated[int, Field(ge=0, description="Also draw the samples every so many steps; 0: do not.")] = 0
    sample_steps: Annotated[int, Field(ge=1, le=1000, description="Denoising steps of a sample picture.")] = 25
    guidance_scale: Annotated[float, Field(ge=1, le=50, description="Classifier-free guidance of the samples.")] = 7.5

    held_out_images: Annotated[
        int, Field(ge=0, description="Pictures kept out of training, to measure the held-out loss on; 0: on all.")
    ] = 0
    held_out_every: Annotated[
        int, Field(ge=0, description="Measure the held-out loss every so many steps; 0: before and after training.")
    ] = 0

    @field_validator("revision")
    @classmethod
    def _is_a_revision(cls, name: str | None) -> str | None:
        # The hub's client keeps a file of this name in its cache.
        if name and (not re.fullmatch(r"\w[\w./-]*", name) or ".." in name or "//" in name):
            raise ValueError(f"found {name!r}, wanted a branch, tag or commit, such as main or fp16.")
        return name

    @field_validator("min_bucket_reso", "max_bucket_reso", "bucket_no_upscale")
    @classmethod
    def _there_are_buckets(cls, value: int | bool | None, info: ValidationInfo) -> int | bool | None:
        if value and info.data.get("enable_bucket") is False:
            raise ValueError(f"found {value} with enable_bucket false: there are no buckets; leave one of them out.")
        side = info.data.get("resolution")
        if value and side and info.field_name == "min_bucket_reso" and value > side:
            raise ValueError(f"found {value} with resolution {side}; the shortest side must not be longer than that.")
        if value and side and info.field_name == "max_bucket_reso" and value < side:
            raise ValueError(f"found {value} with resolution {side}; the longest side must not be shorter than that.")
        return value

    @field_validator("lr_warmup_steps")
    @classmethod
    def _warmup_has_a_use(cls, steps: int, info: ValidationInfo) -> int:
        total = info.data.get("max_train_steps")
        if steps and info.data.get("lr_scheduler") == "constant":
            raise ValueError(
                f"found {steps} with lr_scheduler constant, which has no warm-up; "
                "use constant_with_warmup or leave it out."
            )
        if total is not None and steps >= total:
            raise ValueError(
                f"found {steps}, but max_train_steps is {total}; the warm-up must be shorter than the run."
            )
        return steps

    @field_validator("lr_scheduler")
    @classmethod
    def _polynomial_falls(cls, scheduler: str, info: ValidationInfo) -> str:
        rate = info.data.get("learning_rate", 1.0)
        if scheduler == "polynomial" and rate <= 1e-7:
            raise ValueError(
                f"found polynomial with learning_rate {rate:g}, but it falls to 1e-7; "
                "use linear, which falls to 0, or a larger learning_rate."
            )
        return scheduler

    @field_validator("sample_every")
    @classmethod
    def _samples_to_draw(cls, every: int, info: ValidationInfo) -> int:
        if every and info.data.get("num_samples") == 0:
            raise ValueError(f"found {every} with num_samples 0: there is nothing to draw; raise num_samples.")
        return every

    def resolved(self, *, resolution: int, mixed_precision: str, prompts: Sequence[str] = ()) -> Self:
        """The same settings with what only the run could know filled in.

        resolution: the base model's, where none was given. prompts: what is sampled where none was given.
        """
        return self.model_copy(
            update={
                "resolution": self.resolution or resolution,
                "mixed_precision": mixed_precision,
                "sample_prompt": self.sample_prompts() or tuple(prompts),
            }
        )

    def buckets(self, resolution: int, step: int) -> Buckets:
        """The shapes that pictures are trained in at ``resolution``: the square alone without ``enable_bucket``.

        step: what the model needs sides to be multiples of, in pixels.
        RecipeError: a bound does not fit the resolution.
        """
        for name, bound in (("min_bucket_reso", self.min_bucket_reso), ("max_bucket_reso", self.max_bucket_reso)):
            if bound and (bound > resolution if name == "min_bucket_reso" else bound < resolution):
                least = (
                    "shortest side must not be longer" if name == "min_bucket_reso" else "longest must not be shorter"
                )
                raise RecipeError(f"{name}: found {bound}, but pictures are trained at {resolution}; the {least}.")
        if not self.enable_bucket:
            return Buckets(resolution, step, resolution, resolution)
        shortest = self.min_bucket_reso or max(step, resolution // 2 // step * step)
        longest = self.max_bucket_reso or -(-2 * resolution // step) * step
        return Buckets(resolution, step, shortest, longest, self.bucket_no_upscale)

    def check_examples(self, count: int) -> None:
        """DatasetError if so many pictures are not enough for these settings."""
        if self.held_out_images >= count:
            raise DatasetError(
                f"held_out_images: {self.held_out_images} of {count} pictures would leave none to train on; "
                "keep fewer out."
            )

    @property
    def checkpointing(self) -> bool:
        """Checkpoints are written, so that a run that was stopped goes on."""
        return False

    def sample_prompts(self) -> tuple[str, ...]:
        """The prompts that samples are drawn from; a method without an own prompt has none unless told."""
        return self.sample_prompt


class CheckpointFields(Method):
    """What is kept of a run while it goes, so that it can go on after an end that nobody wanted."""

    checkpointing_minutes: Annotated[
        float,
        Field(ge=0, le=1440, description="Write a checkpoint every so many minutes; 0: none by the clock."),
    ] = 5.0
    checkpointing_steps: Annotated[
        int, Field(ge=0, description="Write a checkpoint every so many steps; 0: none by their number.")
    ] = 0
    checkpoints_total_limit: Annotated[
        int, Field(ge=1, le=1000, description="How many checkpoints are kept, the newest.")
    ] = 2
    keep_checkpoints: Annotated[
        bool, Field(description="Keep them when the run has finished, to train on with more steps.")
    ] = False

    @property
    def checkpointing(self) -> bool:
        return bool(self.checkpointing_minutes or self.checkpointing_steps)

    @field_validator("keep_checkpoints")
    @classmethod
    def _there_are_checkpoints(cls, keep: bool, info: ValidationInfo) -> bool:
        if keep and info.data.get("checkpointing_minutes") == 0 and info.data.get("checkpointing_steps") == 0:
            raise ValueError("found true, but no checkpoints are written; leave it out, or give checkpointing_steps.")
        return keep


class TrainingFields(CheckpointFields, CommonFields):
    """What every method that trains with diffusers needs to know."""

    torch_compile: Annotated[
        bool,
        Field(
            description="Compile the UNet by torch.compile instead of using sdtune's own kernels. Takes minutes, the "
            "first time: what is compiled is kept in the output."
        ),
    ] = False
    random_flip: Annotated[
        bool, Field(description="Mirror pictures at random. Harms faces, text and everything with a left and right.")
    ] = False
    optimizer: Annotated[
        Literal["adamw", "adamw8bit", "prodigy", "adafactor", "lion"],
        Field(description="The optimizer. adamw8bit takes less memory; prodigy finds its own rate: learning rate 1."),
        Tunable(values=("adamw", "lion")),
    ] = "adamw"
    lr_num_cycles: Annotated[
        int,
        Field(ge=1, description="Rounds of cosine_with_restarts."),
        Tunable(2, 5, when=("lr_scheduler", ("cosine_with_restarts",))),
    ] = 1
    adam_beta1: Annotated[
        float,
        Field(ge=0, lt=1, description="Decay of the first moment: AdamW, Prodigy, Lion."),
        Tunable(0.8, 0.95, when=("optimizer", ("adamw", "adamw8bit", "prodigy", "lion"))),
    ] = 0.9
    adam_beta2: Annotated[
        float,
        Field(ge=0, lt=1, description="Decay of the second moment: AdamW, Prodigy, Lion."),
        Tunable(values=(0.95, 0.99, 0.999), when=("optimizer", ("adamw", "adamw8bit", "prodigy", "lion"))),
    ] = 0.999
    adam_weight_decay: Annotated[
        float, Field(ge=0, description="Weight decay of the optimizer."), Tunable(1e-4, 1e-1, log=True)
    ] = 1e-2
    adam_epsilon: Annotated[float, Field(gt=0, description="Epsilon of AdamW and Prodigy.")] = 1e-8
    max_grad_norm: Annotated[
        float, Field(gt=0, description="Gradients are clipped to this norm."), Tunable(0.1, 2.0, log=True)
    ] = 1.0

    prediction_type: Annotated[
        Literal["epsilon", "v_prediction"] | None,
        Field(description="What the UNet predicts: the noise or the velocity. Not given: as the base model says."),
    ] = None
    rescale_betas_zero_snr: Annotated[
        bool, Field(description="Noise that ends in pure noise (arXiv:2305.08891); for models of the velocity alone.")
    ] = False
    snr_gamma: Annotated[
        float | None,
        Field(gt=0, description="Weight the loss by min-SNR with this gamma; 5.0 in the paper (arXiv:2303.09556)."),
        Tunable(1.0, 20.0, log=True),
    ] = None
    clip_skip: Annotated[
        int, Field(ge=0, le=8, description="Last layers of the text encoder to leave out; 1 is what web UIs call 2.")
    ] = 0
    max_token_length: Annotated[
        int, Field(ge=75, le=225, multiple_of=75, description="Tokens of a caption that are read, in windows of 75.")
    ] = 75
    noise_offset: Annotated[
        float,
        Field(ge=0, le=1, description="Strength of noise added per picture and channel, for very dark or light."),
        Tunable(0.0, 0.1),
    ] = 0.0

    @field_validator("optimizer")
    @classmethod
    def _prodigy_finds_its_own_rate(cls, optimizer: str, info: ValidationInfo) -> str:
        rate = info.data.get("learning_rate", 1.0)
        if optimizer == "prodigy" and rate < 0.1:
            raise ValueError(f"found prodigy with learning_rate {rate}, which scales the rate it finds; use about 1.")
        return optimizer

    @field_validator("lr_num_cycles")
    @classmethod
    def _cycles_belong_to_restarts(cls, cycles: int, info: ValidationInfo) -> int:
        restarts = info.data.get("lr_scheduler") == "cosine_with_restarts"
        if restarts and cycles == 1:
            raise ValueError("found 1, with which cosine_with_restarts never restarts; use 2 or more, or cosine.")
        if not restarts and cycles != 1 and "lr_scheduler" in info.data:
            raise ValueError(f"found {cycles}, which only cosine_with_restarts has a use for; leave it out.")
        return cycles

    @field_validator("adam_beta1", "adam_beta2", "adam_epsilon")
    @classmethod
    def _the_optimizer_has_it(cls, value: float, info: ValidationInfo) -> float:
        name = str(info.field_name)
        without = {"adafactor", "lion"} if name == "adam_epsilon" else {"adafactor"}
        optimizer = info.data.get("optimizer")
        if optimizer in without and value != cls.model_fields[name].default:
            raise ValueError(f"found {value}, but {optimizer} has no such setting; leave it out.")
        return value

    @field_validator("rescale_betas_zero_snr")
    @classmethod
    def _pure_noise_has_a_velocity_alone(cls, rescale: bool, info: ValidationInfo) -> bool:
        if rescale and info.data.get("prediction_type") == "epsilon":
            raise ValueError(
                "found true with prediction_type epsilon, from which nothing is learned at pure noise; "
                "use v_prediction or leave it out."
            )
        return rescale
