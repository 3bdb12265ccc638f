# nbdtool: `make` builds dist/nbdtool, one executable file; `make help` lists the rest.

PYTHON = /usr/bin/python3
PYTHONS = 3.9 3.10 3.11 3.12 3.13
PREFIX = /usr/local
DESTDIR =
ROWS =

BIN = .venv/bin
SOURCES := $(shell find nbdtool -name '*.py') pyproject.toml README.md LICENSE
FUZZ_EXAMPLES = 20000

.PHONY: all check check-quick check-pythons format lint bench fuzz man install clean help

all: dist/nbdtool

dist/nbdtool: .venv/built $(SOURCES) tools/build_zipapp.py tools/bootstrap.py tools/carried.txt
	$(BIN)/python tools/build_zipapp.py $@

.venv/built: tools/build.txt
	tools/venv $(PYTHON) .venv tools/build.txt
	touch $@

.venv/checked: tools/check.txt .venv/built
	tools/venv $(PYTHON) .venv tools/check.txt
	touch $@

# What the tests need from the system; done at once when it is all there.
.PHONY: packages
packages:
	@tools/packages $$(grep -v '^#' tools/check-packages.txt)

lint: .venv/checked
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/checked
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: packages lint dist/nbdtool man
	tools/check all $(BIN)/pytest

check-quick: packages lint dist/nbdtool man
	tools/check quick $(BIN)/pytest -m "not slow"

check-pythons: packages .venv/checked dist/nbdtool
	tools/check-pythons $(PYTHONS)

bench: packages .venv/checked dist/nbdtool
	$(BIN)/python -m bench $(ROWS)

fuzz: .venv/checked
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/pytest --timeout=0 -m fuzz

man: dist/man/built

dist/man/built: .venv/built $(SOURCES) tools/build_manpages.py $(wildcard man/*)
	$(BIN)/python tools/build_manpages.py $(@D)
	touch $@

install: dist/nbdtool man
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/man/man1
	install -m 755 dist/nbdtool $(DESTDIR)$(PREFIX)/bin/nbdtool
	install -m 644 dist/man/*.1 $(DESTDIR)$(PREFIX)/share/man/man1

clean:
	rm -rf dist .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

help:
	@echo 'make                  build dist/nbdtool, one executable file'
	@echo 'make check            format, lint, types and all tests (installs what they need)'
	@echo 'make check-quick      the same without the slow tests'
	@echo 'make check-pythons    the executable under each of PYTHONS="$(PYTHONS)"'
	@echo 'make bench            measure against nbdkit, qemu-nbd and mke2fs; ROWS="name ..." picks rows'
	@echo 'make fuzz             attack it with FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) random cases'
	@echo 'make man              build the manual pages in dist/man'
	@echo 'make install          install below DESTDIR=$(DESTDIR) PREFIX=$(PREFIX)'
	@echo 'make clean            remove what was built'
