"""The checksums of ext4's metadata, which the standard library lacks.

Source: the Linux kernel, Documentation/filesystems/ext4/checksums.rst; crc32c is that of RFC 3720
(polynomial 0x1EDC6F41, reflected), crc16 has the polynomial 0x8005, reflected.
"""

from __future__ import annotations

from typing import Union


def _table(polynomial: int) -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (polynomial if value & 1 else 0)
        table.append(value)
    return table


_CRC32C, _CRC16 = _table(0x82F63B78), _table(0xA001)


def crc32c(data: Union[bytes, memoryview], crc: int = 0xFFFFFFFF) -> int:
    """The checksum of data after what gave crc, without the inversion at the end."""
    table = _CRC32C
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc


def crc16(data: Union[bytes, memoryview], crc: int = 0xFFFF) -> int:
    """The checksum of data after what gave crc."""
    table = _CRC16
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc
