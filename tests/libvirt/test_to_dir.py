"""All disks of a guest into a directory, verified, against a real libvirtd."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.libvirt.rig import Rig, disk

pytestmark = pytest.mark.slow

MIB = 1 << 20


def test_each_disk_has_its_file(
    rig: Rig,
    raw_image: Path,
    chain: list[Path],
    backing_chain: str,
    tmp_path: Path,
    nbdtool: Any,
    compare: Any,
    run: Any,
) -> None:
    folder, rescued = tmp_path / "new" / "backup", tmp_path / "rescued"
    disks = (disk(raw_image), disk(chain[0], "sda", "qcow2", backing_chain))
    with rig.guest("two", *disks):
        words = ("libvirt", "two", f"connect={rig.uri}")
        done = nbdtool(*words, "--to-file", tmp_path / "out", status=2)
        assert "here are vda, sda; choose one, or write all with --to-dir" in done.stderr
        done = nbdtool(*words, "--to-dir", folder, "--verify", "--sha256", status=0)
        assert run("sha256sum", "-c", input=done.stdout).count(": OK\n") == 2
        assert sorted(os.listdir(folder)) == ["sda.img", "vda.img"]
        compare(folder / "vda.img", raw_image)
        compare(folder / "sda.img", chain[0], "qcow2")
        assert (folder / "vda.img").stat().st_blocks * 512 < 5 * MIB  # the hole stays one

        lines = map(str.split, done.stdout.splitlines())
        digests = {os.path.basename(path): digest for digest, path in lines}
        done = nbdtool(*words, "--to-dir", rescued, "--rescue=map", "--json",
                       "--sha256", status=0)  # fmt: skip
        assert sorted(os.listdir(rescued)) == ["sda.img", "sda.img.map", "vda.img", "vda.img.map"]
        last = json.loads(done.stdout.splitlines()[-1])
        assert {os.path.basename(file["file"]): file["sha256"] for file in last["files"]} == digests
        assert {file["export"]: file["bad"] for file in last["files"]} == {"vda": 0, "sda": 0}
