"""A disk that can't be read in one go, rescued into a file as GNU ddrescue does with devices."""

from __future__ import annotations

import time
from datetime import timedelta

from nbdtool.disk import Disk
from nbdtool.errors import Error, debug, tell
from nbdtool.progress import human
from nbdtool.rescue.blocks import DONE, UNTRIED
from nbdtool.rescue.mapfile import MapFile
from nbdtool.rescue.passes import Progress, Rescue
from nbdtool.rescue.target import Target


def rescue_disk(
    disk: Disk,
    target: str,
    mapfile: str,
    *,
    retries: int,
    read_timeout: float,
    fill: bytes,
    progress: Progress,
) -> bool:
    """Read what isn't rescued yet by the map file; whether all of the disk is in the target now.

    The target, a regular file or a block device, is written in place. It has holes, or `fill` at
    the start of each sector and repeated in it, where nothing could be read; a device has zeroes.
    A read that makes no progress for read_timeout seconds has failed; bad sectors are tried
    `retries` times more. Raises Error, and whatever ends the process: what was rescued by then is
    kept, as it is if that is killed.
    """
    mapped = MapFile(mapfile, disk.size, disk.description)
    try:
        done = mapped.blocks.before(disk.size, DONE)
        try:
            opened = Target(target, disk.size, known=mapped.known, needed=done.end if done else 0)
        except BaseException:
            if not mapped.known:
                mapped.remove()
            raise
        try:
            opened.sync()  # what the journal speaks of
            mapped.save(mapped.blocks, mapped.status)
            opened.prepare()
            _run(disk, opened, mapped, progress, retries, read_timeout, fill)
            return mapped.blocks.totals[DONE] == disk.size
        finally:
            opened.close()
    finally:
        mapped.close()


def _run(
    disk: Disk,
    target: Target,
    mapped: MapFile,
    progress: Progress,
    retries: int,
    read_timeout: float,
    fill: bytes,
) -> None:
    """The rescue and its summary."""
    began = time.monotonic()
    rescue = Rescue(disk, target, mapped, progress, retries=retries, read_timeout=read_timeout)
    try:
        try:
            rescue.run()
        finally:
            target.written = rescue.reader.close()
        rescue.finish(fill)
    except BaseException as exc:
        if isinstance(exc, Error):
            for start, end in rescue.reader.copied():
                mapped.append(start, end, DONE)
        _keep(target, mapped)
        raise
    finally:
        tell(_summary(mapped, time.monotonic() - began))


def _keep(target: Target, mapped: MapFile) -> None:
    """Save what is rescued after an exception, which may have come in the middle of a change."""
    try:
        target.sync()
    except Error as error:
        debug(f"rescue: {error}")
        mapped.drop_journal()  # what the target has of it may be lost
        return
    try:
        mapped.blocks, mapped.status = mapped.load()  # by the journal
        mapped.save(mapped.blocks, mapped.status)
    except Error as error:
        debug(f"rescue: {error}")  # it stays as it is, journal and all


def _summary(mapped: MapFile, seconds: float) -> str:
    blocks = mapped.blocks
    text = f"nbdtool: rescued {human(blocks.totals[DONE])} of {human(blocks.size)}"
    text += f" in {timedelta(seconds=round(seconds))}"
    if blocks.failed:
        areas = f"{blocks.areas:,} area{'s'[: blocks.areas != 1]}"
        text += f"; {human(blocks.failed)} bad in {areas}"
    if blocks.totals[UNTRIED]:
        text += f"; {human(blocks.totals[UNTRIED])} not tried yet"
    return text
