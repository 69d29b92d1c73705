# make demo: distil a student on handwritten digits.  make test: every check.  make quality: the missing cells of the
# quality table, and the table.  All install what they need into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quality install clean

demo: install
	$(BIN)/python scripts/demo.py

test: install
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check.sh

quality: install
	$(BIN)/python scripts/bench_quality.py
	$(BIN)/python scripts/make_tables.py

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make: $(PYTHON) is older than Python 3.10; name another by PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv
