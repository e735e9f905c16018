# make demo        train, tune and compare on the embedded text (about ten minutes on two cores)
# make test        lint, type-check and test, CPU only
# make test-slow   the long runs: kills by the hundred, several processes, every documented command
# Each makes .venv and installs what it needs, once.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test test-slow lint clean
demo: $(VENV)/.core
	$(PY) scripts/demo.py

test: $(VENV)/.dev lint
	$(PY) -m pytest -n 2

test-slow: $(VENV)/.dev
	$(PY) -m pytest -m slow

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# A stamp names the requirements that it was made from, so that a second run installs nothing.
$(VENV)/.core: requirements.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.core
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
