"""The command line: where options may stand, how they are spelt, and what is said of mistakes."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest

from nbdtool import __main__, cli
from nbdtool.disk import Disk
from nbdtool.errors import Error, UsageError

Run = Callable[..., Any]


def parsed(*words: str) -> Any:
    command, args = cli.parse(list(words))
    args.command = command
    return args


def refused(*words: str) -> str:
    with pytest.raises(UsageError) as error:
        cli.parse(list(words))
    text = str(error.value)
    assert "\n" not in text
    return text


# Where options stand


@pytest.mark.parametrize(
    "words",
    [
        "-r -p 10810 file disk.img",
        "file -r -p 10810 disk.img",
        "file disk.img -r -p 10810",
        "file disk.img --read-only --port 10810",
        "-rp 10810 file disk.img",
        "-rp10810 file disk.img",
        "--port=10810 file --readonly file=disk.img",
        "-p10810 -r file --file disk.img",
        "-p 10810 file -r --file=disk.img",
        "-p 1 -p 10810 -r file disk.img",
        "-r file -p 10810 -- disk.img",
    ],
)
def test_options_stand_before_or_after_the_subcommand(words: str) -> None:
    args = parsed(*words.split())
    assert (args.command, args.file, args.port, args.read_only) == ("file", "disk.img", 10810, True)
    assert not args.verbose


def test_a_value_is_not_taken_for_the_subcommand() -> None:
    args = parsed("-e", "linuxdisk", "--run", "file", "-U", "-", "file", "file")
    assert (args.command, args.file, args.export_name) == ("file", "file", "linuxdisk")
    assert (args.run, args.unix) == ("file", "-")


def test_layers_options_stand_before_the_subcommand_too() -> None:
    for words in ["--partition 2 file disk", "file disk --partition=2", "file disk partition=2"]:
        args = parsed(*words.split())
        assert args.command == "file"
        assert [value for _, value in args.layers] == ["2"]


def test_layers_keep_their_order() -> None:
    args = parsed("file", "disk", "cow=on", "partition=1")
    assert [module.__name__.rpartition(".")[2] for module, _ in args.layers] == ["cow", "partition"]
    args = parsed("file", "disk", "partition=1", "--cow", "cow=off")
    assert [module.__name__.rpartition(".")[2] for module, _ in args.layers] == ["partition", "cow"]


# key=value


@pytest.mark.parametrize(
    ("word", "path"),
    [
        ("disk.img", "disk.img"),
        ("file=a=b", "a=b"),
        ("./a=b", "./a=b"),
        ("/a=b", "/a=b"),
        ("--file=", ""),
        ("-", "-"),
        ("ä=b", "ä=b"),
        ("1=2", "1=2"),
        ("=x", "=x"),
    ],
)
def test_what_the_bare_argument_may_be(word: str, path: str) -> None:
    assert parsed("file", word).file == path


def test_after_two_dashes_all_is_the_bare_argument() -> None:
    assert parsed("file", "--", "-r").file == "-r"
    assert parsed("file", "--", "dir=x").file == "dir=x"
    assert not parsed("file", "--", "-r").read_only


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["allow-live=on"], True),
        (["allow-live=0"], False),
        (["--allow-live"], True),
        (["--allow-live=no"], False),
        (["--allow-live", "allow-live=off"], False),
        ([], False),
    ],
)
def test_booleans(words: list[str], expected: bool) -> None:
    assert parsed("file", "disk", *words).allow_live is expected


def test_unknown_keys_name_the_nearest() -> None:
    text = refused("file", "disk", "alow-live=on")
    assert "alow-live=" in text
    assert "allow-live=" in text
    assert "./alow-live=on" in text
    assert "partition=" in refused("file", "disk", "partiton=1")
    assert "--read-only" in refused("file", "disk", "--read-onyl")
    refused("file", "disk", "port=10810")  # an option of the server's is no key
    refused("file", "disk", "x=1")


def test_options_are_not_abbreviated() -> None:
    assert "--port" in refused("file", "disk", "--por=1")
    refused("file", "disk", "--read")
    refused("file", "disk", "--part=1")


@pytest.mark.parametrize(
    "words",
    [
        ["file", "one", "two"],
        ["file", "one", "file=two"],
        ["file", "--file", "one", "two"],
        ["fiel", "disk"],
        ["file=disk"],
        ["nosuch", "disk"],
        ["../file", "disk"],
        ["file.x", "disk"],
        ["", "disk"],
        ["file", "disk", "-p"],
        ["file", "disk", "--port"],
        ["file", "disk", "-p", "x"],
        ["file", "disk", "-p", "65536"],
        ["file", "disk", "-p", "-1"],
        ["file", "disk", "-p", ""],
        ["file", "disk", "-Z"],
        ["file", "disk", "-rZ"],
        ["file", "disk", "--verbose=yes"],
        ["file", "disk", "--tls=maybe"],
        ["file", "disk", "--timeout=0"],
        ["file", "disk", "--timeout=nan"],
        ["file", "disk", "--timeout=x"],
        ["file", "disk", "--max-connections=0"],
        ["file", "disk", "--max-connections=-1"],
        ["file", "disk", "--unix-mode=8"],
        ["file", "disk", "--unix-mode=rw"],
        ["file", "disk", "allow-live=perhaps"],
        ["file", "disk", "--allow-live=perhaps"],
    ],
)
def test_what_cannot_be_understood_is_wrong_usage(words: list[str]) -> None:
    refused(*words)


def test_mistyped_subcommands_name_the_nearest() -> None:
    assert "did you mean file?" in refused("fiel", "disk")
    assert "did you mean linuxdisk?" in refused("linux-disk", "x")
    assert "file, " in refused("zzz")


# nbdkit's spellings


@pytest.mark.parametrize(
    ("name", "value", "spellings"),
    [
        ("export_name", "x", ["-e", "--export", "--export-name", "--exportname"]),
        ("group", "x", ["-g", "--group"]),
        ("user", "x", ["-u", "--user"]),
        ("ip_addr", "x", ["-i", "--ip-addr", "--ipaddr"]),
        ("pid_file", "x", ["-P", "--pid-file", "--pidfile"]),
        ("port", "7", ["-p", "--port"]),
        ("unix", "x", ["-U", "--unix"]),
        ("run", "x y", ["--run"]),
        ("log", "x", ["--log"]),
        ("tls_psk", "x", ["--tls-psk"]),
        ("tls_certificates", "x", ["--tls-certificates"]),
        ("foreground", None, ["-f", "--foreground", "--no-fork"]),
        ("newstyle", None, ["-n", "--new-style", "--newstyle"]),
        ("oldstyle", None, ["-o", "--old-style", "--oldstyle"]),
        ("read_only", None, ["-r", "--read-only", "--readonly"]),
        ("stdin", None, ["-s", "--single", "--stdin"]),
        ("verbose", None, ["-v", "--verbose"]),
        ("version", None, ["-V", "--version"]),
        ("no_sr", None, ["--no-sr"]),
        ("exit_with_parent", None, ["--exit-with-parent"]),
        ("dump_config", None, ["--dump-config"]),
        ("help", None, ["--help"]),
    ],
)
def test_all_spellings(name: str, value: str | None, spellings: list[str]) -> None:
    for spelling in spellings:
        words = [spelling] if value is None else [spelling, value]
        for args in parsed(*words, "file", "disk"), parsed("file", "disk", *words):
            expected = True if value is None else int(value) if value.isdecimal() else value
            assert getattr(args, name) == expected
    assert getattr(parsed("file", "disk"), name) in (None, False, "stderr")


# Whole runs


def test_help_and_version(nbdtool: Run) -> None:
    help_ = nbdtool("--help", status=0).stdout
    for word in "--to-file", "--run", "file", "linuxdisk", "--partition":
        assert word in help_
    of_file = nbdtool("--help", "file", status=0).stdout
    assert "--allow-live" in of_file
    assert nbdtool("file", "--help", status=0).stdout == of_file
    assert nbdtool("file", "-r", "nothing", "--help", status=0).stdout == of_file
    version = nbdtool("--version", status=0).stdout
    assert re.fullmatch(r"nbdtool \d+\.\d+\S*\n", version)
    assert nbdtool("-V", status=0).stdout == version
    assert nbdtool("file", "-V", status=0).stdout == version


def test_dump_config(nbdtool: Run) -> None:
    lines = nbdtool("--dump-config", status=0).stdout.splitlines()
    config = dict(line.split("=", 1) for line in lines)
    assert "file" in config["commands"].split()
    assert "partition" in config["filters"].split()
    assert config["tls"] == "yes"
    assert config["version"]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["-r"],
        ["file"],
        ["-o", "-e", "name", "file", "IMAGE"],
        ["-o", "--tls=require", "file", "IMAGE"],
        ["-o", "--tls=on", "file", "IMAGE"],
        ["-U", "socket", "-p", "1", "file", "IMAGE"],
        ["-U", "socket", "-i", "::", "file", "IMAGE"],
        ["-s", "-p", "1", "file", "IMAGE"],
        ["-s", "-U", "-", "file", "IMAGE"],
        ["-s", "--run", "true", "file", "IMAGE"],
        ["--fork", "-s", "file", "IMAGE"],
        ["--fork", "--run", "true", "file", "IMAGE"],
        ["-4", "-6", "file", "IMAGE"],
        ["-e", "n" * 4097, "file", "IMAGE"],
        ["-e", b"\xff", "file", "IMAGE"],
        ["--to-file", "target", "-p", "1", "file", "IMAGE"],
        ["--to-file", "target", "-U", "-", "file", "IMAGE"],
        ["--to-file", "target", "-s", "file", "IMAGE"],
        ["--to-file", "target", "--run", "true", "file", "IMAGE"],
    ],
)
def test_wrong_usage_is_status_2_and_one_line(
    nbdtool: Run, tmp_path: Path, words: list[Any]
) -> None:
    (tmp_path / "image").write_bytes(bytes(512))
    words = [tmp_path / "image" if word == "IMAGE" else word for word in words]
    done = nbdtool(*words, status=2, cwd="/", stdin=subprocess.DEVNULL, timeout=20)
    assert re.fullmatch(r"nbdtool: error: [^\n]+\n", done.stderr)
    assert done.stdout == ""


def test_wrong_usage_is_found_before_a_source_is_opened(nbdtool: Run) -> None:
    for words in ["-o", "-e", "x"], ["-s", "-p", "1"], ["--to-file=x", "-p", "1"]:
        nbdtool("file", "/no/such/file", *words, status=2)


def test_what_a_terminal_would_obey_is_escaped(nbdtool: Run, run: Run, tmp_path: Path) -> None:
    evil = os.fsencode(tmp_path) + b"/\x1b[31m\nnbdtool: \x07 \xff"
    done = nbdtool("file", os.fsdecode(evil), status=1)
    assert re.fullmatch(r"nbdtool: error: [^\x00-\x1f]+\n", done.stderr)
    Path(os.fsdecode(evil)).write_bytes(bytes(1000))
    script = 'nbdinfo --list "$uri" >/dev/null'
    done = nbdtool("file", os.fsdecode(evil), "-U", os.fsdecode(evil) + ".s", "--run", script)
    assert done.returncode == 0
    assert re.fullmatch(r"nbdtool: warning: [^\x00-\x1f]+\n", done.stderr)


def test_the_start_line_escapes_names_too(serve: Run, tmp_path: Path) -> None:
    evil = tmp_path / "\x1b[31m\nred"
    evil.write_bytes(bytes(512))
    with serve("file", evil) as server:
        while "guestfish" not in server.log():
            pass
        assert "\x1b" not in server.log()
        assert server.log().count("\n") == 3


def test_a_socket_whose_name_is_not_utf_8(nbdtool: Run, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(512))
    path = os.fsencode(tmp_path) + b"/\xff\xfe"
    words = ["file", tmp_path / "image", "-U", os.fsdecode(path)]
    done = nbdtool(*words, "--print-uri", "--run", 'nbdinfo --size "$uri"', status=0)
    assert done.stdout.endswith("%FF%FE\n512\n")


@pytest.mark.parametrize("failing", ["flush", "close"])
def test_what_may_be_lost_at_the_end_is_told(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    class Failing(Disk):
        writable = True
        description = "the disk"

    def broken(self: Disk) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Failing, failing, broken)
    monkeypatch.setattr(cli, "open_disks", lambda command, args: {"": Failing()})
    text = r"the disk: Input/output error.*may be lost"
    with pytest.raises(Error, match=text), __main__._opened("file", SimpleNamespace()):
        pass
