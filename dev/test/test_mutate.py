"""dev/test/mutate.py finds what it should and mutates it as it says; its result, results/mutation.json, agrees with itself."""
import json
import re
import subprocess

import pytest

import mutate

SOURCE = '''// a < b in a comment
constexpr int LANES = 32, WARPS = 8;
int host(int a, int b) { return a < b; }
__device__ void later(int a);
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
template <int G, bool SUM>
__global__ void __launch_bounds__(LANES * G, 1)
sum_kernel(float* out, const float* x, int n) {   // n < 3
    static_assert(G > 0, "G > 0");
    constexpr int COUNT = G > 1 ? G : 1;
    if constexpr (SUM && (G >= 2)) out[0] = COUNT;
#pragma unroll   // twice
    for (int o = 1; o < G; o <<= 1) {
#pragma unroll 2
        for (int i = 2 * o; i < 2 * o + WARPS; i++) out[i] = x[o];
    }
#pragma unroll 4
    for (int i = 0; i < n; i++) out[i] = 0;   // n of them
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
    __device__ bool operator()(int i) const { return i < n; }   // one line
    __device__ int twice() const { return 2 * n; }
};
'''
FOUND = ["sum_kernel: for (int i = 0; i [< to <=] n; i++) out[i] = 0;", "sum_kernel: for (int i = 0; i [< to >=] n; i++) out[i] = 0;",
         "sum_kernel: if (n [!= to ==] 7) __syncthreads();", "sum_kernel: if (n != 7) [__syncthreads(); to nothing]",
         "sum_kernel: auto at = [&](int i) { return i [>= to >] 0 && x[i] <= static_cast<float>(n) ? x[i] : 0; };",
         "sum_kernel: auto at = [&](int i) { return i [>= to <] 0 && x[i] <= static_cast<float>(n) ? x[i] : 0; };",
         "sum_kernel: auto at = [&](int i) { return i >= 0 && x[i] [<= to <] static_cast<float>(n) ? x[i] : 0; };",
         "sum_kernel: auto at = [&](int i) { return i >= 0 && x[i] [<= to >] static_cast<float>(n) ? x[i] : 0; };",
         "sum_kernel: if (x [== to !=] nullptr) out[0] = at(n);", "sum_kernel: [cp_async_wait<1>(); to nothing]",
         "operator(): __device__ bool operator()(int i) const { return i [< to <=] n; }",
         "operator(): __device__ bool operator()(int i) const { return i [< to >=] n; }"]

def names(text):
    return [f"{m.function}: {m.name}" for m in mutate.find(text)]

def test_what_is_found():
    """By its code alone: other comments, other lines and another order of functions change no name."""
    assert names(SOURCE) == FOUND
    reworded = SOURCE.replace("n of them", "as many as\n    // there are: i < n").replace("n < 3", "/* \"n").replace("one line", "short")
    kernel, sizes = reworded.split("struct Sizes")
    assert sorted(names("\n\nstruct Sizes" + sizes + kernel)) == sorted(FOUND)
    assert mutate.fingerprint(reworded) == mutate.fingerprint(SOURCE) != mutate.fingerprint(SOURCE.replace("i < n", "i <= n"))

@pytest.mark.parametrize("code", ["a<=b", "a <=b", "a==b", "a>= b"])
def test_what_is_not_understood_is_an_error(code):
    with pytest.raises(mutate.MutateError, match="line 2: .* without blanks"):
        mutate.find(f"__global__ void k(int a, int b) {{\n    if ({code}) a = 1;\n}}\n")

# Each line is a case: its operator, and what it decides as it stands and in either mutant.
CASES = {"__device__ int f0() { int a = 2; unsigned b = 2; return a < b; }": "0 1 1",
         "__device__ int f1() { int a = -1; unsigned b = 2; return a < b; }": "0 0 1",      # as C++ has it: -1 becomes large
         "__device__ int f2() { float a = NAN; return a < 1.0f; }": "0 0 0",
         "__device__ int f3() { double a = 1; return 2 * a + 1 > 3.0f ? 5 : 6; }": "6 5 5",
         "__device__ int f4() { int* p = nullptr; return p == nullptr; }": "1 0",
         "__device__ int f5() { int a = 6; return (a & 2) != 0 && a >= 6; }": "1 0 0 0",
         "__device__ int f6() { int n = 0; for (int i = 0; i < 3 && n <= 100; i++) n++; return n; }": "3 4 0 3 0",
         "__device__ int f7() { int n = 1; __syncthreads(); return n + late; }": "2 1"}

def test_mutants_decide_as_they_say(tmp_path):
    text = "\n".join(CASES)
    mutants = mutate.find(text)
    calls = "".join(f'    printf("%d ", f{i}());\n' for i in range(len(CASES)))
    (tmp_path / "mutation.h").write_text(mutate.HEADER.replace("@COUNT@", str(len(mutants))))
    (tmp_path / "x.cpp").write_text("#include <math.h>\n#define __device__\nint late = 0;\nvoid __syncthreads() { late = 1; }\n" +
                                    mutate.mutated(text, mutants) + "\nint main() {\n" + calls + "}\n")
    subprocess.run(["g++", "-std=c++17", "-w", "-include", "mutation.h", "x.cpp", "-o", "x"], cwd=tmp_path, check=True)

    def outputs(**env):
        return subprocess.run([tmp_path / "x"], env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    original, by_mutant = outputs(), {m.number: outputs(MUTANT=str(m.number)) for m in mutants}
    assert original == [c.split()[0] for c in CASES.values()]
    place = [i for i, c in enumerate(CASES.values()) for _ in c.split()[1:]]
    assert [by_mutant[m.number][i] for m, i in zip(mutants, place)] == [x for c in CASES.values() for x in c.split()[1:]]
    assert all(sum(a != b for a, b in zip(original, o)) <= 1 for o in by_mutant.values())   # and nothing else
    assert outputs(MUTANTS_SEEN=str(tmp_path / "seen")) == original
    seen = set(map(int, (tmp_path / "seen").read_text().split()))
    assert {n for n, o in by_mutant.items() if o != original} <= seen
    assert not seen & {3, 5, 6}   # -1 is not at the boundary, a NaN on neither side

def test_the_trainer():
    """Every barrier of the trainers' kernels has a mutant, and every entry of EQUIVALENT is about as many as it says."""
    texts = {path: path.read_text() for path in mutate.SOURCES}
    gpt2, llama = mutate.find_all(texts).values()
    mutants = gpt2 + llama
    assert [m.number for m in mutants] == list(range(1, len(mutants) + 1)) and {"rope_kernel", "swiglu_backward_kernel"} <= {m.function for m in llama}
    assert not {m.function for m in gpt2} & {m.function for m in llama}, "a twin is there twice"
    bare = "".join(mutate.blank(mutate.NO_CODE, text if path == mutate.SOURCES[0] else mutate.blank(mutate.TWINS, text)) for path, text in texts.items())
    assert sum(m.operator == "__syncthreads();" for m in mutants) == bare.count("__syncthreads();") > 10
    assert len({m.begin for m in mutants if m.operator in mutate.CHANGES}) > 100
    assert mutate.match_equivalents(mutants)
    with pytest.raises(mutate.MutateError, match="expected 1 mutants, found 0"):
        mutate.match_equivalents(mutants, [("if (lane [== to !=] 0) nothing = like[this];", 1, "it is not there")])

@pytest.mark.skipif(not mutate.RESULT.exists(), reason="mutate.py has not been run")
def test_result():
    """Of the source that it names; a full run takes a while, so it is not made at every change."""
    result = json.loads(mutate.RESULT.read_text())
    survived, equivalent, kills = result["survived"], result["equivalent"], result["kills"]
    assert len(survived) + len(equivalent) + len(kills) == result["mutants"] and len(kills) == result["killed"]
    assert result["score"] == round(len(kills) / (result["mutants"] - len(equivalent)), 4) >= mutate.ENOUGH
    assert re.fullmatch(r"[0-9a-f]{16} \d{4}-\d\d-\d\d", f"{result['source']} {result['date']}")
