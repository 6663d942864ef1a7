# SPDX-License-Identifier: Apache-2.0
"""Messages over a socket pair: whole, in parts, with descriptors, and damaged."""

import json
import os
import socket
import struct

import pytest

from weights_core import wire


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(5)
        yield ours, theirs


def taken(sock, inbox):
    while (message := inbox.take()) is None:
        assert inbox.receive(sock)
    return message


def test_messages_arrive_whole_however_they_are_cut(pair):
    data = wire.pack({"a": 1}) + wire.pack({"b": [2]})
    inbox = wire.Inbox(1000)
    for at in range(len(data)):
        pair[0].send(data[at : at + 1])
        inbox.receive(pair[1])
        if at == len(data) // 2:
            assert inbox.pending
            first = taken(pair[1], inbox)
    assert first == ({"v": wire.VERSION, "a": 1}, [])
    assert inbox.take() == ({"v": wire.VERSION, "b": [2]}, [])
    assert inbox.take() is None
    assert not inbox.pending


def test_descriptors_come_with_their_message_and_are_closed_with_the_inbox(pair):
    fd = os.memfd_create("x")
    wire.send(pair[0], wire.pack({}), [fd, fd])
    inbox = wire.Inbox(1000)
    _, fds = taken(pair[1], inbox)
    assert [os.fstat(one).st_ino for one in fds] == [os.fstat(fd).st_ino] * 2
    wire.send(pair[0], wire.pack({})[:3], [fd])
    inbox.receive(pair[1])
    before = len(os.listdir("/proc/self/fd"))
    inbox.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1
    for one in (fd, *fds):
        os.close(one)


def framed(body):
    return struct.pack("!I", len(body)) + body


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (struct.pack("!I", 1001) + b"x", "1001 bytes; at most 1000"),
        (framed(b"{"), "no JSON"),
        (framed(b"[" * 900), "no JSON"),
        (framed(b"[]"), "no JSON object"),
        (framed(json.dumps({"v": 2}).encode()), "speaks version 2"),
        (framed(b"{}"), "speaks version None"),
    ],
)
def test_what_is_no_message_is_refused(pair, data, why):
    pair[0].send(data)
    with pytest.raises(wire.WireError, match=why):
        taken(pair[1], wire.Inbox(1000))
