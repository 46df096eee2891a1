"""The dataset laid out for sd-scripts: what its own rules make of the staged folder is what the check promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sdtune.errors import DatasetError
from sdtune.methods.layouts import KOHYA_SUFFIXES
from sdtune.training.kohya.dataset import stage_captioned, stage_repeats_folders


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

    staged = stage_repeats_folders(data, None, tmp_path / "staged")
    seen = as_kohya_reads(staged.train_data_dir)
    assert list(seen) == ["10_sks cat", "3_sks dog"]
    cats = {caption for _, caption, _ in seen["10_sks cat"]}
    assert cats == {"sks cat", "a photo of sks cat, sleeping"}
    assert [caption for _, caption, _ in seen["10_sks cat"]].count("a photo of sks cat, sleeping") == 2
    assert (72, 96) in [size for _, _, size in seen["10_sks cat"]]
    assert [caption for _, caption, _ in seen["3_sks dog"]] == ["sks dog"]
    assert len(staged.pictures) == sum(map(len, seen.values()))
    assert staged.trigger_words == staged.prompts == ["sks cat", "sks dog"]
    assert all(name.isascii() for name, _, _ in seen["10_sks cat"])

    pixels = {picture_of(staged.train_data_dir / "10_sks cat" / name) for name, _, _ in seen["10_sks cat"]}
    assert (255, 255, 255) in pixels  # what was see-through, and the 16-bit white
    links = [path for path in (staged.train_data_dir / "10_sks cat").iterdir() if path.is_symlink()]
    assert {link.resolve().name for link in links} >= {"a.png", "a.jpg", "ünï 🐈 (1).webp"}
    assert not {link.resolve().name for link in links} & {"turned.jpg", "glass.png", "deep.png"}


def picture_of(path: Path) -> tuple[int, ...]:
    pixel = Image.open(path).convert("RGB").getpixel((5, 5))
    assert isinstance(pixel, tuple)
    return pixel


def test_captions_are_the_prompt_where_no_folder_name_is(tmp_path: Path) -> None:
    picture(tmp_path / "data" / "5_" / "a.png")
    (tmp_path / "data" / "5_" / "a.txt").write_text("a drawing of zwx", encoding="utf-8")
    staged = stage_repeats_folders(tmp_path / "data", None, tmp_path / "staged")
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
    staged = stage_repeats_folders(tmp_path / "data", str(tmp_path / "class"), tmp_path / "staged")
    assert words in staged.regularisation
    assert staged.reg_data_dir is not None
    assert list(as_kohya_reads(staged.reg_data_dir)) == [f"{repeats}_cat"]


def test_a_broken_regularisation_folder_is_told_as_one(tmp_path: Path) -> None:
    picture(tmp_path / "data" / "2_sks cat" / "a.png")
    picture(tmp_path / "class" / "a.png")
    with pytest.raises(DatasetError, match=r"class_data_dir: .*1 error in the dataset") as error:
        stage_repeats_folders(tmp_path / "data", str(tmp_path / "class"), tmp_path / "staged")
    assert "directly in the dataset" in str(error.value)


def test_captioned_images_become_the_json_of_sd_scripts(tmp_path: Path) -> None:
    data = tmp_path / "data"
    picture(data / "a.png")
    picture(data / "sub" / "ü.jpg", exif=turned(), size=(96, 72))
    rows = [("a.png", "first"), ("a.png", "second caption"), ("sub/ü.jpg", 'naïve 🐈, "quoted"\nline')]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (data / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")

    staged = stage_captioned(data, tmp_path / "staged")
    assert staged.in_json is not None
    metadata = json.loads(staged.in_json.read_text(encoding="utf-8"))
    assert [entry["caption"] for entry in metadata.values()] == [text for _, text in rows]
    for path, entry in metadata.items():
        assert Path(path).is_absolute()
        assert list(Image.open(path).size) == entry["image_size"]
    assert [entry["image_size"] for entry in metadata.values()] == [[96, 64], [96, 64], [72, 96]]


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "unnumbered" / "cat" / "a.png")
    for folder in ("empty", "unnumbered", "missing"):
        with pytest.raises(DatasetError):
            stage_repeats_folders(tmp_path / folder, None, tmp_path / "staged")
