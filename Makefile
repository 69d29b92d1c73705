# make demo: distil a student on handwritten digits.  make test: every check.  make docs: the site, build/site/index.html.
# make quality: the missing cells of the quality table, and the table.  make bench: speed and memory, PHOTOS being a
# folder of photographs.  All install what they need into .venv: about 6 GB, nearly all of it PyTorch for CUDA. For a
# small installation, first install the CPU build that https://pytorch.org/get-started/locally names into .venv.
PYTHON ?= python3
PHOTOS ?= ../shared/data/clothing
BIN := .venv/bin

.PHONY: demo test docs quality bench install clean

demo: install
	$(BIN)/python scripts/demo.py

test: install
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check.sh

docs: install
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/site
	@echo "build/site/index.html"

quality: install
	$(BIN)/python scripts/bench_quality.py
	$(BIN)/python scripts/bench_quality.py --suite clothing
	$(BIN)/python scripts/make_tables.py

bench: install
	$(BIN)/python scripts/bench_flow.py
	$(BIN)/python scripts/bench_step.py
	$(BIN)/python scripts/bench_memory.py
	$(BIN)/python scripts/bench_terms.py
	$(BIN)/python scripts/bench_growth.py
	@test -d $(PHOTOS) || echo "bench_reader.py and bench_start.py left out: no photographs at $(PHOTOS)"
	test ! -d $(PHOTOS) || $(BIN)/python scripts/bench_reader.py $(PHOTOS)
	test ! -d $(PHOTOS) || $(BIN)/python scripts/bench_start.py $(PHOTOS)
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
