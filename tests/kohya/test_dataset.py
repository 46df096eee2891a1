"""The dataset laid out for sd-scripts: what its own rules make of the staged folder is what the check promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdtune.errors import DatasetError
from sdtune.methods.kohya import KohyaDreamBoothLora, KohyaNativeLora
from sdtune.methods.layouts import KOHYA_SUFFIXES
from sdtune.training.kohya.dataset import StagedDataset, stage_captioned, stage_repeats_folders


def picture(
    path: Path, mode: str = "RGB", colour: object = "red", size: tuple[int, int] = (96, 64), **saved: object
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **saved)  # type: ignore[arg-type]


def as_kohya_reads(folder: Path) -> dict[str, list[tuple[str, str, tuple[int, int]]]]:
    """By sub-folder: file, caption and size as stored, by sd-scripts' rules (DreamBoothDataset)."""
    found = {}
    for parent in sorted(folder.iterdir()):
        assert int(parent.name.split("_")[0]) > 0
        images = sorted(path for path in parent.iterdir() if path.suffix in KOHYA_SUFFIXES)
        found[parent.name] = [
            (
                path.name,
                path.with_suffix(".txt").read_text(encoding="utf-8").split("\n")[0].strip(),
                Image.open(path).size,
            )
            for path in images
        ]
    return found


def with_class(folder: Path) -> KohyaDreamBoothLora:
    return KohyaDreamBoothLora(class_data_dir=str(folder / "class"))


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[274] = 6
    return exif


def test_folders_become_what_sd_scripts_should_see(tmp_path: Path) -> None:
    data = tmp_path / "data"
    picture(data / "10_sks cat" / "a.png")
    picture(data / "10_sks cat" / "a.jpg", colour="blue")
    picture(data / "10_sks cat" / "turned.jpg", exif=turned(), size=(96, 72))
    picture(data / "10_sks cat" / "ünï 🐈 (1).webp", colour="green")
    picture(data / "10_sks cat" / "glass.png", "RGBA", (255, 0, 0, 0))
    picture(data / "10_sks cat" / "deep.png", "I;16", 65535)
    picture(data / "10_sks cat" / ".hidden.png")
    picture(data / "3_sks dog" / "one_two_three_four_five.png", colour="black")
    (data / "10_sks cat" / "a.txt").write_text("a photo of sks cat, sleeping\nsecond line", encoding="utf-8")

    staged = stage_repeats_folders(data, KohyaDreamBoothLora(), tmp_path / "staged")
    train = tmp_path / "staged" / "train"
    seen = as_kohya_reads(train)
    assert list(seen) == ["10_sks cat", "3_sks dog"]
    cats = {caption for _, caption, _ in seen["10_sks cat"]}
    assert cats == {"sks cat", "a photo of sks cat, sleeping"}
    assert [caption for _, caption, _ in seen["10_sks cat"]].count("a photo of sks cat, sleeping") == 2
    assert (72, 96) in [size for _, _, size in seen["10_sks cat"]]
    assert [caption for _, caption, _ in seen["3_sks dog"]] == ["sks dog"]
    assert len(staged.pictures) == sum(map(len, seen.values()))
    assert staged.trigger_words == staged.prompts == ["sks cat", "sks dog"]
    assert all(name.isascii() for name, _, _ in seen["10_sks cat"])

    pixels = {picture_of(train / "10_sks cat" / name) for name, _, _ in seen["10_sks cat"]}
    assert (255, 255, 255) in pixels  # what was see-through, and the 16-bit white
    links = [path for path in (train / "10_sks cat").iterdir() if path.is_symlink()]
    assert {link.resolve().name for link in links} >= {"a.png", "a.jpg", "ünï 🐈 (1).webp"}
    assert not {link.resolve().name for link in links} & {"turned.jpg", "glass.png", "deep.png"}


def picture_of(path: Path) -> tuple[int, ...]:
    pixel = Image.open(path).convert("RGB").getpixel((5, 5))
    assert isinstance(pixel, tuple)
    return pixel


def subsets(staged: StagedDataset) -> list[dict[str, Any]]:
    assert staged.dataset_config is not None
    (dataset,) = json.loads(staged.dataset_config.read_text(encoding="utf-8"))["datasets"]
    told: list[dict[str, Any]] = dataset["subsets"]
    return told


def test_folders_are_told_in_an_order_of_their_own(tmp_path: Path) -> None:
    """That of the check, and not the file system's, which is another on each machine."""
    for name in ("3_sks dog", "10_sks cat", "2_a_b"):
        picture(tmp_path / "data" / name / "a.png")
    told = subsets(stage_repeats_folders(tmp_path / "data", KohyaDreamBoothLora(), tmp_path / "staged"))
    assert [(Path(one["image_dir"]).name, one["num_repeats"], one["class_tokens"]) for one in told] == [
        ("10_sks cat", 10, "sks cat"), ("2_a_b", 2, "a_b"), ("3_sks dog", 3, "sks dog"),
    ]  # fmt: skip
    assert all(Path(one["image_dir"]).is_dir() for one in told)


def test_pictures_kept_apart_are_measured_and_not_trained_on(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(4):
        picture(data / "2_sks cat" / f"{number}.png", colour=(number, 0, 0))
    staged = stage_repeats_folders(data, KohyaDreamBoothLora(held_out_images=2), tmp_path / "folders")
    assert [one.path.name for one in staged.measured] == ["0.png", "2.png"]
    assert [one.path.name for one in staged.pictures] == ["1.png", "3.png"]
    assert [one.caption for one in staged.measured] == ["sks cat"] * 2
    assert len(as_kohya_reads(tmp_path / "folders" / "train")["2_sks cat"]) == 2

    lines = [json.dumps({"file_name": f"2_sks cat/{number}.png", "text": f"picture {number}"}) for number in range(4)]
    (data / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    captioned = stage_captioned(data, KohyaNativeLora(held_out_images=1), tmp_path / "captioned")
    assert captioned.in_json is not None
    trained = json.loads(captioned.in_json.read_text(encoding="utf-8"))
    assert [entry["caption"] for entry in trained.values()] == ["picture 1", "picture 2", "picture 3"]
    assert captioned.prompts == ["picture 1", "picture 2"]
    assert [one.caption for one in captioned.measured] == ["picture 0"]
    everything = stage_captioned(data, KohyaNativeLora(), tmp_path / "all")
    assert everything.measured == everything.pictures
    with pytest.raises(DatasetError, match="held_out_images: 4 of 4 pictures would leave none to train on"):
        stage_captioned(data, KohyaNativeLora(held_out_images=4), tmp_path / "none")


def test_captions_are_the_prompt_where_no_folder_name_is(tmp_path: Path) -> None:
    picture(tmp_path / "data" / "5_" / "a.png")
    (tmp_path / "data" / "5_" / "a.txt").write_text("a drawing of zwx", encoding="utf-8")
    staged = stage_repeats_folders(tmp_path / "data", KohyaDreamBoothLora(), tmp_path / "staged")
    assert (staged.trigger_words, staged.prompts) == ([], ["a drawing of zwx"])


@pytest.mark.parametrize(
    ("repeats", "words"),
    [
        (1, "1 regularisation pictures, with their repeats, for 2 training pictures: sd-scripts shows them again"),
        (2, "2 regularisation pictures, with their repeats, for 2 training pictures."),
        (5, "sd-scripts leaves out 3 of them"),
    ],
)
def test_the_balance_of_regularisation_is_told(repeats: int, words: str, tmp_path: Path) -> None:
    picture(tmp_path / "data" / "2_sks cat" / "a.png")
    picture(tmp_path / "class" / f"{repeats}_cat" / "b.png")
    staged = stage_repeats_folders(tmp_path / "data", with_class(tmp_path), tmp_path / "staged")
    assert words in staged.regularisation
    assert list(as_kohya_reads(tmp_path / "staged" / "regularisation")) == [f"{repeats}_cat"]
    of_class = subsets(staged)[-1]
    assert (of_class["num_repeats"], of_class["class_tokens"], of_class["is_reg"]) == (repeats, "cat", True)


def test_a_broken_regularisation_folder_is_told_as_one(tmp_path: Path) -> None:
    picture(tmp_path / "data" / "2_sks cat" / "a.png")
    picture(tmp_path / "class" / "a.png")
    with pytest.raises(DatasetError, match=r"class_data_dir: .*1 error in the dataset") as error:
        stage_repeats_folders(tmp_path / "data", with_class(tmp_path), tmp_path / "staged")
    assert "directly in the dataset" in str(error.value)


def test_captioned_images_become_the_json_of_sd_scripts(tmp_path: Path) -> None:
    data = tmp_path / "data"
    picture(data / "a.png")
    picture(data / "sub" / "ü.jpg", exif=turned(), size=(96, 72))
    rows = [("a.png", "first"), ("a.png", "second caption"), ("sub/ü.jpg", 'naïve 🐈, "quoted"\nline')]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (data / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")

    staged = stage_captioned(data, KohyaNativeLora(), tmp_path / "staged")
    assert staged.in_json is not None
    metadata = json.loads(staged.in_json.read_text(encoding="utf-8"))
    # Of a caption of several lines sd-scripts reads the first alone, without a word.
    assert [entry["caption"] for entry in metadata.values()] == [text.replace("\n", " ") for _, text in rows]
    for path, entry in metadata.items():
        assert Path(path).is_absolute()
        assert list(Image.open(path).size) == entry["image_size"]
    assert [entry["image_size"] for entry in metadata.values()] == [[96, 64], [96, 64], [72, 96]]


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "unnumbered" / "cat" / "a.png")
    for folder in ("empty", "unnumbered", "missing"):
        with pytest.raises(DatasetError):
            stage_repeats_folders(tmp_path / folder, KohyaDreamBoothLora(), tmp_path / "staged")
