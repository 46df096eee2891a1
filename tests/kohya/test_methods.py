"""The settings of the two kohya methods: defaults, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest

from sdtune.errors import RecipeError
from sdtune.methods.kohya import KohyaDreamBoothLora, KohyaNativeLora
from sdtune.methods.ledger import Layout

CONFLICTS: list[tuple[dict[str, Any], str]] = [
    ({"conv_alpha": 4}, "conv_alpha: found 4 without conv_dim"),
    ({"train_text_encoder": False, "text_encoder_lr": 1e-5}, "text_encoder_lr: found 1e-05 with train_text_encoder"),
    ({"optimizer_type": "Prodigy"}, "optimizer_type: found Prodigy with learning_rate 0.0001"),
    ({"optimizer_type": "SGD"}, "wanted AdamW or AdamW8bit or Lion or Lion8bit or Prodigy or AdaFactor"),
    ({"optimizer_args": ["weight_decay = 1"]}, "optimizer_args: found 'weight_decay = 1', wanted name=value"),
    ({"lr_warmup_steps": 5}, "lr_warmup_steps: found 5 with lr_scheduler constant"),
    ({"lr_warmup_steps": 400, "lr_scheduler": "cosine"}, "the warm-up must be shorter than the run"),
    ({"lr_scheduler_num_cycles": 3}, "only cosine_with_restarts has cycles"),
    ({"keep_tokens": 1}, "keep_tokens: found 1 without shuffle_caption"),
    ({"max_token_length": 100}, "max_token_length: found 100, wanted a whole number of at least 75"),
    ({"enable_bucket": False, "bucket_no_upscale": True}, "bucket_no_upscale: found True with enable_bucket false"),
    ({"resolution": 512, "min_bucket_reso": 576}, "min_bucket_reso: found 576 with resolution 512"),
    ({"resolution": 512, "max_bucket_reso": 448}, "max_bucket_reso: found 448 with resolution 512"),
    ({"random_crop": True}, "random_crop: found true with cache_latents"),
    ({"prior_loss_weight": 0.5}, "prior_loss_weight: found 0.5 without class_data_dir"),
    ({"sample_every": 5, "num_samples": 0}, "sample_every: found 5 with num_samples 0"),
    ({"network_dims": 5}, "did you mean network_dim?"),
]


@pytest.mark.parametrize(("settings", "words"), CONFLICTS, ids=[" ".join(settings) for settings, _ in CONFLICTS])
def test_what_does_not_go_together_is_an_error(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        KohyaDreamBoothLora.from_settings(settings)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer_type": "Prodigy", "learning_rate": 1},
        {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3, "lr_warmup_steps": 10},
        {"random_crop": True, "cache_latents": False},
        {"class_data_dir": "/reg", "prior_loss_weight": 0.5},
        {"shuffle_caption": True, "keep_tokens": 1, "max_token_length": "225"},
        {"conv_dim": 8, "conv_alpha": 4, "optimizer_args": ["betas=0.9,0.99", "weight_decay=1e-2"]},
    ],
)
def test_what_goes_together(settings: dict[str, Any]) -> None:
    KohyaDreamBoothLora.from_settings(settings)


def test_defaults_are_those_of_a_photo_user() -> None:
    method = KohyaNativeLora()
    assert (method.clip_skip, method.max_token_length, method.shuffle_caption) == (None, 75, False)
    assert method.alpha == method.network_dim
    assert (KohyaDreamBoothLora.layout, KohyaNativeLora.layout) == (Layout.KOHYA, Layout.CAPTIONED)
    assert "class_data_dir" not in KohyaNativeLora.model_fields
