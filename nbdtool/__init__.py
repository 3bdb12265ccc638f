"""nbdtool: turn an unusual source into a disk, and serve it over NBD or write it to a file."""

__version__ = "0.1.0"
