"""The readers of a model's files, JSON and safetensors, on inputs that nobody meant: a short run of dev/test/fuzz_readers.cu."""
import os
import re
import shutil

import pytest
from helpers import ROOT, execute, program, says

def test_readers_survive_mutated_headers():
    done = execute(program("san-bf16", "dev/test/fuzz_readers"), 300000, 1, cwd=ROOT)
    assert done.status == 0, done.err[-3000:]
    says(done.out, "300000 inputs")

def test_readers_survive_libfuzzer():
    """It looks for inputs that take new ways through the code. 10 million were tried once: make fuzz."""
    link = ("clang++", "-fsanitize=fuzzer", "-x", "c++", "-", "-o", os.devnull)
    if not shutil.which("clang++") or execute(*link, cwd=ROOT, input=b'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }').status:
        pytest.skip("clang++ with libFuzzer is not installed (Debian: clang, libclang-rt-dev)")
    done = execute("make", "fuzz", "RUNS=100000", cwd=ROOT, timeout=900)
    assert done.status == 0, (done.out + done.err)[-3000:]
    assert int(re.search(r"number_of_executed_units: (\d+)", done.err)[1]) >= 100000
