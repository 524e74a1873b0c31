"""Frames arrive whole and in order, however the bytes are cut."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laneway.worker.wire import Frames, pack
from servers import wait_until

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def send_cut(messages: list[Any], cuts: list[int]) -> list[Any]:
    """What arrives of `messages` when their bytes are sent in pieces."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        data, frames, arrived, start = b"".join(map(pack, messages)), Frames(theirs), [], 0
        for end in sorted({cut for cut in cuts if 0 < cut < len(data)} | {len(data)}):
            if end > start:
                ours.sendall(data[start:end])
                arrived += frames.read()
                start = end
        ours.close()
        arrived += frames.read()
        assert frames.ended
        return arrived


@given(st.lists(JSON, max_size=5), st.lists(st.integers(0, 200), max_size=20))
def test_messages_arrive_whole_and_in_order_however_they_are_cut(
    messages: list[Any], cuts: list[int]
) -> None:
    assert send_cut(messages, cuts) == messages


def test_messages_arrive_byte_by_byte() -> None:
    messages = [["end", "j", "Returned", None, 1.5], {"run": []}]
    assert send_cut(messages, list(range(500))) == messages


def test_a_frame_larger_than_one_read_is_put_together(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.setblocking(False)
    rest, frames = memoryview(pack({"text": "x" * 1_000_000})), Frames(theirs)
    arrived: list[Any] = []

    def step() -> bool:
        nonlocal rest
        if rest:
            try:
                rest = rest[ours.send(rest) :]
            except BlockingIOError:
                pass
        arrived.extend(frames.read())
        return bool(arrived)

    wait_until(step, what="the frame is whole")
    assert arrived == [{"text": "x" * 1_000_000}]


def test_nothing_to_read_is_no_message_and_not_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.setblocking(False)
    frames = Frames(theirs)
    assert (frames.read(), frames.ended) == ([], False)
    ours.sendall(pack(1)[:2])
    assert (frames.read(), frames.ended) == ([], False)
    ours.sendall(pack(1)[2:])
    assert (frames.read(), frames.ended) == ([1], False)


def test_a_reader_that_does_not_wait_learns_that_there_was_nothing(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair  # blocking
    frames = Frames(theirs)
    assert (frames.read(wait=False), frames.dry, frames.ended) == ([], True, False)
    ours.sendall(pack(1))
    assert (frames.read(wait=False), frames.dry) == ([1], False)


def test_what_was_said_before_the_end_still_counts(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.sendall(pack("last words") + pack("cut off")[:-1])
    ours.close()
    frames = Frames(theirs)
    assert (frames.read(), frames.ended) == (["last words"], False)
    assert (frames.read(), frames.ended) == ([], True)


def test_a_peer_that_died_with_unread_data_is_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.sendall(b"never read")
    ours.close()  # resets the connection
    frames = Frames(theirs)
    assert (frames.read(), frames.ended) == ([], True)
