"""What libvirt's storage pools know of images: their volumes (formatstorage.html of libvirt)."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any, Optional

from nbdtool.disks.libvirt.guests import GuestDisk, Image
from nbdtool.disks.libvirt.link import Link, module

_LONGEST = 200  # images in a chain


def resolve(link: Link, disk: GuestDisk) -> GuestDisk:
    """The disk with the paths of its volumes, and with the backing images that pools name.

    libvirt doesn't write the chain of a stopped guest into its XML, but a volume has its backing
    image in its own. That one counts if it is a volume too: no image alone says what is read.
    """
    chain = link.call(lambda connection: [_place(connection, image) for image in disk.chain])
    while not disk.complete and chain[-1].format == "qcow2" and len(chain) < _LONGEST:
        backing = link.call(lambda connection: _backing(connection, chain[-1]))
        if backing is None:
            break
        chain.append(backing)
    return replace(disk, chain=tuple(chain))


def volume_of(connection: Any, image: Image) -> Any:
    """The virStorageVol that holds an image; None if no active pool does."""
    try:
        if image.type == "volume" and image.pool:
            pool = connection.storagePoolLookupByName(image.pool)
            return pool.storageVolLookupByName(image.path)
        return connection.storageVolLookupByPath(image.path)
    except module().libvirtError as exc:
        # VIR_ERR_NO_STORAGE_POOL, VIR_ERR_NO_STORAGE_VOL, and a driver without storage
        if exc.get_error_code() in (49, 50, 3):
            return None
        raise


def _place(connection: Any, image: Image) -> Image:
    if image.type != "volume":
        return image
    volume = volume_of(connection, image)
    if volume is None:
        return image
    kind = {0: "file", 1: "block"}.get(volume.info()[0], "volume")  # virStorageVolType
    return replace(image, type=kind, path=volume.path())


def _backing(connection: Any, image: Image) -> Optional[Image]:
    volume = volume_of(connection, image)
    if volume is None:
        return None
    root = ET.fromstring(volume.XMLDesc(0))
    path = root.findtext("backingStore/path")
    form = root.find("backingStore/format")
    if not path or form is None:
        return None
    backing = Image("file", path, form.get("type", "raw"))
    return backing if volume_of(connection, backing) is not None else None
