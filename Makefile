# Everything a person types. `make help` lists it.
.DEFAULT_GOAL := help
# Columns of `dvc exp show` that `make show` leaves out. State stays: a run that failed shows the numbers of its baseline.
HIDDEN := Created|Executor|.*/|cost|spread|attention|benchmark|dataset|model|scaling|seeds|train
BRANCHES := [regional],[dilated],[linear],[regional,dilated],[regional,linear],[dilated,linear],[regional,dilated,linear]
# Of `make hybrid-search`; for a try on the digits: make hybrid-search SEARCH='-S train.epochs=1'
# Each mechanism has a sweep of its own: in a sweep over mechanisms, DVC knows the stages of the first one alone.
COMPARED := fused nystromformer window linear focused
SEARCH := -S dataset=cifar10 -S train=study -S train.epochs=12 -S train.lr=4e-3
.PHONY: help env study show ablation hybrid-search params tables quick test test-gpu study-gpu lint clean

PYTHON ?= python3
JOBS ?=
BIN := .venv/bin

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST) | column -t -s: -l 2

env: .venv/.made ## the environment in .venv, from requirements.lock alone; TORCH=cpu or cu126 for another PyTorch

# Another PyTorch than the lock's, whose Linux wheel is for new NVIDIA drivers: make env TORCH=cpu, or TORCH=cu126.
TORCH ?=
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
OF_TORCH := ^(torch|torchvision)==
OF_CUDA := ^(triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==
ifneq ($(TORCH),)
$(shell grep -qsx '$(TORCH)' .venv/.made || rm -f .venv/.made)
endif

.venv/.made: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "installing into .venv: some minutes the first time"
ifeq ($(TORCH),)
	$(PIP) --requirement requirements.lock
else
	grep -E '$(OF_TORCH)' requirements.lock | $(PIP) --index-url https://download.pytorch.org/whl/$(TORCH) --requirement /dev/stdin
	grep -vE '$(OF_TORCH)|$(OF_CUDA)' requirements.lock | $(PIP) --requirement /dev/stdin
endif
	$(PIP) --no-deps --no-build-isolation --editable .
	echo '$(TORCH)' > $@

# `exec`, so that what ends `make` ends what runs, and not only the shell around it.
study: env ## train, measure and plot all mechanisms on the embedded data set; JOBS=n trains n at a time, JOBS=1 in turns
	. $(BIN)/activate && exec python -m stages.jobs $(JOBS)
	. $(BIN)/activate && exec dvc repro $$(dvc config core.remote | sed 's/.*/--pull/')
	@grep -m 1 '^\*\*' report/report.md | tr -d '*'
	@echo "the whole answer: report/index.html"

show: env ## experiments: what became of each, and test accuracy of its mechanisms; 160 columns
	. $(BIN)/activate && dvc exp show --no-pager --drop '$(HIDDEN)'

ablation: env ## the hybrid with every set of its branches, an experiment each, and their picture
	. $(BIN)/activate && dvc exp run --queue -S attention=hybrid -S 'attention.hybrid.branches=$(BRANCHES)' aggregate
	. $(BIN)/activate && dvc exp run --run-all && effvit ablation --output-dir docs/ablation

hybrid-search: env ## forms of the hybrid and what they are compared with: an experiment each, and their table
	. $(BIN)/activate && queue() { dvc exp run --queue $(SEARCH) "$$@" train; } && \
	for attention in $(COMPARED); do queue -S attention=$$attention -S model.value_conv=0,3 || exit; done && \
	queue -S attention=hybrid -S attention.hybrid.feature_map=elu,relu,focused -S model.value_conv=0,3 && \
	queue -S attention=hybrid -S attention.hybrid.fusion=gate -S model.value_conv=0,3 && \
	queue -S attention=hybrid -S attention.hybrid.feature_map=focused -S model.value_conv=3 -S attention.hybrid.global_every=2 && \
	queue -S attention=hybrid -S attention.hybrid.feature_map=focused -S model.value_conv=3 -S 'attention.hybrid.dilations=[1,2,4]' && \
	for attention in $(COMPARED) hybrid; do queue -S attention=$$attention -S model.value_conv=3 -S 'seeds=[1]' || exit; done
	. $(BIN)/activate && dvc exp run --run-all && effvit variants --output-dir docs/hybrid-search && python -m stages.tables

params: env ## compose params.yaml from conf/
	$(BIN)/python -m stages.params

tables: env ## tables of docs/machines and docs/hybrid-search, and launches, into README.md and the pages of docs
	$(BIN)/python -m stages.tables

lint: env ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

quick: lint ## lint and the fast tests, while you work: 70 to 100 s on two cores
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest --numprocesses logical --dist loadfile -m "not slow"

# Without CUDA: otherwise as many processes as there are cores would share the first GPU and its memory.
test: lint ## lint, then all tests, a file a core at a time
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest --numprocesses logical --dist loadfile --no-loadscope-reorder --device cpu

DEVICE ?= cuda
PARTS ?=
MACHINES := $(if $(filter cpu,$(DEVICE)),outputs,docs/machines)

test-gpu: env ## the tests of tests/gpu, 5 minutes on a GPU; DEVICE=cpu is a dry run. writes tests.json
	$(BIN)/pytest tests/gpu $(if $(filter-out cpu,$(DEVICE)),tests/kernels/numerics_of_triton.py) --device $(DEVICE) --gpu-report $(MACHINES)

study-gpu: env ## what a GPU can say in 20 minutes, as CSVs in docs/machines; PARTS='blocks cells', JOBS=n, DEVICE=cpu
	$(BIN)/python -m stages.study_gpu --device $(DEVICE) --output-dir $(MACHINES) $(if $(filter-out 1,$(JOBS)),--jobs $(JOBS)) $(PARTS)

clean: ## remove the environment and everything that can be made again but results
	rm -rf .venv build dist *.egg-info dvc_plots outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis
