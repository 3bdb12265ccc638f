"""The command line: server options, layers, and nbdkit's key=value spelling.

argparse's subparsers would let their defaults overwrite what stood before the subcommand, so a
first pass finds the subcommand and writes every argument as --option=value; then one parser reads
the whole as one list.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NoReturn

from nbdtool import __version__, commands, layers, values
from nbdtool.disk import Disk
from nbdtool.errors import UsageError

_KEY_VALUE = re.compile(r"([A-Za-z][\w.-]*)=(.*)", re.DOTALL)


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
            help="a layer as nbdkit names it (" + ", ".join(_filters()) + "); the last one named"
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
    near = _close(name.partition("=")[0], command_names(), 0.6)
    known = f"did you mean {near}?" if near else f"there are {', '.join(command_names())}"
    raise UsageError(f"{name}: no such subcommand; {known}")


def _layers() -> list[ModuleType]:
    modules = (importlib.import_module(f"nbdtool.layers.{name}") for name in _members(layers))
    return [module for module in modules if hasattr(module, "OPTION")]


def _filters() -> dict[str, ModuleType]:
    return {layer.FILTER: layer for layer in _layers() if hasattr(layer, "FILTER")}


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
    add("--run", metavar="CMD", help="serve while CMD runs in a shell, to it alone")
    add("-r", "--read-only", "--readonly", action="store_true", help="refuse writes")
    add("--help", action="store_true", help="print this help and exit")
    add("-V", "--version", action="store_true", help="print the version and exit")
    add("--dump-config", action="store_true", help="print how nbdtool is set up and exit")
    add("-v", "--verbose", action="store_true", help="print what happens")

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
    add("--max-connections", type=_count, default=1024, metavar="N", help="at once (1024)")
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
        raise argparse.ArgumentTypeError("no time is no time for a handshake")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 20:
        raise argparse.ArgumentTypeError(f"not a number of connections: {text!r}")
    return int(text)


# The first pass


def parse(argv: list[str]) -> tuple[str | None, argparse.Namespace]:
    """The subcommand and all options; UsageError for what can't be understood."""
    parser = build_parser(with_layers=False)
    at = _find_command(parser, argv)
    command = argv[at] if at is not None else None
    rest = argv if at is None else argv[:at] + argv[at + 1 :]
    if command is not None:
        parser = build_parser(command, with_layers=False)
    normal = _normalise(parser, rest)
    if normal is None:  # something unknown: it may be a layer's
        parser = build_parser(command)
        normal = _normalise(parser, rest) or []
    args = parser.parse_args(normal)
    if args.help and parser.option("--filter") is None:
        parser = build_parser(command)
    args.parser = parser
    args.tls = args.tls or ("require" if args.tls_psk else "on" if args.tls_certificates else "off")
    return command, args


def _find_command(parser: Parser, argv: list[str]) -> int | None:
    """Where the subcommand stands: the first argument that isn't an option or its value."""
    skip = False
    for at, word in enumerate(argv):
        if skip:
            skip = False
        elif not word.startswith("-") or word == "-":
            return at
        elif word.startswith("--"):
            action = parser.option(word)
            known = "=" in word or action is not None
            takes_value = action is not None and action.nargs is None
            unknown_value = (
                not known and argv[at + 1 : at + 2] != [] and (argv[at + 1] not in command_names())
            )
            skip = takes_value or unknown_value
        else:
            action, rest = _last_short(parser, word)
            skip = action is not None and action.nargs is None and not rest
    return None


def _last_short(parser: Parser, word: str) -> tuple[argparse.Action | None, str]:
    """Of a cluster like -rvp10809: the action that takes the rest as its value, and the rest."""
    action = None
    for i, letter in enumerate(word[1:], 2):
        action = parser.option("-" + letter)
        if action is None or action.nargs is None:
            return action, word[i:]
    return action, ""


def _normalise(parser: Parser, words: list[str]) -> list[str] | None:
    """Every argument as --option or --option=value; None if the layers' options are needed."""
    result: list[str] = []
    queue = list(reversed(words))
    options = True

    def value_of(name: str) -> str:
        if not queue:
            raise UsageError(f"{name}: its value is missing")
        return queue.pop()

    while queue:
        word = queue.pop()
        pair = _KEY_VALUE.fullmatch(word) if options else None
        if word == "--" and options:
            options = False
        elif word.startswith("--") and options:
            name, equals, _ = word.partition("=")
            action = parser.option(name)
            if action is None:
                if parser.option("--filter") is None:
                    return None
                near = _near(name, parser._option_string_actions, parser)
                raise UsageError(f"{name}: no such option{near}")
            if action.nargs == "?" and not equals:
                word = name + "=on"
            elif action.nargs is None and not equals:
                word = f"{name}={value_of(name)}"
            elif action.nargs == 0 and equals:
                raise UsageError(f"{name}: takes no value")
            result.append(word)
        elif word.startswith("-") and word != "-" and options:
            for i, letter in enumerate(word[1:], 2):
                action = parser.option("-" + letter)
                if action is None:
                    raise UsageError(f"-{letter}: no such option; see nbdtool --help")
                long = action.option_strings[-1 if action.option_strings[0][:2] == "--" else 1]
                if action.nargs is None:
                    result.append(f"{long}={word[i:] or value_of('-' + letter)}")
                    break
                result.append(long)
        elif pair and pair[1] in parser.keys:
            result.append("--" + word)
        elif pair:
            if parser.option("--filter") is None:
                return None
            near = _near(pair[1] + "=", sorted(key + "=" for key in parser.keys), parser)
            raise UsageError(
                f"{pair[1]}=: no such key{near}; a file of that name is given as ./{word}"
            )
        else:
            if not parser.magic:
                raise UsageError(f"{word}: what is this? See nbdtool --help")
            result.append(f"--{parser.magic}={word}")
    sources = [word for word in result if word.startswith(f"--{parser.magic}=")]
    if len(sources) > 1 and parser.magic:
        action = parser.option("--" + parser.magic)
        if not isinstance(action, argparse._AppendAction):
            surplus = sources[1].partition("=")[2]
            raise UsageError(f"{surplus}: there is one {parser.magic} already")
    return result


def _near(name: str, known: Iterable[str], parser: Parser) -> str:
    near = _close(name, known, 0.6)
    return f"; did you mean {near}?" if near else f"; see {parser.prog} --help"


def _close(name: str, known: Iterable[str], likeness: float) -> str | None:
    import difflib  # slow to load, and seldom needed

    return next(iter(difflib.get_close_matches(name, list(known), 1, likeness)), None)


# What the command line asks for


def open_disks(command: str, args: argparse.Namespace) -> dict[str, Disk]:
    """Open the source and put the layers on it, each export apart.

    args.writable says whether the source is to be written.
    """
    chain = _chain(args)
    reading = args.read_only or args.to_file is not None
    args.writable = not (reading or any(getattr(layer, "READS_ONLY", False) for layer, _ in chain))
    disks: dict[str, Disk] = command_module(command).open(args)
    try:
        for layer, value in chain:
            for name in disks:
                disks[name] = layer.open(disks[name], value, args)
    except BaseException:
        for disk in disks.values():
            disk.close()
        raise
    return disks


def _chain(args: argparse.Namespace) -> list[tuple[ModuleType, Any]]:
    """The layers with their values, from the source outward."""
    given: list[tuple[ModuleType, Any]] = getattr(args, "layers", [])
    names: list[str] = getattr(args, "filter", [])
    if not names:
        _refuse_idle(args, given)
        return given
    known = _filters()
    chain = []
    for name in reversed(names):
        if name not in known:
            raise UsageError(f"--filter={name}: no such filter; there are {', '.join(known)}")
        layer = known[name]
        configured = [value for module, value in given if module is layer]
        if layer.ARGUMENT.get("nargs") == "?":
            configured = [True]
        if not configured:
            raise UsageError(f"--filter={name}: needs {layer.OPTION[2:]}=")
        chain.append((layer, configured[-1]))
    for layer, _ in given:
        if layer.ARGUMENT.get("nargs") == "?":
            raise UsageError(
                f"{layer.OPTION} doesn't go with --filter; add --filter={layer.FILTER}"
            )
        if layer not in [module for module, _ in chain]:
            raise UsageError(f"{layer.OPTION[2:]}= needs --filter={layer.FILTER} beside the others")
    _refuse_idle(args, chain)
    return chain


def _refuse_idle(args: argparse.Namespace, chain: list[tuple[ModuleType, Any]]) -> None:
    """UsageError if an option of a layer is given that isn't there: --cow-save without --cow."""
    there = [layer for layer, _ in chain]
    for name, layer in args.parser.configures.items():
        if not hasattr(layer, "OPTION") or layer in there:
            continue
        dest = args.parser.option(name).dest
        if getattr(args, dest) != args.parser.get_default(dest):
            raise UsageError(f"{name}: needs {layer.OPTION} or --filter={layer.FILTER}")


def print_help(command: str | None, args: argparse.Namespace) -> None:
    print(args.parser.format_help(), end="")
    if command is None:
        print("\nsubcommands (nbdtool --help COMMAND tells more):")
        for name in command_names():
            print(f"  {name:<12}{command_module(name).SUMMARY}")


def print_config() -> None:
    """--dump-config: name=value lines for scripts."""
    import ssl

    for name, value in {
        "version": __version__,
        "python": sys.version.split()[0],
        "commands": " ".join(command_names()),
        "filters": " ".join(_filters()),
        "tls": "yes",
        "tls_psk": "yes" if getattr(ssl, "HAS_PSK", False) else "no",
        "default_port": 10809,
    }.items():
        print(f"{name}={value}")
