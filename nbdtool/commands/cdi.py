"""nbdtool cdi: the disk in a container image."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nbdtool.disk import Disk
from nbdtool.errors import UsageError
from nbdtool.values import add_flag, count, size

if TYPE_CHECKING:
    from nbdtool.registry.manifest import Image, Source

SUMMARY = "serve the disk in a container image, from a registry or an archive"
MAGIC = "name"


def add_arguments(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    add(
        "--name",
        metavar="NAME",
        help="the image: [docker://]NAME[:TAG|@DIGEST] in a registry, oci:DIR[:TAG],"
        " oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], dir:DIR or containers-storage:NAME",
    )
    add(
        "--layer",
        type=_layer,
        metavar="N",
        help="serve this layer as a tar archive (0, the first; -1 is the last)",
    )
    add_flag(
        parser,
        "--find-disk",
        help="serve the disk of a virtual machine: the file below disk/ in the topmost layer that"
        " has one, qcow2 decoded",
    )
    add_flag(parser, "--raw", help="with --find-disk, serve that file as it is")
    add_flag(parser, "--list", help="print the layers and their files, and exit")
    add("--platform", metavar="OS/ARCH[/VARIANT]", help="of an image for several (linux, this one)")
    add("--creds", metavar="USER[:PASSWORD]", help="log in to the registry; a password that is left"
        " out is asked for")  # fmt: skip
    add("--authfile", metavar="FILE", help="where logins are, instead of podman's and docker's")
    add("--cert-dir", metavar="DIR", help="certificates (*.crt, *.cert, *.key) for the registry")
    add_flag(
        parser, "--tls-verify", default=None, help="off: any certificate will do, or plain HTTP"
    )
    add_flag(
        parser,
        "--insecure-policy",
        help="use images of which policy.json demands signatures, which aren't checked",
    )
    add(
        "--retry",
        type=count("retries", 0, 100),
        default=3,
        metavar="N",
        help="tries after a failure (3)",
    )
    add("--max-size", type=size, metavar="SIZE", help="refuse what is bigger, unpacked")


def _layer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a layer: {text!r} (like 0, 1 or -1)") from None


def open(args: argparse.Namespace) -> dict[str, Disk]:
    from nbdtool.registry import fetch

    if args.find_disk and args.layer is not None:
        raise UsageError("--find-disk finds the layer itself; leave out layer=")
    if args.raw and not args.find_disk:
        raise UsageError("--raw goes with --find-disk")
    source, image = _image(args)
    try:
        if args.find_disk:
            return {"": _find_disk(source, image, args)}
        number = _number(image, args.layer or 0)
        disk = fetch.spool_layer(source, image, number, args.max_size)
    finally:
        source.close()
    disk.description = f"{source.description}, layer {number} of {len(image.layers)}"
    if not getattr(args, "layers", None) and not getattr(args, "filter", None):
        disk.description += ", a tar archive (--find-disk serves the disk in it)"
    return {"": disk}


def listing(args: argparse.Namespace) -> str:
    """What --list prints; raises Error."""
    from nbdtool.registry import contents

    source, image = _image(args)
    try:
        return contents.listing(source, image, as_json=args.json)
    finally:
        source.close()


def _image(args: argparse.Namespace) -> tuple[Source, Image]:
    from nbdtool.registry import manifest, sources

    if args.name is None:
        raise UsageError("which image? Give its name: nbdtool cdi HOST/PATH:TAG")
    platform = manifest.Platform.parse(args.platform) if args.platform else None
    return sources.open_image(
        args.name,
        platform,
        sources.Options(
            creds=args.creds,
            authfile=args.authfile,
            cert_dir=args.cert_dir,
            tls_verify=args.tls_verify,
            insecure_policy=args.insecure_policy,
            retries=args.retry,
        ),
    )


def _number(image: Image, layer: int) -> int:
    """The layer counted from the first; UsageError if there is none of that number."""
    count = len(image.layers)
    if not -count <= layer < count:
        those = f"{count} layers, 0 to {count - 1}" if count else "no layers"
        raise UsageError(f"layer={layer}: the image has {those}")
    return layer % count


def _find_disk(source: Source, image: Image, args: argparse.Namespace) -> Disk:
    from nbdtool.layers import qcow2
    from nbdtool.layers.qcow2.header import is_qcow2
    from nbdtool.registry import finder

    disk = finder.find_disk(source, image, args.max_size)
    name = disk.description
    if args.raw:
        disk.description = f"{name}, as it is"
        return disk
    if is_qcow2(disk):
        options = argparse.ArgumentParser(add_help=False)
        qcow2.add_arguments(options)
        disk = qcow2.open(disk, True, options.parse_args([], args))
        disk.description = f"{name}, qcow2"
        return disk
    finder.refuse_other_formats(disk)
    disk.description = f"{name}, raw"
    return disk
