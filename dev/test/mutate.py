"""Mutation testing of the kernels: does a test notice when a barrier or a comparison of a trainer is wrong?

    python3 dev/test/mutate.py                 all of it (half an hour to an hour on two cores); writes dev/test/results/mutation.json
    python3 dev/test/mutate.py --list          the mutants, without running anything
    python3 dev/test/mutate.py --only colsum   mutants of functions whose names match

A mutant is one change in one __global__ or __device__ function of train_gpt2.cu, or of what train_llama.cu has alone: a barrier (__syncthreads, __syncwarp, cp_async_wait...) that is
gone, a < or > whose boundary is moved (< and <= change places) or that is reversed (< becomes >=), an == that becomes !=. Its name
is its line of code, with the change in brackets: `if (i [< to <=] n) {`; comments, line numbers and the order of functions do not
matter. What is decided when compiling has none: if constexpr, static_assert, constexpr, and
loops of constant length.
Comparisons are told from template arguments by the blanks around them, as clang-format puts them.

All mutants are in one build of each program of dev/cuda: a copy of its trainer has `a <= M >= b` for `a < b`, where M knows the
mutant's number and the operator. <= and >= have the precedence of < and never open a template's arguments, so no expression has to
be parsed. MUTANT=n in the environment switches mutant n on. MUTANTS_SEEN=file takes the numbers of those that would have decided
otherwise at least once, and a mutant is run with such programs alone: the quickest first, in four orders of threads and once without
poison, then with sanitizers, and what is left in fp32. It is killed by an exit status other than 0, a signal, a timeout, or output
that differs between orders. EQUIVALENT lists the mutants that no test can kill, each with the reason.
"""
import argparse
import concurrent.futures
import datetime
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "train_gpt2.cu", ROOT / "train_llama.cu"]
OUT = ROOT / "build/mutate"
RESULT = ROOT / "dev/test/results/mutation.json"
ENOUGH = 0.95

# (a piece of "FUNCTION: NAME", how many mutants have it, why they cannot be killed)
EQUIVALENT = [
    ("if (threadIdx.x % 32 [== to !=] 0) shared[threadIdx.x / 32] = x;", 1,
     "warp_sum has given all lanes the same bits: the other 31 lanes write to its slot what lane 0 would have"),
    ("if (lane [== to !=] 0) {", 1,
     "mean and rstd come from warp sums, which have the same bits in all lanes: the other 31 lanes write the same"),
    ("&& lane [== to !=] 0) folded_bias[row] =", 1, "sum is a warp sum, which has the same bits in all lanes"),
    ("if (lane [== to !=] 0) shared_max[warp] =", 1, "warp_max has given all lanes the same bits"),
    ("if (lane [== to !=] 0) shared_sum[warp] =", 1, "warp_sum has given all lanes the same bits"),
    ("if (threadIdx.x [== to !=] 0) losses[row] =", 2,
     "every warp adds the same slots in the same order: all threads hold the same three terms, or 0, and write the same"),
    ("if (lane [== to !=] 0) mean_dz[buffer][i] =", 1, "warp_sum has given all lanes the same bits"),
    ("end = min(block.first + ATT_ROWS, T); t0 [< to <=] end;", 1,
     "the tile too many begins after all rows of the block, or after T: it is zeros, and p is 0"),
    ("return t [< to <=] (KEYS ?", 1, "as before"),
    ("t) [< to <=] block.first + ATT_ROWS)", 1, "the tile more has only queries whose documents begin after the block's keys: p is 0"),
    ("last = t0 + TC_ROWS [>= to >] T ||", 1, "the tile more has zeros for queries"),
    ("row_documents[stage][TC_ROWS] [>= to >] block.first", 1, "as before, of documents that begin after the block's keys"),
    ("attention_forward_tc_kernel: for (int t0 = first, stage = 0; t0 [< to <=] end;", 1,
     "the tile too many begins after all rows of the block, or after T: no row that is stored looks at it"),
    ("heads - first [< to <=] together ?", 1, "where they are equal either is the size"),
    ("if ((unsigned)(target - c) [< to <=] VEC)", 1, "where they are equal the target is none of the vector's elements"),
    ("c + VEC [> to >=] V && k < VEC", 2, "where they are equal no element of the vector lies beyond V"),
    ("[> to >=] 16 * M - 1) break", 2, "the left side is a multiple of 16, the right one less than such: they are never equal"),
    ("if (first_key() - (t0 + j) [> to >=] 15)", 1, "the left side is a multiple of 16: they are never equal"),
    ("8 * N - 1) [<= to <] 0 &&", 1, "the left side is odd: it is never 0"),
    ("first_query + 8 * N [<= to <] T)", 1, "where they are equal the last query exists: no score is masked, with or without looking at each"),
    ("__any_sync(ALL_LANES, t0 [<= to <] row &&", 1,
     "a warp that has row t0, a multiple of 16, has the next one, which comes after t0 and whose document begins there at the latest"),
    ("&& first_key [< to <=] t0 + ATT_TILE", 1, "the tile more has only keys before all queries' documents: p is 0"),
    ("attention_forward_kernel: if (s[j] [> to >=] max)", 1, "where they are equal all is multiplied by exp(0)"),
    ("tc_mask_documents: if (first_key [>= to >] seen)", 1, "where they are equal no key comes before a query's document"),
    ("KEYS ? row < t0 + ATT_TILE : t0 [<= to <] row)", 1, "as in forward"),
    ("KEYS ? row [< to <=] t0 + ATT_TILE", 1, "the tile more has only queries before the warp's keys: p is 0"),
    ("tc_column_sums: if (row [== to !=] 0) shared", 1, "the sums have the same bits in the 8 lanes of a column: the other 7 write the same"),
    ("first_query + 8 * N [<= to >] T)", 1, "queries after T have zeros for q, dout, lse and delta: their p is 1, and multiplies zeros"),
    ("first_query + col + right [>= to >] T)", 1, "as before"),
    ("i0 [< to <=] end; i0 += slots", 1, "the round too many has no head: it adds zeros to sums of dgamma, and stores nothing"),
    ("if (lane_col() [== to !=] 0 && query < T)", 2,
     "neighbours_sum and the exchange of maxima have given the 4 lanes of a row the same bits: the other 3 write what lane 0 would have"),
]

# ---- finding the mutants -------------------------------------------------------------------------

BARRIER = r"(?<![\w:])(?:__syncthreads|__syncwarp|cp_async_wait\w*)(?:<\w*>)?\([^;{]*\);"
COMPARISON = r"(?<=\s)(?:<=|>=|==|!=|<|>)(?=\s)"
UNBLANKED = r"(?<![\s<>=!-])(?:<=|>=|==|!=)|(?:<=|(?<![<>])>=|==|!=)(?![\s<>=])"
BRACKETS = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
NO_CODE = [r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'", r"#ifdef __CUDACC__.*?(?=#else|#endif)"]
TWINS = [r"^// ==== twin: .*?^// ==== end twin"]
COMPILE_TIME = [rf"\bif constexpr {BRACKETS}", r"\b(?:static_assert|constexpr)\b[^;{]*;",
                rf"#pragma unroll[ \d]*\n *for (?!\([^;]*; \w+ < [a-z]\w*;){BRACKETS}", r"\b\w+ < (?:VEC|PAIRS|ATT_VECS|ATT_CHANNELS|N|\(1 << BITS\) - 1|1u << BITS); \w+(?=\+\+| <<=| \+= 2|, )", r"\bo > 0; o >>= 1", r"\bBITS == 3 \?",
                r"^ *#[^\n]*"]
CHANGES = {"<": ["<=", ">="], "<=": ["<", ">"], ">": [">=", "<="], ">=": [">", "<"], "==": ["!="], "!=": ["=="]}
KIND = {"<": "LT", "<=": "LE", ">": "GT", ">=": "GE", "==": "EQ", "!=": "NE"}

Mutant = namedtuple("Mutant", "number function name begin end operator")   # begin, end: of the operator, or the barrier's statement

class MutateError(Exception):
    pass

def blank(patterns, text):
    for pattern in patterns:
        text = re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S | re.M)
    return text

def functions(code):
    """(name, begin, end) of the body of each device function: it ends on its line, or with a bracket as far left as it begins."""
    for head in re.finditer(r"^( *)[^\n{;]*\b__(?:global|device)__\b([^{;]*)\{", code, re.M):
        end = re.compile(rf"[^\n]*\}} *$|.*?^{head[1]}\}}", re.M | re.S).match(code, head.end())
        name = re.search(r"(operator\W+|\w+)\(", re.sub(r"(__launch_bounds__|__align__|alignas)\([^)]*\)", "", head[2]))
        if "constexpr" not in head[0]:
            yield re.sub(r"\s", "", name[1]), head.end(), end.end()

def find(text, first=1):
    """The mutants of a source, in its order; each operator's share a begin. Their numbers begin with `first`."""
    bare = blank(NO_CODE, text)
    code, mutants = blank(COMPILE_TIME, bare), []
    for function, begin, end in functions(code):
        unclear = re.compile(UNBLANKED).search(code, begin, end)
        if unclear:
            raise MutateError(f"line {text.count(chr(10), 0, unclear.start()) + 1}: '{unclear[0]}' without blanks: is it a comparison?")
        for m in re.compile(f"{BARRIER}|{COMPARISON}").finditer(code, begin, end):
            line = bare.rfind("\n", 0, m.start()) + 1, bare.find("\n", m.end())
            for change in CHANGES.get(m[0], ["nothing"]):
                name = f"{bare[line[0]:m.start()]}[{m[0]} to {change}]{bare[m.end():line[1]]}"
                mutants.append(Mutant(len(mutants) + first, function, " ".join(name.split()), m.start(), m.end(), m[0]))
    return mutants

def find_all(texts):
    """Those of both trainers, {path: its mutants}; the second one's twins are the first one's."""
    gpt2, llama = SOURCES
    found = find(texts[gpt2])
    return {gpt2: found, llama: find(blank(TWINS, texts[llama]), len(found) + 1)}

def match_equivalents(mutants, entries=None):
    """{number: argument}; an entry that does not fit as many mutants as it says is an error."""
    found = {}
    for piece, count, argument in EQUIVALENT if entries is None else entries:
        fits = [m.number for m in mutants if piece in f"{m.function}: {m.name}"]
        if len(fits) != count:
            raise MutateError(f"EQUIVALENT: {piece}: expected {count} mutants, found {len(fits)}")
        found.update(dict.fromkeys(fits, argument))
    return found

# ---- the copy that has them all ------------------------------------------------------------------

HEADER = r"""// What dev/test/mutate.py puts in front of the trainer: see there.
#pragma once
#include <stdio.h>
#include <stdlib.h>

namespace mutation {

const int COUNT = @COUNT@;
static unsigned char seen[COUNT + 2];          // by a mutant's number: it would have decided otherwise
static int low = COUNT + 2, high = -1;         // the mutants that are watched
static int mutant = 0;                         // the one that is switched on
static struct Start {
    const char* file = getenv("MUTANTS_SEEN");
    Start() {
        if (const char* value = getenv("MUTANT")) low = high = mutant = atoi(value);
        else if (file) low = 1, high = COUNT;
    }
    ~Start() {
        FILE* f = file ? fopen(file, "a") : nullptr;   // appended to: a program may run others of its kind
        for (int i = 1; f && i <= COUNT; i++)
            if (seen[i]) fprintf(f, "%d\n", i);
        if (f) fclose(f);
    }
} start __attribute__((init_priority(101)));

#define INLINE __attribute__((always_inline)) inline
INLINE bool unwatched(int first, int last) { return __builtin_expect(last < low || first > high, 1); }
inline bool decide(int number, bool original, bool changed) {
    if (mutant == number) return changed;
    seen[number] |= changed != original;
    return original;
}
INLINE bool removed(int number) { return unwatched(number, number) ? false : decide(number, false, true); }

enum Kind { LT, LE, GT, GE, EQ, NE };
template <Kind K, class A, class B>
INLINE bool compare(A a, B b) {
    if constexpr (K == LT) return a < b;
    if constexpr (K == LE) return a <= b;
    if constexpr (K == GT) return a > b;
    if constexpr (K == GE) return a >= b;
    if constexpr (K == EQ) return a == b;
    if constexpr (K == NE) return a != b;
}
template <Kind K> struct Operator { int number; };
template <Kind K, class A> struct Left { A a; int number; };
template <Kind K, class A> INLINE Left<K, A> operator<=(A a, Operator<K> o) { return {a, o.number}; }
template <Kind K, class A> INLINE Left<K, A> operator==(A a, Operator<K> o) { return {a, o.number}; }
template <Kind K, class A, class B>
INLINE bool operator>=(Left<K, A> left, B b) {
    constexpr Kind moved = K == LT ? LE : K == LE ? LT : K == GT ? GE : GT;
    constexpr Kind reversed = K == LT ? GE : K == LE ? GT : K == GT ? LE : LT;
    const int n = left.number;
    bool original = compare<K>(left.a, b);
    if (unwatched(n, n + 1)) return original;
    bool second = decide(n + 1, original, compare<reversed>(left.a, b));
    return mutant == n + 1 ? second : decide(n, original, compare<moved>(left.a, b));
}
template <Kind K, class A, class B>
INLINE bool operator==(Left<K, A> left, B b) {
    bool original = compare<K>(left.a, b);
    return unwatched(left.number, left.number) ? original : decide(left.number, original, !original);
}

}  // namespace mutation
"""

def mutated(text, mutants):
    """The source with every mutant switchable; a line stays where it is."""
    pieces, position = [], 0
    for m in mutants:
        if m.begin < position:
            continue   # the second of an operator
        pieces.append(text[position:m.begin])
        if m.operator not in CHANGES:
            pieces.append(f"::mutation::removed({m.number}) ? void() : {m.operator}")
        else:
            before, after = ("==", "==") if m.operator in ("==", "!=") else ("<=", ">=")
            pieces.append(f"{before} ::mutation::Operator<::mutation::{KIND[m.operator]}>{{{m.number}}} {after}")
        position = m.end
    return "".join(pieces) + text[position:]

# ---- building and running ------------------------------------------------------------------------

Build = namedtuple("Build", "name flags orders")
ORDERS = {"forward": {}, "reverse": {"SIMT_ORDER": "reverse"}, "priority 1": {"SIMT_ORDER": "priority", "SIMT_SEED": "1"},
          "priority 2": {"SIMT_ORDER": "priority", "SIMT_SEED": "2"},
          "not poisoned": {"SIMT_POISON": "0"}}   # what nobody wrote is not NaN, which fmaxf would pass over, but what was there before
BUILDS = [Build("bf16", [], list(ORDERS)), Build("san", ["SAN=1"], ["forward"]), Build("fp32", ["PRECISION=FP32"], list(ORDERS))]
interrupted = threading.Event()

def build(texts, mutants, names, how, jobs):
    """Makes the programs in a copy of the tree, in which only what has changed is written again."""
    files = {path.relative_to(ROOT): path.read_text() for pattern in ("Makefile", "dev/cpu/*.*", "dev/cpu/include/**/*.h", "dev/cuda/*.cu*")
             for path in ROOT.glob(pattern)}
    files.update({path.name: mutated(texts[path], mutants[path]) for path in SOURCES})
    files["mutation.h"] = HEADER.replace("@COUNT@", str(sum(map(len, mutants.values()))))
    for path, content in files.items():
        to = OUT / path
        to.parent.mkdir(parents=True, exist_ok=True)
        if not to.exists() or to.read_text() != content:
            to.write_text(content)
    # a mutated comparison may look odd to -Wall; a program uses little of the trainer, and -fwhole-program compiles no more
    done = subprocess.run(["make", "-s", f"-j{jobs}", *[f"dev/cuda/{name}" for name in names], "CPU=1", f"BUILD={how.name}", *how.flags,
                           "CXXFLAGS=-w -O1 -fwhole-program -include mutation.h"], cwd=OUT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise MutateError(done.stderr[:6000])

def run(program, env, seconds=600):
    """(what was wrong, output) of a program that runs to its end, or until it has had the time that it may."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SIMT_", "OMP_", "MUTANT", "ASAN_", "UBSAN_"))}
    with subprocess.Popen([program], env={**clean, "OMP_NUM_THREADS": "1", **env}, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, start_new_session=True) as process:
        end = time.monotonic() + seconds
        while True:
            try:
                out, err = process.communicate(timeout=0.5)
            except subprocess.TimeoutExpired:
                if not interrupted.is_set() and time.monotonic() < end:
                    continue
                os.killpg(process.pid, signal.SIGKILL)   # with the others of its kind that it has started
                return "timeout", b""
            status = process.returncode
            said = re.search(rb"simt error: [^\n]{0,60}|AddressSanitizer|runtime error|written beside a tensor|FAIL", err + out)
            return status and (said[0].decode(errors="replace") if said else f"status {status}"), out

class Program:
    """One build, and what it did without a mutant: its seconds and output, and the mutants that would make a difference."""

    def __init__(self, name, how):
        self.name, self.how, self.path = name, how, OUT / how.name / "dev/cuda" / name
        with tempfile.TemporaryDirectory() as folder:
            seen, begin = Path(folder) / "seen", time.monotonic()
            wrong, self.out = run(self.path, {"MUTANTS_SEEN": str(seen)})
            if wrong:
                raise MutateError(f"{name}, {how.name}, without any mutant: {wrong}")
            self.seconds, self.seen = time.monotonic() - begin, set(map(int, seen.read_text().split()))

    def kills(self, mutant):
        """In which order and by what a mutant is killed, or None."""
        if mutant.number not in self.seen:
            return None
        outputs = set()
        for order in self.how.orders:
            wrong, out = run(self.path, {**ORDERS[order], "MUTANT": str(mutant.number)}, 10 * self.seconds + 5)
            if interrupted.is_set():
                raise KeyboardInterrupt
            outputs.add(out)
            if wrong or len(outputs) > 1:
                return f"{self.name} {self.how.name} {order}: {wrong or 'other output than in another order'}"
        return None

def in_parallel(function, items, jobs):
    """[function(item)]; Ctrl-C ends what runs."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [f.result() for f in futures]
        except BaseException:
            interrupted.set()
            pool.shutdown(cancel_futures=True)
            raise

def say(text):
    print(text, flush=True)

# ---- the result ----------------------------------------------------------------------------------

def fingerprint(text):
    """Of the code alone: comments and blanks do not count."""
    return hashlib.sha256("".join(re.sub(NO_CODE[0].split('|"')[0], "", text, flags=re.S).split()).encode()).hexdigest()[:16]

def summary(text, mutants, killed, equivalent):
    """What goes into mutation.json; killed: {number: by what}."""
    def names(numbers):
        return sorted(f"{m.function}: {m.name}" for m in mutants if m.number in numbers)
    everyone = {m.number for m in mutants}
    return {"source": fingerprint(text), "date": datetime.date.today().isoformat(), "mutants": len(mutants), "killed": len(killed),
            "score": round(len(killed) / max(1, len(everyone - set(equivalent))), 4), "survived": names(everyone - set(equivalent) - set(killed)),
            "equivalent": names(equivalent), "kills": sorted(f"{m.function}: {m.name} -- {killed[m.number]}" for m in mutants if m.number in killed)}

def main():
    parser = argparse.ArgumentParser(description="Mutation testing of the trainers' kernels by the programs of dev/cuda.")
    parser.add_argument("--only", metavar="REGEX", help="mutants of the functions whose names match, alone; writes no file")
    parser.add_argument("--programs", metavar="A,B", help="by these programs of dev/cuda alone; writes no file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs at a time (one per core)")
    parser.add_argument("--list", action="store_true", help="show the mutants, and run nothing")
    a = parser.parse_args()
    begin, texts = time.monotonic(), {path: path.read_text() for path in SOURCES}
    by_source = find_all(texts)
    everything = sum(by_source.values(), [])
    equivalent, killed = match_equivalents(everything), {}
    chosen = [m for m in everything if re.search(a.only or "", m.function)]
    if a.list or not chosen:
        return say("\n".join(f"{m.function}: {m.name}" for m in chosen) + f"\n{len(chosen)} mutants")
    names = a.programs.split(",") if a.programs else sorted(path.stem for path in ROOT.glob("dev/cuda/*.cu"))
    for how in BUILDS:
        build(texts, by_source, names, how, a.jobs)
        programs = sorted(in_parallel(lambda name: Program(name, how), names, a.jobs), key=lambda p: p.seconds)
        left = [m for m in chosen if m.number not in killed]
        say(f"{how.name}: {len(left)} mutants to kill ({time.monotonic() - begin:.0f} s so far)")
        by = in_parallel(lambda m: next(filter(None, (p.kills(m) for p in programs)), None), left, a.jobs)
        killed.update({m.number: what for m, what in zip(left, by) if what})
    wrong = [m for m in chosen if m.number in killed and m.number in equivalent]
    for m in wrong:
        say(f"error: EQUIVALENT: {m.name}: it was killed by {killed[m.number]}")
    result = summary("".join(texts.values()), chosen, killed, {n: why for n, why in equivalent.items() if n in {m.number for m in chosen}})
    for name in result["survived"]:
        say(f"survived: {name}")
    if not (a.only or a.programs or wrong):
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=0) + "\n")   # one line for each mutant
    say(f"{len(chosen)} mutants, {len(killed)} killed, {len(result['survived'])} survived, {len(result['equivalent'])} equivalent; "
        f"{100 * result['score']:.1f} % of those not equivalent are killed ({100 * ENOUGH:.0f} % is enough), in {time.monotonic() - begin:.0f} s")
    return 0 if result["score"] >= ENOUGH and not wrong else 1

if __name__ == "__main__":
    try:
        sys.exit(main())
    except (MutateError, OSError) as e:
        sys.exit(f"mutate: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
