# make demo        the whole pipeline on real images: data, distil, export, evaluate, measure, report
# make test        the tests, without the soak
# make test-unit   the quick ones among them, in under three minutes
# make test-slow   the slow ones, and hundreds of kills instead of twelve
# All create .venv and install what they need; no other step is required first.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV   ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -q

export ORT_DISABLE_TELEMETRY = 1
# The tests start hundreds of Python processes: each would compile robx again where compiled files are not kept.
export PYTHONDONTWRITEBYTECODE =

# Only these plugins, by name: pytest would rewrite the assertions of all modules of the installed ones, in each process.
PYTEST = OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 \
  PYTEST_PLUGINS=xdist.plugin,pytest_timeout,_hypothesis_pytestplugin $(VENV)/bin/python -m pytest

.PHONY: demo test test-unit test-slow docs release lint types format check gpu test-mobile test-arm64 soak sbom audit clean

demo: $(VENV)/.demo
	$(VENV)/bin/robx demo $(DEMO_FLAGS)

# One thread per process: two processes with two threads each would oversubscribe two cores.
test: $(VENV)/.dev
	$(PYTEST) $(PYTEST_FLAGS) -m 'not soak'

test-unit: $(VENV)/.dev
	$(PYTEST) $(PYTEST_FLAGS) -m 'not slow and not soak'

test-slow: $(VENV)/.dev
	$(PYTEST) $(PYTEST_FLAGS) -m 'slow or soak'
	$(MAKE) soak

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The site, in site/. A link or a reference that leads nowhere is an error.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

types: $(VENV)/.dev
	$(VENV)/bin/mypy

check: lint types test

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/bin/pip:
	@test -n "$(PYTHON)" || { echo "robx needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: apt-get install python3-venv, or make PYTHON=..."; exit 2; }

# The environment takes 6.5 GB, 5 of them for torch with CUDA; pip would run out of space only after minutes.
ROOM_GB ?= 7
define ROOM
@free=$$(df -Pk $(VENV) | awk 'NR == 2 { print int($$4 / 1048576) }'); \
ls -d $(VENV)/lib/python3*/site-packages/torch > /dev/null 2>&1 || test "$$free" -ge $(ROOM_GB) || { \
  echo "robx needs $(ROOM_GB) GB of disk space, and $$free GB are free under $(VENV):" \
    "free some, or choose another folder with make VENV=/path, or try anyway with make ROOM_GB=$$free"; exit 2; }
endef

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(ROOM)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(ROOM)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo

# The mobile converters pin conflicting packages: each has an environment of its own.
MOBILE = executorch litert coreml ncnn
test-mobile: $(MOBILE:%=.venv-%/.mobile)
	for f in $(MOBILE); do \
	  OMP_NUM_THREADS=1 .venv-$$f/bin/python -m pytest -m mobile -q \
	    tests/export/formats/test_mobile.py tests/runtime/device/test_native_litert.py || exit 1; done

.venv-%/.mobile: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
	  $$(grep -E '^torch(vision)?==' constraints.txt) -e '.[$*]' pytest pytest-timeout hypothesis
	@touch $@

# An arm64 device under qemu-user behind an sshd, created once (as root: debootstrap, qemu-user-static; 400 MB).
# With g++-aarch64-linux-gnu it also builds the native runner and runs it there.
ARM64 ?= $(CURDIR)/.venv-arm64
test-arm64: $(VENV)/.dev $(ARM64)/python
	OMP_NUM_THREADS=1 ROBX_ARM64_ROOT=$(ARM64) $(VENV)/bin/python -m pytest -q tests/runtime/device/test_arm64.py

$(ARM64)/python: | $(VENV)/.dev
	$(VENV)/bin/python tests/runtime/device/arm64_device.py $(ARM64)

# Hundreds of kills instead of the twelve in the tests: make soak ROBX_SOAK=1000 ROBX_SEED=7
soak: $(VENV)/.dev
	OMP_NUM_THREADS=1 ROBX_SOAK=$(or $(ROBX_SOAK),300) $(VENV)/bin/python -m pytest -q --timeout 14400 tests/faults/test_kill.py

# The tests and the training speed that need a CUDA GPU, with a Python that has torch for it; installs nothing.
gpu:
	PYTHONPATH=. $(or $(GPU_PYTHON),python3) benchmarks/gpu.py $(GPU_FLAGS)

# A software bill of materials of the environment, as CycloneDX; needs no network after its tools are installed.
sbom: $(VENV)/.dev .venv-audit/.tools
	.venv-audit/bin/cyclonedx-py environment --output-format JSON --output-file sbom.json $(VENV)/bin/python

# The sdist and, from it, the wheel, checked in an environment without the repository: docs/releasing.md.
release: $(VENV)/.dev .venv-audit/.tools
	rm -rf dist .venv-release
	$(VENV)/bin/python -m build --outdir dist .
	.venv-audit/bin/twine check --strict dist/*
	$(VENV)/bin/python -m venv .venv-release
	.venv-release/bin/pip install --quiet --disable-pip-version-check --no-deps dist/*.whl
	$(VENV)/bin/python -c 'import site; print(*site.getsitepackages(), sep="\n")' \
	  > "$$(ls -d .venv-release/lib/python3*/site-packages)/dependencies.pth"
	cd / && $(CURDIR)/.venv-release/bin/robx --version && $(CURDIR)/.venv-release/bin/robx students
	.venv-audit/bin/cyclonedx-py environment --output-format JSON --output-file dist/sbom.json $(VENV)/bin/python
	cd dist && sha256sum * > SHA256SUMS && cat SHA256SUMS

# Known vulnerabilities, from the package index's database. robx itself is not on the index.
audit: $(VENV)/.dev .venv-audit/.tools
	@$(VENV)/bin/pip --disable-pip-version-check freeze --exclude-editable > .venv-audit/installed.txt
	@.venv-audit/bin/pip-audit --no-deps --disable-pip --progress-spinner off --format json \
	  -r .venv-audit/installed.txt > .venv-audit/found.json 2> .venv-audit/said.txt; \
	.venv-audit/bin/python -c "$$AUDIT" .venv-audit/found.json .venv-audit/said.txt

# Packages missing from the database count as not audited; if all are missing, there was no audit.
define AUDIT
import json, pathlib, sys
found, said = (pathlib.Path(name).read_text() for name in sys.argv[1:])
try:
    packages = json.loads(found)["dependencies"]
except ValueError:
    packages = []
known = [p for p in packages if "skip_reason" not in p]
if not known:
    why = (said.strip().splitlines() or ["it contains none of these packages"])[-1][:200]
    sys.exit(f"audit: not done, no vulnerability database is available ({why})")
for p in known:
    for v in p["vulns"]:
        print(p["name"], p["version"], v["id"], "fixed in", ", ".join(v["fix_versions"]) or "no version")
bad = sum(bool(p["vulns"]) for p in known)
print(f"audit: {bad} of {len(known)} packages have known vulnerabilities; {len(packages) - len(known)} are not in the database")
sys.exit(bad > 0)
endef
export AUDIT

# The audit tools have their own environment, so that they do not change the one they examine.
.venv-audit/.tools:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) cyclonedx-bom pip-audit twine
	@touch $@

clean:
	rm -rf $(VENV) .venv-* build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
