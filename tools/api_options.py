"""Writes src/sdtune/api/options.py: the options of the functions in ``sdtune.api``, for editors and type checkers.

They are declared once, as fields of Settings; a type checker cannot read them there, because it runs nothing.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic.fields import FieldInfo

from sdtune.jobs.images import BuildSettings
from sdtune.jobs.placement import Placement
from sdtune.jobs.study_settings import StudySettings
from sdtune.methods.catalog import METHODS
from sdtune.methods.settings import Settings

TARGET = Path(__file__).parent.parent / "src" / "sdtune" / "api" / "options.py"
HEAD = '''\
"""The options of the functions in this package, for editors and type checkers. Made by: make api-options

They are the fields of the methods, of Placement, StudySettings and BuildSettings, which check them. None: not given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Literal, TypedDict

Text = str | PathLike[str]
'''
PLACES = ("base_model", "class_data_dir")
"""Fields that name a file or folder, which may be a Path."""
DURATIONS = ("timeout", "max_wait")
"""Fields that take seconds, or a text such as 2h."""
PAIRS = ("labels", "env")
WIDTH = 120


def main() -> None:
    """Write the file."""
    TARGET.write_text(text(), encoding="utf-8")


def text() -> str:
    """The module."""
    methods: dict[str, list[FieldInfo]] = {}
    for method in METHODS.values():
        for name, info in method.model_fields.items():
            methods.setdefault(name, []).append(info)
    parts = [
        HEAD,
        options("MethodOptions", "Of all methods; each has some of them.", methods),
        options("PlacementOptions", "Where in Google Cloud a job runs.", of(Placement)),
        options("StudyOptions", "How a search is made.", of(StudySettings)),
        options("BuildOptions", "How an image is built.", of(BuildSettings)),
        both("TrainOptions", "MethodOptions, PlacementOptions", "Of ``train``."),
        both("HpoOptions", "MethodOptions, PlacementOptions, StudyOptions", "Of ``hpo``."),
    ]
    return "\n\n".join(parts)


def of(settings: type[Settings]) -> dict[str, list[FieldInfo]]:
    return {name: [info] for name, info in settings.model_fields.items()}


def options(name: str, what: str, fields: Mapping[str, Sequence[FieldInfo]]) -> str:
    lines = [f"class {name}(TypedDict, total=False):", f'    """{what}"""', ""]
    for field, infos in fields.items():
        found = dict.fromkeys(part for info in infos for part in kinds(field, info.annotation))
        lines += annotated(f"    {field}: ", " | ".join([*found, "None"]))
        lines += wrapped(infos[0].description or "")
    return "\n".join(lines) + "\n"


def annotated(start: str, kind: str) -> list[str]:
    """As ruff formats it."""
    return [start + kind] if len(start + kind) <= WIDTH else [f"{start}(", f"        {kind}", "    )"]


def wrapped(description: str) -> list[str]:
    """The description as a docstring of the field, in lines that are not too long."""
    lines, line = [], '    """'
    for word in description.replace("\\", "\\\\").split():
        if len(line) + len(word) + 3 > WIDTH:
            lines.append(line.rstrip())
            line = "    "
        line += word + " "
    return [*lines, line.rstrip() + '"""']


def both(name: str, bases: str, what: str) -> str:
    return f'class {name}({bases}, total=False):\n    """{what}"""\n'


def kinds(field: str, annotation: Any) -> Iterable[str]:
    """What may be given, as a type checker reads it; without None."""
    if field in PAIRS:
        return ["Mapping[str, str]", "Sequence[str]"]
    if field in DURATIONS:
        return ["int", "str"]
    if field in PLACES:
        return ["Text"]
    return [written(part) for part in alternatives(annotation) if part is not type(None)]


def alternatives(annotation: Any) -> Sequence[Any]:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return alternatives(typing.get_args(annotation)[0])
    return typing.get_args(annotation) if origin in (types.UnionType, typing.Union) else [annotation]


def written(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is Annotated:
        return written(typing.get_args(kind)[0])
    if origin is typing.Literal:
        return "Literal[" + ", ".join(f'"{value}"' for value in typing.get_args(kind)) + "]"
    if origin is tuple:
        return "str | Sequence[str]"
    return str(kind.__name__)


if __name__ == "__main__":
    main()
