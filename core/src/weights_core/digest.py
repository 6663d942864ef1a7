# SPDX-License-Identifier: Apache-2.0
"""The digest of a checkpoint's content, found without reading it where that can be.

In this order, for each file: the hub's cache names its files by their SHA-256; a sidecar file says
it; it was hashed before and kept, under the file's device, inode, size and times; else the file is
hashed now, once, however many processes ask at the same time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import attrs

from weights_core.checkpoint import CheckpointFiles, find
from weights_core.errors import CheckpointError
from weights_core.files import File

Origin = Literal["hub", "sidecar", "cache", "hashed"]
SIDECAR = "weights-digests.json"
SCHEMA = "weights.digests/1"
_FORM = re.compile(r"[a-z0-9_]+:[0-9a-f]{16,128}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 4 << 20
_SETTLED_NS = 100_000_000
"""A file changed less than this ago may change again without its times showing it."""


@attrs.frozen
class Digest:
    """The digest of a checkpoint, `algorithm:hex`, and how each of its files' digests was found."""

    value: str
    origins: Mapping[Path, Origin]
    bytes_hashed: int
    seconds: float

    def __str__(self) -> str:
        """Return the digest and how it was found, for reports."""
        counts = {o: list(self.origins.values()).count(o) for o in ("hub", "sidecar", "cache", "hashed")}
        how = ", ".join(f"{_SAID[origin]} ({count})" for origin, count in counts.items() if count)
        cost = f", {self.bytes_hashed / 1e6:,.1f} MB in {self.seconds:.2f} s" if self.bytes_hashed else ""
        return f"{self.value}, files {how}{cost}"


_SAID = {
    "hub": "named by the hub",
    "sidecar": "said by the sidecar",
    "cache": "hashed before",
    "hashed": "hashed now",
}


def content_digest(
    found: CheckpointFiles,
    *,
    environ: Mapping[str, str] = os.environ,
    threads: int = 4,
    stop: threading.Event | None = None,
) -> Digest:
    """Return the digest of what the files of a checkpoint hold; their names and places don't matter.

    Args:
        found: the checkpoint.
        environ: says where the cache is: `XDG_CACHE_HOME`, else `HOME`.
        threads: files hashed at a time.
        stop: ends the hashing when it is set.

    Raises:
        CheckpointError: a file cannot be read, changed while it was hashed, or the sidecar is wrong; or
            it was stopped.
    """
    started = time.perf_counter()
    said = _read_sidecar(found)
    cache = _cache_folder(environ)

    digests: dict[Path, tuple[str, Origin]] = {}
    unknown = []
    for path in found.files:
        known = _hub(path)
        if known is not None:
            digests[path] = known, "hub"
        elif path in said:
            digests[path] = said[path], "sidecar"
        elif cache is not None and (kept := _found_in(cache, path)) is not None:
            digests[path] = kept, "cache"
        else:
            unknown.append(path)
    if unknown:
        with ThreadPoolExecutor(min(threads, len(unknown))) as pool:
            hashed = pool.map(lambda path: _cached_or_hashed(path, cache, stop), unknown)
            digests.update(zip(unknown, hashed, strict=True))
    return Digest(
        value=_combined([digest for digest, _ in digests.values()]),
        origins={path: origin for path, (_, origin) in digests.items()},
        bytes_hashed=sum(path.stat().st_size for path, (_, origin) in digests.items() if origin == "hashed"),
        seconds=time.perf_counter() - started,
    )


def checkpoint_digest(
    path: Path,
    component: str | None = None,
    is_pipeline: bool | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
) -> Digest:
    """Return the digest of the checkpoint at `path`, whatever its format.

    A folder that holds the weights of a checkpoint in another form says in its sidecar of which:
    `"content": "algorithm:hex"`. Else it is that of the files.

    Args:
        path: the checkpoint.
        component: a component of a pipeline.
        is_pipeline: as `LoadRequest.is_pipeline`.
        environ: as `content_digest`.

    Raises:
        CheckpointError: as `content_digest`, and if there is no checkpoint.
    """
    for folder in (path / component, path) if component else (path,):
        sidecar = folder / SIDECAR
        said = _parse_sidecar(sidecar).get("content") if folder.is_dir() else None
        if said is not None:
            if not _FORM.fullmatch(str(said)):
                raise CheckpointError("its content is no digest, algorithm:hex", file=sidecar)
            return Digest(said, {sidecar: "sidecar"}, 0, 0.0)
    return content_digest(find(path, component, is_pipeline), environ=environ)


def write_content(folder: Path, digest: str) -> Path:
    """Say in the sidecar of a folder that it holds the weights of the checkpoint with `digest`.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    return _write_sidecar(folder, {"content": check_form(digest), "files": {}})


def check_form(digest: str) -> str:
    """Return `digest` if it is `algorithm:hex`.

    Raises:
        ValueError: it is not.
    """
    if not _FORM.fullmatch(digest):
        raise ValueError(f"{digest!r} is no digest: need algorithm:hex, e.g. sha256:… or xxh3_128:…")
    return digest


def write_sidecar(found: CheckpointFiles) -> Path:
    """Hash every file with SHA-256 and write the digests beside them; return the sidecar's path.

    Raises:
        CheckpointError: a file cannot be read, or the folder cannot be written.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "digest": _hash(File(path), "sha256")}
        for path in found.files
    }
    return _write_sidecar(found.root, {"files": files})


def _write_sidecar(folder: Path, told: Mapping[str, object]) -> Path:
    target = folder / SIDECAR
    part = target.with_suffix(f".{os.getpid()}.part")
    try:
        with open(part, "w") as out:
            out.write(json.dumps({"schema": SCHEMA, **told}, indent=1) + "\n")
            out.flush()
            os.fsync(out.fileno())
        part.replace(target)
    except OSError as exc:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"cannot be written: {exc.strerror}", file=target) from exc
    return target


def _combined(digests: list[str]) -> str:
    if len(digests) == 1:
        return digests[0]
    algorithms = {digest.partition(":")[0] for digest in digests}
    listed = "\n".join(sorted(digests)).encode()
    kind = algorithms.pop() if len(algorithms) == 1 else "mixed"
    return f"{kind}:{hashlib.blake2b(listed, digest_size=16).hexdigest()}"


def _hub(path: Path) -> str | None:
    """Return the SHA-256 by which the hub's cache names a large file: `snapshots/…` links to `blobs/…`."""
    if not path.is_symlink():
        return None
    blob = path.resolve()
    is_cache = blob.parent.name == "blobs" and (blob.parent.parent / "snapshots").is_dir()
    return f"sha256:{blob.name}" if is_cache and _SHA256.fullmatch(blob.name) else None


def _parse_sidecar(path: Path) -> dict[str, Any]:
    try:
        parsed: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as exc:
        raise CheckpointError(f"cannot be read: {exc.strerror}", file=path) from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"is not valid JSON: {exc}", file=path) from exc
    if (
        not isinstance(parsed, dict)
        or parsed.get("schema") != SCHEMA
        or not isinstance(parsed.get("files"), dict)
    ):
        raise CheckpointError(f"is not a table of digests of the schema {SCHEMA}", file=path)
    return parsed


def _read_sidecar(found: CheckpointFiles) -> dict[Path, str]:
    path = found.root / SIDECAR
    files = _parse_sidecar(path).get("files", {})
    said = {}
    for file in found.files:
        entry = files.get(file.name)
        if entry is None:
            continue
        if not (isinstance(entry, dict) and _FORM.fullmatch(str(entry.get("digest")))):
            raise CheckpointError(f"has no digest, algorithm:hex, for {file.name}", file=path)
        size = file.stat().st_size
        if entry.get("bytes") != size:
            raise CheckpointError(
                f"is of other files: {file.name} has {size} bytes, it says {entry.get('bytes')}",
                file=path,
            )
        said[file] = entry["digest"]
    return said


def _cache_folder(environ: Mapping[str, str]) -> Path | None:
    """Return the folder of kept digests, or None where nothing can be kept, or others could write."""
    given, home = environ.get("XDG_CACHE_HOME", ""), environ.get("HOME", "")
    base = Path(given) if given.startswith("/") else Path(home) / ".cache" if home else None
    if base is None:
        return None
    folder = base / "weights" / "digests"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return None
    return folder if found.st_uid == os.geteuid() and not found.st_mode & 0o022 else None


def _found_in(cache: Path, path: Path) -> str | None:
    """Return the digest that was kept for a file, without waiting for whoever computes it."""
    try:
        found = path.stat()
        with open(_entry(cache, found), "rb", buffering=0) as entry:
            return _kept(entry.fileno(), found)
    except OSError:
        return None  # not kept; whether the file can be read is found out by hashing it


def _entry(cache: Path, found: os.stat_result) -> Path:
    return cache / f"{found.st_dev:x}-{found.st_ino:x}"


def _cached_or_hashed(path: Path, cache: Path | None, stop: threading.Event | None) -> tuple[str, Origin]:
    file = File(path)
    with contextlib.ExitStack() as stack:
        stack.callback(file.close)
        found = path.stat()
        entry = stack.enter_context(_locked(_entry(cache, found))) if cache else None
        if entry is not None:
            kept = _kept(entry, found)
            if kept is not None:
                return kept, "cache"
        digest = _hash(file, "xxh3_128", stop)
        if entry is not None and _settled(path, found):
            record = json.dumps({"key": _key(found), "digest": digest}).encode()
            os.ftruncate(entry, 0)
            os.pwrite(entry, record, 0)
    return digest, "hashed"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """Hold a file for oneself: whoever else wants to hash the same bytes waits, then finds the digest."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield None
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def _kept(entry: int, found: os.stat_result) -> str | None:
    try:
        record = json.loads(os.pread(entry, 4096, 0))
        digest = record["digest"] if record["key"] == _key(found) else None
    except (ValueError, KeyError, TypeError):
        return None  # empty, or its writer was killed
    return digest if isinstance(digest, str) and _FORM.fullmatch(digest) else None


def _key(found: os.stat_result) -> list[int]:
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _settled(path: Path, found: os.stat_result) -> bool:
    now = path.stat()
    changed = max(found.st_mtime_ns, found.st_ctime_ns)
    return stat.S_ISREG(now.st_mode) and _key(now) == _key(found) and time.time_ns() - changed > _SETTLED_NS


def _hash(file: File, algorithm: str, stop: threading.Event | None = None) -> str:
    hasher: Any
    if algorithm == "xxh3_128":
        import xxhash

        hasher = xxhash.xxh3_128()
    else:
        hasher = hashlib.new(algorithm)
    buffer = memoryview(bytearray(min(_CHUNK, file.size)))
    for start in range(0, file.size, _CHUNK):
        if stop is not None and stop.is_set():
            raise CheckpointError("was not hashed to its end: it was no longer wanted", file=file.path)
        part = buffer[: min(_CHUNK, file.size - start)]
        file.read_into(part, start)
        hasher.update(part)
    file.check_unchanged()
    return f"{algorithm}:{hasher.hexdigest()}"
