# How to build a .cu file for the CPU: variables only; the including Makefile has the rules. CPU_DIR is this folder.
#
#   $(CPU_TRANSLATE) x.cu -o x.cpp && $(CPU_CXX) $(CPU_CXXFLAGS) x.cpp -o x $(CPU_LDLIBS)
#
# With SAN=1 use $(CPU_SANFLAGS) after $(CPU_CXXFLAGS).
CPU_DIR := $(patsubst %/,%,$(dir $(lastword $(MAKEFILE_LIST))))

CPU_CXX := g++
# -fno-math-errno and -fno-trapping-math let g++ vectorise without changing a result; -fno-strict-aliasing is
# what nvcc does. -g1: line numbers for the reports. A GPU compiler knows #pragma unroll, g++ does not. ggc-min-heapsize
# (KiB): up to there g++ looks for no memory to use again, which spares it a twelfth of its time.
CPU_CXXFLAGS := -std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fno-strict-aliasing -pthread -g1 \
	-Wall -Wno-unknown-pragmas --param=ggc-min-heapsize=2000000 -I $(CPU_DIR)/include
CPU_SANFLAGS := -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
# OpenBLAS is loaded when it is first needed (simt/matmul.h); naming it here finds it missing before that
CPU_LDLIBS := -Wl,--as-needed -lopenblas -ldl

CPU_TRANSLATE := python3 $(CPU_DIR)/cu2cpp.py
CPU_DEPS := $(CPU_DIR)/cpu.mk $(CPU_DIR)/cu2cpp.py $(wildcard $(CPU_DIR)/include/*.h $(CPU_DIR)/include/*/*.h)
