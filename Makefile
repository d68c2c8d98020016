# make demo · make test · make check: each makes .venv first where it is missing or out of date.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-fast chaos check format lock clean
.DELETE_ON_ERROR:

# A run starts dozens of processes; without bytecode each would compile torch, Ray and MLflow anew.
unexport PYTHONDONTWRITEBYTECODE

demo: $(INSTALLED)  ## the whole pipeline on the data set that ships with it
	$(BIN)/ediffi demo

test: $(INSTALLED)  ## every test; those marked gpu skip themselves without a CUDA device
	$(BIN)/pytest

test-fast: $(INSTALLED)  ## the tests that take seconds
	$(BIN)/pytest -m "not slow"

chaos: $(INSTALLED)  ## runs that are killed at random moments and started again must give the same bytes
	$(BIN)/pytest tests/chaos

check: $(INSTALLED)  ## style, types, who imports whom: what CI checks
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# After a change of the ranges in pyproject.toml: resolve them afresh, then write down what came out.
lock:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --upgrade --editable ".[dev]"
	@{ echo '# Every package of the tested environment, exactly: Python 3.11, Linux x86_64. Written by `make lock`.'; \
	   echo "# The markers leave torch's CUDA libraries out where torch does not ask for them."; \
	   $(BIN)/pip freeze --all --exclude-editable --exclude pip \
	   | sed -E 's/^((nvidia-|cuda-|triton)[^ ]*)$$/\1 ; platform_system == "Linux"/'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock
	touch $(INSTALLED)

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# The lock is the whole environment: nothing to resolve (--no-deps), and of 7 GB only what is imported
# need be compiled, when it is (--no-compile). Then the project itself, with the lock's setuptools.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	"ediffi needs Python 3.11 or newer, found " + sys.version.split()[0] + ": make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-deps --no-compile --requirement requirements.lock
	$(BIN)/pip install --no-deps --no-build-isolation --editable .
	@touch $@
