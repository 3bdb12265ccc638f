"""A guard before libguestfs' qemu, which guesses no format.

For a drive that is only read, libguestfs (1.48) lays a qcow2 overlay over the image and has qemu
guess what is in that: if the disk begins like an image that names another file of the host, because
its guest wrote that there, qemu opens the file in the disk's place. With libvirt as its backend
there is no guessing.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbdtool.errors import Error

_SCRIPT = """\
#!/bin/sh
for word; do
    shift
    case $word in
    *,format=* | *,driver=*) ;;
    file.file.filename=*) word=$word,format=raw ;;
    esac
    set -- "$@" "$word"
done
exec {qemu} "$@"
"""


@contextlib.contextmanager
def guarded(g: Any) -> Iterator[None]:
    """While g launches, the formats of all its drives are said. Raises Error, RuntimeError."""
    if g.get_backend() != "direct":
        yield
        return
    qemu = g.get_hv()
    path = Path(tempfile.mkdtemp(prefix="nbdtool-", dir=_place())) / "qemu"
    try:
        path.write_text(_SCRIPT.format(qemu=shlex.quote(qemu)))
        path.chmod(0o700)
        with contextlib.suppress(OSError):  # libguestfs knows by its time what this qemu can do
            times = os.stat(qemu)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        g.set_hv(os.fspath(path))
        yield
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)


def _place() -> str:
    """A directory that programs may be started from."""
    for place in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/run", "/dev/shm"):
        if os.access(place, os.W_OK) and not os.statvfs(place).f_flag & os.ST_NOEXEC:
            return place
    raise Error("no temporary directory that programs may be started from: set TMPDIR to one")
