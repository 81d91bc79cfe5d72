# Two commands on a fresh machine: `make demo` and `make test`. Needs Python >= 3.11 and a network to PyPI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-heavy faults check docs format bench bench-trl experiments papers studies sizes weights clean

# The stamp says: this environment has what pyproject.toml and constraints.txt say, and the development tools.
$(VENV)/stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("chainrule needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/stamp ## fine-tune the bundled model, evaluate, write runs/demo/report.html
	$(BIN)/chainrule train examples/demo.yaml --overwrite
	$(BIN)/chainrule eval runs/demo --prompts animals:test --seeds 4
	$(BIN)/chainrule report runs/demo

test: $(VENV)/stamp ## the whole suite, on every core (at most eight: each process holds a gigabyte)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test-heavy: $(VENV)/stamp ## the same claims for further methods on every family, and over whole runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m heavy

faults: $(VENV)/stamp ## runs killed, disks filled, files damaged, input malformed, some 760 times; resumable, about half an hour
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m faults

check: $(VENV)/stamp ## formatting, lint, types, and the links between pages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/check_links.py

$(VENV)/docs: $(VENV)/stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/docs ## build the site into site/, without a network once its packages are there; a broken link fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --clean

format: $(VENV)/stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/stamp ## time ratios and memory; writes benchmarks/speed.md (needs a C++ compiler) and benchmarks/results.md
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.bench

# TRL 0.23.1 has AlignProp. It is kept out of the environment, and has the same versions of everything else.
$(VENV)-trl/stamp: $(VENV)/stamp
	test -x $(VENV)-trl/bin/python || $(PYTHON) -m venv $(VENV)-trl
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//' > $(VENV)-trl/pins.txt
	$(VENV)-trl/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)-trl/pins.txt trl==0.23.1 -e .
	touch $@

bench-trl: $(VENV)-trl/stamp ## an update beside TRL's AlignProp, in an environment of its own; writes benchmarks/trl_alignprop.md
	$(VENV)-trl/bin/python -m benchmarks.trl_alignprop

sizes: $(VENV)/stamp ## memory at the published sizes, counted where there is no GPU; resumable; writes docs/performance.md
	$(BIN)/python -m benchmarks.sizes
	$(BIN)/python -m benchmarks.sizes --write

# Where results lie. Their numbers are kept in the repository (evaluation.json and experiment.yaml), so that pages can be written again.
RESULTS := --root docs/results

experiments: $(VENV)/stamp ## the methods compared; resumable, about an hour on two cores; writes docs/experiments.md
	$(BIN)/chainrule experiment methods $(RESULTS) --jobs 2
	$(BIN)/chainrule experiment methods $(RESULTS) --write docs/experiments.md

STUDIES := sampler policy generalization tradeoff clipping rewards

studies: $(VENV)/stamp ## the papers' further studies in miniature; resumable, about two hours on two cores; writes docs/further.md
	$(BIN)/chainrule experiment $(STUDIES) $(RESULTS) --jobs 2
	$(BIN)/chainrule experiment $(STUDIES) $(RESULTS) --write docs/further.md
	$(BIN)/python docs/make_studies.py $(RESULTS)

weights: $(VENV)/stamp ## train the bundled models again
	$(BIN)/python -m chainrule.tiny all --out build
	$(BIN)/chainrule distill tiny-emoji --updates 1000 --lr 4e-3 --teacher-steps 12 --starts 16 --out build/student --resume
	mkdir -p src/chainrule/tiny/weights/student && cp build/student/adapter/* src/chainrule/tiny/weights/student/

PAPERS := all-methods all-methods-rates few-steps shortft-pickscore shortft-hpsv2 shortft-symmetry shortft-student shortft-rates \
	sdo-1 sdo-2 sdo-3-pixel sdo-3-latent sdo-4 sdo-5

papers: $(VENV)/stamp ## the papers' tables in miniature; resumable, about three hours on two cores; writes docs/papers.md
	$(BIN)/chainrule experiment $(PAPERS) $(RESULTS) --jobs 2
	$(BIN)/chainrule experiment $(PAPERS) $(RESULTS) --write docs/papers.md

clean:
	rm -rf $(VENV) runs dist site .pytest_cache .mypy_cache .ruff_cache
