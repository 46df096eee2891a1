"""The shapes that pictures are trained in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtune.methods.buckets import Buckets, bucket_table
from sdtune.methods.dreambooth import DreamBoothLora


def buckets(resolution: int = 512, **settings: object) -> Buckets:
    method = DreamBoothLora.from_settings({"instance_prompt": "x", **settings})
    return method.buckets(resolution, 64)


def test_the_table_is_that_of_sd_scripts() -> None:
    """model_util.make_bucket_resolutions((512, 512), 256, 1024, 64) of kohya-ss/sd-scripts 48d368f."""
    assert set(buckets().shapes) == {
        (256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576), (512, 512),
        (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("picture", "shape"),
    [
        ((4000, 4000), (512, 512)),
        ((1000, 1500), (384, 640)),
        ((1500, 1000), (640, 384)),
        ((1200, 900), (576, 448)),
        ((100, 100), (512, 512)),
        ((5000, 100), (1024, 256)),
    ],
)
def test_the_nearest_shape_is_taken(picture: tuple[int, int], shape: tuple[int, int]) -> None:
    assert buckets().shape_of(picture) == shape


@given(st.integers(16, 6000), st.integers(16, 6000))
def test_shapes_fit_the_model(width: int, height: int) -> None:
    for one in (buckets(), buckets(bucket_no_upscale=True), buckets(768, min_bucket_reso=512, max_bucket_reso=1024)):
        across, down = one.shape_of((width, height))
        assert across % 64 == down % 64 == 0
        assert across * down <= one.resolution**2
        assert max(across, down) <= one.longest
    across, down = buckets(bucket_no_upscale=True).shape_of((width, height))
    assert across <= max(width, 64)
    assert down <= max(height, 64)
    # As wide as high, as high as wide.
    assert buckets().shape_of((height, width)) == tuple(reversed(buckets().shape_of((width, height))))


@pytest.mark.parametrize("resolution", [512, 520])
def test_without_buckets_there_is_the_square(resolution: int) -> None:
    assert buckets(resolution, enable_bucket=False).shapes == [(resolution, resolution)]
    assert (resolution, resolution) in buckets(resolution).shapes


def test_the_table_for_people() -> None:
    assert bucket_table([(512, 512), (448, 576), (512, 512)]) == "512 x 512: 2, 448 x 576: 1"
