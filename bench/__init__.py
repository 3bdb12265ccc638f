"""How nbdtool compares with its peers: `make bench`, or `python -m bench [ROW ...]`."""
