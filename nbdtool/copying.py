"""Disks into files: which goes where, and what is told of it (--to-file, --to-dir, --rescue)."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

from nbdtool import errors, outputs, progress, writer
from nbdtool.disk import Disk
from nbdtool.errors import Error, UsageError

Facts = dict[str, Any]  # what scripts are told of a file


def file_name(export: str) -> str:
    """The name of an export's file in --to-dir: `vda.img`, `dev+sda1.img`, `disk.img` for "".

    No two exports have the same, and none leads out of the directory, is hidden or looks like an
    option: letters, digits, `.`, `_`, `-` and `~` stay, the slashes of an absolute path but for the
    first are `+`, and all else is a % and two hexadecimal digits for each byte.
    """
    from urllib.parse import quote_from_bytes  # slow to load, and seldom needed

    if export == "":
        return "disk.img"
    parts = [quote_from_bytes(os.fsencode(part), safe="") for part in export.split("/")]
    absolute = len(parts) > 2 and parts[0] == ""
    stem = "+".join(parts[1:]) if absolute else "%2F".join(parts)
    if stem[0] in ".-~" or stem == "disk":
        stem = f"%{ord(stem[0]):02X}{stem[1:]}"
    return f"{stem}.img"


@contextlib.contextmanager
def reporting(args: argparse.Namespace) -> Iterator[list[Facts]]:
    """While the block runs, SIGUSR1 prints progress, and so does --json, the end included.

    The block appends what there is to say of each file.
    """
    progress.print_on_signal(signal.SIGUSR1)
    files: list[Facts] = []
    if not args.json:
        yield files
        return
    tell = progress.print_for_scripts(2 if args.to_file == "-" else 1)
    end: Facts = {"status": "failed"}
    try:
        yield files
        if all(file.get("complete") for file in files):
            end["status"] = "done"
    except (Error, OSError) as exc:
        end["error"] = errors.describe(exc)
        raise
    except (KeyboardInterrupt, SystemExit):
        end["error"] = "interrupted"
        raise
    finally:
        tell({**end, "files": files})


def copy_disks(disks: dict[str, Disk], args: argparse.Namespace, files: list[Facts]) -> int:
    """Write the disks where args say; what fails of one doesn't keep the others from it.

    Returns the exit status, and appends to files. Raises Error or OSError if nothing can be written
    at all.
    """
    if args.to_dir is None:
        if len(disks) > 1:
            raise UsageError(
                f"--to-file writes one disk, here are {', '.join(disks)}; choose one, or write all"
                " with --to-dir"
            )
        targets = dict.fromkeys(disks, args.to_file)
    else:
        try:
            os.makedirs(args.to_dir, exist_ok=True)
        except FileExistsError:
            raise Error(f"{args.to_dir}: Not a directory") from None
        targets = {export: os.path.join(args.to_dir, file_name(export)) for export in disks}
    status = 0
    for export, disk in disks.items():
        target = targets[export]
        facts: Facts = {"export": export, "file": target, "size": disk.size, "complete": False}
        files.append(facts)
        try:
            _copy(disk, target, args, facts)
        except (Error, OSError) as exc:
            facts["error"] = errors.describe(exc)
            errors.fail(exc)
            status = 1
        if not facts["complete"]:
            status = 1
    return status


def _copy(disk: Disk, target: str, args: argparse.Namespace, facts: Facts) -> None:
    inside = args.to_dir is not None
    subject = os.path.basename(target) if inside else ""
    if args.rescue is None:
        sha256 = writer.write_disk(
            disk, target, verify=args.verify, digest=args.sha256, inside=inside, subject=subject
        )
        facts["complete"] = True
    else:
        facts["mapfile"] = f"{target}.{args.rescue}" if inside else args.rescue
        if inside:
            _refuse_special(target)
            _refuse_special(facts["mapfile"])
        _rescue(disk, facts, args, subject)
        sha256 = _hash(target, disk.size, subject) if args.sha256 else ""
    if sha256:
        facts["sha256"] = sha256
        if not args.json:
            _print_digest(sha256, target)


def _refuse_special(path: str) -> None:
    try:
        outputs.refuse_special(path)
    except OSError as exc:
        raise Error(f"{path}: {exc.strerror}") from exc


def _rescue(disk: Disk, facts: Facts, args: argparse.Namespace, subject: str) -> None:
    from nbdtool.rescue import rescue_disk

    line = progress.RescueProgress(disk.size, file=facts["file"], subject=subject)
    try:
        with line:
            facts["complete"] = rescue_disk(
                disk,
                facts["file"],
                facts["mapfile"],
                retries=args.retries,
                read_timeout=args.read_timeout,
                fill=args.fill,
                progress=line,
            )
    finally:
        facts.update(rescued=line.done, bad=line.bad, bad_areas=line.areas)


def _hash(target: str, size: int, subject: str) -> str:
    from nbdtool.disks.file import FileDisk
    from nbdtool.layers.window import Window

    disk = Window(FileDisk(target, allow_live=True), 0, size, target)
    try:
        return writer.hash_disk(disk, target, subject=subject)
    finally:
        disk.close()


def _print_digest(sha256: str, target: str) -> None:
    """As sha256sum prints it, and reads it again."""
    name = re.sub(r"[\\\n\r]", lambda m: {"\\": r"\\", "\n": r"\n", "\r": r"\r"}[m[0]], target)
    line = f"{chr(92) if name != target else ''}{sha256}  {name}\n"
    fd = 2 if target == "-" else 1
    rest = memoryview(os.fsencode(line))
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, "standard output") from None
