"""One value of the configuration: from text or Python object to the type and range its field declares."""

import ast
import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from typing import Any

from llm_jax.errors import ConfigError


class Text(str):
    """A value typed on the command line: still text, whatever its key's type."""


def refuse(key: str, value: Any, reason: str, fix: str) -> ConfigError:
    """The error of a value that cannot be used, as one sentence: key, value, reason, fix."""
    shown = str(value) if isinstance(value, Text) else value
    return ConfigError(f"{key} = {shown!r}: {reason}; {fix}")


def nearest(word: str, choices: Iterable[str], count: int = 3, cutoff: float = 0.6) -> list[str]:
    """Up to `count` of `choices` that look like `word`, whatever the case, best first."""
    by_lower = {choice.lower(): choice for choice in choices}
    return [by_lower[match] for match in difflib.get_close_matches(word.lower(), by_lower, count, cutoff)]


def did_you_mean(word: str, choices: Iterable[str], otherwise: str) -> str:
    matches = nearest(word, choices)
    return f"did you mean {' or '.join(matches)}?" if matches else otherwise


def to_field_type(value: Any, kind: type, field: dataclasses.Field, key: str) -> Any:
    """`value` as `kind` (int, float, str, bool or tuple[str, ...]) within the limits in the field's metadata.

    Raises ConfigError naming the key where the type is wrong or the value is out of range.
    """
    choices = field.metadata.get("choices")
    if value is None or isinstance(value, Text) and value.strip() in ("None", "null") and not choices:
        fix = f"leave the key out for its default ({default_of(field)!r})" + (', or give ""' if kind is str else "")
        raise refuse(key, value, "every key has a value", fix)
    converted = CONVERTERS[kind](value, key)
    if isinstance(converted, (int, float)) and not isinstance(converted, bool):
        check_range(converted, field, key)
    if choices and converted not in choices:
        listed = f"it can be {', '.join(choices)}"
        close = nearest(converted, choices, 1)
        raise refuse(
            key, converted, "this is not one of its choices", f"did you mean {close[0]}? {listed}" if close else listed
        )
    return converted


def default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def to_int(value: Any, key: str) -> int:
    try:
        number = Decimal(value.strip()) if isinstance(value, Text) else value
        if isinstance(number, bool) or not isinstance(number, (numbers.Real, Decimal)) or number != number:  # NaN
            raise ValueError
        if not -(2**63) < number < 2**63:
            raise refuse(key, value, "this does not fit into 64 bits", "give a smaller number")
        if number == int(number):
            return int(number)
    except (ValueError, InvalidOperation):
        raise refuse(key, value, "a whole number is needed", "write it as 1000 or 1e3") from None
    raise refuse(key, value, "a whole number is needed", f"give {math.floor(number)} or {math.ceil(number)}")


def to_float(value: Any, key: str) -> float:
    try:
        if isinstance(value, bool) or not (isinstance(value, (Text, numbers.Real))):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise refuse(key, value, "a number is needed", "write it as 0.1, 3 or 3e-4") from None
    if not math.isfinite(number):
        raise refuse(key, value, "infinity and NaN are not usable numbers", "give a finite number")
    return number


def to_bool(value: Any, key: str) -> bool:
    if isinstance(value, Text) and value.strip().lower() in ("true", "1", "false", "0"):
        return value.strip().lower() in ("true", "1")
    if not isinstance(value, bool):
        raise refuse(key, value, "this key is a yes or no", "write true or false (True or False in a config file)")
    return value


def to_str(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise refuse(key, value, "a text is needed", "put it in quotes")
    return str(value)


def to_texts(value: Any, key: str) -> tuple[str, ...]:
    """A tuple of strings; on the command line "a,b", "[a,b]" or, where items hold commas, "('a','b,c')"."""
    items = split_texts(str(value).strip()) if isinstance(value, Text) else value
    if not isinstance(items, (list, tuple)):
        raise refuse(key, value, "a list of texts is needed", f"write {[value]!r}")
    for i, item in enumerate(items):
        if not isinstance(item, str):
            raise refuse(f"{key}[{i}]", item, "every item of this list is a text", "put it in quotes")
    return tuple(str(item) for item in items)


def split_texts(text: str) -> list[str]:
    try:
        literal = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        literal = None
    items = [literal] if isinstance(literal, str) else literal
    if isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items):
        return list(items)
    inner = text[1:-1]  # brackets inside belong to a pattern such as (wq|wk)_[ab]
    if text[:1] + text[-1:] in ("()", "[]") and not any(bracket in inner for bracket in "()[]"):
        text = inner
    return [item.strip() for item in text.split(",") if item.strip()]


CONVERTERS = {int: to_int, float: to_float, bool: to_bool, str: to_str, tuple[str, ...]: to_texts}


def check_range(number: float, field: dataclasses.Field, key: str) -> None:
    low, high = field.metadata.get("low", -math.inf), field.metadata.get("high", math.inf)
    open_low = field.metadata.get("open_low", False)
    if number > low and number <= high or number == low and not open_low:
        return
    above = f"above {low:g}" if open_low else f"at least {low:g}"
    limits = [above] * (low > -math.inf) + [f"at most {high:g}"] * (high < math.inf)
    raise refuse(key, number, "this is out of range", f"it must be {' and '.join(limits)}")


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def nearest_multiples(size: int, step: int) -> str:
    """The multiples of `step` around `size`, as words: "24 or 32"."""
    below = size // step * step
    return f"{below} or {below + step}" if below else str(step)
