"""Run the rows whose names match the arguments (all without one) and print a Markdown table."""

from __future__ import annotations

import argparse
import fnmatch
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import cdi, guestfs, layers, libvirt, linuxdisk, race, rescue, serving, starting

AREAS = [
    area.__name__ for area in (starting, serving, linuxdisk, layers, cdi, libvirt, guestfs, rescue)
]
HEAD = "| what | nbdtool | peer | its figure | ratio | goal |\n|---|---|---|---|---|---|"


def first_line(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout.partition("\n")[0].strip()


def machine() -> str:
    """What the figures were made on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    parts = [
        f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}",
        f"{memory:.0f} GiB of memory",
        f"Linux {platform.release()}",
        first_line("/usr/bin/python3", "--version"),
        first_line("nbdkit", "--version"),
        first_line("qemu-nbd", "--version"),
        first_line("mke2fs", "-V"),
        first_line("fio", "--version"),
        f"load at the start {os.getloadavg()[0]:.1f}",
    ]
    return ", ".join(part for part in parts if part)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="names or patterns like nbdcopy-*")
    parser.add_argument("--list", action="store_true", help="list the rows")
    parser.add_argument("--rounds", type=int, help="paired runs for each row")
    parser.add_argument(
        "--directory",
        default="/dev/shm" if shutil.disk_usage("/dev/shm").free > 8 << 30 else "/var/tmp",
        help="where the files are made (default %(default)s)",
    )
    args = parser.parse_args()
    rows = sorted(race.ROWS.values(), key=lambda row: AREAS.index(row.make.__module__))
    if args.list:
        for row in rows:
            print(f"{row.name:20} {row.what}")
        return 0
    patterns = args.rows or ["*"]
    chosen = [
        row for row in rows if any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns)
    ]
    if not chosen:
        parser.error("no such row; see --list")
    print(f"{machine()}\n\n{HEAD}", flush=True)
    status = 0
    for row in chosen:
        print(row.name, end=" ", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="nbdtool-bench-", dir=args.directory) as name:
            try:
                lines = race.run(row, Path(name), args.rounds or row.rounds)
            except subprocess.CalledProcessError as error:
                lines = [f"| {row.what} | failed: {error.cmd[0]} | | | | |"]
                status = 1
        print("\n".join(lines), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
