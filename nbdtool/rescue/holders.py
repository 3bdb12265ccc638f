"""Who has a file locked, as the kernel tells in /proc/locks (proc(5))."""

from __future__ import annotations

import os


def holder(fd: int) -> str:
    """` (process 123, nbdtool)` for who has the file of a descriptor locked; empty if unknown."""
    st = os.fstat(fd)
    wanted = f"{os.major(st.st_dev):02x}:{os.minor(st.st_dev):02x}:{st.st_ino}"
    try:
        with open("/proc/locks") as file:
            for line in file:
                words = line.split()
                if len(words) > 5 and words[1] == "FLOCK" and words[5] == wanted:
                    return f" ({_process(words[4])})"
    except OSError:
        pass
    return ""


def _process(number: str) -> str:
    try:
        with open(f"/proc/{number}/comm") as file:
            return f"process {number}, {file.read().strip()}"
    except OSError:
        return f"process {number}"
