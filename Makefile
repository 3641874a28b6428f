# make demo, make test and make bench each create .venv, install with constraints.txt, and run.
# PYTHON picks the interpreter the environment is made from; DEMO_OUT the folder of the demo, DATA,
# SCIENCE_OUT and SCALE (small or full) those of make science, DATA, PICTURES_OUT and SCALE those of
# make pictures.
comma := ,
PYTHON ?= python3
GPU ?=
DEMO_OUT ?= demo-out
DATA ?= ../shared/data
SCIENCE_OUT ?= science-out
PICTURES_OUT ?= pictures-out
SCALE ?= small
BIN := .venv/bin
PIP_OPTIONS := --quiet --disable-pip-version-check -c constraints.txt
RESULT := .benchmarks/bench.json
# where the recorded results of the published code are, a test that cannot read them fails
GOLDEN := $(if $(wildcard ../shared/golden/*.npz),$(comma)golden)
# where there is an nvcc, a test that cannot compile with it fails
NVCC := $(if $(CUDA_HOME)$(shell command -v nvcc),$(comma)nvcc)
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -name '*.h' -o -name '*.c*')

.PHONY: demo test bench science pictures kernels-report lint gpu clean

demo: .venv/installed
	$(BIN)/sma-fast demo --out $(DEMO_OUT)

# what runs GPUs' kernels (Triton's interpreter, the emulator of CUDA), which takes half of the time,
# in a process beside
TEST = TRITON_INTERPRET=1 \
    SMA_FAST_REQUIRE=cpu,triton,emulated,peers,build,train$(GOLDEN)$(NVCC) $(BIN)/pytest
KERNELS = interpreted or emulated
test: .venv/installed
	$(TEST) -m "$(KERNELS)" -p no:cacheprovider & $(TEST) -m "not ($(KERNELS))"; rest=$$?; wait $$! && exit $$rest

bench: .venv/installed
	mkdir -p $(dir $(RESULT))
	$(BIN)/pytest bench --quiet --benchmark-quiet --benchmark-json=$(RESULT)
	$(BIN)/python -m bench.report --save $(RESULT)

# real data of three sciences, in DATA (see ../shared/README.md); runs that are done are not repeated
science: .venv/installed
	$(BIN)/python -m bench.science --data $(DATA) --out $(SCIENCE_OUT) --scale $(SCALE) --save

# masks of pictures compared, on those in DATA; runs that are done are not repeated either
pictures: .venv/installed
	$(BIN)/python -m bench.pictures --data $(DATA) --out $(PICTURES_OUT)/$(SCALE) --scale $(SCALE) \
	    --save

# registers, shared memory and spills of Triton's kernels and, where there is nvcc, CUDA's; needs no
# GPU
kernels-report: .venv/installed
	$(BIN)/python -m bench.kernels_report

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu')

# On a machine with a GPU: tests, benchmarks, compute-sanitizer; GPU holds more options of bench.gpu.
# Already there: torch built for CUDA, triton, nvcc, setuptools 64 or newer (before 70.1 with wheel),
# pybind11, ninja, numpy, pytest, pytest-benchmark and hypothesis. expecttest is for tests of opcheck,
# flash-colreduce (PyPI) is timed where it is. Builds for the GPUs it finds.
gpu:
	$(PYTHON) -m bench.gpu_install
	$(PYTHON) -m bench.gpu $(GPU)

# torch comes first and alone: a later step that wants a range of it then installs no other build
.venv/installed: $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_OPTIONS) torch
	$(BIN)/python -m pip install $(PIP_OPTIONS) -e '.[dev]'
	$(BIN)/python -m pip install $(PIP_OPTIONS) --no-deps timm lightly
	touch $@

clean:
	rm -rf .venv build dist $(DEMO_OUT) $(SCIENCE_OUT) $(PICTURES_OUT) .benchmarks .pytest_cache \
	    .hypothesis .ruff_cache sma_fast.egg-info sma_fast/_C*.so sma_fast/_build.json
