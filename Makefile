# Everything a fresh machine needs is done by the targets themselves: `make demo` and `make test` come first.
PYTHON ?= python3
VENV ?= .venv
export MAX_JOBS ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
PYTEST := $(PY) -m pytest
# A test keeps one core busy; neighbours stay in one process as long as all have enough to do.
PARALLEL := -n $(MAX_JOBS) --dist worksteal
TRITON36 := .cache/triton-3.6
OLDEST := .cache/torch-2.11
SOURCES := $(shell find csrc -type f)
STAGES := lint test-interpreter test-aot test-cpu

.DEFAULT_GOAL := help
.PHONY: help setup demo train degradation gradients test test-cpu test-slow test-oldest test-aot test-aot-slow test-interpreter lint format bench results peers wheel sdist gpu-check clean distclean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */\1\t/' | awk -F'\t' '{printf "  make %-17s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.x")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch torchvision setuptools wheel ninja pybind11
	$(PIP) install -q -c constraints.txt --no-deps nvidia-cutlass
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[test,demo]'
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	@touch $@

setup: $(VENV)/.built  ## .venv with the pinned versions, and the compiled part built in place

demo: setup  ## a swapped ResNet-50: parity of outputs and gradients, the timing table, a photo classified
	$(PY) examples/demo.py

train: setup  ## examples/train.py on the handwritten digits, with a picture of the curve; ARGS="--epochs 5"
	$(PIP) install -q -c constraints.txt matplotlib
	$(PY) examples/train.py --dataset digits --model cifar_resnet8 --epochs 15 --batch-size 64 --out runs/digits $(ARGS)

degradation: setup  ## plain and residual twins of 8, 20 and 56 layers, trained and compared; ARGS="--quick"
	$(PIP) install -q -c constraints.txt matplotlib
	$(PY) examples/degradation.py $(ARGS)

gradients: setup  ## gradient norms at every layer of plain and residual stacks, with a picture; ARGS="--depths 8 20"
	$(PIP) install -q -c constraints.txt matplotlib
	$(PY) examples/gradient_highway.py $(ARGS)

test: setup  ## lint, then every test that is not slow: interpreter, ahead-of-time compilation, and the suite on the CPU
	@status=0; for stage in $(STAGES); do echo "== make $$stage"; $(MAKE) --no-print-directory $$stage || status=1; done; exit $$status

test-cpu: setup
	$(PYTEST) tests -q $(PARALLEL) -m 'not slow and not aot' --durations=5

test-slow: setup  ## the slow tests, those in Triton's interpreter as well
	$(PYTEST) tests -q $(PARALLEL) -m 'slow and not aot' --timeout=1800 --durations=10
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter -q $(PARALLEL) -m slow --timeout=1800 --durations=10

test-oldest: setup $(OLDEST)/.installed  ## the suite on the CPU under the oldest PyTorch that is supported
	FUSED_RESNET_TEST_DEVICE=cpu $(OLDEST)/bin/python -m pytest tests -q $(PARALLEL) -m 'not slow and not aot' --timeout=1800 $(ARGS)

# What was compiled serves it as well, by the stable ABI; what else is installed is the same.
$(OLDEST)/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(OLDEST)
	$(PIP) freeze --exclude-editable > $(OLDEST)/installed.txt
	grep -Ev '^(torch=|torchvision=|triton=|nvidia-|cuda-|setuptools=)' $(OLDEST)/installed.txt > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install -q torch==2.11.0 torchvision==0.26.0 setuptools \
		-r $(OLDEST)/requirements.txt
	@touch $@

test-aot: setup $(TRITON36)/.installed  ## compile every Triton kernel ahead of time, under the installed Triton and under 3.6
	FUSED_RESNET_TRITON36=$(abspath $(TRITON36)) $(PYTEST) tests -q -m 'aot and not slow' --timeout=1800 --durations=5

test-aot-slow: setup $(TRITON36)/.installed  ## the engine's kernels in every configuration, for all chips and Tritons
	FUSED_RESNET_TRITON36=$(abspath $(TRITON36)) $(PYTEST) tests -q -m 'aot and slow' --timeout=3600 --durations=5

$(TRITON36)/.installed: $(VENV)/.installed
	$(PIP) install -q --no-deps --upgrade --target $(TRITON36) triton==3.6.0
	@touch $@

test-interpreter: setup  ## the Triton kernels in Triton's interpreter
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter -q $(PARALLEL) -m 'not slow' --durations=5

lint: setup  ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: setup  ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup  ## pytest-benchmark: block by block and model by model
	$(PYTEST) benchmarks

results: setup  ## measure benchmarks/results/*.json on this machine and render the README's table from it
	$(PY) benchmarks/record.py
	$(PY) benchmarks/table.py

peers: setup  ## whole models beside other systems, and a picture of it; ARGS="--models resnet50 --slow"
	$(PIP) install -q -c constraints.txt onnx onnxscript onnxruntime openvino matplotlib
	$(PY) benchmarks/peers.py $(ARGS)
	$(PY) benchmarks/plot_peers.py

wheel: setup  ## dist/*.whl
	$(PIP) wheel -q --no-deps --no-build-isolation -w dist .

sdist: setup  ## dist/*.tar.gz, which pip can build
	$(PY) setup.py -q sdist

# No virtual environment: python3 is the one that has torch, and the package is used from the checkout.
gpu-check:  ## PART=smoke|test|sanitize|bench|tune OUT=folder: on a machine with a GPU, network not needed
	$(PYTHON) -m benchmarks.gpu_check $(PART) --out "$(OUT)" $(ARGS)

clean:  ## remove what was built
	rm -rf build dist *.egg-info fused_resnet/*.so fused_resnet/_build_facts.json $(VENV)/.built .pytest_cache .ruff_cache .benchmarks

distclean: clean  ## remove the virtual environment and the caches as well
	rm -rf $(VENV) .cache .hypothesis
