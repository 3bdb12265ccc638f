"""The door: parse, open, serve or write, exit status."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nbdtool import __version__

if TYPE_CHECKING:
    import argparse

    from nbdtool.disk import Disk


def main(argv: list[str] | None = None) -> int:
    """Run nbdtool; the exit status is 0, 1 for a failure, 2 for wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    _reserve_standard_descriptors()
    from nbdtool import errors

    try:
        status = _run(argv)
        _flush()
        return status
    except errors.UsageError as exc:
        errors.fail(exc)
        return 2
    except (errors.Error, OSError) as exc:
        errors.fail(exc)
        return 1
    except KeyboardInterrupt:
        return 130
    except MemoryError:
        errors.fail(errors.Error("out of memory"))
        return 1
    except Exception as exc:
        errors.fault(exc)
        return 1


def _reserve_standard_descriptors() -> None:
    """Let no file of ours become standard input, output or error where one of them is closed."""
    for fd, mode in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, mode)  # the wrong way round: to use it fails as before


def _flush() -> None:
    """Have standard output out before the exit status is settled."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as exc:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left would be tried again
        raise OSError(exc.errno, exc.strerror, "standard output") from None


def _run(argv: list[str]) -> int:
    if argv in (["--version"], ["-V"]):  # without argparse: scripts ask often
        print(f"nbdtool {__version__}")
        return 0
    from nbdtool import cli, errors, options

    command, args = cli.parse(argv)
    errors.verbose = args.verbose
    if args.help:
        cli.print_help(command, args)
        return 0
    if args.version:
        print(f"nbdtool {__version__}")
        return 0
    if args.dump_config:
        cli.print_config()
        return 0
    if command is None:
        names = ", ".join(options.command_names())
        raise errors.UsageError(f"which source? One of {names}; see --help")
    cli.settle(args)
    if getattr(args, "list", False):
        print(options.command_module(command).listing(args), end="")
        return 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, _interrupted)
    if args.to_file is not None:
        return _write(command, args)
    return _serve(command, args)


def _serve(command: str, args: argparse.Namespace) -> int:
    from nbdtool.server.lifecycle import Server

    server = Server(args)
    with _opened(command, args) as disks:
        return server.run(disks)


def _write(command: str, args: argparse.Namespace) -> int:
    from nbdtool import copying

    with copying.reporting(args) as files, _opened(command, args) as disks:
        return copying.copy_disks(disks, args, files)


@contextlib.contextmanager
def _opened(command: str, args: argparse.Namespace) -> Iterator[dict[str, Disk]]:
    """The disks, flushed and closed at the end; Error if that fails: data may be lost then."""
    from nbdtool import cli
    from nbdtool.errors import Error

    disks = cli.open_disks(command, args)
    try:
        yield disks
    finally:
        failures = []
        for disk in disks.values():
            try:
                if disk.writable:
                    disk.flush()
                disk.close()
            except OSError as exc:
                failures.append(f"{disk.description}: {exc.strerror or exc}")
        if failures:
            raise Error(f"{'; '.join(failures)}; what was written last may be lost")


def _interrupted(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
