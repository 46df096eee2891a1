"""Placement: every mistake told, in the user's terms, before anything is asked of anybody."""

from __future__ import annotations

from typing import Any

import pytest

from sdtune.errors import RecipeError
from sdtune.jobs.durations import parse_duration, show_duration
from sdtune.jobs.mounts import NfsMount, parse_mount
from sdtune.jobs.placement import Placement

NETWORK = "projects/123456/global/networks/default"
ACCOUNT = "trainer@my-project.iam.gserviceaccount.com"


def place(**settings: Any) -> Placement:
    return Placement.from_settings({"project": "my-project", **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"project": "My Project"}, "project: found 'My Project', wanted a project's id"),
        ({"region": "us-central1-a"}, "is a zone; wanted its region, us-central1"),
        ({"region": "mars"}, "region: found 'mars'"),
        ({"region": []}, "region: found none"),
        ({"gpus": "none"}, "gpus: found 'none', wanted a whole number of at least 1 and at most 16"),
        ({"boot_disk_gb": 10}, "boot_disk_gb: found 10"),
        ({"strategy": "cheap"}, "wanted on-demand or spot or flex-start"),
        ({"strategy": "flex-start", "spot": True}, "spot: found true with strategy flex-start"),
        ({"max_wait": "2h"}, "max_wait: only --strategy flex-start waits"),
        ({"timeout": "soon"}, "timeout: found 'soon', wanted a duration such as 90m"),
        ({"timeout": "1s"}, "timeout: found '1s'"),
        ({"timeout": "8d", "strategy": "flex-start"}, "flex-start runs for 7d at most"),
        ({"persistent_resource": "p", "region": "us-central1,us-east1"}, "is in one region; give that one alone"),
        ({"bucket": "UPPER"}, "bucket: 'gs://UPPER' is no place in Cloud Storage"),
        ({"service_account": "me"}, "service_account: found 'me', wanted NAME@PROJECT"),
        ({"network": "projects/my-project/global/networks/x"}, "Vertex AI wants its number"),
        ({"network": "default"}, "wanted projects/NUMBER/global/networks/NAME"),
        ({"reserved_ip_range": "r"}, "reserved_ip_range: a reserved range lies in a network"),
        ({"nfs": "10.0.0.2:/vol1=models"}, "nfs: a share is reached through a peered network"),
        ({"network": NETWORK, "nfs": "vol1"}, "wanted SERVER:/PATH=/mnt/nfs/NAME"),
        ({"network": NETWORK, "nfs": "10.0.0.2:/vol1=/data/x"}, "mounts shares nowhere else"),
        ({"network": NETWORK, "nfs": ["1.2.3.4:/a=m", "1.2.3.4:/b=/mnt/nfs/m"]}, "two shares at one place"),
        ({"save_nfs": True}, "save_nfs: there is no share to copy to"),
        ({"tensorboard": "tb", "service_account": ACCOUNT}, "wanted projects/P/locations/REGION/tensorboards/ID"),
        ({"tensorboard": "projects/p/locations/us-central1/tensorboards/1"}, "needs --service-account"),
        (
            {"tensorboard": "projects/p/locations/us-east1/tensorboards/1", "service_account": ACCOUNT},
            "it must run in us-east1 alone",
        ),
        ({"labels": ["Team=art"]}, "labels: found Team=art"),
        ({"labels": ["team"]}, "found 'team', wanted NAME=VALUE"),
        ({"labels": ["sdtune-run=1"]}, "are sdtune's own"),
        ({"env": ["1A=x"]}, "env: found '1A'"),
        ({"env": ["HF_TOKEN=hf_abc"]}, "env: HF_TOKEN looks like a secret"),
        ({"env": {"NAME": "hf_abcdefghijklmnop"}}, "env: NAME looks like a secret"),
        ({"hf_token_secret": "hf_abcdefghijklmnop"}, "found what looks like the token itself"),
        ({"hf_token_secret": "a/b"}, "wanted NAME or projects/P/secrets/NAME"),
        ({"kms_key": "key"}, "wanted projects/P/locations/REGION/keyRings/RING/cryptoKeys/KEY"),
        ({"gpuz": 1}, "vertex has no such setting; did you mean gpu?"),
    ],
)
def test_a_mistake_is_told(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        place(**settings)
    assert words in str(caught.value)


def test_a_secret_is_not_repeated_in_the_error() -> None:
    for settings in ({"env": ["HF_TOKEN=hf_abcdefghijklmnop"]}, {"hf_token_secret": "hf_abcdefghijklmnop"}):
        with pytest.raises(RecipeError) as caught:
            place(**settings)
        assert "hf_abcdefghijklmnop" not in str(caught.value)


def test_typed_and_written_settings_mean_the_same() -> None:
    typed = place(region=["us-central1,us-east1"], labels=["a=b", "c=d-e"], timeout="2d", env=["X=a,b"])
    written = place(
        region=["us-central1", "us-east1"], labels={"a": "b", "c": "d-e"}, timeout=172_800, env={"X": "a,b"}
    )
    assert typed == written
    assert typed.label_pairs == {"a": "b", "c": "d-e"}
    assert typed.env_pairs == {"X": "a,b"}


def test_what_is_not_given_is_safe() -> None:
    placement = place()
    assert placement.timeout == 24 * 3600
    assert placement.region == ("us-central1",)
    assert placement.effective_strategy == "on-demand"
    assert place(spot=True).effective_strategy == "spot"


def test_no_project_is_told_with_what_to_do() -> None:
    with pytest.raises(RecipeError, match="gcloud config set project"):
        Placement().in_project()


def test_names_are_completed() -> None:
    placement = place(region="europe-west4", repository="art")
    assert placement.image_of("kohya").startswith("europe-west4-docker.pkg.dev/my-project/art/sdtune-kohya:")
    assert place(image="x/y:z").image_of("kohya") == "x/y:z"
    assert placement.secret_of("hf") == "projects/my-project/secrets/hf/versions/latest"
    assert placement.secret_of("projects/p/secrets/hf/versions/3") == "projects/p/secrets/hf/versions/3"


def test_a_share_is_named_by_its_name_or_its_place() -> None:
    mount = NfsMount("10.0.0.2", "/vol1/art", "models")
    assert parse_mount("10.0.0.2:/vol1/art=models") == parse_mount("10.0.0.2:/vol1/art/=/mnt/nfs/models") == mount
    assert mount.place == "/mnt/nfs/models"


@pytest.mark.parametrize(
    ("text", "seconds", "shown"),
    [("24h", 86_400, "24h"), ("90m", 5400, "90m"), ("2d", 172_800, "48h"), ("61", 61, "61s"), ("1.5h", 5400, "90m")],
)
def test_durations(text: str, seconds: int, shown: str) -> None:
    assert parse_duration(text) == seconds
    assert show_duration(seconds) == shown
    assert parse_duration(shown) == seconds
