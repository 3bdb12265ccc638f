"""Large buffers that come and go."""

from __future__ import annotations

from nbdtool.errors import debug

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt(3)


def keep_buffers() -> None:
    """Keep glibc from giving each large buffer back to the kernel, and asking for it again.

    That costs as much as filling it: every page is cleared and mapped anew.
    """
    import ctypes

    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - not in another C library
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 256 << 20)
    except (OSError, AttributeError) as exc:
        debug(f"no malloc tuning: {exc}")
