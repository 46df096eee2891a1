"""The three layouts of a dataset: the one place that knows how to check one and how to read one.

The launcher checks with ``decode=True`` before anything costs money; the trainer calls the same function with
``decode=False`` and trains on its ``examples``, so both always mean the same images and captions.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from posixpath import dirname, splitext

from sdtune.methods.captions import captions_beside, kohya_captions, remark_on_unread
from sdtune.methods.folders import ARCHIVES, Folder, number_of, sort_files
from sdtune.methods.images import SUFFIXES, Fault, Picture, look
from sdtune.methods.ledger import Draft, Example, Layout, Ledger
from sdtune.methods.metadata import find_metadata, read_metadata
from sdtune.methods.sources import File, LocalFolder, Source
from sdtune.methods.threads import in_threads

__all__ = ["Layout", "check", "check_source"]

KOHYA_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MANY_REPEATS = 1000
NARROW = 3.0


def check(
    folder: Path,
    layout: Layout,
    *,
    resolution: int | None = None,
    decode: bool = True,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Ledger:
    """Check the dataset in ``folder``. Reads only; DatasetError if there is no such folder.

    resolution: warn of images that training at this size would enlarge. decode: read the pixels too, not only the
    headers. workers: threads. progress: called with (images looked at, images in all), at most ten times a second.
    """
    return check_source(
        LocalFolder(Path(folder)), layout, resolution=resolution, decode=decode, workers=workers, progress=progress
    )


def check_source(
    source: Source,
    layout: Layout,
    *,
    resolution: int | None = None,
    decode: bool = True,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Ledger:
    """The same for any source of files; workers: not given, as many as the source has a use for."""
    workers = workers or source.workers
    draft = Draft()
    folder = sort_files(source, draft)
    asked = sorted(_READERS[layout](folder, draft), key=lambda one: one.file.path)
    files = list({one.file.path: one.file for one in asked}.values())
    pictures: dict[str, Picture] = {}
    for file, result in zip(files, in_threads(lambda file: look(file, decode), files, workers, progress), strict=True):
        if isinstance(result, Fault):
            draft.reject(result.code, file.path, result.message)
        else:
            _remark(file.path, result, resolution, draft)
            if not result.animated:
                pictures[file.path] = result
    asked = _without_duplicates([one for one in asked if one.file.path in pictures], workers, draft)
    for one in asked:
        draft.keep(one.file.path, "used")
    if not asked and not draft.has_errors():
        draft.find("no-images", "", "no image is left to train on; the warnings say why.")
    examples = [_example(one, pictures[one.file.path], layout) for one in asked]
    return draft.finish(source.root, layout, folder.paths, examples)


# --- which images with which captions: one function per layout --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Asked:
    """An image that the layout would train on, if it is a good one."""

    file: File
    caption: str | None
    repeats: int = 1


def _read_images(folder: Folder, draft: Draft) -> list[_Asked]:
    """Layout.IMAGES: one flat folder."""
    top = folder.images_in.get("", {})
    if not top:
        _explain_no_images(folder, draft)
        return []
    _ignore_sub_folders(folder, "", draft)
    captions: dict[str, list[str | None]]
    metadata = find_metadata(folder, draft, required=False)
    if metadata is not None:
        captions = _captions_of_metadata(metadata, folder, draft)
        remark_on_unread(folder, "", f"{metadata.path} has the captions", draft)
    else:
        captions = {path: [text] for path, text in captions_beside(folder, top, draft).items()}
        remark_on_unread(folder, "", "another file has the caption of this image", draft)
    captioned = sum(path in captions for path in top)
    if 0 < captioned < len(top):
        message = f"{captioned} of {len(top)} images have a caption; the others get the method's own prompt."
        draft.find("mixed-captions", "", message)
    return [_Asked(file, caption) for path, file in top.items() for caption in captions.get(path, [None])]


def _read_captioned(folder: Folder, draft: Draft) -> list[_Asked]:
    """Layout.CAPTIONED: metadata.jsonl or its like says which images there are."""
    if not folder.images:
        _explain_no_images(folder, draft)
        return []
    metadata = find_metadata(folder, draft, required=True)
    captions = _captions_of_metadata(metadata, folder, draft) if metadata is not None else {}
    # Where the metadata cannot be read, that error is the reason and not each image's lack of a row.
    whole = metadata is not None and not draft.has_errors(metadata.path)
    for path in folder.images:
        if path not in captions:
            draft.drop(path, "no-row")
            if whole:
                draft.find("no-row", path, "has no row in the metadata file and is not used.")
    if metadata is not None:
        remark_on_unread(folder, "", f"{metadata.path} has the captions", draft)
    return [_Asked(folder.images[path], text) for path, texts in captions.items() for text in texts]


def _read_kohya(folder: Folder, draft: Draft) -> list[_Asked]:
    """Layout.KOHYA: a folder of folders named <repeats>_<name>."""
    if not folder.images:
        _explain_no_images(folder, draft)
        return []
    flat = folder.images_in.get("", {})
    names = sorted({path.split("/")[0] for path in folder.images if "/" in path})
    for path in flat:
        draft.drop(path, "flat-images")
    if flat and _repeats(folder.name) is not None and not any(_repeats(name) for name in names):
        message = f"{folder.name!r} is itself a folder named <repeats>_<name>. Give the folder that it lies in."
        draft.find("itself-a-repeats-folder", "", message)
        return []
    if flat:
        message = (
            f"{number_of(len(flat), 'image')} directly in the dataset, such as {next(iter(flat))!r}; kohya reads only"
            " images in folders named <repeats>_<name>. Move them into one, such as '10_sks dog'."
        )
        draft.find("flat-images", "", message)
    return [asked for name in names for asked in _read_repeats_folder(folder, name, draft)]


def _read_repeats_folder(folder: Folder, name: str, draft: Draft) -> list[_Asked]:
    repeats = _repeats(name)
    if repeats is None or repeats < 1:
        _explain_no_repeats(folder, name, repeats, draft)
        return []
    if repeats >= MANY_REPEATS:
        message = f"every image of this folder is shown {repeats} times per epoch. Is {repeats} a number of repeats?"
        draft.find("many-repeats", name, message)
    _ignore_sub_folders(folder, name, draft)
    images = dict(folder.images_in.get(name, {}))
    for path in list(images):
        suffix = splitext(path)[1].lower()
        if suffix not in KOHYA_SUFFIXES:
            message = f"kohya does not read {suffix} images: it is not used. Convert it to PNG or JPEG."
            draft.reject("kohya-suffix", path, message)
            del images[path]
    if not images:
        draft.find("empty-repeats-folder", name, "the folder has no image that kohya reads.")
    captions = kohya_captions(folder, images, draft)
    remark_on_unread(folder, name, "kohya reads <name of the image>.txt", draft)
    fallback = name.partition("_")[2]
    if not fallback and len(captions) < len(images):
        lacking = number_of(len(images) - len(captions), "image")
        message = f"{lacking} with neither a .txt caption nor one in the folder's name."
        draft.find("no-caption", name, f"{message} Name it <repeats>_<caption>.")
    return [_Asked(file, captions.get(path, fallback), repeats) for path, file in images.items()]


_READERS: dict[Layout, Callable[[Folder, Draft], list[_Asked]]] = {
    Layout.IMAGES: _read_images,
    Layout.CAPTIONED: _read_captioned,
    Layout.KOHYA: _read_kohya,
}


def _captions_of_metadata(metadata: File, folder: Folder, draft: Draft) -> dict[str, list[str | None]]:
    """Every caption of each image that is named."""
    captions: dict[str, list[str | None]] = defaultdict(list)
    for row in read_metadata(metadata, draft, folder.images) or ():
        captions[row.file_name].append(row.text)
    return dict(captions)


def _repeats(name: str) -> int | None:
    """The number before the first "_", as kohya takes it."""
    try:
        return int(name.split("_")[0])
    except ValueError:
        return None


# --- what is wrong with the folders ---------------------------------------------------------------------------------


def _explain_no_images(folder: Folder, draft: Draft) -> None:
    """Nothing where the layout looks for images."""
    if folder.images:
        below = Counter(dirname(path) for path in folder.images)
        where = ", ".join(f"{name!r} ({count})" for name, count in sorted(below.items())[:5])
        more = f" and {len(below) - 5} more" if len(below) > 5 else ""
        if any(_repeats(name.split("/")[0]) is not None for name in below):
            advice = (
                "Folders named <repeats>_<name> are read by the kohya DreamBooth method. Use that, or give one of them."
            )
        else:
            advice = "Give one of them, or move the images up."
        message = (
            f"no image directly in the folder; {number_of(len(folder.images), 'image')} in {where}{more}. {advice}"
        )
        draft.find("only-sub-folders", "", message)
    elif folder.paths:
        archives = [path for path in folder.others if splitext(path)[1].lower() in ARCHIVES]
        advice = f"Unpack {archives[0]!r}." if archives else f"Wanted are files ending in {', '.join(SUFFIXES)}."
        draft.find("no-images", "", f"{number_of(len(folder.paths), 'file')} and no image among them. {advice}")


def _ignore_sub_folders(folder: Folder, parent: str, draft: Draft) -> None:
    """Warn of the images below the sub-folders of ``parent``, which are not read."""
    start = parent + "/" if parent else ""
    below: dict[str, list[str]] = defaultdict(list)
    for folder_below, images in folder.images_in.items():
        if folder_below.startswith(start) and folder_below != parent:
            below[start + folder_below[len(start) :].split("/")[0]] += images
    for name, paths in below.items():
        message = f"{number_of(len(paths), 'image')} in this sub-folder: not used. Move them up if they should be."
        draft.find("sub-folder", name, message)
        for path in paths:
            draft.drop(path, "sub-folder")


def _explain_no_repeats(folder: Folder, name: str, repeats: int | None, draft: Draft) -> None:
    """kohya leaves such a folder out without stopping."""
    below = [path for path in folder.images if path.startswith(name + "/")]
    code = "no-repeats" if repeats is None else "bad-repeats"
    for path in below:
        draft.drop(path, code)
    lost = f"kohya would silently leave out its {number_of(len(below), 'image')}"
    if repeats is not None:
        better = f"10_{name.partition('_')[2]}"
        draft.find(
            code, name, f"the folder asks for {repeats} repeats; {lost}. Name it with 1 or more, such as {better!r}."
        )
    elif any(_repeats(path.split("/")[1]) is not None for path in below if path.count("/") > 1):
        draft.find(code, name, f"the <repeats>_<name> folders lie in this one. Give {name!r} as the dataset.")
    else:
        numbered = re.fullmatch(r"(\d+)[\s.x-]*(.+)", name)
        better = f"{numbered[1]}_{numbered[2]}" if numbered else "10_" + name.strip("_ ")
        message = f"the folder's name does not begin with a number and '_'; {lost}."
        draft.find(code, name, f"{message} Name it <repeats>_<name>, such as {better!r}.")


# --- what is remarkable about the images ----------------------------------------------------------------------------


def _remark(path: str, picture: Picture, resolution: int | None, draft: Draft) -> None:
    if picture.animated:
        message = "holds several pictures (an animation or pages) and is not used. Save the one you want as PNG."
        draft.reject("animated", path, message)
        return
    promised = SUFFIXES[splitext(path)[1].lower()]
    if promised != picture.format.replace("MPO", "JPEG"):
        draft.find("wrong-suffix", path, f"is a {picture.format} in spite of its name; it is used.")
    if picture.rotated:
        draft.find("rotated", path, "is turned by its EXIF orientation; it is used upright.")
    if picture.mode == "CMYK":
        draft.find(
            "cmyk", path, "has print colours (CMYK) and is converted to RGB. Look whether its colours come out right."
        )
    if picture.deep:
        draft.find(
            "deep-colour", path, "has more than 8 bits of grey and is scaled down to 8. Look whether it is too dark."
        )
    elif picture.transparent:
        draft.find("alpha", path, "has transparency; what is see-through becomes white.")
    shorter, longer = sorted((picture.width, picture.height))
    size = f"{picture.width} x {picture.height} pixels"
    if resolution is not None and shorter < resolution:
        draft.find("small", path, f"is {size} and is enlarged to train at {resolution}. Use a larger one if there is.")
    if longer > NARROW * shorter:
        draft.find("narrow", path, f"is {size}, over {NARROW:g} times as long as wide: its ends may be cut away.")


def _without_duplicates(asked: list[_Asked], workers: int | None, draft: Draft) -> list[_Asked]:
    """``asked`` less the files that repeat an earlier one, byte for byte and with the same caption."""
    by_size: dict[int, dict[str, File]] = defaultdict(dict)
    captions: dict[str, list[str | None]] = defaultdict(list)
    for one in asked:
        by_size[one.file.size][one.file.path] = one.file
        captions[one.file.path].append(one.caption)
    suspects = [file for files in by_size.values() if len(files) > 1 for file in files.values()]
    firsts: dict[bytes, str] = {}
    dropped: set[str] = set()
    for file, digest in zip(suspects, in_threads(_digest, suspects, workers), strict=True):
        first = firsts.setdefault(digest or file.path.encode(), file.path)
        if first == file.path:
            continue
        if captions[first] == captions[file.path]:
            draft.reject("duplicate", file.path, f"is the same file as {first!r} and is not used. Remove it.")
            dropped.add(file.path)
        else:
            draft.find("duplicate", file.path, f"is the same file as {first!r} with another caption; both are used.")
    return [one for one in asked if one.file.path not in dropped]


def _digest(file: File) -> bytes:
    try:
        return file.digest()
    except OSError:  # gone since it was looked at
        return b""


def _example(one: _Asked, picture: Picture, layout: Layout) -> Example:
    suffix = splitext(one.file.path)[1]
    # kohya knows .png and .PNG, but not .Png.
    plain = picture.plain and (layout is not Layout.KOHYA or suffix in (suffix.lower(), suffix.upper()))
    return Example(one.file.path, one.caption, picture.width, picture.height, one.repeats, plain)
