"""SearchSpace: which settings a hyperparameter search varies, and between which bounds.

Written as ``learning_rate=1e-5:1e-3:log``, ``rank=4,8,16,32`` or, for the range that a method declares, ``rank``.
"""

from __future__ import annotations

import difflib
import itertools
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sdtune.errors import RecipeError
from sdtune.methods.base import Method, Tunable

Value = str | int | float
Kind = Literal["double", "integer", "categorical", "discrete"]
Scale = Literal["linear", "log", "reverse-log"]
SCALES: tuple[Scale, ...] = ("linear", "log", "reverse-log")
MOST_VALUES = 1000
"""Of a discrete parameter; Vertex AI takes no more."""
CLOSEST_VALUES = 1e-10
"""Discrete values nearer to each other than this are one to Vertex AI."""
MOST_CORNERS = 2000
"""Settings that are tried out on the method before a search begins."""


@dataclass(frozen=True, slots=True)
class Parent:
    """The parameter, and its values, under which another one matters."""

    name: str
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One setting that is varied; its name is the field's.

    low, high: of a double or an integer. values: of a categorical (texts; true and false too) or a discrete one
    (numbers, ascending). parent: None where it always matters.
    """

    name: str
    kind: Kind
    low: float = 0
    high: float = 0
    values: tuple[Value, ...] = ()
    scale: Scale = "linear"
    parent: Parent | None = None

    @property
    def extremes(self) -> tuple[Value, ...]:
        """The values at its edges: both bounds, or all there are."""
        return self.values or ((self.low, self.high) if self.kind == "double" else (int(self.low), int(self.high)))

    def value_of(self, text: Value) -> Value:
        """A value as a place returned it, in this parameter's type: a whole number may have come as 4.0."""
        if self.kind == "categorical":
            return str(text)
        number = float(text)
        whole = self.kind == "integer" or (self.kind == "discrete" and all(isinstance(v, int) for v in self.values))
        return round(number) if whole else number

    def is_active(self, values: Mapping[str, Value]) -> bool:
        """Whether it matters beside ``values`` of the others."""
        return self.parent is None or values.get(self.parent.name) in self.parent.values

    @property
    def words(self) -> str:
        """Its range, for people: ``1e-05 to 0.001, log``."""
        span = ", ".join(map(str, self.values)) if self.values else f"{self.low:g} to {self.high:g}"
        text = span if self.scale == "linear" else f"{span}, {self.scale}"
        if self.parent is None:
            return text
        return f"{text}; where {self.parent.name} is {' or '.join(map(str, self.parent.values))}"


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """All parameters of a search; a parent stands before its children."""

    parameters: tuple[Parameter, ...]

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, name: str) -> Parameter:
        return next(one for one in self.parameters if one.name == name)

    def active(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """``values`` without those of parameters that do not matter beside the others."""
        kept: dict[str, Value] = {}
        for one in self.parameters:
            if one.name in values and one.is_active(kept):
                kept[one.name] = values[one.name]
        return kept

    @property
    def points(self) -> int | None:
        """How many settings there are in all; None if they cannot be counted, or parameters hang on others."""
        if any(one.kind == "double" or one.parent for one in self.parameters):
            return None
        return math.prod(len(one.values) or int(one.high - one.low) + 1 for one in self.parameters)

    def children(self, name: str) -> list[Parameter]:
        """The parameters that matter only under values of ``name``."""
        return [one for one in self.parameters if one.parent and one.parent.name == name]


def search_space(method: type[Method], tune: Sequence[str] = (), base: Method | None = None) -> SearchSpace:
    """What ``tune`` says of a method's fields; its declared default space where it says nothing.

    base: the recipe that trials start from; with it, settings that do not go together are found too.
    RecipeError tells every mistake.
    """
    if not tune:
        tune = [name for name, mark in tunables(method).items() if mark.by_default]
    mistakes: list[str] = []
    found: dict[str, Parameter] = {}
    for text in tune:
        try:
            parameter = _parameter(method, text)
            if parameter.name in found:
                raise RecipeError(f"tune {parameter.name}: given twice; leave one of them out.")
            found[parameter.name] = parameter
        except RecipeError as error:
            mistakes.append(str(error))
    for name, parameter in found.items():
        try:
            found[name] = replace(parameter, parent=_parent(method, parameter, found, base))
        except RecipeError as error:
            mistakes.append(str(error))
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    space = SearchSpace(tuple(_parents_first(found)))
    if base is not None:
        check_corners(space, base)
    return space


def tunables(method: type[Method]) -> dict[str, Tunable]:
    """The marks of the fields that a search may vary."""
    marks = {name: _mark(method, name) for name in method.model_fields}
    return {name: mark for name, mark in marks.items() if mark is not None}


def check_corners(space: SearchSpace, base: Method) -> None:
    """RecipeError if a trial at the edges of the space would be refused by the method itself."""
    for values in _corners(space):
        try:
            base.from_settings({**base.settings(), **values})
        except RecipeError as error:
            shown = ", ".join(f"{name} {value}" for name, value in values.items())
            raise RecipeError(f"tune: a trial with {shown} would be refused. {error}") from None


def _corners(space: SearchSpace) -> Iterator[dict[str, Value]]:
    """Every parameter at its edges together with every other; of a large space, every two."""
    edges = [one.extremes for one in space]
    names = [one.name for one in space]
    if math.prod(map(len, edges)) <= MOST_CORNERS:
        for values in itertools.product(*edges):
            yield space.active(dict(zip(names, values, strict=True)))
        return
    first = {name: values[0] for name, values in zip(names, edges, strict=True)}
    pairs = itertools.combinations(range(len(names)), 2)
    every = ((a, b, x, y) for a, b in pairs for x in edges[a] for y in edges[b])
    for a, b, x, y in itertools.islice(every, 10 * MOST_CORNERS):
        yield space.active({**first, names[a]: x, names[b]: y})


def _parameter(method: type[Method], text: str) -> Parameter:
    """One ``--tune``, or the bare name of a field."""
    written, equals, said = text.partition("=")
    name = written.strip().replace("-", "_")
    if name not in method.model_fields:
        near = difflib.get_close_matches(name, tunables(method), n=1)
        hint = f"did you mean {near[0]}?" if near else f"a search can vary {', '.join(tunables(method))}."
        raise RecipeError(f"tune {name}: {method.name} has no such setting; {hint}")
    mark = _mark(method, name)
    if mark is None:
        raise RecipeError(
            f"tune {name}: this setting is the same in all trials of a search; {method.name} can vary "
            f"{', '.join(tunables(method))}."
        )
    if not equals:
        return _declared(method, name, mark)
    parts = [part.strip() for part in said.split(":")]
    scale = _scale(name, parts.pop()) if len(parts) > 1 and not _is_number(parts[-1]) else None
    if len(parts) == 1 and "," not in parts[0] and not _is_number(parts[0]) and _numeric(method, name):
        raise _ill_formed(name, said)
    if len(parts) == 2:
        return _range(method, name, parts[0], parts[1], scale or ("log" if mark.log else "linear"))
    if len(parts) > 2:
        raise _ill_formed(name, said)
    return _choice(method, name, parts[0].split(","), scale)


def _declared(method: type[Method], name: str, mark: Tunable) -> Parameter:
    if mark.values:
        return _choice(method, name, [_as_text(value) for value in mark.values], "log" if mark.log else None)
    return _range(method, name, str(mark.low), str(mark.high), "log" if mark.log else "linear")


def _range(method: type[Method], name: str, low: str, high: str, scale: Scale) -> Parameter:
    """``LOW:HIGH[:SCALE]``."""
    if not _numeric(method, name):
        raise RecipeError(
            f"tune {name}: found the range {low}:{high}, but it is {method.allowed(name)}; name values: {name}=A,B."
        )
    bounds = [_number(name, bound, whole=_type(method, name) is int) for bound in (low, high)]
    if bounds[0] >= bounds[1]:
        raise RecipeError(f"tune {name}: found {low}:{high}; wanted LOW:HIGH, the smaller first.")
    for bound in (low, high):
        _check_allowed(method, name, bound)
    if scale != "linear" and bounds[0] <= 0:
        raise RecipeError(
            f"tune {name}: found {low}:{high}:{scale}, but there is no logarithm of {low}; "
            "begin above 0, or take linear."
        )
    if any(getattr(limit, "multiple_of", None) for limit in method.model_fields[name].metadata):
        raise RecipeError(
            f"tune {name}: found a range, but it is {method.allowed(name)}; name the values: {name}={low},{high}."
        )
    kind: Kind = "integer" if _type(method, name) is int else "double"
    return Parameter(name, kind, low=bounds[0], high=bounds[1], scale=scale)


def _choice(method: type[Method], name: str, texts: Sequence[str], scale: Scale | None) -> Parameter:
    """``A,B,C``."""
    texts = [text.strip() for text in texts]
    values: list[Value] = []
    for text in texts:
        _check_allowed(method, name, text)
        if _numeric(method, name):
            values.append(_number(name, text, whole=_type(method, name) is int))
        else:
            values.append(text.lower() if _type(method, name) is bool else text)
    if len(set(values)) < len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise RecipeError(f"tune {name}: found {twice} twice; name each value once.")
    if len(values) < 2:
        raise RecipeError(
            f"tune {name}: found one value, {texts[0]}, so nothing is searched; name several, or set it with "
            f"{method.flag(name)}."
        )
    if not _numeric(method, name):
        if scale:
            raise RecipeError(f"tune {name}: found the scale {scale}, which only numbers have; leave it out.")
        if _type(method, name) is bool and set(values) != {"true", "false"}:
            raise RecipeError(f"tune {name}: found {','.join(texts)}, wanted true,false.")
        return Parameter(name, "categorical", values=tuple(values))
    numbers = sorted(float(value) for value in values)
    if len(values) > MOST_VALUES:
        raise RecipeError(f"tune {name}: found {len(values)} values, wanted at most {MOST_VALUES}; give a range.")
    if min(b - a for a, b in itertools.pairwise(numbers)) < CLOSEST_VALUES:
        raise RecipeError(f"tune {name}: two values are nearer to each other than {CLOSEST_VALUES:g}; give a range.")
    if scale and scale != "linear" and numbers[0] <= 0:
        raise RecipeError(f"tune {name}: found {numbers[0]:g} with {scale}, but it has no logarithm; take linear.")
    return Parameter(name, "discrete", values=tuple(sorted(values, key=float)), scale=scale or "linear")


def _parent(
    method: type[Method], parameter: Parameter, found: Mapping[str, Parameter], base: Method | None
) -> Parent | None:
    """What the field's mark says of when it matters, in this search."""
    mark = _mark(method, parameter.name)
    if mark is None or mark.when is None or mark.when[0] not in method.model_fields:
        return None
    name, values = mark.when
    wanted = tuple(_as_value(value) for value in values)
    words = f"only matters where {name} is {' or '.join(map(str, wanted))}"
    if name in found:
        under = tuple(value for value in found[name].extremes if value in wanted)
        if not under:
            raise RecipeError(f"tune {parameter.name}: {words}, which is not among what is searched; add it.")
        if found[name].kind in ("double", "integer") or len(under) == len(found[name].values):
            return None
        return Parent(name, under)
    if base is not None and _as_value(getattr(base, name)) not in wanted:
        raise RecipeError(
            f"tune {parameter.name}: {words}, and here it is {_as_text(getattr(base, name))}; set {name}, or tune it "
            "too."
        )
    return None


def _parents_first(found: Mapping[str, Parameter]) -> Iterator[Parameter]:
    def depth(one: Parameter) -> int:
        return 0 if one.parent is None else 1 + depth(found[one.parent.name])

    return iter(sorted(found.values(), key=depth))


def _mark(method: type[Method], name: str) -> Tunable | None:
    return next((one for one in method.model_fields[name].metadata if isinstance(one, Tunable)), None)


def _type(method: type[Method], name: str) -> Any:
    """int, float, bool or str: what is under ``| None``, Annotated and Literal."""
    kind: Any = method.model_fields[name].annotation
    while (origin := typing.get_origin(kind)) is not None:
        if origin in (types.UnionType, typing.Union):
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
        elif origin is Annotated:
            kind = typing.get_args(kind)[0]
        else:
            return str
    return kind


def _numeric(method: type[Method], name: str) -> bool:
    return _type(method, name) in (int, float)


@lru_cache(maxsize=256)
def _adapter(method: type[Method], name: str) -> TypeAdapter[Any]:
    info = method.model_fields[name]
    limits = [limit for limit in info.metadata if not isinstance(limit, Tunable)]
    kind: Any = Annotated[(info.annotation, *limits)] if limits else info.annotation
    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))


def _check_allowed(method: type[Method], name: str, text: str) -> None:
    try:
        _adapter(method, name).validate_python(text)
    except ValidationError:
        raise RecipeError(f"tune {name}: found {text!r}, wanted {method.allowed(name)}.") from None


def _number(name: str, text: str, *, whole: bool) -> int | float:
    try:
        number = float(text)
    except ValueError:
        raise RecipeError(f"tune {name}: found {text!r}, wanted a number.") from None
    if not math.isfinite(number):
        raise RecipeError(f"tune {name}: found {text!r}, wanted a number.")
    if whole and number != int(number):
        raise RecipeError(f"tune {name}: found {text}, wanted a whole number.")
    return int(number) if whole else number


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _scale(name: str, text: str) -> Scale:
    for scale in SCALES:
        if text.lower() == scale:
            return scale
    raise RecipeError(f"tune {name}: found the scale {text!r}, wanted {' or '.join(SCALES)}.")


def _ill_formed(name: str, said: str) -> RecipeError:
    return RecipeError(f"tune {name}: found {said!r}, wanted LOW:HIGH, LOW:HIGH:log, or values such as A,B,C.")


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _as_value(value: Any) -> Value:
    """As a parameter has it: true and false are texts there."""
    return _as_text(value) if isinstance(value, bool) else value
