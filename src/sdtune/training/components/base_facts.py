"""What a model card says of the base model: its public name, how diffusers opens it, its licence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml
from huggingface_hub import HfApi, metadata_load
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open

from sdtune.methods.base_models import CHECKPOINTS, locate_base_model
from sdtune.methods.places import BUCKETS

SECONDS_TO_WAIT = 5.0
"""For the Hub, which tells the licence of a model that was loaded from there."""
HUB_LICENSES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "bigcode-openrail-m", "bigscience-openrail-m", "bsd-2-clause",
    "bsd-3-clause", "cc", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "creativeml-openrail-m",
    "deepfloyd-if-license", "gpl-3.0", "lgpl-3.0", "mit", "openrail", "openrail++", "unlicense", "wtfpl",
}  # fmt: skip
"""Words of the Hub for licences of image models. It refuses a card with a word that it does not know."""
SPOKEN = {
    "creativeml open rail-m": "creativeml-openrail-m",
    "creativeml openrail-m": "creativeml-openrail-m",
    "creativeml open rail++-m": "openrail++",
    "creativeml openrail++-m": "openrail++",
    "apache 2.0": "apache-2.0",
}
"""What headers of checkpoints say, in lower case, and the Hub's word for it."""


@dataclass(frozen=True)
class License:
    """id: the Hub's word, or ``other``; name, link: of another licence; text: as the base model puts it."""

    id: str
    text: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class BaseFacts:
    """name: a Hugging Face id, or the last part of a path; single_file: one file with all weights."""

    name: str
    on_hub: bool
    single_file: bool
    license: License | None


def base_facts(base_model: str) -> BaseFacts:
    """Of a model that has been trained from. Never fails; what cannot be found out is not said."""
    found = locate_base_model(base_model)
    if found.path is None and not found.name.startswith(BUCKETS):
        return BaseFacts(found.name, True, False, _license_on_hub(found.name))
    name = PurePosixPath(found.name).name
    if found.path is None:
        return BaseFacts(name, False, name.endswith(CHECKPOINTS), None)
    if found.path.is_file():
        return BaseFacts(name, False, True, _license_of_file(found.path))
    return BaseFacts(name, False, False, _license_of_folder(found.path))


def _license_of_folder(folder: Path) -> License | None:
    try:
        return _license(metadata_load(folder / "README.md") or {})
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _license_of_file(path: Path) -> License | None:
    try:
        with safe_open(path, "pt") as file:
            return _license({"license": (file.metadata() or {}).get("modelspec.license")})
    except (OSError, SafetensorError):
        return None


def _license_on_hub(name: str) -> License | None:
    try:
        card = HfApi().model_info(name, timeout=SECONDS_TO_WAIT).card_data
    except (HTTPError, OSError, ValueError):
        return None
    return _license(dict(card.to_dict()) if card else {})  # type: ignore[no-untyped-call]


def _license(metadata: dict[str, object]) -> License | None:
    """The licence in a card's front matter. What is no word of the Hub's becomes ``other`` with a name."""
    text = " ".join(str(metadata.get("license") or "").split())
    word = SPOKEN.get(text.lower(), text.lower())
    if word in ("", "none", "unknown"):
        return None
    if word in HUB_LICENSES:
        return License(word, text)
    text = str(metadata.get("license_name") or text)
    link = str(metadata.get("license_link") or (text if re.fullmatch(r"https://\S+", text) else "")) or None
    return License("other", text, re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")[:60] or None, link)
