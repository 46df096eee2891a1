"""Train examples/base-model from scratch: render the world, then the VAE, then the UNet with its text encoder.

    pip install scikit-image  # for the photographs in its wheel
    python tools/train_base_model.py --output examples/base-model --minutes 12

Made for one GPU of the H100's kind; it runs on a CPU too, for a test of a minute that learns nothing.
Every phase learns for a share of --minutes, so the pipeline is saved in time.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812, as torch's own documentation names it
from base_model import (
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
    save_pipeline,
    write_tokenizer,
)
from torch import Tensor, nn
from transformers import CLIPTokenizer
from world import Scene, caption, combinations, render_many, seen, with_size
from world_photographs import PHOTOGRAPHS, Album, photo_caption

CAPTIONS_EACH = 3  # forms of caption per picture, one drawn at random whenever it is shown
KL_WEIGHT = 3e-4
RESERVE = 12  # seconds at the end for saving


def caption_all(scenes: list[Scene]) -> list[list[str]]:
    rng = np.random.default_rng(1)
    return [[caption(scene, rng) for _ in range(CAPTIONS_EACH)] for scene in scenes]


def vocabulary_captions() -> list[str]:
    """The captions that the tokenizer learns words from: the same in every run, so weights can be resumed."""
    rng = np.random.default_rng(2)
    drawn = [caption(with_size(scene, rng), rng) for scene in combinations() for _ in range(3)]
    return drawn + [photo_caption(name, rng) for name in PHOTOGRAPHS for _ in range(100)]


class Average:
    """Exponential moving average of parameters, which is what gets saved."""

    def __init__(self, modules: list[nn.Module], decay: float) -> None:
        self.live = [parameter for module in modules for parameter in module.parameters()]
        self.kept = [parameter.detach().clone() for parameter in self.live]
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.kept, self.live, 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        torch._foreach_copy_(self.live, self.kept)


def timed(seconds: float, optimizers: list[torch.optim.Optimizer], every: int = 200) -> Iterator[float]:
    """Yield the share of the time that is spent, from 0 to 1; learning rates rise, then fall along a cosine."""
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start, step = time.monotonic(), 0
    while (progress := (time.monotonic() - start) / max(seconds, 1)) < 1:
        factor = min(1, (step + 1) / 200) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        yield progress
        step += 1
        if step % every == 0 and torch.cuda.is_available():
            torch.cuda.synchronize()  # or the clock runs ahead of the work
    print(f"  {step} steps in {time.monotonic() - start:.0f} s", flush=True)


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def adamw(modules: list[nn.Module], lr: float, device: torch.device, **settings: object) -> torch.optim.AdamW:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.AdamW(parameters, lr=lr, fused=device.type == "cuda", **settings)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] to floats from -1 to 1."""
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def build_discriminator() -> nn.Sequential:
    """PatchGAN: one judgement per 8 px, from patches of some 30 px. Source: Isola et al. 2017, arXiv:1611.07004."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 48, 4, 2, 1), nn.LeakyReLU(0.2)),
        nn.Sequential(nn.Conv2d(48, 96, 4, 2, 1), nn.GroupNorm(8, 96), nn.LeakyReLU(0.2)),
        nn.Sequential(nn.Conv2d(96, 160, 4, 2, 1), nn.GroupNorm(8, 160), nn.LeakyReLU(0.2)),
        nn.Conv2d(160, 1, 3, 1, 1),
    )


def features(discriminator: nn.Sequential, pictures: Tensor) -> list[Tensor]:
    """Outputs of the discriminator's layers, the judgement last."""
    outputs = [pictures]
    for layer in discriminator:
        outputs.append(layer(outputs[-1]))
    return outputs[1:]


def structural_similarity(x: Tensor, y: Tensor) -> Tensor:
    """Mean SSIM in windows of 7 px, for values from -1 to 1. Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861."""

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, 7, 1)

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.02**2, 0.06**2
    return ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean()


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 at three scales, of the differences between neighbours, and SSIM."""
    output, target = output.float(), target.float()
    loss = (output - target).abs().mean() + 0.2 * (1 - structural_similarity(output, target))
    error = output - target
    loss = loss + 0.5 * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())
    for _ in range(2):
        error = F.avg_pool2d(error, 2)
        loss = loss + 0.5 * error.abs().mean()
    return loss


def train_vae(vae: nn.Module, pixels: Tensor, seconds: float, batch: int, fast: Callable) -> None:
    """Fit the VAE to pictures uint8 [n, 3, 128, 128]; the second half is judged by a discriminator too."""
    device = pixels.device
    discriminator = build_discriminator().to(device, memory_format=torch.channels_last)
    optimizer = adamw([vae], 1.2e-3, device, weight_decay=1e-3)
    critic = adamw([discriminator], 4e-4, device, betas=(0.5, 0.9))
    average = Average([vae], 0.998)

    def code(pictures: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = vae.quant_conv(vae.encoder(pictures)).chunk(2, 1)
        mean, log_variance = mean.float(), log_variance.float().clamp(-20, 10)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        output = vae.decoder(vae.post_quant_conv(latents)).float()
        return output, kl

    def rehearse() -> None:
        pictures = to_float(pixels[:batch])
        output, kl = code(pictures)
        (compare(output, pictures) + kl).backward()

    code, compare = fast(code), fast(reconstruction_loss)
    warm_up(rehearse, device)
    for progress in timed(seconds, [optimizer, critic]):
        pictures = to_float(pixels[torch.randint(len(pixels), (batch,), device=device)])
        with autocast(device):
            output, kl = code(pictures)
        shown = output.detach().requires_grad_()
        loss = compare(shown, pictures)
        (pull,) = torch.autograd.grad(loss, shown)
        if progress > 0.45:
            with autocast(device):
                real = features(discriminator, pictures)
                fake = features(discriminator, output.detach())
                critic_loss = F.relu(1 - real[-1]).mean() + F.relu(1 + fake[-1]).mean()
            critic.zero_grad()
            critic_loss.backward()
            critic.step()
            with autocast(device):
                fake = features(discriminator, shown)
                match = sum(F.l1_loss(a, b.detach()) for a, b in zip(fake[:-1], real[:-1], strict=True))
                judged = -fake[-1].mean() + 2 * match
            (push,) = torch.autograd.grad(judged, shown)
            # The discriminator's say is a fixed share of the reconstruction's, as VQGAN balances them.
            pull = pull + push * (0.35 * min(1, (progress - 0.45) / 0.1) * pull.norm() / (push.norm() + 1e-12))
        optimizer.zero_grad()
        torch.autograd.backward([output, kl], [pull, torch.full_like(kl, KL_WEIGHT)])
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update()
    print(f"  loss {loss.item():.4f} kl {kl.item():.3f}")
    average.apply()


def warm_up(step: Callable[[], None], device: torch.device) -> None:
    """Run some steps outside the clock: compiling takes a minute."""
    start = time.monotonic()
    for _ in range(3):
        with autocast(device):
            step()
    print(f"  ready after {time.monotonic() - start:.0f} s", flush=True)


@torch.no_grad()
def encode(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Means and standard deviations of the latents, half [2, n, 4, 16, 16]."""
    parts = []
    for part in pixels.split(500):
        with autocast(pixels.device):
            posterior = vae.encode(to_float(part)).latent_dist
        parts.append(torch.stack([posterior.mean, posterior.std]).half())
    return torch.cat(parts, 1)


def tokenize(tokenizer: CLIPTokenizer, captions: list[list[str]]) -> Tensor:
    """Token ids int16 [n, CAPTIONS_EACH, 77]."""
    texts = [text for forms in captions for text in forms]
    known = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    ids = tokenizer(list(known), padding="max_length", truncation=True, return_tensors="pt").input_ids.short()
    return ids[torch.tensor([known[text] for text in texts])].view(len(captions), -1, ids.shape[-1])


def train_unet(
    unet: nn.Module,
    text_encoder: nn.Module,
    latents: Tensor,
    tokens: Tensor,
    empty: Tensor,
    seconds: Callable[[], float],
    batch: int,
    fast: Callable,
) -> None:
    """Fit UNet and text encoder to latents [2, n, 4, 16, 16] (scaled) with tokens [n, forms, 77].

    One caption in ten is empty, for classifier-free guidance; losses are weighed by min(SNR, 5) / SNR
    (Hang et al. 2023, arXiv:2303.09556). seconds: asked for once all is compiled.
    """
    device = latents.device
    alphas = build_scheduler().alphas_cumprod.to(device)
    optimizer = adamw([unet, text_encoder], 1.2e-3, device, weight_decay=1e-2, betas=(0.9, 0.99))
    average = Average([unet, text_encoder], 0.999)
    # CUDA graphs: the network is so small that starting its kernels one by one takes longer than running them.
    predict = fast(
        lambda noisy, times, states: unet(noisy, times, states, return_dict=False)[0], mode="reduce-overhead"
    )

    def loss_of_a_batch() -> Tensor:
        chosen = torch.randint(latents.shape[1], (batch,), device=device)
        mean, std = latents[:, chosen].float()
        clean = mean + std * torch.randn_like(mean)
        forms = torch.randint(tokens.shape[1], (batch,), device=device)
        dropped = torch.rand(batch, 1, device=device) < 0.1
        ids = torch.where(dropped, empty, tokens[chosen, forms]).long()
        times = torch.randint(len(alphas), (batch,), device=device)
        alpha = alphas[times].view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        with autocast(device):
            noise_pred = predict(noisy, times, text_encoder(ids).last_hidden_state)
        snr = alpha / (1 - alpha)
        weights = (snr.clamp(max=5) / snr).view(-1)
        return (weights * ((noise_pred.float() - noise) ** 2).mean((1, 2, 3))).mean() / weights.mean()

    def rehearse() -> None:
        optimizer.zero_grad()
        loss_of_a_batch().backward()

    warm_up(rehearse, device)
    losses = []
    for _ in timed(seconds(), [optimizer]):
        optimizer.zero_grad()
        loss = loss_of_a_batch()
        loss.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        average.update()
        losses.append(loss.detach())
        if len(losses) % 1000 == 0:
            print(f"  step {len(losses)} loss {torch.stack(losses[-1000:]).mean().item():.4f}", flush=True)
    average.apply()


def load_some(modules: dict[str, nn.Module], folder: Path) -> None:
    """Continue from the full-precision weights in a folder, of those parts that it has."""
    for name, module in modules.items():
        if (folder / f"{name}.pt").exists():
            module.load_state_dict(torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True))


def build(
    output: Path, minutes: float, drawings: int, batch: int, vae_share: float, resume: Path | None, save: Path | None
) -> None:
    """Make everything and write the pipeline folder."""
    deadline = time.monotonic() + 60 * minutes - RESERVE
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    fast = partial(torch.compile, dynamic=False) if device.type == "cuda" else lambda function, **_: function
    print(f"drawing {drawings} pictures", flush=True)
    pixels, scenes = render_many(seen(), drawings)
    album = Album(device)
    plain, which = album.plain(drawings // 2)
    rng = np.random.default_rng(1)
    captions = caption_all(scenes)
    captions += [[photo_caption(album.names[i], rng) for _ in range(CAPTIONS_EACH)] for i in which.tolist()]
    drawn = torch.from_numpy(pixels).to(device)

    write_tokenizer(vocabulary_captions(), output / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
    vae, unet, text_encoder = build_vae(), build_unet(), build_text_encoder(tokenizer)
    parts = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    if resume:
        load_some(parts, resume)
    for module in parts.values():
        module.to(device, memory_format=torch.channels_last)

    print(f"VAE, {deadline - time.monotonic():.0f} s left", flush=True)
    if vae_share:
        pictures = torch.cat([drawn, plain, album.varied(drawings // 2)])
        train_vae(vae, pictures, vae_share * (deadline - time.monotonic()), batch // 4, fast)
        del pictures
    latents = torch.cat([encode(vae, drawn), encode(vae, plain)], 1)
    vae.register_to_config(scaling_factor=round(1 / latents[0].float().std().item(), 5))
    print(f"UNet, {deadline - time.monotonic():.0f} s left, scaling_factor {vae.config.scaling_factor}", flush=True)
    tokens = tokenize(tokenizer, captions).to(device)
    empty = tokenize(tokenizer, [[""]])[0, 0].to(device)
    latents = latents * vae.config.scaling_factor
    train_unet(unet, text_encoder, latents, tokens, empty, lambda: deadline - time.monotonic(), batch, fast)
    if save:
        save.mkdir(parents=True, exist_ok=True)
        for name, module in parts.items():
            torch.save(module.state_dict(), save / f"{name}.pt")
    save_pipeline(output, vae.cpu(), unet.cpu(), text_encoder.cpu(), tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("examples/base-model"))
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--drawings", type=int, default=80_000, help="and half as many photographs")
    parser.add_argument("--batch", type=int, default=512, help="of the UNet; the VAE's is a quarter of it")
    parser.add_argument("--vae-share", type=float, default=0.42, help="of the time; 0 leaves the VAE as it is")
    parser.add_argument("--resume", type=Path, help="folder of weights to continue from, as --save wrote it")
    parser.add_argument("--save", type=Path, help="folder for full-precision weights")
    arguments = parser.parse_args()
    build(**vars(arguments))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
