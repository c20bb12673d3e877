# The two commands of a fresh machine: `make inpaint` and `make test`. Each sets up what it needs in .venv; what is there
# already is not installed again.

PYTHON ?= python3
VENV := .venv
# Not the scripts of $(VENV)/bin: they hold the folder's path, and break when the repository is moved.
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --no-input
# One process for each core, of one thread each. A process whose tests are done takes over half of those another still has.
TESTS := OMP_NUM_THREADS=1 $(RUN) -m pytest --ignore=tests/browser -n auto --maxprocesses=4 --dist=worksteal

# One stamp per set of packages, made only after pip has succeeded: an interrupted install is begun again, and a changed
# requirements file is installed again.
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
DEMO := $(VENV)/.installed-demo
BROWSER := $(VENV)/.installed-browser

.PHONY: help inpaint test demo test-demo coverage
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make inpaint    complete the sample pictures with the bundled weights, into out/"
	@echo "make test       lint and tests"
	@echo "make demo       the demo in the browser"
	@echo "make test-demo  the demo's tests in a real browser (needs chromium)"
	@echo "make coverage   tests, with the share of models/ and pictures/ that they run; fails below 90 %"
	@echo "PYTHON=python3.12 before the first of them picks another Python than python3."

inpaint: $(BASE)
	$(RUN) inpainting.py
	@echo "The completed pictures are in $(CURDIR)/out"

test: $(DEV)
	$(RUN) -m ruff check .
	$(TESTS)

demo: $(DEMO)
	$(RUN) -m demo

# Exit code 5 of pytest: nothing to run, as when every file of the folder is skipped as a whole.
test-demo: $(BROWSER)
	$(RUN) -m pytest tests/browser || [ $$? -eq 5 ]

coverage: $(DEV)
	$(TESTS) --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

# ---- set-up ----

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(BASE): requirements.txt | $(VENV)/.created
	$(PIP) -r requirements.txt
	@touch $@

$(DEV): requirements-dev.txt requirements-eval.txt $(BASE)
	$(PIP) -r requirements-dev.txt
	@touch $@

$(DEMO): requirements-demo.txt $(BASE)
	$(PIP) -r requirements.txt -r requirements-demo.txt
	@touch $@

$(BROWSER): requirements-browser.txt $(DEV) $(DEMO)
	$(PIP) -r requirements-browser.txt
	@touch $@
