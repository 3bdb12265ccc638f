"""The options: those that all sources share, those of one source, and the layers."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NoReturn

from nbdtool import commands, layers, values
from nbdtool.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError, and knows which options aren't the server's."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            add_help=False,
            conflict_handler="resolve",
            formatter_class=_Formatter,
            **kwargs,
        )
        self.keys: set[str] = set()  # key=value is an option of the subcommand or a layer
        self.configures: dict[str, ModuleType] = {}  # option -> that subcommand or layer
        self.magic = ""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def option(self, name: str) -> argparse.Action | None:
        return self._option_string_actions.get(name)

    def add_keys(self, group: argparse._ArgumentGroup, module: ModuleType) -> None:
        """Let a subcommand or layer add its options to group."""
        before = set(self._option_string_actions.items())
        module.add_arguments(group)
        added = set(self._option_string_actions.items()) - before
        names = [name for name, _ in added if name.startswith("--")]
        self.keys.update(name[2:] for name in names)
        self.configures.update(dict.fromkeys(names, module))


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


def build_parser(command: str | None = None, *, with_layers: bool = True) -> Parser:
    """The parser of one subcommand, or of what all have in common."""
    module = command_module(command) if command else None
    what = "COMMAND"
    if module is not None:
        magic = getattr(module, "MAGIC", "")
        what = f"{command} [{magic}=]{magic.upper()}" if magic else str(command)
    parser = Parser(
        prog=f"nbdtool {command}" if command else "nbdtool",
        usage=f"nbdtool [OPTION ...] {what} [KEY=VALUE ...]",
        description=module.__doc__ if module else "Turn an unusual source into a disk.",
    )
    _add_server_arguments(parser)
    if module is not None:
        parser.magic = getattr(module, "MAGIC", "")
        group = parser.add_argument_group(f"options of {command}, also given as KEY=VALUE")
        parser.add_keys(group, module)
    if with_layers:
        group = parser.add_argument_group("layers, applied in the order of the command line")
        for layer in _layers():
            group.add_argument(layer.OPTION, action=_AddLayer, module=layer, **layer.ARGUMENT)
            parser.keys.add(layer.OPTION[2:])
            parser.add_keys(group, layer)
        group.add_argument(
            "--filter",
            action="append",
            metavar="NAME",
            default=[],
            help="a layer as nbdkit names it (" + ", ".join(filters()) + "); the last one named"
            " is nearest the source",
        )
    return parser


def _members(package: ModuleType) -> list[str]:
    """The names of a package's modules, in order."""
    import pkgutil  # slow to load, and seldom needed

    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def command_names() -> list[str]:
    """The subcommands."""
    return _members(commands)


def command_module(name: str) -> ModuleType:
    """The module of a subcommand; UsageError if there is none."""
    try:
        if name.isidentifier():
            return importlib.import_module(f"nbdtool.commands.{name}")
    except ModuleNotFoundError as exc:
        if exc.name != f"nbdtool.commands.{name}":
            raise
    near = closest(name.partition("=")[0], command_names())
    known = f"did you mean {near}?" if near else f"there are {', '.join(command_names())}"
    raise UsageError(f"{name}: no such subcommand; {known}")


def _layers() -> list[ModuleType]:
    modules = (importlib.import_module(f"nbdtool.layers.{name}") for name in _members(layers))
    return [module for module in modules if hasattr(module, "OPTION")]


def filters() -> dict[str, ModuleType]:
    """The layers that nbdkit has as filters, by the names that they have there."""
    return {layer.FILTER: layer for layer in _layers() if hasattr(layer, "FILTER")}


def closest(name: str, known: Iterable[str]) -> str | None:
    """The one that was meant, as far as can be told."""
    import difflib  # slow to load, and seldom needed

    return next(iter(difflib.get_close_matches(name, list(known), 1)), None)


class _AddLayer(argparse.Action):
    """Remember the layer and its value, in the order of the command line."""

    def __init__(self, module: ModuleType, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.module = module

    def __call__(
        self, parser: object, namespace: argparse.Namespace, value: Any, option: object = None
    ) -> None:
        if value is not False:
            namespace.layers = [*getattr(namespace, "layers", []), (self.module, value)]


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to do").add_argument
    add("--to-file", metavar="PATH", help="write the disk to PATH (- is standard output) and exit")
    add("--to-dir", metavar="DIR", help="write each disk to a file of its own in DIR and exit")
    add("--run", metavar="CMD", help="serve while CMD runs in a shell, to it alone")
    add("-r", "--read-only", "--readonly", action="store_true", help="refuse writes")
    add("--help", action="store_true", help="print this help and exit")
    add("-V", "--version", action="store_true", help="print the version and exit")
    add("--dump-config", action="store_true", help="print how nbdtool is set up and exit")
    add("-v", "--verbose", action="store_true", help="print what happens")

    group = parser.add_argument_group("how to write")
    add = group.add_argument
    add("--verify", action="store_true", help="read back what was written, and compare")
    add("--sha256", action="store_true", help="print the digest of what was written")
    add("--rescue", metavar="MAPFILE", help="read a failing source as ddrescue does; MAPFILE, in"
        " its format, keeps what is done, to go on with")  # fmt: skip
    add("--retries", type=values.count("retries", 0, 1 << 20), default=0, metavar="N",
        help="of what is bad in the end (0)")  # fmt: skip
    add("--read-timeout", type=_seconds, default=60.0, metavar="SECONDS",
        help="a read that takes longer is an error (60)")  # fmt: skip
    add("--fill", type=values.pattern, default=b"", metavar="BYTES",
        help="instead of holes for what is bad: a text, or hexadecimal after 0x")  # fmt: skip
    values.add_flag(group, "--json", help="how far it is each second, or what --list prints, as"
        " JSON")  # fmt: skip

    add = parser.add_argument_group("where to listen").add_argument
    add("-p", "--port", type=_port, help="the TCP port (10809); 0 is one that is free")
    add("-i", "--ip-addr", "--ipaddr", metavar="IPADDR", help="the address (loopback; * is all)")
    add("-4", "--ipv4-only", action="store_true", help="no IPv6")
    add("-6", "--ipv6-only", action="store_true", help="no IPv4")
    add("-U", "--unix", metavar="SOCKET", help="a Unix socket instead; - is a private one")
    add("--unix-mode", type=_mode, default=0o600, metavar="MODE", help="its permissions (0600)")
    add("-s", "--single", "--stdin", dest="stdin", action="store_true",
        help="serve one client on standard input and output")  # fmt: skip

    add = parser.add_argument_group("how to serve").add_argument
    add("-e", "--export-name", "--exportname", "--export", metavar="NAME",
        help="the name of the export; without it any name will do")  # fmt: skip
    add("-n", "--newstyle", "--new-style", action="store_true", help="newstyle (the default)")
    add("-o", "--oldstyle", "--old-style", action="store_true", help="the oldstyle protocol")
    add("--no-sr", "--no-structured-replies", action="store_true", help="no structured replies")
    add("--timeout", type=_seconds, default=30.0, metavar="SECONDS",
        help="for the handshake of a client (30)")  # fmt: skip
    add("--max-connections", type=values.count("connections", 1, (1 << 20) - 1), default=1024,
        metavar="N", help="at once (1024)")  # fmt: skip
    add("--tls", choices=("off", "on", "require"), help="offer TLS, or insist on it")
    add("--tls-certificates", metavar="DIR", help="where the X.509 files are, named as nbdkit's")
    add("--tls-verify-peer", action="store_true", help="ask clients for a certificate of the CA")
    add("--tls-psk", metavar="FILE", help="pre-shared keys instead (Python 3.13)")

    add = parser.add_argument_group("the server's process").add_argument
    add("-f", "--foreground", "--no-fork", action="store_true", help="stay there (the default)")
    add("--fork", action="store_true", help="go to the background once clients can connect")
    add("-P", "--pid-file", "--pidfile", metavar="FILE", help="write the process ID when ready")
    add("-u", "--user", help="become this user after binding and opening")
    add("-g", "--group", help="become this group")
    add("--exit-with-parent", action="store_true", help="exit when the parent process does")
    add("--log", default="stderr", metavar="stderr|FILE", help="where messages go")
    add("--print-uri", action="store_true", help="print the NBD URI when ready")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"not a port: {text!r} (0 to 65535)")
    return int(text)


def _mode(text: str) -> int:
    if not re.fullmatch("[0-7]{3,4}", text):
        raise argparse.ArgumentTypeError(f"not a mode: {text!r} (like 0660)")
    return int(text, 8) & 0o777


def _seconds(text: str) -> float:
    value = values.seconds(text)
    if not value:
        raise argparse.ArgumentTypeError("no time is not enough")
    return value
