"""--quiesce: the guest's agent freezes and thaws its filesystems, whatever happens between."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.libvirt.agent import Agent
from tests.libvirt.rig import Rig, disk

pytestmark = pytest.mark.slow

MIB = 1 << 20
ONCE = ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]


@pytest.fixture(scope="module")
def agent(rig: Rig, random_file: Any) -> Iterator[Agent]:
    """That of the running guest "frozen"."""
    image = random_file(rig.images / "frozen", 2 * MIB)
    image.chmod(0o666)
    with tempfile.TemporaryDirectory(prefix="nbdtool-agent-") as directory:
        Path(directory).chmod(0o777)
        agent = Agent(Path(directory))
        with rig.guest("frozen", disk(image), agent.channel, qemu=agent.qemu):
            with rig.connection() as connection:
                domain = connection.lookupByName("frozen")
                domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
                agent.open_channel(rig, "frozen")
                domain.resume()
            yield agent
        agent.close()


def test_frozen_while_the_backup_begins(agent: Agent, rig: Rig, nbdtool: Any) -> None:
    agent.heard.clear()
    words = ("libvirt", "frozen", f"connect={rig.uri}", "--quiesce", "--to-file", "/dev/null")
    nbdtool(*words, status=0)
    assert agent.heard == ONCE


def test_thawed_if_the_backup_cannot_begin(agent: Agent, rig: Rig, nbdtool: Any) -> None:
    agent.heard.clear()
    closed = rig.directory / "closed"  # to the guest's qemu
    closed.mkdir(mode=0o700)
    words = ("libvirt", "frozen", f"connect={rig.uri}", "--quiesce", f"--scratch-dir={closed}")
    done = nbdtool(*words, "--to-file", "-", status=1)
    assert "frozen: no backup: " in done.stderr and done.stderr.count("\n") == 1
    assert agent.heard == ONCE and list(closed.iterdir()) == []
