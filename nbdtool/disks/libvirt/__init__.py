"""The disks of libvirt's guests."""
