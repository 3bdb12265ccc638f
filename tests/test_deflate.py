"""Raw deflate data, by libdeflate and by zlib."""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from nbdtool import deflate

SIZE = 65536


def compressed(data: bytes, level: int = 6) -> bytes:
    deflater = zlib.compressobj(level, zlib.DEFLATED, -12)
    return deflater.compress(data) + deflater.flush()


def sample(seed: int) -> bytes:
    generator = random.Random(seed)
    words = [generator.randbytes(5), b"abcdef" * 9, bytes(30)]
    return b"".join(generator.choices(words, k=4000))[:SIZE].ljust(SIZE, b"x")


@pytest.fixture(params=["libdeflate", "zlib"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert deflate._library is not None
    if request.param == "zlib":
        monkeypatch.setattr(deflate, "_library", None)
    yield


@pytest.mark.usefixtures("way")
class TestEach:
    @pytest.mark.parametrize("level", [0, 1, 9])
    def test_whole_and_with_more_behind_it(self, level: int) -> None:
        data = compressed(sample(level), level)
        for tail in b"", b"next cluster", bytes(511):
            assert deflate.decompress(data + tail, SIZE, 12) == sample(level)

    def test_more_than_wanted_is_cut(self) -> None:
        bomb = compressed(bytes(50 << 20), 9)
        assert deflate.decompress(bomb, SIZE, 12) == bytes(SIZE)

    def test_less_or_none_is_an_error(self) -> None:
        data = compressed(sample(1))
        for bad in data[:-100], b"", b"\xff" * 999, compressed(b"short"), data[9:]:
            with pytest.raises(ValueError):
                deflate.decompress(bad, SIZE, 12)

    def test_many_threads(self) -> None:
        wrong = []

        def work(seed: int) -> None:
            expected, data = sample(seed), compressed(sample(seed))
            for _ in range(50):
                if deflate.decompress(data, SIZE, 12) != expected:
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
