"""Captions as the UNet reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdtune import events
from sdtune.methods.fields import TrainingFields
from sdtune.training.components.dataset import Picture
from sdtune.training.components.models import Parts
from sdtune.training.components.room import room_for
from sdtune.training.run import Run

AT_ONCE = 32
"""Captions that are encoded together: fewer keep a GPU waiting for Python."""
MANY = 64
"""Captions whose encoding is worth telling of."""
ON_DEVICE = 2**28
"""Bytes that all captions may take on the UNet's device: of SD 1.x about 2,200, of SDXL 840, in half precision. More
stay behind, and those of a batch travel with it: a few megabytes at most, while the device is at work."""


@dataclass(frozen=True)
class Conditioning:
    """encoder_hidden_states: [batch, tokens, hidden size]; pooled: [batch, projection size], SDXL's alone."""

    encoder_hidden_states: torch.Tensor
    pooled: torch.Tensor | None = None

    def __getitem__(self, rows: torch.Tensor) -> Conditioning:
        return Conditioning(self.encoder_hidden_states[rows], None if self.pooled is None else self.pooled[rows])

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that there are."""
        return [self.encoder_hidden_states] if self.pooled is None else [self.encoder_hidden_states, self.pooled]

    def to(self, device: torch.device) -> Conditioning:
        """On the device; what is there already, as it is."""
        return Conditioning(*[tensor.to(device) for tensor in self.tensors])

    @property
    def pipeline_arguments(self) -> dict[str, torch.Tensor]:
        """As the arguments of diffusers' pipelines."""
        pooled = {} if self.pooled is None else {"pooled_prompt_embeds": self.pooled}
        return {"prompt_embeds": self.encoder_hidden_states, **pooled}


class Captions:
    """The distinct captions of a run: encoded once, or at every step if a text encoder is trained."""

    def __init__(
        self, parts: Parts, method: TrainingFields, pictures: Sequence[Picture], run: Run, trained: bool = False
    ) -> None:
        self._parts, self._method = parts, method
        # The empty caption stands at 0: caption dropout asks for it.
        self.texts = ["", *sorted({picture.caption for picture in pictures} - {""})]
        _warn_of_long(parts, method, self.texts, run)
        self._rows = {text: row for row, text in enumerate(self.texts)}
        self._encoded: Conditioning | None = None
        self._travel = False
        if trained:
            self._token_ids = token_ids(parts, method, self.texts)
        else:
            with parts.at_work(*parts.text_encoders):
                self._encoded, self._travel = _encode_all(parts, method, self.texts, run)

    def row(self, caption: str) -> int:
        """The number that stands for ``caption`` in a batch."""
        return self._rows[caption]

    def travelling(self, rows: torch.Tensor) -> Conditioning | None:
        """What must go to the device with a batch of these rows, int64 [batch] on the CPU; None: all of it is there."""
        return self._encoded[rows] if self._encoded is not None and self._travel else None

    def encode(self, rows: torch.Tensor) -> Conditioning:
        """What the UNet reads for these rows, int64 [batch]; with a gradient if a text encoder is trained."""
        device = self._parts.unet.device
        if self._encoded is not None:
            return self._encoded[rows.to("cpu" if self._travel else device)].to(device)
        return _encode_ids(self._parts, self._method, [ids[rows.to(device)] for ids in self._token_ids])


def _encode_all(parts: Parts, method: TrainingFields, texts: Sequence[str], run: Run) -> tuple[Conditioning, bool]:
    """All captions, and whether they stay behind on the CPU, because they are too many for the device.

    texts: the empty one, which is nobody's caption, and all others.
    """
    many = len(texts) > MANY
    if many:
        run.tell(events.Phase("cache", f"Encoding {len(texts) - 1} captions"))
    kept, travel = None, False
    for start in range(0, len(texts), AT_ONCE):
        some = encode(parts, method, texts[start : start + AT_ONCE])
        if kept is None:
            travel = sum(one[0].nbytes for one in some.tensors) * len(texts) > ON_DEVICE
            kept = Conditioning(*[_room(one, len(texts), travel, run) for one in some.tensors])
        for room, one in zip(kept.tensors, some.tensors, strict=True):
            room[start : start + len(one)].copy_(one)
        if many:
            run.tell(events.Progress("cache", min(start + AT_ONCE, len(texts)), len(texts)))
    assert kept is not None
    return kept, travel


def _room(like: torch.Tensor, rows: int, travel: bool, run: Run) -> torch.Tensor:
    """For so many rows of what ``like`` has some of."""
    shape = (rows, *like.shape[1:])
    if not travel:
        return like.new_empty(shape)
    return room_for(f"embeddings of {rows - 1} captions", math.prod(shape), like.dtype, run).view(shape)


def encode_with_gradient(parts: Parts, method: TrainingFields, prompts: Sequence[str]) -> Conditioning:
    """The prompts as the UNet reads them, all at once."""
    return _encode_ids(parts, method, token_ids(parts, method, prompts))


@torch.no_grad()
def encode(parts: Parts, method: TrainingFields, prompts: Sequence[str]) -> Conditioning:
    """The prompts as the UNet reads them. A prompt's encoding is the same in any company: on a GPU bit for bit."""
    some = [_encode_some(parts, method, prompts[at : at + AT_ONCE]) for at in range(0, len(prompts), AT_ONCE)]
    return Conditioning(*[torch.cat(of_all) for of_all in zip(*[one.tensors for one in some], strict=True)])


def _encode_some(parts: Parts, method: TrainingFields, prompts: Sequence[str]) -> Conditioning:
    """``prompts``: at most AT_ONCE."""
    ids = token_ids(parts, method, prompts)
    if fills_batches(parts.unet.device):
        ids = [torch.cat([one, one[:1].expand(AT_ONCE - len(one), -1, -1)]) for one in ids]
    encoded = _encode_ids(parts, method, ids)
    return Conditioning(*[one[: len(prompts)] for one in encoded.tensors])


def fills_batches(device: torch.device) -> bool:
    """Whether all batches get one size, so that a prompt is encoded alike in any.

    Kernels, and with them the last bits, are chosen by the size. A GPU takes hardly longer for a full batch than for
    one prompt; a CPU takes as much longer as there is more in it.
    """
    return device.type != "cpu"


def token_ids(parts: Parts, method: TrainingFields, prompts: Sequence[str]) -> list[torch.Tensor]:
    """For each tokenizer int64 [prompts, chunks, 77]: windows of 75 tokens, each between a start and an end."""
    chunks = method.max_token_length // 75
    return [
        torch.stack([_windows(tokenizer, prompt, chunks) for prompt in prompts]).to(parts.unet.device)
        for tokenizer in parts.tokenizers
    ]


def _windows(tokenizer: Any, prompt: str, chunks: int) -> torch.Tensor:
    body = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids[: 75 * chunks]
    rows = []
    for start in range(0, 75 * chunks, 75):
        ids = [tokenizer.bos_token_id, *body[start : start + 75], tokenizer.eos_token_id]
        rows.append(ids + [tokenizer.pad_token_id] * (77 - len(ids)))
    return torch.tensor(rows)


def _encode_ids(parts: Parts, method: TrainingFields, ids: list[torch.Tensor]) -> Conditioning:
    """``ids``: per text encoder, int64 [batch, chunks, 77]."""
    states, pooled = [], None
    for encoder, windows in zip(parts.text_encoders, ids, strict=True):
        batch, chunks, _ = windows.shape
        out = encoder(windows.flatten(0, 1), output_hidden_states=True)
        if len(parts.text_encoders) == 2:
            # SDXL reads the last layer but one, without the final norm, and the second encoder's projection.
            hidden = out.hidden_states[-2 - method.clip_skip]
            pooled = out[0].unflatten(0, (batch, chunks))[:, 0]
        elif method.clip_skip:
            hidden = _final_layer_norm(encoder)(out.hidden_states[-1 - method.clip_skip])
        else:
            hidden = out.last_hidden_state
        states.append(hidden.reshape(batch, chunks * 77, -1))
    return Conditioning(torch.cat(states, dim=-1), pooled)


def _final_layer_norm(encoder: Any) -> Any:
    """Transformers from 5.6 on has no ``text_model`` between."""
    return getattr(encoder, "text_model", encoder).final_layer_norm


def _warn_of_long(parts: Parts, method: TrainingFields, texts: Sequence[str], run: Run) -> None:
    limit = method.max_token_length
    counts = [len(parts.tokenizers[0](text, add_special_tokens=False, verbose=False).input_ids) for text in texts]
    long = [text for text, tokens in zip(texts, counts, strict=True) if tokens > limit]
    if long:
        run.tell(
            events.Note(
                f"{len(long)} of {len(texts) - 1} captions are longer than {limit} tokens (the longest has "
                f"{max(counts)}), and only the first {limit} are read; --max-token-length goes up to 225. "
                f"The first: {long[0][:60]!r} ...",
                level="warning",
            )
        )
