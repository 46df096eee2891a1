"""sdtune: fine-tune Stable Diffusion on Google Cloud, or on this machine.

    import sdtune
    run = sdtune.train("dreambooth-lora", dataset="photos", output="out/cat", instance_prompt="a photo of sks cat")

The functions are those of ``sdtune.api``, which is imported when one of them is asked for.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_OF_API = ("build", "find_search", "hpo", "images", "sync_nfs", "train")
_MODULES = ("api", "errors", "jobs")


def __getattr__(name: str) -> Any:
    if name in _OF_API:
        try:
            return getattr(import_module("sdtune.api"), name)
        except ModuleNotFoundError as error:
            if error.name != "sdtune.api":
                raise
            raise ImportError(
                f"sdtune.{name} is not in the images of jobs, which hold the trainer alone; call it where sdtune is "
                "installed, or in a Workbench instance."
            ) from None
    if name in _MODULES:
        return import_module(f"sdtune.{name}")
    raise AttributeError(f"module 'sdtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_OF_API, *_MODULES])
