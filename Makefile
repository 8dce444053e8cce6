# make demo: set up, then quantize, profile and print the table.   make test: set up, then all tests.
PYTHON ?= python3
VENV := .venv
GPU := .venv-gpu
READY := $(VENV)/.ready

.PHONY: demo gpu gpu-check image-check plugin-check test fast check docs picture mutants lock lock-cuda clean
demo: $(READY)
	$(VENV)/bin/workbench run recipes/smollm2-135m.yaml

# The same on an NVIDIA GPU: CUDA environments beside the other one (about 16 GB), then the default recipe.
gpu: $(GPU)/.ready
	. $(GPU)/activate && workbench run recipes/smollm2-135m.yaml

$(GPU)/.ready: requirements/install-gpu.sh requirements/cuda.lock requirements/cuda-vllm.lock requirements/cuda-build.lock
	requirements/install-gpu.sh $(if $(filter python3,$(PYTHON)),python3.12,$(PYTHON)) $(GPU)
	touch $@

# What holds on this machine's GPU and what does not, in ten minutes at most; PARTS="kernels speed" runs some parts.
# Takes what `make gpu` set up, and without that whatever torch and Triton $(PYTHON) has.
gpu-check:
	$(if $(wildcard $(GPU)/activate),. $(GPU)/activate && python,$(PYTHON)) -P benchmarks/gpu_check.py $(PARTS)

# The image's own steps without a GPU and without Docker: an hour on two cores and 16 GB the first time; STEPS="kernels"
# takes some of them, and an interrupted one goes on.
image-check:
	requirements/image-check.sh $(if $(filter python3,$(PYTHON)),python3.12,$(PYTHON)) $(GPU)-image 90 $(STEPS)

# Whether the newest vllm-gguf-plugin still makes another model of Llama's files, so that our own loader is needed.
plugin-check: $(READY)
	rm -rf $(VENV)/gguf-plugin
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(VENV)/gguf-plugin vllm-gguf-plugin
	WORKBENCH_GGUF_PLUGIN=$(CURDIR)/$(VENV)/gguf-plugin $(VENV)/bin/python -m pytest -q tests/worker/backends/test_vllm_gguf.py

# Two files of tests at a time, first the tests that need no real engine; the others run whatever those say.
PYTEST = $(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
test: $(READY)
	$(PYTEST) -m "not slow"; fast=$$?; $(PYTEST) -m slow --durations=10 && exit $$fast

fast: $(READY)
	$(PYTEST) -m "not slow"

check: $(READY)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

# The documentation, into docs/_build/index.html; a warning is an error.
docs: $(READY)
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build

# The picture of the page that README shows: the top of that of the published rows, under a limit.
CHROMIUM ?= chromium
picture: $(READY)
	WORKBENCH_HOME=/home/you/.cache/workbench $(VENV)/bin/workbench report --results results -o $(VENV)/report.html
	$(CHROMIUM) --headless --hide-scrollbars --window-size=1280,1310 --screenshot=docs/report.png \
		"file://$(CURDIR)/$(VENV)/report.html?divergence=0.1"

# Whether the tests notice a wrong number: COUNT small changes, those that SEED draws, one at a time (tests/mutants.py).
COUNT ?= 300
SEED ?= 1
mutants: $(READY)
	$(VENV)/bin/python -c "import cosmic_ray" 2>/dev/null || \
		$(VENV)/bin/python -m pip install --quiet --require-hashes --no-deps -r requirements/mutants.lock
	$(VENV)/bin/python tests/mutants.py $(COUNT) $(SEED)

$(READY): requirements/install.sh requirements/cpu.lock requirements/docs.lock requirements/torch.txt pyproject.toml
	requirements/install.sh $(PYTHON) $(VENV)
	touch $@

lock:
	for set in cpu docs mutants; do $(VENV)/bin/uv pip compile --no-deps --generate-hashes --no-header --no-annotate --universal \
		--python-version 3.11 requirements/$$set.in -o requirements/$$set.lock || exit 1; done

lock-cuda:
	for set in cuda cuda-vllm cuda-build; do $(VENV)/bin/uv pip compile --generate-hashes --no-header --no-annotate \
		--python-version 3.12 --python-platform x86_64-manylinux_2_39 \
		requirements/$$set.in -o requirements/$$set.lock || exit 1; done

clean:
	rm -rf $(VENV) $(GPU) $(GPU)-image docs/_build docs/_generated
