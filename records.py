"""Frozen dataclasses to JSON and back, strictly: unknown keys and wrong types name their path in the file."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from .errors import PlanError

T = TypeVar("T")
_MOST = 2**63 - 1


def to_json(value: Any) -> Any:
    """Turn a record (nested frozen dataclasses, tuples, mappings, scalars) into plain JSON values.

    >>> to_json(("a", 1, None))
    ['a', 1, None]
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise PlanError(f"{value} has no place in a JSON file")
    return value


def read_file(path: str | Path, parse: Callable[[Any], T]) -> T:
    """Read a JSON file and build a record of its values with ``parse``.

    Raises:
        PlanError: the file cannot be read, is no JSON, or ``parse`` refuses it; the message starts with ``path``.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: no JSON: {error}") from error
    try:
        return parse(value)
    except PlanError as error:
        raise PlanError(f"{path}: {error.message}", hint=error.hint) from error


def json_schema(kind: type, identifier: str) -> dict[str, Any]:
    """Describe the JSON that :func:`from_json` reads, as JSON Schema (https://json-schema.org/draft/2020-12)."""
    known: dict[str, Any] = {}
    _describe(kind, known)
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, "$id": identifier, "$ref": f"#/$defs/{kind.__name__}", "$defs": known}


def _describe(kind: Any, known: dict[str, Any]) -> dict[str, Any]:
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_describe(option, known) for option in inside]}
    if origin is tuple and len(inside) == 2 and inside[1] is Ellipsis:
        return {"type": "array", "items": _describe(inside[0], known)}
    if origin is tuple:
        items = [_describe(item, known) for item in inside]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _describe(inside[1], known)}
    if not dataclasses.is_dataclass(kind):
        names = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
        return {"type": names[kind]}
    name = getattr(kind, "__name__", str(kind))
    if name not in known:
        known[name] = {}  # a record that holds records of its own kind finds itself
        hints = typing.get_type_hints(kind)
        fields = [field.name for field in dataclasses.fields(kind)]
        known[name] |= {
            "description": (kind.__doc__ or "").strip().splitlines()[0],
            "type": "object",
            "properties": {field: _describe(hints[field], known) for field in fields},
            "required": fields,
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}


def from_json(kind: type[T], value: Any, path: str = "$") -> T:
    """Build ``kind`` from plain JSON values.

    Raises:
        PlanError: a key is unknown or missing, or a value has another type than the field; the message starts
            with the path inside the file, such as ``$.stages[1].ops``.
    """
    return typing.cast(T, _read(kind, value, path))


def _read(kind: Any, value: Any, path: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _read_union(kind, value, path)
    if origin is tuple:
        return _read_tuple(get_args(kind), value, path)
    if origin in (dict, Mapping):
        _expect(value, dict, "an object", path)
        item_kind = get_args(kind)[1]
        return {key: _read(item_kind, item, f"{path}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _read_record(kind, value, path)
    return _read_scalar(kind, value, path)


def _read_union(kind: Any, value: Any, path: str) -> Any:
    options = get_args(kind)
    if value is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    if len(rest) != 1:
        raise TypeError(f"records hold at most optional types, not {kind}")
    return _read(rest[0], value, path)


def _read_tuple(kinds: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    _expect(value, list, "an array", path)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_read(kinds[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if len(value) != len(kinds):
        raise PlanError(f"{path}: expected an array of {len(kinds)} items, got {len(value)}")
    return tuple(_read(kind, item, f"{path}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value)))


def _read_record(kind: Any, value: Any, path: str) -> Any:
    _expect(value, dict, "an object", path)
    fields = _fields(kind)
    for key in value:
        if key not in fields:
            raise PlanError(f"{path}.{key}: unknown key; {kind.__name__} has {', '.join(fields)}")
    for name in fields:
        if name not in value:
            raise PlanError(f"{path}.{name}: missing key of {kind.__name__}")
    return kind(**{name: _read(hint, value[name], f"{path}.{name}") for name, hint in fields.items()})


@cache
def _fields(kind: Any) -> dict[str, Any]:
    """Return the fields of a record with their types, which are looked up once: a plan has thousands of ops."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _read_scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise PlanError(f"{path}: expected a number, got {_name(value)}")
        number = finite(value)
        if number is None:
            raise PlanError(f"{path}: expected a finite number, got {_name(value)}")
        return number
    if kind is int and isinstance(value, bool):
        raise PlanError(f"{path}: expected an integer, got {_name(value)}")
    _expect(value, kind, {int: "an integer", str: "a string", bool: "true or false"}.get(kind, str(kind)), path)
    if kind is int and not -_MOST <= value <= _MOST:
        raise PlanError(f"{path}: expected an integer of at most 64 bits, got {_name(value)}")
    return value


def finite(value: object) -> float | None:
    """Return a number as a float; None if it is none, not finite, or an integer that no float holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _expect(value: Any, kind: type, words: str, path: str) -> None:
    if not isinstance(value, kind):
        raise PlanError(f"{path}: expected {words}, got {_name(value)}")


def _name(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of thousands of digits
        return type(value).__name__
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
