"""A disk made of given spans, for the tests of what reads disks."""

from __future__ import annotations

import bisect
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbdtool.disk import (
    DATA,
    HOLE,
    Disk,
    Extent,
    FileSpan,
    Span,
    SpanFile,
    Stamp,
    ZeroSpan,
    span_bytes,
    span_length,
)

MIB = 1 << 20


class SpanDisk(Disk):
    """A disk made of spans; zero spans are holes."""

    def __init__(self, spans: list[Span]) -> None:
        self.spans = spans
        self.starts = [0]
        for span in spans:
            self.starts.append(self.starts[-1] + span_length(span))
        self.size = self.starts.pop()
        self.asked: list[tuple[str, int, int]] = []

    def content(self) -> bytes:
        return b"".join(bytes(span_bytes(span)) for span in self.spans)

    def prefetch(self, ranges: Any) -> None:
        self.asked += [("prefetch", *pair) for pair in ranges]

    def read(self, offset: int, length: int) -> list[Span]:
        self.asked.append(("read", offset, length))
        return self._spans(offset, length)

    def _spans(self, offset: int, length: int) -> list[Span]:
        result: list[Span] = []
        index = bisect.bisect_right(self.starts, offset) - 1
        while length:
            span, skip = self.spans[index], offset - self.starts[index]
            count = min(span_length(span) - skip, length)
            if isinstance(span, FileSpan):
                result.append(FileSpan(span.file, span.offset + skip, count))
            elif isinstance(span, ZeroSpan):
                result.append(ZeroSpan(count))
            else:
                result.append(memoryview(span)[skip : skip + count])
            offset, length, index = offset + count, length - count, index + 1
        return result

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        for span in self._spans(offset, length):
            yield Extent(span_length(span), HOLE if isinstance(span, ZeroSpan) else DATA)


def span_file(path: Path, content: bytes) -> SpanFile:
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    return SpanFile(fd, str(path), Stamp.of(os.fstat(fd)))


def mixed_disk(directory: Path, seed: int, scale: int = 300_000) -> SpanDisk:
    """A disk of spans of all kinds and many lengths, whose neighbours can often be joined."""
    generator = random.Random(seed)
    spans: list[Span] = []
    file, position = span_file(directory / f"source{seed}", generator.randbytes(4 * MIB)), 0
    for _ in range(60):
        length = 1 + int(scale ** generator.random())
        kind = generator.randrange(3)
        if kind == 0:
            spans.append(generator.randbytes(length))
        elif kind == 1:
            spans.append(ZeroSpan(length + generator.choice((0, 4096, 1 << 17))))
        else:
            if generator.random() < 0.5 or position + length > 4 * MIB:
                position = generator.randrange(4 * MIB - length)
            spans.append(FileSpan(file, position, length))
            position += length
    return SpanDisk(spans)
