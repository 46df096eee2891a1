"""The result on the Hugging Face Hub: checked before anything is loaded, uploaded when the result is whole."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import disable_progress_bars

from sdtune import events
from sdtune.errors import ProjectError, PublishError, RecipeError
from sdtune.methods.fields import CommonFields, is_hub_id
from sdtune.methods.places import BUCKETS, MOUNT
from sdtune.training.launch import is_one_of_several
from sdtune.training.results import files_of

PLACES = ("base_model", "class_data_dir")
"""Settings that may name a folder of this machine, which is nobody else's business."""
ADVICE = "Log in with: hf auth login, or set HF_TOKEN, with a token that may write (https://hf.co/settings/tokens)."


@dataclass(frozen=True)
class HubRepository:
    """A repository that the token may write to."""

    repo_id: str

    def upload(self, output: Path, names: list[str], kept: str | None = None) -> str:
        """Upload files of ``output``, named by patterns relative to it, in one commit; the address of the repository.

        kept: where the result stays, if that is not ``output``. PublishError: it failed; there the result is whole.
        """
        disable_progress_bars()
        try:
            commit = HfApi().upload_folder(
                repo_id=self.repo_id, folder_path=output, allow_patterns=names, commit_message="Trained with sdtune"
            )
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            words = ["hf", "upload", self.repo_id, output.name if kept else str(output), "."]
            words += [word for name in names for word in ("--include", name)]
            fetch = f"\n  {shlex.join(['gcloud', 'storage', 'cp', '--recursive', kept, '.'])}" if kept else ""
            raise PublishError(
                f"the result is whole in {kept or output}, but its upload to {self.repo_id} failed ({_told(error)}). "
                f"Try that again with:{fetch}\n  {shlex.join(words)}"
            ) from None
        return str(commit.repo_url)


def open_repository(method: CommonFields, output_name: str) -> HubRepository | None:
    """The repository that the result will be uploaded to, made if it is not there; None if nothing is uploaded.

    ProjectError: no token, one that may not write, or no Hub. RecipeError: the name is none, or the repository is
    public where a private one is wanted.
    """
    if not method.push_to_hub:
        return None
    api = HfApi()
    try:
        repo_id = method.hub_model_id or f"{api.whoami()['name']}/{_repository_name(output_name)}"
        if not is_hub_id(repo_id):
            raise RecipeError(
                f"hub_model_id: the output folder's name {output_name!r} makes no name for the Hub; give "
                "--hub-model-id owner/name."
            )
        api.create_repo(repo_id, private=method.hub_private, exist_ok=True)
        api.auth_check(repo_id, write=True)
        found = api.model_info(repo_id)
    except LocalTokenNotFoundError:
        raise ProjectError(f"push_to_hub: there is no Hugging Face token here. {ADVICE}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ProjectError(f"push_to_hub: the Hub refuses the token ({_told(error)}). {ADVICE}") from None
        raise ProjectError(f"push_to_hub: the Hub answered with an error ({_told(error)}). Try again later.") from None
    except (HTTPError, OSError) as error:
        raise ProjectError(f"push_to_hub: the Hub cannot be reached ({_told(error)}).") from None
    if method.hub_private and not found.private:
        raise RecipeError(
            f"hub_private: {repo_id} is on the Hub already, for everyone to see; make it private there or choose "
            "another --hub-model-id."
        )
    # Of several processes the first asks again what the one that starts them has asked.
    if not is_one_of_several() and {file.rfilename for file in found.siblings or []} - {".gitattributes"}:
        text = f"{repo_id} is on the Hub already; files of the result will replace those of the same name there."
        events.emit(events.Note(text, "warning"))
    return HubRepository(repo_id)


def published_names(
    output: Path, files: dict[str, list[str]], settings: dict[str, object], not_ours: Collection[Path] = ()
) -> list[str]:
    """What of a result is uploaded, as patterns; nothing that the run has not told as a part of its result.

    files: names in ``output`` by the kind of artifact. not_ours: files that lay there before the result. Left out are
    the curves, the contact sheet, which shows the training pictures, and the recipe if it names a folder of this
    machine or a bucket; the card has all settings.
    """
    private = any(_is_private(str(settings[place])) for place in PLACES if settings.get(place))
    left_out = {"contact_sheet", *(["recipe"] if private else [])}
    told = files_of(output, {kind: names for kind, names in files.items() if kind not in left_out})
    names = [escape(name) for name in told if output / name not in not_ours]
    return [*names, "samples/*"]


def _is_private(place: str) -> bool:
    return place.startswith((BUCKETS, f"{MOUNT}/")) or Path(place).expanduser().exists()


def _repository_name(folder: str) -> str:
    """The nearest name that the Hub takes: ``my cat (2)`` becomes ``my-cat-2``."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder)
    return re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", name)).strip("-.")[:90].strip("-.").removesuffix(".git")


def _told(error: Exception) -> str:
    """The error on one line. A token is in none: the Hub's client sends it in a header."""
    return " ".join(str(error).split())[:500].rstrip(".") or type(error).__name__
