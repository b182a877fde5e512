# make demo   the whole way on real images: data, distil, evaluate, export, measure, report
# make test   the tests
# Both make .venv and install what they need; nothing else has to be done first.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV   ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2 --dist loadfile --max-worker-restart 0 -q

export ORT_DISABLE_TELEMETRY = 1

.PHONY: demo test lint types format check test-mobile test-arm64 soak sbom audit clean

demo: $(VENV)/.demo
	$(VENV)/bin/robx demo $(DEMO_FLAGS)

# One thread a process: two processes with two threads each would fight over two cores.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev
	$(VENV)/bin/mypy

check: lint types test

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/bin/pip:
	@test -n "$(PYTHON)" || { echo "robx needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: apt-get install python3-venv, or make PYTHON=..."; exit 2; }

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo

# Each mobile converter pins packages that the others do not bear: an environment each.
MOBILE = executorch litert coreml ncnn
test-mobile: $(MOBILE:%=.venv-%/.mobile)
	for f in $(MOBILE); do \
	  OMP_NUM_THREADS=1 .venv-$$f/bin/python -m pytest -m mobile -q tests/export/test_mobile.py || exit 1; done

.venv-%/.mobile: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
	  $$(grep -E '^torch(vision)?==' constraints.txt) -e '.[$*]' pytest pytest-timeout hypothesis
	@touch $@

# An arm64 device under qemu-user, made once (as root: debootstrap, qemu-user-static; 400 MB), behind an sshd.
ARM64 ?= $(CURDIR)/.venv-arm64
test-arm64: $(VENV)/.dev $(ARM64)/python
	OMP_NUM_THREADS=1 ROBX_ARM64_ROOT=$(ARM64) $(VENV)/bin/python -m pytest -q tests/runtime/test_arm64.py

$(ARM64)/python: | $(VENV)/.dev
	$(VENV)/bin/python tests/runtime/arm64_device.py $(ARM64)

# Hundreds of kills instead of the thirty that the tests do.
soak: $(VENV)/.dev
	OMP_NUM_THREADS=1 ROBX_SOAK=300 $(VENV)/bin/python -m pytest -q --timeout 14400 tests/faults/test_kill.py

# What is installed, as CycloneDX, and what is known against it; both ask the package index.
sbom audit: $(VENV)/.dev
	$(VENV)/bin/pip install --quiet --disable-pip-version-check pip-audit
	$(if $(filter sbom,$@),$(VENV)/bin/pip-audit --local --format cyclonedx-json --output sbom.json,$(VENV)/bin/pip-audit --local)

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
