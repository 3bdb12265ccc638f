"""The command line: where options may stand, nbdkit's key=value spelling, and what is asked for.

argparse's subparsers would let their defaults overwrite what stood before the subcommand, so a
first pass finds the subcommand and writes every argument as --option=value; then one parser reads
the whole as one list.
"""

from __future__ import annotations

import argparse
import os
import re
import stat
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from nbdtool import __version__
from nbdtool.disk import Disk
from nbdtool.errors import UsageError
from nbdtool.options import (
    Parser,
    build_parser,
    closest,
    command_module,
    command_names,
    filters,
)

_KEY_VALUE = re.compile(r"([A-Za-z][\w.-]*)=(.*)", re.DOTALL)


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
    near = closest(name, known)
    return f"; did you mean {near}?" if near else f"; see {parser.prog} --help"


# What the command line asks for


def settle(args: argparse.Namespace) -> None:
    """UsageError for options that don't go together: found before a source is opened.

    With --to-dir, args.to_file becomes the target of a disk without a name.
    """
    if args.to_dir is not None:
        if args.to_file is not None:
            raise UsageError("--to-file and --to-dir: choose one")
        args.to_file = os.path.join(args.to_dir, "disk.img")
    writes = args.to_file is not None
    for needed, there, names in (
        ("--to-file or --to-dir", writes, ("verify", "sha256", "rescue")),
        ("--to-file, --to-dir or --list", writes or getattr(args, "list", False), ("json",)),
        ("--rescue", args.rescue is not None, ("retries", "read_timeout", "fill")),
    ):
        for name in () if there else names:
            if _given(args, name):
                raise UsageError(f"{_spelling(name)}: needs {needed}")
    for name in ("port", "ip_addr", "unix", "stdin", "run", "fork", "pid_file") if writes else ():
        if _given(args, name):
            option = "--to-file" if args.to_dir is None else "--to-dir"
            raise UsageError(f"{option} writes and exits; {_spelling(name)} serves")
    if args.verify:
        _refuse_stream(args.to_file)
    if args.rescue is not None:
        _refuse_with_rescue(args)


def _given(args: argparse.Namespace, name: str) -> bool:
    return bool(getattr(args, name) != args.parser.get_default(name))


def _spelling(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse_stream(target: str) -> None:
    from nbdtool.outputs import file_type

    try:
        kind = stat.S_IFIFO if target == "-" else file_type(target)
    except OSError:
        return  # the writer says so
    if kind not in (stat.S_IFREG, stat.S_IFBLK):
        raise UsageError(f"--verify: {target} can't be read back; give a file or a block device")


def _refuse_with_rescue(args: argparse.Namespace) -> None:
    if not args.rescue:
        raise UsageError("--rescue: its value is missing")
    if args.verify:
        raise UsageError("--verify would read a failing source again; --sha256 reads the target")
    if args.to_file == "-":
        raise UsageError("--rescue writes in no order, so that - won't do; give a file")
    if args.to_dir is None and os.path.realpath(args.rescue) == os.path.realpath(args.to_file):
        raise UsageError(f"{args.rescue}: is the target; give the map file a name of its own")
    # Behind a file's name in the directory: nothing else may come of it.
    if args.to_dir is not None and not re.fullmatch(r"(?!img)[\w-]+", args.rescue, re.ASCII):
        raise UsageError(
            f"--rescue={args.rescue}: with --to-dir, this is the ending of the maps' names, such as"
            " map"
        )


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
    known = filters()
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
        if _given(args, args.parser.option(name).dest):
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
        "filters": " ".join(filters()),
        "tls": "yes",
        "tls_psk": "yes" if getattr(ssl, "HAS_PSK", False) else "no",
        "default_port": 10809,
    }.items():
        print(f"{name}={value}")
