"""The NBD protocol's constants and messages, in the order of its specification (doc/proto.md of
NetworkBlockDevice/nbd; extended headers: its branch extension-ext-header). All are big-endian."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from struct import Struct
from typing import Union

Buffer = Union[bytes, bytearray, memoryview]

DEFAULT_PORT = 10809
MAX_STRING = 4096  # bytes of a name or a text
MAX_PAYLOAD = 32 << 20  # bytes of a read or write that every server should take
MAX_EXTENTS = 1 << 20  # in one block status chunk

# Handshake
INIT_PASSWD = 0x4E42444D41474943
OLDSTYLE_MAGIC = 0x00420281861253
IHAVEOPT = 0x49484156454F5054
REPLY_MAGIC = 0x3E889045565A9
OLDSTYLE = Struct(">QQQHH124x")  # passwd, magic, size, handshake flags, transmission flags
NEWSTYLE = Struct(">QQH")  # passwd, magic, handshake flags
CLIENT_FLAGS = Struct(">I")
OPTION = Struct(">QII")  # magic, option, length
OPTION_REPLY = Struct(">QIII")  # magic, option, reply type, length
EXPORT = Struct(">QH")  # size, transmission flags: the reply to EXPORT_NAME
INFO_EXPORT_REPLY = Struct(">HQH")  # type, size, transmission flags
INFO_BLOCK_SIZE_REPLY = Struct(">HIII")  # type, minimum, preferred, maximum
U16 = Struct(">H")
U32 = Struct(">I")

FLAG_FIXED_NEWSTYLE = 1 << 0
FLAG_NO_ZEROES = 1 << 1

FLAG_HAS_FLAGS = 1 << 0
FLAG_READ_ONLY = 1 << 1
FLAG_SEND_FLUSH = 1 << 2
FLAG_SEND_FUA = 1 << 3
FLAG_SEND_TRIM = 1 << 5
FLAG_SEND_WRITE_ZEROES = 1 << 6
FLAG_SEND_DF = 1 << 7
FLAG_CAN_MULTI_CONN = 1 << 8
FLAG_SEND_CACHE = 1 << 10
FLAG_SEND_FAST_ZERO = 1 << 11

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10
OPT_EXTENDED_HEADERS = 11

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERR_UNSUP = 1 << 31 | 1
REP_ERR_POLICY = 1 << 31 | 2
REP_ERR_INVALID = 1 << 31 | 3
REP_ERR_PLATFORM = 1 << 31 | 4
REP_ERR_TLS_REQD = 1 << 31 | 5
REP_ERR_UNKNOWN = 1 << 31 | 6
REP_ERR_SHUTDOWN = 1 << 31 | 7
REP_ERR_TOO_BIG = 1 << 31 | 9
REP_ERR_EXT_HEADER_REQD = 1 << 31 | 10

INFO_EXPORT = 0
INFO_NAME = 1
INFO_DESCRIPTION = 2
INFO_BLOCK_SIZE = 3

BASE_ALLOCATION = "base:allocation"

# Transmission
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C
REQUEST = Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
EXTENDED_REQUEST = Struct(">IHHQQQ")
SIMPLE_REPLY = Struct(">IIQ")  # magic, error, cookie
STRUCTURED_REPLY = Struct(">IHHQI")  # magic, flags, type, cookie, length
EXTENDED_REPLY = Struct(">IHHQQQ")  # magic, flags, type, cookie, offset, length
OFFSET = Struct(">Q")  # in front of the data of OFFSET_DATA, behind ERROR_OFFSET's text
OFFSET_HOLE = Struct(">QI")  # offset, length
ERROR = Struct(">IH")  # error, length of the text
BLOCK_STATUS_HEAD = Struct(">I")  # metadata context
BLOCK_STATUS_EXT_HEAD = Struct(">II")  # metadata context, number of extents

CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_CACHE = 5
CMD_WRITE_ZEROES = 6
CMD_BLOCK_STATUS = 7

CMD_FLAG_FUA = 1 << 0
CMD_FLAG_NO_HOLE = 1 << 1
CMD_FLAG_DF = 1 << 2
CMD_FLAG_REQ_ONE = 1 << 3
CMD_FLAG_FAST_ZERO = 1 << 4
CMD_FLAG_PAYLOAD_LEN = 1 << 5

REPLY_FLAG_DONE = 1 << 0

REPLY_TYPE_NONE = 0
REPLY_TYPE_OFFSET_DATA = 1
REPLY_TYPE_OFFSET_HOLE = 2
REPLY_TYPE_BLOCK_STATUS = 5
REPLY_TYPE_BLOCK_STATUS_EXT = 6
REPLY_TYPE_ERROR = 1 << 15 | 1
REPLY_TYPE_ERROR_OFFSET = 1 << 15 | 2

EPERM = 1
EIO = 5
ENOMEM = 12
EINVAL = 22
ENOSPC = 28
EOVERFLOW = 75
ENOTSUP = 95
ESHUTDOWN = 108

_ERRORS = {
    errno.EPERM: EPERM,
    errno.EROFS: EPERM,
    errno.EIO: EIO,
    errno.ENOMEM: ENOMEM,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
    errno.ESHUTDOWN: ESHUTDOWN,
}


def text(message: str) -> bytes:
    """A text for a human as the protocol carries it: UTF-8, at most MAX_STRING bytes."""
    data = message.encode(errors="replace")[:MAX_STRING]
    return data.decode(errors="ignore").encode()


def nbd_error(number: int | None, flags: int = 0) -> int:
    """The protocol's error value for an errno; ENOTSUP and EOVERFLOW only where flags ask for them.

    Section "Error values".
    """
    if number == errno.EOPNOTSUPP and flags & CMD_FLAG_FAST_ZERO:
        return ENOTSUP
    if number == errno.EOVERFLOW and flags & CMD_FLAG_DF:
        return EOVERFLOW
    return _ERRORS.get(number, EINVAL) if number else EIO


def unsent(buffers: Sequence[Buffer], done: int) -> list[Buffer]:
    """What remains of buffers when their first `done` bytes are sent."""
    for i, buffer in enumerate(buffers):
        if done < len(buffer):
            return [memoryview(buffer)[done:], *buffers[i + 1 :]]
        done -= len(buffer)
    return []
