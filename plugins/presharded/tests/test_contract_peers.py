# SPDX-License-Identifier: Apache-2.0
"""The plugin honours the contract of a publisher: what it offers is read here without it."""

import hashlib
import hmac
import json
import os
import re
import secrets
import socket
from pathlib import Path

import torch

from weights_core import wire
from weights_core.arena import ArenaSet, Manifest
from weights_core.memory import HostSegment
from weights_core.testing import PublisherContract
from weights_presharded.plugin import PreshardedPlugin


def ask(path, folder, entry, **message):
    """Speak to a source by hand, knowing its token; return its answer and descriptors."""
    token = (Path(folder) / "token").read_bytes().strip()

    def proof(role, *nonces):
        said = "\n".join(("weights-presharded", role, *nonces, entry["id"]))
        return hmac.new(token, said.encode(), hashlib.sha256).hexdigest()

    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(path)
        inbox = wire.Inbox(1 << 24)

        def exchange(message):
            sock.sendall(wire.pack(message))
            while (taken := inbox.take()) is None:
                assert inbox.receive(sock), "hung up"
            return taken

        ours = secrets.token_hex(32)
        hello, _ = exchange({"op": "hello", "nonce": ours})
        assert hello["proof"] == proof("source", ours, hello["nonce"])
        told = {"op": "pull", "identity": entry["identity"], "transport": "local", "wait": 0.0}
        return exchange(told | {"proof": proof("target", ours, hello["nonce"])} | message)


class TestPublishing(PublisherContract):
    name = "presharded"
    plugin = PreshardedPlugin

    def config(self, folder):
        return {"registry": str(folder / "peers"), "source": True, "beat": 0.5}

    def offered(self, receipt):
        path = Path(re.search(r" at (\S+\.sock),", receipt.detail)[1])
        entries = [json.loads(found.read_text()) for found in path.parent.glob("*.json")]
        entry = next((one for one in entries if one["socket"] == str(path)), None)
        if entry is None:
            raise LookupError(path)
        _, fds = ask(str(path), path.parent, entry)
        described = json.loads(os.pread(fds[0], 1 << 24, 0))
        os.close(fds[0])
        manifest = Manifest.loads(described["manifest"].encode())
        segments = [HostSegment.attach(fd, size) for fd, size in zip(fds[1:], manifest.sizes, strict=True)]
        found = {name: tensor.clone() for name, tensor in ArenaSet(manifest, segments, provider="").items()}
        for segment in segments:
            segment.close()
        assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
        return found
