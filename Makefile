# `make` alone explains itself. Works from any directory with `make -C <checkout>`.

# The interpreter that .venv is made from: Python 3.10, 3.11 or 3.12.
PYTHON ?= python3
# A further index for torch, such as the one of CPU builds that pytorch.org names: 2.13.0+cpu goes before 2.13.0.
TORCH_INDEX ?=
SEED ?= 0
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := serve,onnx,deepspeed,tensorboard,wandb,math,ifeval,goals,search,ray,reward-server,report,dev
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
# One process a core, at most four; a file's tests stay together, since they share what is slow to set up.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check
SCRIPTS := .ci/run $(wildcard examples/*/*.sh examples/slurm/*.sbatch findings/*.sh singularity/*.sh tests/*.sh) \
	$(wildcard singularity/install/*.sh) singularity/install/tritonserver-cpu
USUAL := not slow and not gpu and not int8 and not vllm

# DeepSpeed would compile its CUDA kernels at installation; it builds the few it uses at run time.
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := help
.PHONY: help install quickstart check format test unit test-processors test-slow test-int8 test-elsewhere vllm-test
.PHONY: docs docs-links wheel clean

help:  ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(firstword $(MAKEFILE_LIST)) \
		| awk 'BEGIN {FS = ":.*## "} {printf "  make %-16s %s\n", $$1, $$2}'
	@echo
	@echo "  Variables: PYTHON=python3.12 and TORCH_INDEX=... (for install), SEED=1 and ARGS=\"key=value ...\" (for quickstart; ARGS for tests too)"

install: $(STAMP)  ## create .venv with everything that tests and examples need; instant once done

# The stamp is made last, so an installation that was interrupted is taken up again. A .venv without pip (half made) or
# with another Python is made anew.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -c 'import pip; $(SUPPORTED)' 2>/dev/null \
		|| { $(PYTHON) -c '$(SUPPORTED)' && $(PYTHON) -m venv --clear $(VENV); } \
		|| { echo "error: cannot make $(VENV) with '$(PYTHON)': it must be Python 3.10, 3.11 or 3.12 (the bundled Triton" \
			"server needs one of them) with its venv module; name one that is: make install PYTHON=python3.11" >&2; \
			exit 1; }
	$(PIP) install --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP) install --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

quickstart: $(STAMP)  ## SFT, reward model, Triton server and PPO on random walks: a few minutes on a laptop CPU
	$(BIN)/python -m examples.randomwalks.quickstart seed=$(SEED) $(ARGS)

check: $(STAMP)  ## lint (scripts and Dockerfiles too), formatting and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/shellcheck --external-sources --source-path=SCRIPTDIR $(SCRIPTS)
	$(BIN)/hadolint singularity/Dockerfile examples/remote/task/Dockerfile
	$(BIN)/python -m pyright

format: $(STAMP)  ## rewrite the sources as `make check` wants them
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

test: check  ## check, all tests but slow ones, the numeric ones once more as on another processor: what .ci/run calls
	$(BIN)/python -m pytest $(PARALLEL) -m "$(USUAL)" $(ARGS)
	$(BIN)/python -m tests.processors --numeric foreign -- --quiet $(ARGS)

unit: $(STAMP)  ## unit tests alone
	$(BIN)/python -m pytest $(PARALLEL) tests/unit $(ARGS)

test-processors: $(STAMP)  ## unit and invariance tests with other processors' kernels and 1 to 4 threads; a table
	$(BIN)/python -m tests.processors -- --quiet $(ARGS)

test-slow: $(STAMP)  ## the tests that `make test` leaves out for their length
	$(BIN)/python -m pytest -m "slow and not gpu and not vllm" $(ARGS)

# torchao makes every import of transformers seconds slower, so it stays out of .venv.
test-int8: $(STAMP)  ## the tests that need torchao, which is fetched into .int8/
	test -d .int8/torchao || $(PIP) install --no-deps --constraint constraints.txt --target .int8 torchao
	PYTHONPATH=.int8 $(BIN)/python -m pytest -m int8 $(ARGS)

test-elsewhere: $(STAMP)  ## as root: the tests as on a machine of somebody else's; tests/elsewhere.sh says how
	tests/elsewhere.sh $(PARALLEL) -m "$(USUAL)" $(ARGS)

vllm-test:  ## the tests that need vLLM, in .venv-vllm, an environment with it that is made first
	PYTHON=$(PYTHON) tests/vllm_env.sh
	.venv-vllm/bin/python -m pytest -m vllm tests/vllm $(ARGS)

docs: $(STAMP)  ## build the documentation site into build/docs; a warning, a dead link among them, is an error
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --conf-dir docs --doctree-dir build/doctrees . build/docs
	@echo "build/docs/index.html"

# Not among the tests: whether others' servers answer is no fault of a change.
docs-links: $(STAMP)  ## ask for every external link of the docs; names those that lead nowhere
	$(BIN)/python -m sphinx --builder linkcheck --keep-going --quiet --conf-dir docs --doctree-dir build/doctrees . build/links

wheel: $(STAMP)  ## build the source distribution and the wheel into dist/
	$(BIN)/python -m build --no-isolation

clean:  ## delete outputs/, caches and build products; .venv and model_store/ stay
	rm -rf outputs build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
	@echo "kept: $(VENV) and model_store/ (converted reward models); delete them by hand"
