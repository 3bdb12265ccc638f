"""What is in an image: its layers and their files, as a table or as JSON."""

from __future__ import annotations

import json
import os
from typing import Any

from nbdtool.errors import Error
from nbdtool.layers.tar import walk as tar
from nbdtool.progress import human
from nbdtool.registry.decompress import compression
from nbdtool.registry.fetch import open_layer
from nbdtool.registry.manifest import Image, Source
from nbdtool.table import printable

_MAX_ENTRIES = 1_000_000
_MAX_NAMES = 256 << 20  # bytes
_TYPES = {
    tar.REGULAR: "file",
    tar.DIRECTORY: "directory",
    tar.SYMBOLIC_LINK: "symlink",
    tar.HARD_LINK: "hardlink",
    tar.CHARACTER_DEVICE: "character device",
    tar.BLOCK_DEVICE: "block device",
    tar.FIFO: "fifo",
}


def listing(source: Source, image: Image, *, as_json: bool) -> str:
    """The layers, the lowest first, and what their archives have; raises Error."""
    layers = []
    entries = names = 0
    for number, descriptor in enumerate(image.layers):
        files: list[dict[str, Any]] = []
        with open_layer(source, image, number) as layer:
            for member in tar.walk(
                tar.StreamSource(layer), f"{source.description}, layer {number}"
            ):
                files.append(_entry(member))
                entries, names = entries + 1, names + len(member.name) + len(member.link)
                if entries > _MAX_ENTRIES or names > _MAX_NAMES:
                    raise Error(f"{source.description}: has too many files to list")
        layers.append(
            {
                "layer": number,
                "digest": descriptor.digest,
                "media_type": descriptor.media_type,
                "size": descriptor.size,
                "unpacked_size": layer.length,
                "files": files,
            }
        )
    if as_json:
        content = {
            "name": source.description,
            "digest": image.digest,
            "platform": image.platform,
            "layers": layers,
        }
        return json.dumps(content, indent=2) + "\n"
    head = f"{source.description}  {image.digest}" + (image.platform and f"  {image.platform}")
    lines = [head]
    for layer_ in layers:
        lines += _table(layer_)
    return "".join(f"{printable(line)}\n" for line in lines)


def _entry(member: tar.Member) -> dict[str, Any]:
    kind = _TYPES.get(member.type, "other")
    entry = {"name": os.fsdecode(member.name), "type": kind, "size": member.size}
    if member.link and kind in ("symlink", "hardlink"):
        entry["target"] = os.fsdecode(member.link)
    return entry


def _table(layer: dict[str, Any]) -> list[str]:
    how = compression(layer["media_type"])
    packed = f"{how}, {human(layer['size'])}, unpacked " if how != "none" else ""
    lines = [f"layer {layer['layer']}  {layer['digest']}  {packed}{human(layer['unpacked_size'])}"]
    for entry in layer["files"]:
        shown = human(entry["size"]) if entry["type"] == "file" else entry["type"]
        target = f" -> {entry['target']}" if "target" in entry else ""
        lines.append(f"{shown:>16}  {entry['name']}{target}")
    return lines
