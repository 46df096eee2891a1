"""JSON as Google's front ends take and give it: strict about names and types, errors in google.rpc's form.

``parse`` finds every mistake of a request, as the services do, not the first one alone: names that the published
message does not have, values of another type, enum names that do not exist. ``matches`` is the filter of list calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

STATUS_NAMES = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 409: "ALREADY_EXISTS",
    429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 501: "UNIMPLEMENTED", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
}  # fmt: skip
WELL_KNOWN = "google.protobuf."
TYPES = "type.googleapis.com/"
Violation = tuple[str, str]
"""Field and description."""


class ApiError(Exception):
    """An answer that is no success: HTTP status, message, and google.rpc's details."""

    def __init__(self, status: int, message: str, name: str = "", details: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.name = name or STATUS_NAMES.get(status, "UNKNOWN")
        self.details = details

    def body(self) -> dict[str, Any]:
        error = {"code": self.status, "message": str(self), "status": self.name}
        return {"error": {**error, **({"details": list(self.details)} if self.details else {})}}


def bad_request(message: str, violations: Sequence[Violation]) -> ApiError:
    """400 that names the fields."""
    named = [{"field": field, "description": text} if field else {"description": text} for field, text in violations]
    return ApiError(400, message, details=[{"@type": f"{TYPES}google.rpc.BadRequest", "fieldViolations": named}])


def parse(body: Any, message: Message, root: str) -> None:
    """Fill ``message``. ApiError with all mistakes; ``root`` is the name that the request gives the message."""
    if not isinstance(body, dict):
        raise ApiError(400, "Invalid JSON payload received. Unexpected token.\n^")
    violations = list(_mistakes(body, message.DESCRIPTOR, root))
    if violations:
        raise bad_request("\n".join(text for _, text in violations), violations)
    try:
        json_format.ParseDict(body, message)
    except json_format.ParseError as error:
        raise bad_request(f"Invalid value: {error}", [(root, str(error))]) from None


def _mistakes(body: Any, described: Descriptor, path: str) -> list[Violation]:
    if not isinstance(body, dict):
        return [_invalid(path, f"{TYPES}{described.full_name}", body)]
    found: list[Violation] = []
    seen: set[str] = set()
    for name, value in body.items():
        field = described.fields_by_name.get(name) or described.fields_by_camelcase_name.get(name)
        if field is None:
            where = f" at '{path}'" if path else ""
            found.append((path, f'Invalid JSON payload received. Unknown name "{name}"{where}: Cannot find field.'))
        elif field.name in seen:
            found.append((f"{path}.{field.name}", f"Field '{field.name}' is given twice, under two spellings."))
        elif value is not None:
            found += _field_mistakes(value, field, f"{path}.{field.name}")
        seen.add(field.name if field else name)
    return found


def _field_mistakes(value: Any, field: FieldDescriptor, path: str) -> list[Violation]:
    if field.message_type and field.message_type.GetOptions().map_entry:
        of = field.message_type.fields_by_name["value"]
        if not isinstance(value, dict):
            return [_invalid(path, "Map", value)]
        return [found for key, one in value.items() for found in _value_mistakes(one, of, f"{path}[{key}]")]
    if not field.is_repeated:
        if isinstance(value, list):
            text = f'Unknown name "{field.name}": Proto field is not repeating, cannot start list.'
            return [(path, f"Invalid JSON payload received. {text}")]
        return _value_mistakes(value, field, path)
    if not isinstance(value, list):
        return [_invalid(path, "List", value)]
    return [found for number, one in enumerate(value) for found in _value_mistakes(one, field, f"{path}[{number}]")]


def _value_mistakes(value: Any, field: FieldDescriptor, path: str) -> list[Violation]:
    if field.message_type is not None:
        return _message_mistakes(value, field.message_type, path)
    if field.enum_type is not None:
        known = field.enum_type.values_by_name if isinstance(value, str) else field.enum_type.values_by_number
        right = isinstance(value, str | int) and not isinstance(value, bool) and value in known
        return [] if right else [_invalid(path, f"{TYPES}{field.enum_type.full_name}", value)]
    kind, right_type = _SCALARS.get(field.type, ("", None))
    return [] if right_type is None or right_type(value) else [_invalid(path, kind, value)]


def _message_mistakes(value: Any, described: Descriptor, path: str) -> list[Violation]:
    if not described.full_name.startswith(WELL_KNOWN):
        return _mistakes(value, described, path)
    # Duration, Timestamp: texts, with rules of their own.
    if described.name == "Duration" and not (isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d{1,9})?s", value)):
        text = f"Field '{path.rsplit('.', 1)[-1]}', Illegal duration format; duration must end with 's'"
        return [(path, f"Invalid value at '{path}' ({TYPES}{described.full_name}), {text}")]
    return []


def _invalid(path: str, kind: str, value: Any) -> Violation:
    shown = f'"{value}"' if isinstance(value, str) else value
    return path, f"Invalid value at '{path}' ({kind}), {shown}"


def _is_integer(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, str):
        return re.fullmatch(r"-?\d+", value) is not None
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


_SCALARS: dict[int, tuple[str, Callable[[Any], bool]]] = {
    FieldDescriptor.TYPE_STRING: ("TYPE_STRING", lambda value: isinstance(value, str)),
    FieldDescriptor.TYPE_BOOL: ("TYPE_BOOL", lambda value: isinstance(value, bool)),
    FieldDescriptor.TYPE_INT64: ("TYPE_INT64", _is_integer),
    FieldDescriptor.TYPE_INT32: ("TYPE_INT32", _is_integer),
}


def to_json(message: Message, query: Mapping[str, str]) -> dict[str, Any]:
    """As the service answers: enums by number where the query asks for it, only the fields of ``readMask``."""
    if query.get("readMask"):
        message = _masked(message, query["readMask"])
    return dict(json_format.MessageToDict(message, use_integers_for_enums="enum-encoding=int" in query.get("$alt", "")))


def _masked(message: Message, paths: str) -> Message:
    kept = type(message)()
    for path in paths.split(","):
        described = message.DESCRIPTOR
        field = described.fields_by_name.get(path) or described.fields_by_camelcase_name.get(path)
        if path == "*":
            kept.CopyFrom(message)
        elif field is None:
            raise bad_request(f"Invalid field mask: {paths}", [("read_mask", f"{path} is no field of it.")])
        elif field.is_repeated or not field.has_presence or message.HasField(field.name):
            kept.MergeFrom(type(message)(**{field.name: getattr(message, field.name)}))
    return kept


# The standard filter of list calls, as the request message describes it ----------------------------------------------

_TERM = re.compile(
    r"""(?P<no>NOT\s+|-)?(?P<field>[a-z_]+)(?:\.(?:"(?P<quoted>[^"]+)"|(?P<key>[\w-]+)))?\s*"""
    r"""(?P<relation>!=|<=|>=|=|<|>|:)\s*(?:"(?P<text>(?:[^"\\]|\\.)*)"|(?P<word>[^\s"()]+))"""
)
_RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": lambda left, right: left == right,
    "!=": lambda left, right: left != right,
    "<": lambda left, right: left < right,
    "<=": lambda left, right: left <= right,
    ">": lambda left, right: left > right,
    ">=": lambda left, right: left >= right,
    ":": lambda left, right: bool(re.fullmatch(".*".join(map(re.escape, right.split("*"))), left)),
}
ALLOWED = {"display_name": "= != :", "state": "= !=", "create_time": "= != < <= > >=", "labels": "= :"}
Matcher = Callable[[Any], bool]


def matches(text: str) -> Matcher:
    """Whether a job is listed. As everywhere in Google's filters OR binds tighter than AND. ApiError if unreadable."""
    parts = [
        [_term(term, text) for term in re.split(r"\s+OR\s+", part)] for part in re.split(r"\s+AND\s+", text.strip())
    ]
    return lambda job: all(any(term(job) for term in part) for part in parts)


def _term(term: str, whole: str) -> Matcher:
    found = _TERM.fullmatch(term.strip())
    if found is None or found["relation"] not in ALLOWED.get(found["field"], "").split():
        raise _unreadable(whole, f"{term.strip()!r} is not understood.")
    key = found["quoted"] or found["key"]
    if (found["field"] == "labels") != bool(key):
        raise _unreadable(whole, f"{found['field']!r} is not a field that can be asked for like this.")
    value = found["word"] if found["text"] is None else re.sub(r"\\(.)", r"\1", found["text"])
    test = _test(found["field"], key, found["relation"], value, whole)
    return (lambda job: not test(job)) if found["no"] else test


def _test(field: str, key: str, relation: str, value: str, whole: str) -> Matcher:
    compare = _RELATIONS[relation]
    if field == "labels":
        if relation == ":" and value != "*":
            raise _unreadable(whole, f"a label can be asked for by {key}=value or {key}:*.")
        return lambda job: key in job.labels and (relation == ":" or job.labels[key] == value)
    if field == "create_time":
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise _unreadable(whole, f"{value!r} is no time of RFC 3339.") from None
        return lambda job: compare(job.create_time.ToDatetime(UTC), moment)
    if field == "state":
        states = {name for name in _states() if name == value}
        if not states:
            raise _unreadable(whole, f"{value!r} is no state.")
        return lambda job: compare(_states()[value], job.state)
    if "*" in value and relation != ":":
        # The published comment has ':' for wildcards and '=' for whole names; an answer without jobs would hide that.
        raise _unreadable(whole, f'write display_name:"{value}" for a wildcard.')
    return lambda job: compare(job.display_name, value)


def _states() -> dict[str, int]:
    from google.cloud.aiplatform_v1.types import JobState

    return {state.name: int(state) for state in JobState}


def _unreadable(text: str, why: str) -> ApiError:
    return bad_request(f"Invalid filter: {text}: {why}", [("filter", why)])
