"""Mistakes in settings are told together, each with what was found, what is allowed and what to do."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sdtune.errors import RecipeError
from sdtune.methods.catalog import METHODS, find_method
from sdtune.methods.dreambooth import DreamBoothLora

GOOD = {"instance_prompt": "a photo of sks cat"}

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": -1}, "learning_rate: found -1, wanted a number greater than 0 and at most 1."),
    ({"learning_rate": "fast"}, "learning_rate: found 'fast', wanted a number greater than 0 and at most 1."),
    ({"learning_rate": float("nan")}, "learning_rate: found nan, wanted a number"),
    ({"max_train_steps": 2.5}, "max_train_steps: found 2.5, wanted a whole number of at least 1."),
    ({"random_flip": "maybe"}, "random_flip: found 'maybe', wanted true or false."),
    ({"mixed_precision": "fp8"}, "mixed_precision: found 'fp8', wanted auto or no or fp16 or bf16."),
    ({"resolution": 100}, "resolution: found 100, wanted a whole number of at least 64 and at most 2048 and in steps"),
    ({"target_modules": "to_q"}, "target_modules: found 'to_q', wanted a list, each a text"),
    ({"target_modules": []}, "target_modules: found [], wanted a list"),
    ({"instance_prompt": ""}, "instance_prompt: found '', wanted a text of at least 1 characters"),
    ({"max_train_step": 5}, "max_train_step: dreambooth-lora has no such setting; did you mean max_train_steps?"),
    ({"zzzz": 5}, "zzzz: dreambooth-lora has no such setting; see sdtune train dreambooth-lora --help."),
    ({"lr_warmup_steps": 5}, "found 5 with lr_scheduler constant, which has no warm-up; use constant_with_warmup"),
    (
        {"lr_warmup_steps": 50, "lr_scheduler": "linear", "max_train_steps": 50},
        "lr_warmup_steps: found 50, but max_train_steps is 50; the warm-up must be shorter than the run.",
    ),
    (
        {"lr_scheduler": "polynomial", "learning_rate": 1e-7},
        "lr_scheduler: found polynomial with learning_rate 1e-07, but it falls to 1e-7; use linear",
    ),
    ({"lr_num_cycles": 2}, "lr_num_cycles: found 2, which only cosine_with_restarts has a use for"),
    ({"lr_scheduler": "cosine_with_restarts"}, "lr_num_cycles: found 1, with which cosine_with_restarts never"),
    ({"optimizer": "adafactor", "adam_beta1": 0.5}, "adam_beta1: found 0.5, but adafactor has no such setting"),
    ({"optimizer": "lion", "adam_epsilon": 0.5}, "adam_epsilon: found 0.5, but lion has no such setting"),
    ({"optimizer": "prodigy"}, "optimizer: found prodigy with learning_rate 0.0001, which scales the rate it finds"),
    ({"sample_every": 5, "num_samples": 0}, "sample_every: found 5 with num_samples 0: there is nothing to draw"),
]


@pytest.mark.parametrize(("settings", "words"), MISTAKES)
def test_a_mistake_says_what_was_found_and_what_is_allowed(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        DreamBoothLora.from_settings({**GOOD, **settings})
    assert words in str(caught.value)
    assert "dreambooth-lora: this setting cannot be used:" in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    wrong = {"learning_rate": 0, "rank": "many", "lr_warmup_steps": 3, "seeed": 1}
    with pytest.raises(RecipeError) as caught:
        DreamBoothLora.from_settings(wrong)
    text = str(caught.value)
    assert "these 5 settings cannot be used" in text
    named = {line.split(":")[0].strip() for line in text.splitlines()[1:]}
    assert named == {"instance_prompt", "lr_warmup_steps", "learning_rate", "rank", "seeed"}


def test_yaml_that_reads_numbers_as_text_is_understood() -> None:
    # PyYAML reads 2e-4 as a text, because YAML 1.1 wants 2.0e-4.
    assert DreamBoothLora.from_settings({**GOOD, "learning_rate": "2e-4"}).learning_rate == 2e-4


def test_a_search_may_send_whole_numbers_with_a_point() -> None:
    sent = DreamBoothLora.from_settings(GOOD)
    assert DreamBoothLora.from_args([*sent.to_args(), "--rank=8.0"]).rank == 8


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--recipe={"], "--recipe is not JSON"),
        (["--recipe=[1]"], "--recipe: found list, wanted a JSON object"),
        (["--rank"], "argument '--rank': wanted --recipe=JSON or --<setting>=<value>"),
        (["rank=3"], "argument 'rank=3': wanted"),
    ],
)
def test_broken_arguments_are_named(args: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        DreamBoothLora.from_args(args)


def test_alpha_is_rank_unless_given() -> None:
    assert DreamBoothLora.from_settings({**GOOD, "rank": 8}).alpha == 8.0
    assert DreamBoothLora.from_settings({**GOOD, "rank": 8, "lora_alpha": 2}).alpha == 2.0


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"did you mean dreambooth-lora\?"):
        find_method("dreambooth-lra")
    assert find_method("dreambooth-lora") is METHODS["dreambooth-lora"]
