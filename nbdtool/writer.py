"""Write a Disk to a file, a block device or a stream, byte for byte as it would be served."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Union

from nbdtool.disk import (
    DATA,
    HOLE,
    STATE_ZERO,
    ZEROES,
    Disk,
    Extent,
    FileSpan,
    Span,
    ZeroSpan,
    merge_extents,
)
from nbdtool.errors import Error
from nbdtool.outputs import Memory, SourceError, Stream, open_output
from nbdtool.progress import Progress

_CHUNK = 1 << 20  # bytes asked of a disk at once
_BATCH = 8  # chunks that a slow source prepares while as many are written
_RUN = 128 << 20  # bytes that one system call copies at most
_PARTS = 1024  # IOV_MAX
_HOLE = 4096  # bytes that a hole has at least

Run = Union[list[Memory], FileSpan, ZeroSpan]


def write_disk(
    disk: Disk,
    target: str,
    *,
    verify: bool = False,
    digest: bool = False,
    inside: bool = False,
    subject: str = "",
) -> str:
    """Write a disk to `target`: a path, or "-" for standard output. Raises Error.

    A regular file appears, or takes the place of an old one, only once it is complete and on stable
    storage: neither a failure nor a kill leaves a part of it. What isn't regular is written in
    place. `inside` is outputs.open_output's; progress names the subject.

    verify compares the target, a regular file or a block device, with the disk before that. digest
    has the SHA-256 of what was written returned in hexadecimal, "" otherwise.
    """
    name = "standard output" if target == "-" else target
    with _naming(name), open_output(target, disk.size, inside=inside) as output:
        progress = Progress("writing", disk.size, file=target, subject=subject)
        result = _copy(disk, output, progress, digest and not verify)
        if verify:
            from nbdtool.verification import Comparison

            progress = Progress("verifying", disk.size, file=target, subject=subject)
            result = _copy(disk, Comparison(output.fd), progress, digest)
        return result


def hash_disk(disk: Disk, file: str, *, subject: str = "") -> str:
    """The SHA-256 of a disk in hexadecimal. Raises Error."""
    from nbdtool.verification import Sink

    progress = Progress("hashing", disk.size, file=file, subject=subject)
    return _copy(disk, Sink(), progress, digest=True)


# The spans of a disk, gathered into runs


def _copy(disk: Disk, output: Stream, progress: Progress, digest: bool) -> str:
    """Write all of a disk; returns its SHA-256 if it is wanted."""
    if digest:
        from nbdtool.verification import Digest

        with Digest(output) as hashed:
            _copy(disk, hashed, progress, digest=False)
        return hashed.hexdigest
    offset = 0
    output.moved = progress.update
    with progress:
        for run in _runs(_spans(disk)):
            if isinstance(run, FileSpan):
                output.write_file(offset, run)
                offset += run.length
            elif isinstance(run, ZeroSpan):
                output.write_zeroes(offset, run.length)
                offset += run.length
            else:
                offset += output.write(offset, run)
            progress.update(offset)
        output.finish(offset)
    return ""


def _spans(disk: Disk) -> Iterator[Span]:
    """The spans of a whole disk, in order; what is known to read as zeroes isn't read."""
    ready: list[tuple[int, int]] = []
    try:
        for batch in _batches(disk):
            disk.prefetch([chunk for chunk in batch if chunk[0] >= 0])
            yield from _read(disk, ready)
            ready = batch
        yield from _read(disk, ready)
    except OSError as error:
        raise SourceError.of(error) from error


def _read(disk: Disk, chunks: list[tuple[int, int]]) -> Iterator[Span]:
    for offset, length in chunks:
        if offset < 0:
            yield ZeroSpan(length)
        else:
            yield from disk.read(offset, length)


def _batches(disk: Disk) -> Iterator[list[tuple[int, int]]]:
    """Lists of (offset, length) that cover the disk; the offset is -1 for a run of zeroes."""
    step = min(_CHUNK, disk.block_size[2])
    batch: list[tuple[int, int]] = []
    offset = 0
    for length, state in merge_extents(_worthwhile(disk)):
        end = offset + length
        if state == HOLE:
            batch.append((-1, length))
            offset = end
        while offset < end:
            stop = min(end, offset - offset % step + step)
            batch.append((offset, stop - offset))
            offset = stop
            if len(batch) >= _BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def _worthwhile(disk: Disk) -> Iterator[Extent]:
    """The extents of a disk, with what can't be a hole as data."""
    if disk.size:
        for length, state in disk.extents(0, disk.size):
            yield Extent(length, HOLE if state & STATE_ZERO and length >= _HOLE else DATA)


def _runs(spans: Iterable[Span]) -> Iterator[Run]:
    """Neighbouring spans as one, as far as one system call takes them."""
    run: Run = []
    size = 0  # of a run in memory
    for span in spans:
        if isinstance(span, FileSpan):
            if (
                isinstance(run, FileSpan)
                and run.file is span.file
                and run.offset + run.length == span.offset
                and run.length < _RUN
            ):
                run = FileSpan(run.file, run.offset, run.length + span.length)
                continue
        elif isinstance(span, ZeroSpan):
            if isinstance(run, ZeroSpan):
                run = ZeroSpan(run.length + span.length)
                continue
            if isinstance(run, list) and run and span.length < _HOLE and len(run) < _PARTS:
                run.append(ZEROES[: span.length])  # what fills a file's last block up
                size += span.length
                continue
        elif isinstance(run, list) and size < _CHUNK and len(run) < _PARTS:
            run.append(span)
            size += len(span)
            continue
        if run:
            yield run
        if isinstance(span, (FileSpan, ZeroSpan)):
            run = span
        else:
            run, size = [span], len(span)
    if run:
        yield run


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Error(f"{name}: {error.strerror or error}") from error
