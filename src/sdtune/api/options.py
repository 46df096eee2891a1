"""The options of the functions in this package, for editors and type checkers. Made by: make api-options

They are the fields of the methods, of Placement, StudySettings and BuildSettings, which check them. None: not given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Literal, TypedDict

Text = str | PathLike[str]


class MethodOptions(TypedDict, total=False):
    """Of all methods; each has some of them."""

    instance_prompt: str | None
    """What every picture shows, with a rare word for the subject: "a photo of sks cat"."""
    with_prior_preservation: bool | None
    """Train on pictures of the subject's class too, so that the model goes on drawing it."""
    class_prompt: str | None
    """What the class pictures show, without the rare word: "a photo of a cat"."""
    class_data_dir: Text | None
    """Folder of class pictures; what is missing is drawn by the model."""
    num_class_images: int | None
    """Class pictures to train on."""
    prior_loss_weight: float | None
    """Weight of the class pictures in the loss."""
    push_to_hub: bool | None
    """Upload the result to the Hugging Face Hub at the end; needs a token that may write."""
    hub_model_id: str | None
    """Where on the Hub: owner/name. Not given: the output folder's name, of the token's user."""
    hub_private: bool | None
    """Make a private repository on the Hub."""
    wandb_project: str | None
    """Also log to this Weights & Biases project."""
    base_model: Text | None
    """The model to start from: a Hugging Face id, a diffusers folder, or one .safetensors file; the latter two here
    or at gs://bucket/path."""
    revision: str | None
    """Branch, tag or commit of a Hugging Face id. Not given: its main branch."""
    resolution: int | None
    """Side of the training pictures in pixels. Not given: the base model's own."""
    enable_bucket: bool | None
    """Train each picture near its own shape. Without, its middle is cut to a square."""
    min_bucket_reso: int | None
    """Shortest side of a bucket. Not given: half of resolution."""
    max_bucket_reso: int | None
    """Longest side of a bucket. Not given: twice resolution."""
    bucket_no_upscale: bool | None
    """Never enlarge a picture to fill its bucket."""
    max_train_steps: int | None
    """Optimizer steps to train."""
    train_batch_size: int | None
    """Pictures per step on each GPU."""
    gradient_accumulation_steps: int | None
    """Batches whose gradients are added up before one optimizer step."""
    gradient_checkpointing: bool | None
    """Recompute activations in the backward pass: less memory, slower."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] | None
    """Compute type. auto: bf16 where the GPU has it, else fp16, and no (float32) on CPU."""
    seed: int | None
    """Of everything random: the same seed, the same run."""
    learning_rate: float | None
    """Peak learning rate of the optimizer."""
    lr_scheduler: (
        Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] | None
    )
    """How the learning rate moves over the run."""
    lr_warmup_steps: int | None
    """Steps over which the learning rate rises from 0."""
    sample_prompt: str | Sequence[str] | None
    """A prompt to draw before and after training; repeatable. Not given: the method's own."""
    num_samples: int | None
    """Pictures to draw per sample prompt; 0 draws none."""
    sample_every: int | None
    """Also draw the samples every so many steps; 0: do not."""
    sample_steps: int | None
    """Denoising steps of a sample picture."""
    guidance_scale: float | None
    """Classifier-free guidance of the samples."""
    held_out_images: int | None
    """Pictures kept out of training, to measure the held-out loss on; 0: on all."""
    held_out_every: int | None
    """Measure the held-out loss every so many steps; 0: before and after training."""
    checkpointing_minutes: float | None
    """Write a checkpoint every so many minutes; 0: none by the clock."""
    checkpointing_steps: int | None
    """Write a checkpoint every so many steps; 0: none by their number."""
    checkpoints_total_limit: int | None
    """How many checkpoints are kept, the newest."""
    keep_checkpoints: bool | None
    """Keep them when the run has finished, to train on with more steps."""
    torch_compile: bool | None
    """Compile the UNet by torch.compile instead of using sdtune's own kernels. Takes minutes, the first time: what
    is compiled is kept in the output."""
    random_flip: bool | None
    """Mirror pictures at random. Harms faces, text and everything with a left and right."""
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "adafactor", "lion"] | None
    """The optimizer. adamw8bit takes less memory; prodigy finds its own rate: learning rate 1."""
    lr_num_cycles: int | None
    """Rounds of cosine_with_restarts."""
    adam_beta1: float | None
    """Decay of the first moment: AdamW, Prodigy, Lion."""
    adam_beta2: float | None
    """Decay of the second moment: AdamW, Prodigy, Lion."""
    adam_weight_decay: float | None
    """Weight decay of the optimizer."""
    adam_epsilon: float | None
    """Epsilon of AdamW and Prodigy."""
    max_grad_norm: float | None
    """Gradients are clipped to this norm."""
    prediction_type: Literal["epsilon", "v_prediction"] | None
    """What the UNet predicts: the noise or the velocity. Not given: as the base model says."""
    rescale_betas_zero_snr: bool | None
    """Noise that ends in pure noise (arXiv:2305.08891); for models of the velocity alone."""
    snr_gamma: float | None
    """Weight the loss by min-SNR with this gamma; 5.0 in the paper (arXiv:2303.09556)."""
    clip_skip: int | None
    """Last layers of the text encoder to leave out; 1 is what web UIs call 2."""
    max_token_length: int | None
    """Tokens of a caption that are read, in windows of 75."""
    noise_offset: float | None
    """Strength of noise added per picture and channel, for very dark or light."""
    save_precision: Literal["float", "fp16", "bf16"] | None
    """Type of the numbers in the model's files."""
    use_ema: bool | None
    """Keep and save a moving average of the weights: smoother, for longer runs."""
    ema_decay: float | None
    """Decay of the moving average."""
    train_text_encoder: bool | None
    """Train the text encoder too."""
    text_encoder_lr: float | None
    """Learning rate of the text encoder. Not given: learning_rate."""
    rank: int | None
    """Rank of the LoRA matrices."""
    lora_alpha: float | None
    """The deltas are scaled by lora_alpha / rank. Not given: equal to rank."""
    lora_dropout: float | None
    """Dropout on the input of each LoRA."""
    target_modules: str | Sequence[str] | None
    """Layers of the UNet that get a LoRA, by the end of their names; repeatable."""
    use_dora: bool | None
    """Also learn the norm of each row of the weights (DoRA, arXiv:2402.09353); slower."""
    conv_rank: int | None
    """Also train the UNet's 3x3 convolutions, with this rank."""
    conv_alpha: float | None
    """The same as lora_alpha for convolutions. Not given: equal to conv_rank."""
    save_bin: bool | None
    """Also write pytorch_lora_weights.bin, for tools from before safetensors."""
    proportion_empty_prompts: float | None
    """Share of captions replaced by nothing; helps classifier-free guidance."""
    adapter: Literal["lora", "loha", "lokr", "oft", "boft", "hra"] | None
    """The kind of adapter; web UIs know all but oft and boft."""
    bias: Literal["none", "all", "adapter_only"] | None
    """Also train the UNet's own biases: all, or those of layers with an adapter."""
    text_encoder_rank: int | None
    """Rank in the text encoder. Not given: rank."""
    text_encoder_alpha: float | None
    """The same as lora_alpha for the text encoder. Not given: the UNet's scale of it."""
    text_encoder_dropout: float | None
    """Dropout in the text encoder. Not given: lora_dropout."""
    text_encoder_bias: Literal["none", "all", "adapter_only"] | None
    """The same as bias for the text encoder. Not given: bias."""
    network_dim: int | None
    """Rank of the LoRA."""
    network_alpha: float | None
    """The LoRA is scaled by network_alpha / network_dim. Not given: equal to network_dim."""
    network_dropout: float | None
    """Share of the LoRA's inner values that each step leaves out."""
    conv_dim: int | None
    """Also train the UNet's 3x3 convolutions, with this rank."""
    unet_lr: float | None
    """Learning rate of the UNet. Not given: learning_rate."""
    optimizer_type: Literal["AdamW", "AdamW8bit", "Lion", "Lion8bit", "Prodigy", "AdaFactor"] | None
    """The optimizer. 8-bit ones need a GPU; Prodigy wants learning_rate 1."""
    optimizer_args: str | Sequence[str] | None
    """An argument of the optimizer, such as weight_decay=0.01 or betas=0.9,0.99; repeatable."""
    lr_scheduler_num_cycles: int | None
    """How often cosine_with_restarts starts again."""
    v_parameterization: bool | None
    """The base model predicts the velocity. Not given: as its scheduler or its metadata say."""
    zero_terminal_snr: bool | None
    """Train with noise that ends in pure noise; for models that predict the velocity."""
    min_snr_gamma: float | None
    """Weight the loss by min-SNR with this gamma; 5.0 in the paper (arXiv:2303.09556)."""
    shuffle_caption: bool | None
    """Shuffle the parts of a caption between its commas; for captions made of tags."""
    keep_tokens: int | None
    """Parts at the beginning of a caption that are not shuffled, such as its rare word."""
    caption_dropout_rate: float | None
    """Share of pictures that are shown without their caption."""
    flip_aug: bool | None
    """Mirror pictures at random. Harms faces, text and everything with a left and right."""
    cache_latents: bool | None
    """Encode every picture once, before training: much faster, less memory."""
    random_crop: bool | None
    """Cut pictures at random places instead of their middle."""


class PlacementOptions(TypedDict, total=False):
    """Where in Google Cloud a job runs."""

    project: str | None
    """Google Cloud project. Not given: gcloud's own."""
    region: str | Sequence[str] | None
    """Region of the job; repeatable or A,B: the next one where there is no capacity."""
    gpu: str | None
    """GPU, such as l4, v100 or a100-80gb (sdtune machines). Not given: l4."""
    gpus: int | None
    """How many of them in each machine. Not given: 1, or the machine's."""
    machine_type: str | None
    """Machine type. Not given: the smallest good one for the GPU."""
    force_machine: bool | None
    """Send a machine type or GPU that sdtune does not know, as it is."""
    replicas: int | None
    """Machines that train together."""
    boot_disk_gb: int | None
    """Disk of each machine, in GB."""
    strategy: Literal["on-demand", "spot", "flex-start"] | None
    """spot: cheaper, can be taken away; flex-start: waits for its machine, then keeps it."""
    spot: bool | None
    """The same as --strategy spot."""
    max_wait: int | str | None
    """With flex-start: how long to wait for a machine; 0: for ever. Not given: 24h."""
    timeout: int | str | None
    """The job is ended after this time, however far it is: 90m, 24h, 2d."""
    restart_on_preemption: bool | None
    """Start all machines of the job anew where one of them was taken away."""
    persistent_resource: str | None
    """Id of a persistent resource to run on, which starts at once."""
    image: str | None
    """Container image. Not given: sdtune's own of this version, in --repository."""
    repository: str | None
    """Artifact Registry repository of sdtune's images."""
    bucket: str | None
    """Bucket that folders of this machine are uploaded to. Not given: the output's."""
    service_account: str | None
    """Account that the job acts as. Not given: Vertex AI's own."""
    network: str | None
    """Peered network: projects/NUMBER/global/networks/NAME; NFS needs one."""
    reserved_ip_range: str | Sequence[str] | None
    """Reserved range in that network; repeatable."""
    nfs: str | Sequence[str] | None
    """Filestore share to mount; repeatable."""
    save_nfs: bool | None
    """Copy the models to every --nfs share after training."""
    tensorboard: str | None
    """Vertex AI TensorBoard: projects/P/locations/REGION/tensorboards/ID; needs --service-account."""
    web_access: bool | None
    """Allow a shell into the running machines."""
    labels: Mapping[str, str] | Sequence[str] | None
    """Label of the job; repeatable."""
    env: Mapping[str, str] | Sequence[str] | None
    """Environment variable of the job; repeatable."""
    hf_token_secret: str | None
    """Secret Manager's name for the Hugging Face token: NAME or projects/P/secrets/NAME."""
    wandb_key_secret: str | None
    """Secret Manager's name for the Weights & Biases key."""
    kms_key: str | None
    """Key to encrypt with: projects/P/locations/REGION/keyRings/R/cryptoKeys/K."""


class StudyOptions(TypedDict, total=False):
    """How a search is made."""

    tune: str | Sequence[str] | None
    """What to vary: SETTING=LOW:HIGH, SETTING=LOW:HIGH:log (or linear, reverse-log), SETTING=A,B,C, or SETTING for
    its own range; repeatable. Not given: what the method declares."""
    metric: str | None
    """What is minimised: held_out_loss, or avr_loss of kohya's methods. Not given: held_out_loss."""
    max_trials: int | None
    """Trials in all."""
    parallel_trials: int | None
    """Trials at a time; more of them learn less from each other. Not given: 3 at most."""
    max_failed_trials: int | None
    """End the search once so many trials have failed; 0: the place decides."""
    algorithm: Literal["default", "random", "grid"] | None
    """How the next trial is chosen: default learns from those before it; grid needs values."""
    early_stopping: Literal["none", "median", "decay-curve"] | None
    """End trials that do worse than the median of the others, or whose curve promises little."""
    measurement: Literal["last", "best"] | None
    """What counts of a trial: its last measurement, or its best, which may be luck."""
    seed_per_trial: bool | None
    """Add the trial's number to the seed. Without, trials differ in what is varied alone."""


class BuildOptions(TypedDict, total=False):
    """How an image is built."""

    machine_type: (
        Literal["E2_HIGHCPU_8", "E2_HIGHCPU_32", "E2_STANDARD_2", "E2_MEDIUM", "N1_HIGHCPU_8", "N1_HIGHCPU_32"] | None
    )
    """Machine of the build."""
    disk_gb: int | None
    """Disk of that machine, in GB."""
    timeout: int | str | None
    """The build is ended after this time: 90m, 2h."""
    service_account: str | None
    """Account that the build acts as, which may push images. Not given: the project's own."""


class TrainOptions(MethodOptions, PlacementOptions, total=False):
    """Of ``train``."""


class HpoOptions(MethodOptions, PlacementOptions, StudyOptions, total=False):
    """Of ``hpo``."""
