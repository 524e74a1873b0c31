from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from enum import IntEnum, StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laneway.domain.payload import MAX_BYTES, MAX_DEPTH, MAX_INTEGER, to_json
from laneway.errors import InvalidPayload, PayloadTooLarge

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=20)


def nested(levels: int, *, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = wrap(value)
    return value


def refusal(value: Any) -> tuple[str, str]:
    """(code, pointer) of the field error that `value` is refused with."""
    with pytest.raises(InvalidPayload) as caught:
        to_json(value)
    (error,) = caught.value.errors
    return error.code, error.pointer


@given(VALUES)
def test_what_passes_comes_back_the_same(value: Any) -> None:
    assert json.loads(to_json(value)) == value


def test_the_text_is_compact_and_keeps_order_and_unicode() -> None:
    assert to_json({"b": [1, 2.5, None, True], "a": "é"}) == '{"b":[1,2.5,null,true],"a":"é"}'
    assert to_json((1, 2)) == "[1,2]"


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: {"k": value}, lambda value: (value,)])
def test_nesting_is_taken_up_to_the_limit_and_refused_one_past_it(wrap: Callable[[Any], Any]) -> None:
    assert MAX_DEPTH == 32
    to_json(nested(32, wrap=wrap))
    assert refusal(nested(33, wrap=wrap))[0] == "too_deep"


def test_nesting_far_past_the_limit_is_refused_and_not_a_crash() -> None:
    assert refusal(nested(100_000, wrap=lambda value: [value]))[0] == "too_deep"


def test_a_value_that_holds_itself_is_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    assert refusal(circle)[0] == "too_deep"


@pytest.mark.parametrize("letter", ["a", "é", "€", "😀"])
def test_size_is_counted_in_bytes_and_taken_up_to_the_limit(letter: str) -> None:
    assert MAX_BYTES == 256 * 1024
    each = len(letter.encode())
    count, rest = divmod(MAX_BYTES - len('""'), each)
    fits = letter * count + "x" * rest
    assert len(to_json(fits).encode()) == MAX_BYTES
    with pytest.raises(PayloadTooLarge) as caught:
        to_json(fits + "x")
    assert caught.value.facts == {"what": "parameters", "limit_bytes": MAX_BYTES}


def test_the_limit_can_be_another_one_and_the_refusal_names_what_is_too_large() -> None:
    assert to_json("abc", what="metadata", max_bytes=5) == '"abc"'
    with pytest.raises(PayloadTooLarge, match="metadata may be at most 5 bytes of JSON, and is 6"):
        to_json("abcd", what="metadata", max_bytes=5)


@pytest.mark.parametrize("number", [MAX_INTEGER, -MAX_INTEGER - 1, 0, -1])
def test_integers_of_64_bits_are_taken(number: int) -> None:
    assert json.loads(to_json([number])) == [number]


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 2**20_000], ids=["one past", "one below", "huge"])
def test_larger_integers_are_refused(number: int) -> None:
    assert refusal({"n": number}) == ("integer_too_large", "/parameters/n")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(number: float) -> None:
    assert refusal([1.0, number]) == ("not_finite", "/parameters/1")


@pytest.mark.parametrize("text", ["\0", "a\0b", "é\0"])
def test_the_nul_character_is_refused_in_values_and_keys(text: str) -> None:
    assert refusal({"k": [text]}) == ("nul", "/parameters/k/0")
    assert refusal({text: 1})[0] == "nul"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_lone_surrogates_are_refused_in_values_and_keys_and_the_refusal_can_be_encoded(text: str) -> None:
    assert refusal({"k": text}) == ("not_unicode", "/parameters/k")
    code, pointer = refusal({"ok": {text: float("nan")}})
    assert code == "not_unicode"
    assert pointer.encode() == b"/parameters/ok"


@pytest.mark.parametrize("key", [1, None, True, 1.5, ("a",)])
def test_keys_that_are_not_text_are_refused(key: Any) -> None:
    assert refusal({key: 1})[0] == "key_not_text"


@pytest.mark.parametrize("value", [b"x", {1}, object(), Decimal(1), datetime(2026, 1, 1, tzinfo=UTC), 1j])
def test_what_is_not_json_is_refused_with_the_name_of_its_type(value: Any) -> None:
    with pytest.raises(InvalidPayload, match=type(value).__name__):
        to_json({"v": value})


def test_subclasses_of_the_json_types_are_taken_as_what_they_are() -> None:
    class Colour(StrEnum):
        RED = "red"

    class Number(IntEnum):
        ONE = 1

    assert to_json(OrderedDict(c=Colour.RED, n=Number.ONE)) == '{"c":"red","n":1}'


def test_a_pointer_escapes_what_a_json_pointer_reserves() -> None:
    """RFC 6901 section 3: `~` is written `~0` and `/` is written `~1`."""
    assert refusal({"a/b": {"~c": float("nan")}}) == ("not_finite", "/parameters/a~1b/~0c")


def test_a_pointer_into_a_huge_key_stays_short() -> None:
    _, pointer = refusal({"k" * 10_000: float("nan")})
    assert len(pointer) <= 200


def test_long_keys_over_many_items_cost_no_more_than_their_size() -> None:
    """A pointer made for every item would copy the key as often: 32 GB here."""
    with pytest.raises(PayloadTooLarge):
        to_json({"k" * 500_000: {"l" * 500_000: [0] * 32_000}})
