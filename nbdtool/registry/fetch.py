"""Layers in one pass: downloaded, verified and unpacked as the bytes come, each in its thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable, Union

from nbdtool.disk import Disk
from nbdtool.errors import Error
from nbdtool.progress import Progress
from nbdtool.registry import decompress
from nbdtool.registry.decompress import CHUNK
from nbdtool.registry.digest import Stream, Verified
from nbdtool.registry.manifest import Image, Source
from nbdtool.registry.spool import Spool

_AHEAD = 4  # pieces


class Ahead:
    """Reads source in a thread of its own, some pieces ahead of whom it is read by."""

    def __init__(self, source: Stream) -> None:
        self._source = source
        self.length = 0  # bytes read
        self._queue: queue.Queue[Union[bytes, BaseException]] = queue.Queue(_AHEAD)
        self._stopped = False
        self._piece, self._at = b"", 0  # what of the last piece isn't read yet
        # A daemon: on a failure nobody waits for what the network still has to say.
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            while not self._stopped:
                data = self._source.read(CHUNK)
                self._queue.put(data)
                if not data:
                    return
        except BaseException as exc:
            self._queue.put(exc)
        finally:
            self._source.close()

    def read(self, size: int, /) -> bytes:
        if self._at == len(self._piece):
            item = self._queue.get()
            if not item or isinstance(item, BaseException):
                self._queue.put(item)  # for the next read
            if isinstance(item, BaseException):
                raise item
            self._piece, self._at = item, 0
        start, self._at = self._at, min(self._at + size, len(self._piece))
        self.length += self._at - start
        return self._piece[start : self._at]

    def close(self) -> None:
        self._stopped = True
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            pass


@contextmanager
def open_layer(source: Source, image: Image, number: int) -> Iterator[Ahead]:
    """Layer `number` unpacked, a tar archive; Error at the end of the block unless all is right.

    What isn't read in the block is read then, since only the whole can be verified.
    """
    descriptor = image.layers[number]
    what = f"{source.description}: layer {number}"
    if descriptor.elsewhere:
        raise Error(f"{what}: is not in the registry but on another server, which isn't asked")
    with Progress(f"layer {number}", descriptor.size) as progress:
        blob = source.blob(descriptor)
        packed = Verified(blob, descriptor.digest, descriptor.size, what)
        download = Ahead(_Counted(packed, progress.update))
        try:
            plain = Ahead(decompress.open_reader(download, what))
        except BaseException:
            download.close()
            raise
        diff_id = image.diff_ids[number] if image.diff_ids else ""
        unpacked = Verified(plain, diff_id, None, f"{what}, unpacked")
        layer = Ahead(unpacked)
        try:
            yield layer
            while layer.read(CHUNK):
                pass
        finally:
            layer.close()
        if not packed.complete or not unpacked.complete:
            raise Error(f"{what}: has something behind its end")


class _Counted:
    """Tells how many bytes were read."""

    def __init__(self, source: Verified, update: Callable[[int], None]) -> None:
        self._source, self._update = source, update

    def read(self, size: int, /) -> bytes:
        data = self._source.read(size)
        self._update(self._source.length)
        return data

    def close(self) -> None:
        self._source.close()


def spool_layer(source: Source, image: Image, number: int, max_size: int | None) -> Disk:
    """Layer `number` unpacked and verified, as a disk in a temporary file; raises Error."""
    what = f"{source.description}, layer {number}"
    spool = Spool(what, max_size)
    spool.expect(image.layers[number].size)
    with open_layer(source, image, number) as layer:
        size = 0
        while data := layer.read(CHUNK):
            spool.write(size, data)
            size += len(data)
    return spool.disk(size, what)
