# `make inpaint` and `make test` are all that a fresh clone needs. Each target installs its packages into .venv first, unless they are there.

PYTHON ?= python3
VENV := .venv
# Not the scripts in $(VENV)/bin: they contain the folder's path and break when the repository is moved.
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --no-input
# One single-threaded process for each core, four at most. An idle process takes over tests from a busy one.
TESTS := OMP_NUM_THREADS=1 $(RUN) -m pytest --ignore=tests/browser -n auto --maxprocesses=4 --dist=worksteal

# Training: folders of pictures, the setting, where the runs are written, files of perceptual
# weights (default: downloaded), and flags of the scores.
TRAIN ?=
VAL ?=
CONFIG ?= configs/cat64.yml
RUNS ?= runs/$(basename $(notdir $(CONFIG)))
FLAGS ?=
PERCEPTUAL ?=
SECOND ?=
SCORES ?= --features none
FOLDERS = --train-dir $(TRAIN) --val-dir $(VAL) --resume auto $(FLAGS)
WEIGHTS = $(if $(PERCEPTUAL),--perceptual-weights $(PERCEPTUAL))

# One stamp for each set of packages. It is made only after pip has succeeded, so an interrupted installation starts again.
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
DEMO := $(VENV)/.installed-demo
BROWSER := $(VENV)/.installed-browser

.PHONY: help inpaint test demo test-demo coverage train reference folders
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo "make inpaint    complete the sample pictures, into out/"
	@echo "make test       lint and tests"
	@echo "make demo       the page in the browser"
	@echo "make test-demo  the page's tests in a real browser (needs chromium)"
	@echo "make coverage   tests, and the share of models/ and pictures/ that they run; fails below 90 %"
	@echo "make train TRAIN=PICTURES VAL=PICTURES       the default model, from nothing; repeat it to resume"
	@echo "make reference TRAIN=PICTURES VAL=PICTURES   the published setting, both stages"
	@echo "PYTHON=python3.12 before the first of them chooses another Python than python3."

inpaint: $(BASE)
	$(RUN) inpainting.py
	@echo "The completed pictures are in $(CURDIR)/out"

test: $(DEV)
	$(RUN) -m ruff check .
	$(TESTS)

demo: $(DEMO)
	$(RUN) -m demo

# pytest's exit code 5: no tests were run, as when chromium is missing.
test-demo: $(BROWSER)
	$(RUN) -m pytest tests/browser || [ $$? -eq 5 ]

coverage: $(DEV)
	$(TESTS) --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

# ---- training ----

folders: $(BASE)
	@[ -n "$(TRAIN)" ] && [ -n "$(VAL)" ] || { echo "Name the folders of pictures: make train TRAIN=data/train VAL=data/val"; exit 2; }

train: folders
	$(RUN) training_vqgan.py --config $(CONFIG) $(FOLDERS) $(WEIGHTS) --output-dir $(RUNS)/vqgan
	$(RUN) training_transformer.py --config $(CONFIG) $(FOLDERS) --vqgan $(RUNS)/vqgan/last.pt --output-dir $(RUNS)/maskgit
	$(RUN) training_finish.py --config $(CONFIG) $(FOLDERS) $(WEIGHTS) $(if $(SECOND),--second-weights $(SECOND)) \
		--model $(RUNS)/maskgit/maskgit.safetensors --vqgan $(RUNS)/vqgan/last.pt --output-dir $(RUNS)/finish
	$(RUN) -m tools.export --transformer $(RUNS)/maskgit/best.pt --vqgan $(RUNS)/finish/maskgit.safetensors --eight-bit --output $(RUNS)/model.safetensors
	[ -d $(RUNS)/masks ] || $(RUN) -m tools.dataset holes $(VAL) --output $(RUNS)/masks
	$(RUN) -m tools.ladder --checkpoint $(RUNS)/model.safetensors --originals $(VAL) --masks $(RUNS)/masks $(WEIGHTS) $(SCORES) --output $(RUNS)/scores
	@echo "The model is $(RUNS)/model.safetensors, its scores are in $(RUNS)/scores/ladder.md"

reference: CONFIG = configs/maskgit_reference.yml
reference: folders
	$(RUN) training_vqgan.py --config $(CONFIG) $(FOLDERS) $(WEIGHTS) --output-dir $(RUNS)/vqgan
	$(RUN) training_transformer.py --config $(CONFIG) $(FOLDERS) --vqgan $(RUNS)/vqgan/last.pt --output-dir $(RUNS)/maskgit

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
