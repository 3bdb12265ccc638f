"""nbdtool libvirt --list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.libvirt.rig import Rig, disk

pytestmark = pytest.mark.slow

MIB = 1 << 20


def test_table_and_json(rig: Rig, raw_image: Path, chain: list[Path], nbdtool: Any) -> None:
    disks = (
        disk(raw_image, "vda"),
        disk(chain[2], "vdb", "qcow2"),
        disk("/nonexistent/x", "vdc"),
        disk("", "sda", device="cdrom"),
    )
    connect = f"connect={rig.uri}"
    with rig.guest("listed", *disks), rig.guest("other"), rig.guest("up", start=True):
        table = nbdtool("libvirt", "--list", connect, status=0).stdout.splitlines()
        assert [line.split() for line in table] == [
            ["GUEST", "STATE", "DISK", "FORMAT", "CAPACITY", "SOURCE"],
            ["listed", "shut", "off", "vda", "raw", "8.0", "MiB", str(raw_image)],
            ["vdb", "qcow2", "8.0", "MiB", str(chain[2])],
            ["vdc", "raw", "-", "/nonexistent/x"],
            ["sda", "-", "-", "-"],
            ["other", "shut", "off", "-", "-", "-", "-"],
            ["up", "running", "-", "-", "-", "-"],
        ]
        told = json.loads(
            nbdtool("libvirt", "--list", "--json", "listed", connect, status=0).stdout
        )
        assert [guest["name"] for guest in told] == ["listed"]
        assert told[0]["state"] == "shut off" and told[0]["id"] is None
        assert told[0]["disks"][1] == {
            "target": "vdb",
            "device": "disk",
            "source": str(chain[2]),
            "format": "qcow2",
            "capacity": 8 * MIB,
        }
        assert [each["capacity"] for each in told[0]["disks"][2:]] == [None, None]
        done = nbdtool("libvirt", "--list", "nobody", connect, status=1)
        assert "no such guest; there are listed, other, up" in done.stderr
        assert "--json: needs" in nbdtool("libvirt", "up", "--json", status=2).stderr
