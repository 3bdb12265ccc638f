"""Each way to decompress zstd, with data that the zstd program made."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from typing import Any, Callable

import pytest

from nbdtool import zstd
from nbdtool.errors import Error

# compression.zstd comes with Python 3.14 and has the interface of backports.zstd.
BACKENDS = zstd._BACKENDS[1:]
SIZE = 65536


@pytest.fixture(params=BACKENDS, ids=["python", "library", "zstandard", "program"])
def backend(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(zstd, "_BACKENDS", (request.param,))
    zstd._find.cache_clear()
    yield
    zstd._find.cache_clear()


@pytest.fixture(scope="module")
def plain() -> bytes:
    generator = random.Random(7)
    words = [b"alpha ", b"beta ", generator.randbytes(9), bytes(40)]
    return b"".join(generator.choices(words, k=100000))


@pytest.fixture(scope="module")
def compress(run: Callable[..., Any]) -> Callable[..., bytes]:
    return lambda data, *options: run("zstd", "-qc", *options, input=data, binary=True)


def read_all(reader: zstd.Readable, step: int) -> bytes:
    return b"".join(iter(lambda: reader.read(step), b""))


@pytest.mark.usefixtures("backend")
class TestEach:
    @pytest.mark.parametrize("options", [(), ("--no-check",), ("-19", "--long=24")])
    def test_a_frame_before_other_bytes(
        self, plain: bytes, compress: Any, options: tuple[str]
    ) -> None:
        frame = compress(plain[:SIZE], *options)
        assert zstd.decompress_frame(frame, SIZE) == plain[:SIZE]
        assert zstd.decompress_frame(frame + b"junk", SIZE) == plain[:SIZE]

    def test_a_bad_frame_is_an_error(self, plain: bytes, compress: Any) -> None:
        frame = compress(plain[:SIZE])
        damaged = frame[:99] + bytes([frame[99] ^ 255]) + frame[100:]
        checksum = frame[:-1] + bytes([frame[-1] ^ 1])
        for data in (
            damaged,
            checksum,
            frame[:-1],
            frame[: len(frame) // 2],
            frame[:4],
            b"",
            b"x" * 99,
        ):
            with pytest.raises(OSError, match="zstd"):
                zstd.decompress_frame(data, SIZE)
        for size in SIZE - 1, SIZE + 1:
            with pytest.raises(OSError, match="zstd"):
                zstd.decompress_frame(frame, size)

    def test_a_bomb_is_cut(self, compress: Any) -> None:
        with pytest.raises(OSError, match="zstd"):
            zstd.decompress_frame(compress(bytes(200 << 20)), SIZE)

    def test_a_stream_of_frames(self, plain: bytes, compress: Any) -> None:
        skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
        data = compress(plain) + skippable + compress(plain[:9]) + compress(b"") + compress(plain)
        for step in 1000, 1 << 20:
            reader = zstd.open_reader(io.BytesIO(data))
            assert read_all(reader, step) == plain + plain[:9] + plain

    def test_a_source_that_gives_little_at_once(self, plain: bytes, compress: Any) -> None:
        class Slow(io.BytesIO):
            def read(self, size: Any = -1, /) -> bytes:
                return super().read(min(size, 7))

        assert read_all(zstd.open_reader(Slow(compress(plain[:SIZE]))), 999) == plain[:SIZE]

    def test_a_source_that_fails(self, plain: bytes, compress: Any) -> None:
        class Failing(io.BytesIO):
            def read(self, size: Any = -1, /) -> bytes:
                if self.tell() > 1000:
                    raise OSError(5, "the network is down")
                return super().read(min(size, 500))

        with pytest.raises(OSError, match="the network is down"):
            read_all(zstd.open_reader(Failing(compress(plain))), 100)


@pytest.mark.parametrize("backend", [BACKENDS[n] for n in (0, 1, 3)], indirect=True)
def test_a_cut_stream_is_an_error(backend: None, plain: bytes, compress: Any) -> None:
    with pytest.raises(OSError, match="zstd"):
        read_all(zstd.open_reader(io.BytesIO(compress(plain)[:-100])), 1 << 20)


@pytest.mark.parametrize("backend", [lambda: None], indirect=True)
def test_nothing_at_hand(backend: None) -> None:
    with pytest.raises(Error, match=r"^disk\.img: it is compressed with zstd; install"):
        zstd.require("disk.img")
