"""Checks of settings: types, ranges and regular expressions, refused by the name of their option."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mcl_clip.core.errors import UserError, shorten


def check_range(flag: str, value: float, least: float, most: float = math.inf) -> None:
    """Check that a value is within its range.

    Raises:
        UserError: if it is not; names the flag, the range and the value.
    """
    if not least <= value <= most:
        limits = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise UserError(f"--{flag} must be {limits}, not {value}")


def check_fields(section: str, config: Any, **limits: float | tuple[float, float]) -> None:
    """Check the types of all fields of a section, and that numbers are within limits; lists become tuples.

    Args:
        section: the section in options of the command line, with a dot at its end.
        config: the section.
        limits: smallest value, or smallest and largest, of a field and of each number that it holds.

    Raises:
        UserError: naming the option and what it takes.
    """
    for name, hint in get_type_hints(type(config)).items():
        value, flag = getattr(config, name), f"{section}{name.replace('_', '-')}"
        if isinstance(value, list) and get_origin(hint) is tuple:
            value = tuple(value)
            object.__setattr__(config, name, value)
        if not _fits(value, hint):
            raise UserError(f"--{flag} is {shorten(repr(value))}, and takes {_describe_type(hint)}")
        least, most = limit if isinstance(limit := limits.get(name, -math.inf), tuple) else (limit, math.inf)
        values = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else (value,)
        for number in values:
            if isinstance(number, int | float):
                check_range(flag, number, least, most)


def _fits(value: object, hint: Any) -> bool:
    """Return whether a value is of an annotated type; an int is a float, NaN is not a number."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if inner:  # of a union
        return any(_fits(value, kind) for kind in inner)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return hint is Any or (isinstance(value, hint) and (hint is bool or not isinstance(value, bool)))


def _describe_type(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin is tuple:
        return f"a tuple ({', '.join('...' if kind is ... else _describe_type(kind) for kind in inner)})"
    if origin in (dict, Mapping):
        return "a dictionary" if Any in inner else f"a dictionary from {' to '.join(map(_describe_type, inner))}"
    if inner:
        return " or ".join(_describe_type(kind) for kind in inner if kind is not type(None))
    names = {int: "an integer", float: "a number", str: "a string", bool: "True or False", Path: "a pathlib.Path"}
    return names.get(hint) or f"{hint.__name__}(...)"


def check_patterns(flag: str, patterns: Iterable[str]) -> None:
    """Check that patterns are regular expressions.

    Raises:
        UserError: naming the option and the pattern.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"--{flag} {shorten(repr(pattern))} is not a regular expression: {error}") from error
