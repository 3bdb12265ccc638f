"""libguestfs' appliance, a small virtual machine that knows every filesystem: one for all."""

from __future__ import annotations

import errno
import os
import queue
import re
import signal
import threading
from collections.abc import Sequence
from typing import Any, Callable, Generic, Optional, TypeVar

from nbdtool.disks.guestfs.launch import Drive, Launcher, end_children, first_line
from nbdtool.errors import Error, debug, warn
from nbdtool.progress import Progress

Result = TypeVar("Result")
Work = Callable[[Any], Result]  # is given libguestfs' handle, and may raise its RuntimeError

_TICK = 0.2  # seconds between two looks at a launch
_LAST_WORDS = 5.0  # seconds in which clients hear why a writable appliance is gone
_GIVING_UP = 10.0  # seconds for an appliance that nobody needs to end
_ERRNOS = {"No space left on device": errno.ENOSPC, "Read-only file system": errno.EROFS}


class _Task(Generic[Result]):
    """Work, and what came of it."""

    def __init__(self, work: Work[Result]) -> None:
        self._work = work
        self._result: Result
        self._error: Optional[BaseException] = None
        self.done = threading.Lock()
        self.done.acquire()

    def run(self, do: Callable[[Work[Any]], Any]) -> None:
        try:
            self._result = do(self._work)
        except BaseException as exc:
            self._error = exc
        self.done.release()

    def result(self) -> Result:
        if self._error is not None:
            raise self._error
        return self._result


class Appliance:
    """An appliance with drives. Its handle does one thing at a time: one thread does all, in turn.

    A read-only one that dies is started again, once. A writable one that dies ends the program:
    what wasn't flushed may be lost.
    """

    def __init__(
        self, drives: Sequence[Drive], *, writable: bool, debug: bool = False, trace: bool = False
    ) -> None:
        self._steps = (0, 1)
        self._launcher = Launcher(
            drives, writable=writable, debug=debug, trace=trace, progress=self._count
        )
        self._writable = writable
        self._g: Any = None
        self._prepared: list[tuple[Work[Any], Any]] = []
        self._died = ""  # why there is none any more
        self._starts = 1  # that are left
        self.dirty = False  # something was written and not flushed; for work to say
        self._users = 0
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Optional[_Task[Any]]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="appliance", daemon=True)
        self._thread.start()

    def _count(self, done: int, total: int) -> None:
        self._steps = (done, total)

    def _work(self) -> None:
        while True:
            task = self._queue.get()
            if task is None:
                break
            task.run(self._do)
            del task
        if self._g is not None:
            self._g.close()

    # Work

    def start(self) -> None:
        """Launch it. Raises Error."""
        task: _Task[None] = _Task(lambda _: None)
        self._queue.put(task)
        with Progress("starting libguestfs' appliance", 12, "steps") as progress:
            while not task.done.acquire(timeout=_TICK):
                progress.update(self._steps[0])
        task.result()

    def call(self, work: Work[Result]) -> Result:
        """What work returns, given the handle, once all that was asked before is done.

        Raises what it raises; OSError for libguestfs' errors, and if there is no appliance left.
        """
        task = _Task(work)
        self._queue.put(task)
        with task.done:
            return task.result()

    def prepare(self, work: Work[Result]) -> Result:
        """The same; another appliance that takes this one's place must return the same for it."""
        result = self.call(work)
        self._prepared.append((work, result))
        return result

    def _do(self, work: Work[Any]) -> Any:
        if self._g is None and not self._died:
            self._g = self._launcher.start()
        while not self._died:
            try:
                return work(self._g)
            except RuntimeError as exc:
                if self._g.is_ready():
                    raise failure(exc) from exc
                self._lose(first_line(exc))
        raise OSError(errno.EIO, self._died)

    def _lose(self, reason: str) -> None:
        """Start another appliance for one that died, or note that there is none."""
        self._g.close()
        self._g = None
        reason = f"libguestfs' appliance died: {reason}"
        if self._launcher.given_up:
            self._died = reason
        elif self._writable:
            self._died = reason  # which the first request tells the user
            end = threading.Timer(_LAST_WORDS, os.kill, (os.getpid(), signal.SIGTERM))
            end.daemon = True
            end.start()
        elif not self._starts:
            self._died = f"{reason}, for the second time"
            warn(self._died)
        else:
            self._starts -= 1
            warn(f"{reason}; starting another")
            try:
                self._g = self._launcher.start()
                for work, result in self._prepared:
                    if work(self._g) != result:
                        raise Error("the drives have changed")
            except (Error, OSError, RuntimeError) as exc:
                self._died = f"{reason}; another: {first_line(exc)}"
                warn(self._died)

    # Its life

    def share(self) -> None:
        """One more has it open."""
        with self._lock:
            self._users += 1

    def flush(self) -> None:
        """Have everything that was written on the host's storage; raises OSError."""
        if self.dirty or self._died:
            self.call(self._sync)

    def _sync(self, g: Any) -> None:
        g.sync()  # sync(2), and an fsync(2) of each disk, which qemu passes on
        self.dirty = False

    def release(self) -> None:
        """As close(), if nobody else has it open."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        self.close()

    def close(self) -> None:
        """Shut it down; raises OSError if what was written may be lost."""
        try:
            self.call(self._shut_down)
        except OSError as exc:
            if self._writable:
                raise
            debug(f"closing: {exc.strerror}")
        finally:
            self._queue.put(None)
            self._thread.join()

    def _shut_down(self, g: Any) -> None:
        try:
            if self._writable:
                g.sync()
                g.umount_all()
            g.shutdown()
        except RuntimeError as exc:
            raise failure(exc) from exc
        finally:
            g.close()
            self._g = None
            self._died = "libguestfs' appliance was shut down"

    def abandon(self) -> None:
        """End it, whatever it does: nothing was written, and nobody waits for it."""
        self._launcher.given_up = True
        end_children()
        self._queue.put(None)
        self._thread.join(_GIVING_UP)


def failure(exc: RuntimeError) -> OSError:
    """libguestfs' error as ours."""
    text = first_line(exc)
    found = re.search("|".join(_ERRNOS), text)
    return OSError(_ERRNOS[found[0]] if found else errno.EIO, text)
