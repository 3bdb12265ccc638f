"""The life of a server: checks, background, binding, privileges, readiness, serving, the end."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Callable

from nbdtool import temporary
from nbdtool.disk import Disk
from nbdtool.errors import UsageError, debug, tell, warn
from nbdtool.progress import human
from nbdtool.server import captive, listen, process
from nbdtool.server.exports import Exports
from nbdtool.server.handshake import Policy
from nbdtool.server.service import GRACE, Connection, Service
from nbdtool.server.stream import PipeStream, SocketStream, Stream

if TYPE_CHECKING:
    import subprocess

_STOP = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)


class Server:
    """Everything that can be checked before the source is opened is; then run() serves it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._check_usage()
        if args.exit_with_parent:
            process.exit_with_parent()
        self._privileges = process.Privileges(args.user, args.group)
        self._tls = None
        if args.tls != "off":
            from nbdtool.server import tls

            self._tls = tls.context(args)
        self._activated = listen.on_activation()
        if self._activated and (args.unix or args.port is not None or args.run or args.stdin):
            raise UsageError("sockets from the service manager and -p, -U, -s or --run don't mix")
        self._stream = _standard_io() if args.stdin else None
        process.log_to(args.log)
        if args.pid_file is not None:
            process.check_pid_file(args.pid_file)
            args.pid_file = os.path.abspath(args.pid_file)
        self._ready: Callable[[], None] = lambda: None
        if args.fork:
            self._ready = process.fork_to_background()

    def _check_usage(self) -> None:
        args = self._args
        if args.oldstyle and args.export_name is not None:
            raise UsageError("oldstyle (-o) has no export names; leave -e or -o out")
        if args.oldstyle and args.tls != "off":
            raise UsageError("oldstyle (-o) has no TLS; leave -o or --tls out")
        if args.unix is not None and (args.port is not None or args.ip_addr is not None):
            raise UsageError(
                "-U is a Unix socket, -p and -i are for TCP; give the one or the other"
            )
        if args.stdin and (args.unix or args.port is not None or args.ip_addr or args.run):
            raise UsageError("-s serves standard input; -p, -i, -U and --run don't go with it")
        if args.run is not None and not args.run.strip():
            raise UsageError("--run: which command?")
        if args.fork and (args.stdin or args.run):
            raise UsageError("--fork doesn't go with -s or --run")
        if args.ipv4_only and args.ipv6_only:
            raise UsageError("-4 and -6 leave no address to listen on; give the one or the other")
        if args.tls_verify_peer and (args.tls == "off" or args.tls_psk is not None):
            raise UsageError("--tls-verify-peer checks certificates: add --tls-certificates")
        if args.tls_psk is not None and args.tls_certificates is not None:
            raise UsageError(
                "--tls-psk and --tls-certificates don't mix; give the one or the other"
            )
        name = os.fsencode(args.export_name or "")
        if len(name) > 4096 or name.decode(errors="replace").encode() != name:
            raise UsageError("an export name is UTF-8 and has at most 4096 bytes")

    def run(self, disks: dict[str, Disk]) -> int:
        """Serve until a signal or the captive command's end; the exit status."""
        args = self._args
        if args.export_name is not None and len(disks) > 1:
            raise UsageError(f"-e names one export, here are {len(disks)} with names of their own")
        if args.oldstyle and len(disks) > 1:
            raise UsageError(f"oldstyle (-o) serves one export, here are {len(disks)}; choose one")
        exports = Exports(disks, name=args.export_name, read_only=args.read_only)
        for export in exports.all:
            if export.disk.size % 512:
                warn(
                    f"{export.disk.description}: {export.disk.size} bytes are no multiple of 512;"
                    " the kernel's client leaves out the last ones"
                )
        policy = Policy(
            exports,
            oldstyle=args.oldstyle,
            structured=not args.no_sr,
            tls=self._tls,
            tls_required=args.tls == "require",
            timeout=args.timeout,
        )
        service = Service(policy, args.max_connections)
        if self._stream is not None:
            return self._serve_stream(service, disks)
        signals = _Signals(service.stop)
        place = self._activated or self._listen()
        signals.at_once = place.close
        child = None
        try:
            self._privileges.give(place.made)
            self._become_server(disks)
            name = args.export_name or ""
            if args.run:
                child = captive.start(args.run, place, name, self._tls is not None)
                threading.Thread(target=_wait, args=(child, service.stop), daemon=True).start()
            self._announce(place, exports, name)
            service.accept(place.sockets)
            process.notify("STOPPING=1")
            for sock in place.sockets:
                sock.close()
            service.finish()
        finally:
            place.close()
            if child is not None and child.poll() is None:
                child.terminate()
        return captive.status(child.wait()) if child is not None else 0

    def _become_server(self, disks: dict[str, Disk]) -> None:
        """What needs our first user's rights, and then what must work without them."""
        if self._args.pid_file is not None:
            process.write_pid_file(self._args.pid_file)  # clients can connect: they wait in line
        self._privileges.give(temporary.paths)
        self._privileges.drop()
        for disk in disks.values():
            disk.verify_access()

    def _listen(self) -> listen.Place:
        args = self._args
        if args.unix is None and args.run and args.port is None and args.ip_addr is None:
            return listen.on_unix("-", 0o600)
        if args.unix is not None:
            return listen.on_unix(args.unix, args.unix_mode)
        families: list[int] = [socket.AF_INET] * (not args.ipv6_only)
        families += [socket.AF_INET6] * (not args.ipv4_only)
        return listen.on_tcp(args.ip_addr, 10809 if args.port is None else args.port, families)

    def _announce(self, place: listen.Place, exports: Exports, name: str) -> None:
        """Tell everyone who waits that clients can connect."""
        args = self._args
        uri = place.uri(name, self._tls is not None)
        if args.print_uri:
            print(uri, flush=True)
        if not args.run and not args.print_uri:
            for line in _start_lines(place, exports, name, uri):
                tell(line)
        self._ready()
        process.notify("READY=1")

    def _serve_stream(self, service: Service, disks: dict[str, Disk]) -> int:
        assert self._stream is not None
        connection = Connection(self._stream)

        def stop() -> None:
            service.stop()
            connection.shut_idle()
            signal.signal(signal.SIGALRM, lambda *_: connection.stream.shut())
            signal.setitimer(signal.ITIMER_REAL, GRACE)

        _Signals(stop)
        self._become_server(disks)
        process.notify("READY=1")
        service.serve(connection)
        return 0


class _Signals:
    """The first of _STOP stops the server in good order, a second one ends it at once."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self.at_once: Callable[[], None] = lambda: None  # what a second one still does
        self._seen = False
        for number in _STOP:
            signal.signal(number, self._handle)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def _handle(self, number: int, frame: object) -> None:
        if self._seen:
            self.at_once()
            os._exit(128 + number)
        self._seen = True
        self._stop()


def _wait(child: subprocess.Popen[bytes], then: Callable[[], None]) -> None:
    child.wait()
    then()


def _standard_io() -> Stream:
    """Standard input and output as a client's stream; afterwards they can't be written to."""
    reading, writing = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    try:
        sock = socket.socket(fileno=reading)
        if sock.type == socket.SOCK_STREAM and os.path.sameopenfile(reading, writing):
            os.close(writing)
            return SocketStream(sock, "standard input")
        sock.detach()
    except OSError:
        pass  # not a socket
    return PipeStream(reading, writing)


def _start_lines(place: listen.Place, exports: Exports, name: str, uri: str) -> list[str]:
    if len(exports.all) == 1:
        export = exports.all[0]
        mode = "read-only" if export.read_only else "writable"
        what = f"{export.disk.description}, {human(export.disk.size)}, {mode}"
    else:
        what = f"{len(exports.all)} exports"
    debug(f"listening at {uri}")
    guestfish = captive.spelling("guestfish", place, name, uri)
    lines = [f"nbdtool: serving {what}, to {place.audience}; connect with"]
    lines.append(f"    nbdinfo {'--list ' * (len(exports.all) > 1)}{captive.quoted(uri)}")
    if len(exports.all) == 1:
        ro = "--ro " if exports.all[0].read_only else ""
        lines.append(f"    guestfish {ro}--format=raw -a {captive.quoted(guestfish)}")
    return lines
