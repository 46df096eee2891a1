"""What a search varies: every way to say it, and every mistake, told before anything is submitted."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import Field

from sdtune.errors import RecipeError
from sdtune.jobs.search_space import Parameter, Parent, SearchSpace, check_corners, search_space, tunables
from sdtune.jobs.study_settings import StudySettings
from sdtune.methods.base import Tunable
from sdtune.methods.catalog import METHODS
from sdtune.methods.fields import CommonFields

LORA = METHODS["dreambooth-lora"]
PEFT = METHODS["peft-dreambooth-lora"]
KOHYA = METHODS["kohya-native-lora"]


def base_of(method: type[CommonFields], **settings: Any) -> CommonFields:
    prompt = {"instance_prompt": "a photo of sks cat"} if "instance_prompt" in method.model_fields else {}
    return method.from_settings({**prompt, **settings})


def one(text: str, method: type[CommonFields] = LORA) -> Parameter:
    name = text.partition("=")[0].replace("-", "_")
    return search_space(method, [text])[name]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("learning_rate=1e-5:1e-3:log", Parameter("learning_rate", "double", low=1e-5, high=1e-3, scale="log")),
        # Not said: the scale that the field declares.
        ("learning_rate=1e-5:1e-3", Parameter("learning_rate", "double", low=1e-5, high=1e-3, scale="log")),
        ("learning-rate=1e-5:1e-3:linear", Parameter("learning_rate", "double", low=1e-5, high=1e-3)),
        ("lora_dropout=0:0.5", Parameter("lora_dropout", "double", low=0, high=0.5)),
        ("adam_beta1=0.5:0.99:reverse-log", Parameter("adam_beta1", "double", low=0.5, high=0.99, scale="reverse-log")),
        ("rank=4,32, 8,16", Parameter("rank", "discrete", values=(4, 8, 16, 32))),
        ("rank=4,8:log", Parameter("rank", "discrete", values=(4, 8), scale="log")),
        ("rank=4:64:log", Parameter("rank", "integer", low=4, high=64, scale="log")),
        ("learning_rate=1e-4,1e-5", Parameter("learning_rate", "discrete", values=(1e-5, 1e-4))),
        ("optimizer=adamw,lion", Parameter("optimizer", "categorical", values=("adamw", "lion"))),
        ("train_text_encoder=True,false", Parameter("train_text_encoder", "categorical", values=("true", "false"))),
        ("rank", Parameter("rank", "integer", low=4, high=64, scale="log")),
    ],
)
def test_what_is_typed_becomes_a_parameter(text: str, found: Parameter) -> None:
    assert one(text) == found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lerning_rate=1:2", "did you mean learning_rate"),
        ("nothing_like_it=1:2", "a search can vary"),
        ("seed=1,2", "the same in all trials"),
        ("base_model=a,b", "the same in all trials"),
        ("held_out_images=1,2", "the same in all trials"),
        ("push_to_hub=true,false", "the same in all trials"),
        ("rank=8:4", "the smaller first"),
        ("rank=8:8", "the smaller first"),
        ("rank=0:8", "wanted a whole number of at least 1 and at most 512"),
        ("rank=4:513", "wanted a whole number of at least 1 and at most 512"),
        ("rank=4.5,8", "a whole number"),
        ("rank=4:inf", "wanted a number"),
        ("rank=a,b", "a whole number"),
        ("rank=many", "wanted LOW:HIGH"),
        ("learning_rate=nan:1", "wanted a number"),
        ("learning_rate=0:1e-3:log", "greater than 0"),
        ("learning_rate=1e-5:2", "at most 1"),
        ("lora_dropout=0:0.3:log", "no logarithm of 0"),
        ("lora_dropout=0,0.1:log", "has no logarithm"),
        ("learning_rate=1e-5:1e-3:lgo", "wanted linear or log or reverse-log"),
        ("learning_rate=1:2:3", "wanted LOW:HIGH"),
        ("learning_rate=", "wanted LOW:HIGH"),
        ("learning_rate=1e-4", "set it with --learning-rate"),
        ("optimizer=adamw", "set it with --optimizer"),
        ("optimizer=adamw,adan", "wanted adamw or adamw8bit"),
        ("optimizer=1:2", "name values: optimizer=A,B"),
        ("optimizer=adamw,lion:log", "which only numbers have"),
        ("rank=8,8", "found 8 twice"),
        ("train_text_encoder=true,maybe", "wanted true or false"),
        ("train_text_encoder=true,yes", "wanted true,false"),
        ("learning_rate=" + ",".join(f"{n}e-6" for n in range(1, 1003)), "at most 1000"),
        ("learning_rate=1e-4,1.00000000001e-4", "nearer to each other"),
    ],
)
def test_a_mistake_is_told_with_what_is_allowed(text: str, told: str) -> None:
    with pytest.raises(RecipeError) as refused:
        search_space(LORA, [text])
    assert told in str(refused.value)
    assert str(refused.value).startswith(f"tune {text.partition('=')[0]}")


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as refused:
        search_space(LORA, ["rank=8:4", "seed=1,2", "learning_rate=1e-5:1e-3", "learning_rate=1e-5:1e-4"])
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == [
        "tune rank", "tune seed", "tune learning_rate",
    ]  # fmt: skip
    assert "given twice" in str(refused.value)


class Stepped(LORA):  # type: ignore[misc, valid-type]
    """With a setting that comes in steps and may be varied."""

    side: Annotated[int, Field(multiple_of=8, description="In steps of 8."), Tunable(8, 64)] = 8


def test_values_in_steps_are_named_one_by_one() -> None:
    with pytest.raises(RecipeError, match="in steps of 8; name the values: side=8,16"):
        search_space(Stepped, ["side=8:16"])
    assert search_space(Stepped, ["side=8,16"])["side"].values == (8, 16)
    with pytest.raises(RecipeError, match="found '12', wanted a whole number in steps of 8"):
        search_space(Stepped, ["side=8,12"])


@pytest.mark.parametrize("name", METHODS)
def test_every_declared_range_can_be_searched(name: str) -> None:
    """By its bare name, beside what it depends on."""
    method = METHODS[name]
    for field, mark in tunables(method).items():
        beside = [mark.when[0]] if mark.when and mark.when[0] in tunables(method) else []
        values = [str(value).lower() for value in mark.when[1]] if mark.when else []
        parent = [f"{beside[0]}={values[0]},{_other(method, beside[0], values)}"] if beside else []
        space = search_space(method, [*parent, field])
        if beside:
            assert space[field].parent == Parent(beside[0], tuple(space[beside[0]].value_of(v) for v in values[:1]))
            assert space.parameters[0].name == beside[0]


def _other(method: type[CommonFields], field: str, without: list[str]) -> str:
    allowed = method.allowed(field).split(" or ")
    return next(value for value in allowed if value not in without)


@pytest.mark.parametrize("name", METHODS)
def test_the_default_space_is_the_learning_rate_and_the_rank_if_there_is_one(name: str) -> None:
    method = METHODS[name]
    space = search_space(method, [], base_of(method))
    ranks = [field for field in ("rank", "network_dim") if field in method.model_fields]
    assert {parameter.name for parameter in space} == {"learning_rate", *ranks}


def test_a_setting_that_matters_under_another_is_its_child() -> None:
    base = base_of(LORA)
    space = search_space(LORA, ["text_encoder_lr=1e-6:1e-4:log", "train_text_encoder=true,false"], base)
    assert [parameter.name for parameter in space] == ["train_text_encoder", "text_encoder_lr"]
    assert space["text_encoder_lr"].parent == Parent("train_text_encoder", ("true",))
    assert space.children("train_text_encoder") == [space["text_encoder_lr"]]
    assert space.active({"train_text_encoder": "false", "text_encoder_lr": 1e-5}) == {"train_text_encoder": "false"}
    both = {"train_text_encoder": "true", "text_encoder_lr": 1e-5}
    assert space.active(both) == both
    assert "where train_text_encoder is true" in space["text_encoder_lr"].words


def test_a_setting_without_its_parent_needs_the_recipe_to_have_it() -> None:
    with pytest.raises(RecipeError, match="only matters where train_text_encoder is true, and here it is false"):
        search_space(LORA, ["text_encoder_lr"], base_of(LORA))
    assert search_space(LORA, ["text_encoder_lr"], base_of(LORA, train_text_encoder=True))["text_encoder_lr"]
    with pytest.raises(RecipeError, match="which is not among what is searched"):
        search_space(PEFT, ["use_dora", "adapter=loha,lokr"])
    # All values of the parent will do: no condition.
    assert search_space(PEFT, ["lora_alpha", "adapter=lora,lokr"])["lora_alpha"].parent is None


@pytest.mark.parametrize(
    ("method", "tune", "settings", "told"),
    [
        (LORA, ["optimizer=adamw,prodigy"], {}, "prodigy with learning_rate"),
        (PEFT, ["adapter=lora,hra", "rank=3,4"], {}, "reflections come in pairs"),
        (LORA, ["lr_scheduler=constant,linear"], {"lr_scheduler": "linear", "lr_warmup_steps": 9}, "has no warm-up"),
        (LORA, ["max_train_steps=5:50"], {"lr_scheduler": "linear", "lr_warmup_steps": 9}, "shorter than the run"),
        (KOHYA, ["optimizer_type=AdamW,Prodigy", "learning_rate=1e-4:1"], {}, "finds the rate itself"),
    ],
)
def test_settings_that_do_not_go_together_are_found_before_a_trial_is_paid_for(
    method: type[CommonFields], tune: list[str], settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError, match="would be refused") as refused:
        search_space(method, tune, base_of(method, **settings))
    assert told in str(refused.value)


def test_of_a_large_space_every_two_values_are_tried_together() -> None:
    many = ["rank=" + ",".join(map(str, range(1, 300))), "max_train_steps=" + ",".join(map(str, range(1, 300)))]
    ok = search_space(LORA, [*many, "learning_rate"], base_of(LORA))
    assert len(ok) == 3
    with pytest.raises(RecipeError, match="shorter than the run"):
        search_space(LORA, [*many, "learning_rate"], base_of(LORA, lr_scheduler="linear", lr_warmup_steps=5))


def test_what_a_trial_gets_is_what_the_trainer_reads() -> None:
    """Every edge of every parameter, as Vertex AI may write it."""
    base = base_of(PEFT)
    tune = ["learning_rate", "rank=4,8", "train_text_encoder=true,false", "optimizer=adamw,lion", "max_train_steps=1:9"]
    for parameter in search_space(PEFT, tune, base):
        for value in parameter.extremes:
            for text in {str(value), str(float(value)) if isinstance(value, int) else str(value)}:
                arrived = getattr(PEFT.from_args([*base.to_args(), f"--{parameter.name}={text}"]), parameter.name)
                assert str(arrived).lower() == str(value).lower()
                assert parameter.value_of(text) == value


def test_a_space_is_checked_also_where_it_came_from_elsewhere() -> None:
    space = SearchSpace((Parameter("rank", "discrete", values=(4, 1024)),))
    with pytest.raises(RecipeError, match="rank 1024 would be refused"):
        check_corners(space, base_of(LORA))


def test_more_trials_at_a_time_than_in_all_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"parallel_trials: found 3, but there are 2 trials in all"):
        StudySettings.from_settings({"max_trials": "2", "parallel_trials": "3"})
    assert StudySettings.from_settings({"max_trials": 2}).parallel == 2
    assert StudySettings.from_settings({}).parallel == 3
    with pytest.raises(RecipeError) as refused:
        StudySettings.from_settings({"algorithm": "genetic", "max_trials": 0, "measurement": "first"})
    assert len(str(refused.value).splitlines()) == 4
