"""dev/test/mutate.py finds what it should and mutates it as it says; its result, mutation.json, is consistent."""
import collections
import json
import subprocess
from types import SimpleNamespace

import pytest

import mutate
from helpers import ROOT

SOURCE = '''// a < b in a comment
#if A < B
#endif
constexpr int LANES = 32, WARPS = 8;
int host(int a, int b) { return a < b; }
__device__ void later(int a);
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
template <int G, bool SUM>
__global__ void __launch_bounds__(LANES * G, 1)
sum_kernel(float* out, const float* x, int n) {
    static_assert(G > 0, "G > 0");
    constexpr int COUNT = G > 1 ? G : 1;
    if constexpr (SUM && G >= 2) out[0] = COUNT;
#pragma unroll
    for (int o = 1; o < G; o <<= 1) {
#pragma unroll
        for (int i = 2 * o; i < 2 * o + WARPS; i++) out[i] = x[o];
    }
#pragma unroll 4
    for (int i = 0; i < n; i++) out[i] = 0;
#ifdef __CUDACC__
    if (n > 7) __syncthreads();
#else
    if (n != 7) __syncthreads();
#endif
    auto at = [&](int i) { return i >= 0 && x[i] <= static_cast<float>(n) ? x[i] : 0; };
    if (x == nullptr) out[0] = at(n);
    else
        cp_async_wait<1>();
}
struct Sizes {
    int n;
    __device__ bool operator()(int i) const { return i <
                                                     n; }
};
'''


def test_what_is_found():
    scan = mutate.Scan(SOURCE)
    found = [(m.point.kernel, m.point.line, m.mutation) for m in mutate.mutants_of(scan)]
    assert found == [("sum_kernel", 20, "i < n becomes i <= n"), ("sum_kernel", 20, "i < n becomes i >= n"),
                     ("sum_kernel", 24, "n != 7 becomes n == 7"), ("sum_kernel", 24, "removed"),
                     ("sum_kernel", 26, "i >= 0 becomes i > 0"), ("sum_kernel", 26, "i >= 0 becomes i < 0"),
                     ("sum_kernel", 26, "x[i] <= static_cast<float>(n) becomes x[i] < static_cast<float>(n)"),
                     ("sum_kernel", 26, "x[i] <= static_cast<float>(n) becomes x[i] > static_cast<float>(n)"),
                     ("sum_kernel", 27, "x == nullptr becomes x != nullptr"), ("sum_kernel", 29, "removed"),
                     ("operator()", 33, "i < n becomes i <= n"), ("operator()", 33, "i < n becomes i >= n")]
    assert scan.excluded == {"constexpr function": 1, "static_assert": 1, "constexpr initialiser": 1, "if constexpr": 1,
                             "trip count of an unrolled loop": 2, "compiled by nvcc alone": 2}


def test_the_mutated_source():
    lines = mutate.mutated(mutate.Scan(SOURCE)).split("\n")
    assert len(lines) == len(SOURCE.split("\n"))
    changed = [(i + 1, new.strip()) for i, (new, old) in enumerate(zip(lines, SOURCE.split("\n"))) if new != old]
    assert changed[:2] == [(20, "for (int i = 0; i <= ::mutation::lt(1) >= n; i++) out[i] = 0;"),
                           (24, "if (n == ::mutation::ne(3) == 7) ::mutation::removed(4) ? void() : __syncthreads();")]
    assert [n for n, _ in changed] == [20, 24, 26, 27, 29, 33]


@pytest.mark.parametrize("line,message", [("if (a<=b) a = 1;", "'<=' without blanks"),
                                          ("if (a==b) a = 1;", "'==' without blanks"),
                                          ("return __syncthreads();", "__syncthreads is no statement"),
                                          ("__syncthreads(), a = 1;", "__syncthreads is no statement")])
def test_what_is_not_understood_is_an_error(line, message):
    with pytest.raises(mutate.MutateError, match=f"x.cu:2: {message}"):
        mutate.Scan(f"__global__ void k(int a, int b) {{\n    {line}\n}}\n", "x.cu")


def test_real_source():
    """Every barrier of the trainer's kernels is a point."""
    scan = mutate.Scan(mutate.SOURCE.read_text())
    barriers = [p for p in scan.points if p.operator is None]
    found = [p for p in barriers if scan.text[p.begin:p.end] == "__syncthreads();"]
    assert len(found) == scan.code.count("__syncthreads();") > 10
    numbers = [m.number for m in mutate.mutants_of(scan)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 100


# Each line is a case: its operator, and what it decides as it stands and in either mutant.
CASES = {"__device__ int f0() { int a = 2; unsigned b = 2; return a < b; }": "0 1 1",
         "__device__ int f1() { int a = -1; unsigned b = 2; return a < b; }": "0 0 1",      # as C++ has it: -1 becomes large
         "__device__ int f2() { float a = NAN; return a < 1.0f; }": "0 0 0",
         "__device__ int f3() { double a = 1; return 2 * a + 1 > 3.0f ? 5 : 6; }": "6 5 5",
         "__device__ int f4() { int* p = nullptr; return p == nullptr; }": "1 0",
         "__device__ int f5() { int a = 6; return (a & 2) != 0 && a >= 6; }": "1 0 0 0",
         "__device__ int f6() { int n = 0; for (int i = 0; i < 3 && n <= 100; i++) n++; return n; }": "3 4 0 3 0",
         "template <class T> __device__ int g(T x) { return x.n < x.m; }\n"
         "int f7() { struct { int n, m; } x = {1, 2}; return g(x); }": "1 1 0"}


def test_mutants_decide_as_they_say(tmp_path):
    source = "#define __device__\n#include <math.h>\n" + "\n".join(CASES)
    calls = "".join(f'    printf("%d ", f{i}());\n' for i in range(len(CASES)))
    scan = mutate.Scan(source.replace("#define __device__\n", ""))
    (tmp_path / "mutation.h").write_text(mutate.header(scan))
    (tmp_path / "x.cpp").write_text("#define __device__\n" + mutate.mutated(scan) + "\nint main() {\n" + calls + "}\n")
    subprocess.run(["g++", "-std=c++17", "-w", "-include", "mutation.h", "x.cpp", "-o", "x"], cwd=tmp_path, check=True)

    def outputs(**env):
        done = subprocess.run([tmp_path / "x"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return done.stdout.split(), done.returncode
    mutants = mutate.mutants_of(scan)
    original, by_mutant = outputs()[0], {m.number: outputs(MUTANT=str(m.number))[0] for m in mutants}
    assert original == [c.split()[0] for c in CASES.values()]
    place = [i for i, c in enumerate(CASES.values()) for _ in c.split()[1:]]
    assert [by_mutant[m.number][i] for m, i in zip(mutants, place)] == [x for c in CASES.values() for x in c.split()[1:]]
    assert all(sum(a != b for a, b in zip(original, o)) <= 1 for o in by_mutant.values())   # and nothing else
    assert outputs(MUTANT=str(len(mutants) + 1))[1] == 2 and outputs(MUTANT="x")[1] == 2

    coverage = tmp_path / "coverage"
    assert outputs(MUTANT_COVERAGE=str(coverage)) == (original, 0)
    seen = {int(n): int(how) for n, how in (line.split() for line in coverage.read_text().splitlines())}
    assert sorted(seen) == [m.number for m in mutants]
    differs = {n for n, how in seen.items() if how & 2}
    assert {n for n, o in by_mutant.items() if o != original} <= differs
    assert not differs & {3, 5, 6}   # -1 is not at the boundary, a NaN on neither side


def test_equivalents_are_matched():
    """By their code: comments, wherever they stand and whatever they say, are no part of it."""
    line = "    a[0] = a[1] < n;   // \"as\" anybody would /* say\n"
    mutants = mutate.mutants_of(mutate.Scan("__global__ void k(int* a, int n) {\n" + line + line + "}\n"))
    entry = mutate.Equivalent("k", "a[0] = a[1] < n;", "a[1] < n becomes a[1] <= n", "never equal", 2)
    assert mutate.match_equivalents(mutants, [entry]) == ({3: "never equal"}, [])
    assert mutate.match_equivalents(mutants, [entry._replace(nth=None)])[0] == {1: "never equal", 3: "never equal"}
    errors = mutate.match_equivalents(mutants, [entry._replace(code="a[0] = 1;"), entry._replace(argument=" ")])[1]
    assert len(errors) == 2 and "no mutant is k: a[0] = 1;" in errors[0] and "no argument" in errors[1]


def test_summary_and_file(tmp_path):
    scan = mutate.Scan("__global__ void k(int* a, int n) {\n    if (a[0] < n) __syncthreads();\n    a[0] = n == 1;\n}\n")
    mutants = mutate.mutants_of(scan)
    killed = {1: ("p", "bf16", "forward", "crash"), 4: ("q", "fp32", "reverse", "timeout")}
    state = SimpleNamespace(mutants=mutants, killed=killed, tried={2: ["p (bf16)"]}, reached={1, 2, 3},
                            left=lambda: mutants[1:3], killer=lambda m: "who")
    result = mutate.summary(scan, state, {3: "reason"})
    assert (result["mutants"], result["killed"], result["score"]) == (4, 2, 0.6667)
    assert result["survived"][0]["why"] == "run by p (bf16)" and result["equivalent"][0]["argument"] == "reason"
    mutate.write_json(tmp_path / "x.json", result)
    assert json.loads((tmp_path / "x.json").read_text()) == result
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.skipif(not mutate.RESULT.exists(), reason="mutate.py has not been run")
def test_result():
    """It agrees with itself. It is of the source that it names; a full run takes a while, so it is not made at every change."""
    result = json.loads(mutate.RESULT.read_text())
    survived, equivalent, kills = result["survived"], result["equivalent"], result["kills"]
    assert len(survived) + len(equivalent) + len(kills) == result["mutants"] and len(kills) == result["killed"]
    for counts in result["killed_by"].values():
        assert sum(counts.values()) == result["killed"]
    assert result["score"] == round(len(kills) / (result["mutants"] - len(equivalent)), 4) >= mutate.ENOUGH
    assert all(e["argument"].strip() for e in equivalent)


def test_arguments():
    """Each of the table of equivalent mutants is about a mutant of the trainer as it is."""
    found = {(m.point.kernel, m.mutation) for m in mutate.mutants_of(mutate.Scan((ROOT / "train_gpt2.cu").read_text()))}
    lines = collections.Counter(mutate.lines_without_comments((ROOT / "train_gpt2.cu").read_text()))
    for e in mutate.EQUIVALENT:
        assert (e.kernel, e.mutation) in found and lines[e.code] and e.argument.strip(), e
