"""Build the manual pages: build_manpages.py DIRECTORY.

argparse-manpage reads the parsers that the program itself uses, so that no option is missing; what
options can't say is in man/NAME.inc (argparse-manpage(1), "--include"). nbdtool(1) has the options
that every source shares, nbdtool-SOURCE(1) those of one source.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from argparse_manpage.manpage import Manpage  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nbdtool import __version__, options  # noqa: E402

SUMMARY = "turn an unusual source into a disk, and serve it over NBD or write it to a file"


def summary(command: str) -> str:
    text: str = import_module(f"nbdtool.commands.{command}").SUMMARY
    return text


def page(command: str | None) -> tuple[str, str]:
    """The name of a page, and its text for man(1)."""
    parser = options.build_parser(command)
    if command is not None:
        parser.prog = f"nbdtool-{command}"
        own = [group for group in parser._action_groups if group.title and command in group.title]
        for group in own:
            group.title = "parameters"
            group.description = "Each is given as KEY=VALUE or as --KEY=VALUE."
        parser._action_groups = own
    prose = ROOT / "man" / f"{parser.prog}.inc"
    if prose.exists():
        parser.description = None
    manual = Manpage(parser)
    if prose.exists():
        manual.parse_include(prose)
    manual.description = summary(command) if command else SUMMARY
    manual.manual = "nbdtool"
    manual.source = f"nbdtool {__version__}"
    head, _, body = str(manual).partition("\n")
    return parser.prog, head.replace("\\-", "-") + "\n" + with_sources(body)


def with_sources(text: str) -> str:
    """Put the list of the sources, and that of their pages, where the prose wants them."""
    sources = [
        f'.TP\n.BR {name} " [" nbdtool\\-{name} (1)]\n{summary(name)}'
        for name in options.command_names()
    ]
    pages = [f".BR nbdtool\\-{name} (1)," for name in options.command_names()]
    return text.replace("@SOURCES@", "\n".join(sources)).replace("@PAGES@", "\n".join(pages))


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for command in (None, *options.command_names()):
        name, text = page(command)
        (directory / f"{name}.1").write_text(text)


if __name__ == "__main__":
    main()
