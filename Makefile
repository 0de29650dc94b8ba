# `make demo` and `make test` are all that a fresh clone needs; both install into .venv, once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/installed
TORCH_CPU := https://download.pytorch.org/whl/cpu/torch/

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Else each of the many processes of the tests would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check lint types format docs install clean

demo: install
	$(BIN)/enginesmith compile --recipe samples/digits/recipe.yaml -o build/digits

test: install
	$(BIN)/pytest $(PYTEST_ARGS)

check: lint types

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The link gives the repository's root the package's name, whatever the clone is called.
types: install
	mkdir -p .mypy_cache/root
	ln -sfn ../.. .mypy_cache/root/enginesmith
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The pages that are made from the code.
docs: install
	$(BIN)/python docs/generate.py

install: $(INSTALLED)

# PyPI's torch brings gigabytes of CUDA along; its CPU build is used where PyTorch's own page can be reached.
# Compiling all files ahead would take longer than the rest; the few that are imported are compiled then.
$(INSTALLED): pyproject.toml setup.cfg constraints.txt tests/bare-packages.txt
	$(PYTHON) -m venv .venv
	from=$$($(PYTHON) -c "import urllib.request as r; r.urlopen('$(TORCH_CPU)', timeout=10)" 2>/dev/null \
		&& echo --find-links $(TORCH_CPU)); \
	$(BIN)/pip install -q --no-compile $$from -c constraints.txt -e '.[cpu,openvino,tensorrt-rtx,dev]'
	$(BIN)/pip install -q --no-compile --no-deps -r tests/bare-packages.txt
	touch $@

clean:
	rm -rf .venv build
