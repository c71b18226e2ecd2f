# ztp_deploy: token-pruned Vision Transformers, from a model's name to a checked, measured engine.
#
#   make engine MODEL=deit_s RATIO=0.7
#   make test

MODEL     ?= $(if $(RECIPE),,deit_s)
RATIO     ?= $(if $(FLOPS)$(KEEP)$(RECIPE)$(filter dense,$(METHOD)),,0.7)
PYTHON    ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
               $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

override VENV := .venv
READY := $(VENV)/.ready
ZTP   := $(VENV)/bin/ztp
comma := ,

# Every variable and the option of `ztp` that it becomes; then what each target takes.
OPTIONS := MODEL/model METHOD/method RATIO/ratio FLOPS/flops KEEP/keep SITES/sites RECIPE/recipe WEIGHTS/weights \
           NUM_CLASSES/num-classes IMG_SIZE/img-size LABELS/labels \
           PROFILE/profile BACKEND/backend PRECISION/precision BATCH/batch IMAGES/images METHODS/methods \
           ENGINE/engine DATA/data BUDGET/budget TRIALS/trials BESIDE/beside CLIENTS/clients RATE/rate THREADS/threads
PLAN    := MODEL METHOD RATIO FLOPS KEEP SITES RECIPE WEIGHTS NUM_CLASSES IMG_SIZE LABELS
BUILD   := PROFILE BACKEND PRECISION BATCH
TAKES_engine     := $(PLAN) $(BUILD) IMAGES
TAKES_bench      := $(PLAN) $(BUILD) IMAGES CLIENTS RATE THREADS
TAKES_demo       := METHOD RATIO FLOPS WEIGHTS PROFILE BACKEND PRECISION
TAKES_export     := $(PLAN) PRECISION
TAKES_check      := ENGINE IMAGES WEIGHTS
TAKES_compare    := MODEL RATIO FLOPS WEIGHTS NUM_CLASSES IMG_SIZE LABELS $(BUILD) IMAGES METHODS
TAKES_eval        = DATA $(if $(ENGINE),ENGINE WEIGHTS,$(PLAN))
TAKES_tune        = MODEL METHOD WEIGHTS NUM_CLASSES IMG_SIZE LABELS IMAGES BUDGET TRIALS $(if $(filter latency%,$(BUDGET)),PROFILE BACKEND PRECISION)
TAKES_gpu-report := MODEL WEIGHTS PRECISION
TAKES_classify   := ENGINE IMAGES
TAKES_show        = IMAGES $(if $(ENGINE),ENGINE,$(PLAN))
TAKES_report     := ENGINE IMAGES BESIDE
TAKES_inspect    := ENGINE
TAKES_selftest   := ENGINE
TAKES_setup      := PYTHON
TAKES_cpp        := CMAKE_ARGS
TAKES_help       := $(foreach pair,$(OPTIONS),$(patsubst %/,%,$(dir $(pair))))

typed = $(strip $(foreach v,$(1),$(if $(filter $(2),$(firstword $(origin $(v)))),$(if $($(v)),$(v)))))
# What was asked for: on the command line whatever it is, in the environment what the table knows.
COMMANDED := $(filter-out MAKEFLAGS MAKEOVERRIDES PYTHON,$(call typed,$(.VARIABLES),command))
ASKED     := $(COMMANDED) $(call typed,$(TAKES_help),environment)
# Targets outside the table take nothing; a variable of the environment is not meant for them.
unused = $(filter-out $(TAKES_$(1)),$(if $(TAKES_$(1)),$(ASKED),$(COMMANDED)))
beside = $(if $(filter ENGINE,$(TAKES_$(1))),$(if $(ENGINE), beside ENGINE))
$(foreach goal,$(MAKECMDGOALS),$(foreach v,$(firstword $(call unused,$(goal))),$(error \
    make $(goal) does not use $(v)$(call beside,$(goal)): leave it out. It takes $(or $(TAKES_$(goal)),no variables))))

# Only what is asked for, and the defaults of MODEL and RATIO: it wins over a recipe or a profile, which win over the rest.
pass = $(foreach v,$(1),$(if $($(v)),--$(notdir $(filter $(v)/%,$(OPTIONS))) "$($(v))"))

.DEFAULT_GOAL := help
.PHONY: help setup engine demo export check bench compare eval tune gpu-report classify show report inspect selftest list doctor cpp test matrix lint lock clean

help:  ## Show the targets and variables
	@echo "Targets:"; sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  \1\t\2/p' Makefile | expand -t 14
	@echo "Variables (a target stops at one that it does not use):"
	@echo "  MODEL=$(MODEL) RATIO=$(RATIO) METHOD=$(or $(METHOD),zero_tprune) BACKEND=$(or $(BACKEND),auto)"
	@echo "  PRECISION=$(or $(PRECISION),fp32) BATCH=$(or $(BATCH),1:8:64) WEIGHTS=$(or $(WEIGHTS),auto)"
	@echo "  FLOPS=share KEEP=counts SITES=blocks RECIPE=name PROFILE=name METHODS=names ENGINE=folder BESIDE=folders"
	@echo "  NUM_CLASSES=count IMG_SIZE=pixels LABELS=file, where a checkpoint's are others than the model's"
	@echo "  DATA=folder or CSV file, BUDGET=flops=0.65 or latency=12ms@batch8, TRIALS=60"
	@echo "  CLIENTS=1,2,4 or RATE=requests a second (THREADS=count serve them): bench measures under load"
	@echo "  CMAKE_ARGS=-DORT_ROOT=… for cpp"
	@echo "  IMAGES=folder; for classify files or folders, for show and report files"

setup: $(READY)  ## Make .venv from requirements.lock (every other target does it by itself)

engine: $(READY)  ## Plan, export, build, prove and measure an engine: make engine MODEL=deit_s RATIO=0.7
	@$(ZTP) engine $(call pass,$(TAKES_engine))

demo: $(READY)  ## The reference classifier, offline: engine, parity, speed-up, accuracy, pictures
	@$(ZTP) demo $(call pass,$(filter $(ASKED),$(TAKES_demo)))

export: $(READY)  ## Export a pruned model only
	@$(ZTP) export $(call pass,$(TAKES_export))

check: $(READY)  ## Prove an engine again: make check ENGINE=engines/…
	@$(ZTP) check $(call pass,$(TAKES_check))

bench: $(READY)  ## Build anew and measure long, recorded in engines/evidence
	@$(ZTP) bench $(call pass,$(TAKES_bench)) --fresh --record engines/evidence

compare: $(READY)  ## Pruning methods against each other at one FLOP share: make compare MODEL=deit_s FLOPS=0.65
	@$(ZTP) compare $(call pass,$(filter MODEL $(ASKED),$(TAKES_compare))) $(if $(filter RATIO FLOPS,$(ASKED)),,--flops "0.65") \
	    $(if $(METHODS),,--methods zero_tprune$(comma)tome$(comma)ats$(comma)evit$(comma)dynamicvit --option dynamicvit.weights=random) \
	    --record engines/evidence

eval: $(READY)  ## What pruning costs in accuracy: make eval ENGINE=engines/… DATA=imagenet/val (or MODEL=… WEIGHTS=…)
	@$(ZTP) eval $(call pass,$(TAKES_eval))

tune: $(READY)  ## Search the plan that changes predictions least: make tune IMAGES=photos/ BUDGET=flops=0.65
	@$(ZTP) tune $(call pass,$(TAKES_tune)) $(if $(BUDGET),,--budget "flops=0.65")

gpu-report: $(READY)  ## Measure what this machine's GPU can run, nine minutes per call; the next call goes on
	@$(ZTP) gpu-report $(call pass,$(filter-out PRECISION,$(filter $(ASKED),$(TAKES_gpu-report)))) $(if $(PRECISION),--precisions "$(PRECISION)")

classify: $(READY)  ## Classify pictures: make classify ENGINE=engines/… IMAGES="cat.jpg dog.png"
	@$(ZTP) classify $(IMAGES) $(call pass,ENGINE)

show: $(READY)  ## Draw what an engine kept, and why: make show ENGINE=engines/… IMAGES="cat.jpg dog.png"
	@$(ZTP) show $(IMAGES) $(call pass,$(filter-out IMAGES,$(TAKES_show)))

report: $(READY)  ## Render an engine's HTML report again: make report ENGINE=engines/… IMAGES="cat.jpg dog.png" BESIDE=engines/…
	@$(ZTP) report $(call pass,ENGINE) $(foreach image,$(IMAGES),--pictures "$(image)") $(foreach other,$(BESIDE),--beside "$(other)")

inspect: $(READY)  ## What an engine folder holds, and whether it runs here: make inspect ENGINE=engines/…
	@$(ZTP) inspect $(call pass,ENGINE)

selftest: $(READY)  ## Repeat an engine's recorded run on this machine: make selftest ENGINE=engines/…
	@$(ZTP) selftest $(call pass,ENGINE)

list: $(READY)  ## Models, methods, formats, back ends
	@$(ZTP) list

doctor: $(READY)  ## Versions, devices, what would be used here
	@$(ZTP) doctor

cpp: $(READY)  ## Build the C++ runtime and ztp-run into build/cpp (needs cmake, ninja, nlohmann-json, stb)
	@cmake -G Ninja -S ztp_deploy/cpp -B build/cpp -DPython3_EXECUTABLE="$(abspath $(VENV))/bin/python" $(CMAKE_ARGS)
	@cmake --build build/cpp

test: lint  ## Lint, type-check and run all tests, in two processes
	@OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

matrix: $(READY)  ## Test every method on every backbone (`make test` takes an eighth, by commit)
	@ZTP_MATRIX=all $(VENV)/bin/python -m pytest -m matrix

lint: $(READY)  ## ruff and mypy
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

lock: $(READY)  ## Resolve requirements.lock anew from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
	    --no-header --no-annotate --no-emit-index-url --upgrade -o requirements.lock
	for release in 10.16.1.11 11.4.0.106; do \
	    echo "tensorrt-cu13-bindings==$$release; sys_platform == 'linux' and platform_machine == 'x86_64' and python_version < '3.14'" | \
	    uv pip compile - --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url \
	        -o tests/backends/tensorrt/harness/bindings-$${release%%.*}.lock; \
	done
	echo "amd-quark==0.6.0" | uv pip compile - --no-deps --universal --python-version 3.11 --generate-hashes \
	    --no-header --no-annotate --no-emit-index-url -o tests/cpp/onnxruntime-headers.lock
	echo "nvidia-pytriton==0.7.0; sys_platform == 'linux' and platform_machine == 'x86_64'" | uv pip compile - --no-deps --universal \
	    --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url -o tests/cpp/triton-server.lock

clean:  ## Remove .venv and everything that was exported or built
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache
	find export engines -mindepth 1 -maxdepth 1 ! -name README.md ! -name '*.toml' ! -name evidence -exec rm -rf {} +

# Made whole or not at all: the stamp comes last, and an interrupted set-up starts over.
$(READY): requirements.lock pyproject.toml $(wildcard tests/backends/tensorrt/harness/*.lock tests/cpp/*.lock)
	@test -n "$(PYTHON)" || { echo "ztp_deploy needs Python 3.11 or newer and found none: install one (apt-get install python3) or name it with PYTHON=/path/to/python3." >&2; exit 3; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ztp_deploy needs Python 3.11 or newer; $(PYTHON) is older or no Python: install one or name it with PYTHON=/path/to/python3." >&2; exit 3; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "This Python has no venv module: apt-get install python3-venv (Debian, Ubuntu), then run make again." >&2; exit 3; }
	@echo "Setting up $(VENV) from requirements.lock (once; about 7 GB with torch) …"
	@test ! -e $(VENV) || test -f $(VENV)/pyvenv.cfg || { echo "$(VENV) is there and is no virtual environment: move it away." >&2; exit 2; }
	@rm -rf $(VENV) && $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@for release in 10 11; do \
	    $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
	        --target $(VENV)/tensorrt-$$release -r tests/backends/tensorrt/harness/bindings-$$release.lock || exit 1; \
	done
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --require-hashes \
	    --target $(VENV)/onnxruntime-headers -r tests/cpp/onnxruntime-headers.lock
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --require-hashes \
	    --target $(VENV)/triton-server -r tests/cpp/triton-server.lock \
	    || echo "Triton's server, for tests alone, could not be installed: they will be skipped." >&2
	@if [ -e /dev/nvidia0 ] || command -v nvidia-smi >/dev/null; then \
	    echo "There is a GPU: installing TensorRT for it …"; \
	    $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "tensorrt>=10.12" \
	        || echo "TensorRT could not be installed; the other back ends work without it." >&2; \
	fi
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
