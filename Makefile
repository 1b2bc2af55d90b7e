# Everything sets itself up: `make demo` and `make test` need Python 3.11 and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The measurements of benchmarks/ that need no data; private_training, membership and
# federation_quality ask for the demo's, and the others are what these share.
BENCHMARKS := aggregation rounds deployment resident_rounds distillation_loss plan_constants secure_sum

.PHONY: demo deployment test test-slow check bench nginx proto clean

demo: $(INSTALLED)
	$(BIN)/python examples/four_institutions/demo.py --out demo

deployment: $(INSTALLED) nginx
	$(BIN)/python examples/deployment/run.py --out deployment

test: $(INSTALLED)
	$(BIN)/pytest

test-slow: $(INSTALLED) nginx
	$(BIN)/pytest -m slow

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pip check

bench: $(INSTALLED) nginx
	@for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; done

# Sites reach a coordinator through nginx. The example and the tests start their own; where Debian starts
# its welcome page on port 80 after the installation, `systemctl disable --now nginx` ends that.
nginx:
	@PATH="$$PATH:/usr/sbin:/usr/local/sbin" command -v nginx > /dev/null && exit 0; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then \
	  echo "error: nginx is not installed: run 'sudo apt-get install nginx-light', or install nginx 1.18 or newer your system's way" >&2; exit 2; \
	fi; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nginx-light > /dev/null

# After a change of client/trainer.proto; a test compares the result with what is committed.
proto: $(INSTALLED)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. client/trainer.proto

clean:
	rm -rf $(VENV) demo deployment build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# torch first: pinned, so that pip does not look for a newer one. Where pip is shown CPU wheels
# (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) it takes 2.13.0+cpu; PyPI's own Linux wheel brings CUDA, several GB.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13)))' \
	  || { echo "error: $$($(PYTHON) -V) found, Python 3.11 to 3.13 needed: make PYTHON=python3.11 …" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
