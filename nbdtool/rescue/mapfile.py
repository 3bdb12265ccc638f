"""GNU ddrescue's map file, and a journal in it of what was done since it was saved.

Format: the chapter "Mapfile structure" of ddrescue's manual. Comments, blank lines and the version
apart, a status line (position, phase, pass) is followed by a line (start, size, state) for each
block.

Data that was written to a target survives a kill at once, but a power cut only once it was synced.
So the blocks are written, to a new file that takes the place of the old one, only after that; and
what is done meanwhile is appended as comments, which ddrescue skips, and which count only as long
as the machine wasn't started again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from typing import IO, NamedTuple

from nbdtool import __version__
from nbdtool.errors import Error
from nbdtool.replacement import replacement
from nbdtool.rescue.blocks import BAD, STATES, UNSCRAPED, UNTRIED, UNTRIMMED, Block, Blocks
from nbdtool.rescue.holders import holder

FINISHED = "+"  # a phase; the others are the states that they work on

_JOURNAL = "# Done since, and of use until the next boot of "
_ENTRY = "#@"
_LONGEST = 4096  # bytes of a line
_LIMIT = 1 << 63
_PHASES = {
    UNTRIED: "Copying non-tried blocks",
    UNTRIMMED: "Trimming failed blocks",
    UNSCRAPED: "Scraping failed blocks",
    BAD: "Retrying bad sectors",
    FINISHED: "Finished",
}


class Status(NamedTuple):
    """What is done: where in the disk, in which phase (a state or FINISHED), in which pass."""

    position: int = 0
    phase: str = UNTRIED
    number: int = 1


class MapFile:
    """The map file at `path` of a disk of `size` bytes, locked; Error if it isn't one.

    Where there is none, one is made. known tells whether it was there, with something in it.
    """

    def __init__(self, path: str, size: int, description: str = "") -> None:
        self.path = os.path.realpath(path)
        self._name, self._size = path, size
        self._description = "".join(c if c.isprintable() else "?" for c in description)
        self._started = _now()
        self._boot = _boot()
        try:
            self._fd = self._open()
        except OSError as error:
            raise self._error(error) from None
        try:
            self.known = os.fstat(self._fd).st_size > 0
            self.blocks, self.status = self.load()
        except BaseException:
            os.close(self._fd)
            raise
        self.journal = 0  # bytes appended since it was saved

    def _open(self) -> int:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise Error(f"{self._name}: a map file is a regular file")
                lock(fd, self._name)
                if os.path.samestat(os.fstat(fd), os.stat(self.path)):
                    return fd
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # it was replaced meanwhile

    def _error(self, error: OSError) -> Error:
        return Error(f"{self._name}: {error.strerror or error}")

    # Reading

    def load(self) -> tuple[Blocks, Status]:
        """The blocks and the status as the file has them, the journal included."""
        try:
            with open(self._fd, encoding="ascii", errors="replace", closefd=False) as file:
                file.seek(0)
                return self._parse(file)
        except OSError as error:
            raise self._error(error) from None

    def _parse(self, file: IO[str]) -> tuple[Blocks, Status]:
        status, end = None, 0
        blocks: list[Block] = []
        journal: list[Block] = []
        current = False  # whether the journal is of this boot
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST), ""), 1):
            if line.startswith(_JOURNAL):
                current = line[len(_JOURNAL) :].rstrip("\n") == self._boot
            elif line.startswith(_ENTRY):
                # A line that was cut off is no entry, nor is what then follows.
                current = current and line.endswith("\n")
                if current:
                    journal.append(self._block(number, line[len(_ENTRY) :].split()))
                continue
            words = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].split()
            if not words:
                continue
            if status is None:
                status = self._status(number, words)
                continue
            block = self._block(number, words)
            if not blocks and block.start:
                blocks.append(Block(0, block.start, UNTRIED))
                end = block.start
            if block.start != end:
                raise self._wrong(number, f"its block starts at {block.start:#x}, not at {end:#x}")
            blocks.append(block)
            end = block.end
        if status is None and self.known:
            raise Error(f"{self._name}: no status line; is it a map file?")
        if end < self._size:
            blocks.append(Block(end, self._size, UNTRIED))
        made = Blocks.of(self._size, blocks)
        for start, stop, state in journal:
            made.mark(start, stop, state)
        return made, status or Status()

    def _status(self, number: int, words: list[str]) -> Status:
        if not 2 <= len(words) <= 3 or words[1] not in (*STATES, "F", "G"):
            raise self._wrong(number, "not a status line (position, phase, pass)")
        position = self._integer(number, words[0])
        turn = int(words[2]) if len(words) == 3 and words[2].isdecimal() else 1
        if words[1] in "FG":  # ddrescue's other modes
            return Status()
        return Status(position, words[1], turn)

    def _block(self, number: int, words: list[str]) -> Block:
        if len(words) != 3 or words[2] not in STATES or len(words[2]) != 1:
            raise self._wrong(number, "not a block (position, size, status)")
        start, length = (self._integer(number, word) for word in words[:2])
        if not length:
            raise self._wrong(number, "a block of no bytes")
        if start + length > self._size:
            raise Error(
                f"{self._name}: is the map of another disk: it has {start + length} bytes or more,"
                f" this one {self._size}"
            )
        return Block(start, start + length, words[2])

    def _integer(self, number: int, word: str) -> int:
        try:
            octal = len(word) > 1 and word[0] == "0" and word[1] not in "xX"
            value = int(word, 8 if octal else 0) if word[0].isdecimal() else -1
        except ValueError:
            value = -1
        if not 0 <= value < _LIMIT:
            raise self._wrong(number, f"not a number of bytes: {word[:40]}")
        return value

    def _wrong(self, number: int, text: str) -> Error:
        return Error(f"{self._name}: line {number}: {text}")

    # Writing

    def save(self, blocks: Blocks, status: Status) -> None:
        """Replace the file; what is in the blocks must be on stable storage. Raises Error."""
        try:
            with replacement(self.path) as fd:
                with open(fd, "w", encoding="ascii", errors="replace", closefd=False) as file:
                    file.writelines(self._lines(blocks, status))
                os.fsync(fd)
                lock(fd, self._name)
                kept = os.dup(fd)  # one description: the lock and the position stay
        except OSError as error:
            raise self._error(error) from None
        os.close(self._fd)
        self._fd = kept
        self.status = status
        self.journal = 0

    def _lines(self, blocks: Blocks, status: Status) -> Iterator[str]:
        phase = _PHASES[status.phase]
        yield f"# Mapfile. Created by nbdtool version {__version__}\n"
        yield f"# Disk: {self._description}\n# Start time:   {self._started}\n"
        yield f"# Current time: {_now()}\n# {phase}"
        yield "\n" if status.phase == FINISHED else f"... Pass {status.number}\n"
        yield "# current_pos  current_status  current_pass\n"
        yield f"0x{status.position:08X}     {status.phase}               {status.number}\n"
        yield "#      pos        size  status\n"
        for start, end, state in blocks:
            yield f"0x{start:08X}  0x{end - start:08X}  {state}\n"
        yield f"{_JOURNAL}{self._boot}\n"

    def append(self, start: int, end: int, state: str) -> None:
        """Note that the state of [start, end) has changed; the bytes are written. Raises Error."""
        line = b"%b 0x%X 0x%X %b\n" % (_ENTRY.encode(), start, end - start, state.encode())
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError("not all of a line could be written")
        except OSError as error:
            raise self._error(error) from None
        self.journal += len(line)

    def drop_journal(self) -> None:
        """Have only what was saved: the rest may not be on stable storage."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - self.journal)

    def remove(self) -> None:
        """Have none after all."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    def close(self) -> None:
        os.close(self._fd)


def lock(fd: int, name: str) -> None:
    """Lock a file for this run; Error if another has it. Not every filesystem can."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Error(f"{name}: in use by another run{holder(fd)}; wait for it, or end it") from None
    except OSError:
        pass


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return os.urandom(16).hex()  # of use to this process only
