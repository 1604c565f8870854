"""Mutation testing of the kernels: does a test notice when a barrier or a comparison of train_gpt2.cu is wrong?

    python3 dev/test/mutate.py                        all of it; writes dev/test/mutation.json
    python3 dev/test/mutate.py --list                 points and mutants, without running anything
    python3 dev/test/mutate.py --only colsum          mutants of kernels whose names match

A mutation point is, in a __global__ or __device__ function of train_gpt2.cu,

    a barrier     __syncthreads(), __syncwarp(), cp_async_wait...(): one mutant, in which it is gone
    a bound       a < b, <=, >, >=: two mutants, the boundary moved (< and <= change places, > and >= do) and the comparison
                  reversed (< becomes >=, <= becomes >). Reversed is the other operator and not the negation: both are false
                  for a NaN
    an equality   a == b or a != b: one mutant, the other operator

Not points, but counted and shown as excluded: what is decided when compiling (if constexpr, static_assert, initialisers of
constexpr, template heads), code that nvcc alone compiles, and the condition of a `#pragma unroll` loop made of nothing but
constants, template parameters and the loop's variable, which is a trip count and no bound on data. Comparisons are told from
template arguments by the blanks around them, as clang-format puts them.

All mutants are in one build of each program of dev/cuda. A copy of the trainer has `a <= M >= b` for `a < b`: M is an object
that knows the point's number and its operator. <= and >= have the precedence of <, and never open a template's arguments; so
no expression has to be parsed, and what does not work is a compiler's error. MUTANT=n in the environment chooses a mutant.
MUTANT_COVERAGE=file appends to the file a line for each mutant whose point was reached: "n 2" if the mutant would have decided
otherwise than the original at least once, else "n 1". A run in which it never would have is the run without it, so it is not
made.

A mutant is run with each program, the quickest first, in four orders of threads and without poison, then with the sanitizers,
and what is left in fp32. It is killed by an exit status other than 0, a signal, a timeout, memory without end, or output that
differs between orders. The table EQUIVALENT lists the mutants that no test can kill, each with the reason. An entry that fits no mutant, or one
that was killed, is an error.
"""
import argparse
import bisect
import collections
import concurrent.futures
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
sys.path.insert(0, str(ROOT / "dev/cpu"))
import cu2cpp  # noqa: E402

SOURCE = ROOT / "train_gpt2.cu"
OUT = ROOT / "build/mutate"
RESULT = ROOT / "dev/test/mutation.json"
ENOUGH = 0.95

# ----------------------------------------------------------------------------
# equivalent mutants
#
# kernel, code: as --list shows them, without comments. nth: which of several equal lines of one kernel, from 1; None: all.

Equivalent = namedtuple("Equivalent", "kernel code mutation argument nth", defaults=[None])
EQUIVALENT = [
    Equivalent("block_sum_256", "if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;",
               "threadIdx.x % 32 == 0 becomes threadIdx.x % 32 != 0",
               "warp_sum has given all lanes the same bits: the other 31 lanes write to its slot what lane 0 would have."),
    Equivalent("layernorm_forward_kernel", "if (lane == 0) {", "lane == 0 becomes lane != 0",
               "Mean and rstd come from warp sums, which have the same bits in all lanes: the other 31 lanes write the same."),
    Equivalent("norm_fold_kernel", "if (lane == 0) folded_bias[row] = (floatX)((float)bias[row] + sum);",
               "lane == 0 becomes lane != 0",
               "sum is a warp sum, which has the same bits in all lanes: the other 31 lanes write the same."),
    Equivalent("classifier_kernel", "if (lane == 0) shared_max[warp] = row_max;", "lane == 0 becomes lane != 0",
               "warp_max has given all lanes the same bits: the other 31 lanes write what lane 0 would have."),
    Equivalent("classifier_kernel", "if (lane == 0) shared_sum[warp] = sum;", "lane == 0 becomes lane != 0",
               "warp_sum has given all lanes the same bits: the other 31 lanes write what lane 0 would have."),
    Equivalent("classifier_kernel", "if (threadIdx.x == 0) losses[row] = logf(sum) + (row_max - target_logit);",
               "threadIdx.x == 0 becomes threadIdx.x != 0",
               "Every warp adds the same slots in the same order: all threads hold the same three terms, and write the same."),
    Equivalent("layernorm_backward_kernel", "for (int r0 = first, turn = 0; r0 < end; r0 += NORM_ROWS, turn ^= 1) {",
               "r0 < end becomes r0 <= end",
               "In the turn too many count is min(8, 0) = 0: nothing is read or written, and all threads meet at its barrier."),
    Equivalent("layernorm_backward_kernel", "if (lane == 0) mean_dz[turn][i] = sum, mean_dz_z[turn][i] = sum_z;",
               "lane == 0 becomes lane != 0",
               "warp_sum has given all lanes the same bits: the other 31 lanes write what lane 0 would have."),
    Equivalent("attention_forward_kernel", "for (int t0 = 0; t0 < end; t0 += ATT_TILE) {", "t0 < end becomes t0 <= end",
               "If end is first + 64, the tile too many comes after all rows of the block and is skipped. If it is T, the tile is "
               "zeros, and masked for every row that is stored."),
    Equivalent("attention_backward_dq_kernel", "for (int t0 = 0; t0 < end; t0 += ATT_TILE) {", "t0 < end becomes t0 <= end",
               "As in the forward kernel: the tile too many is skipped, or p is 0 for every row that is stored."),
    Equivalent("attention_backward_dkv_kernel",
               "for (int t0 = at.first; t0 < T; t0 += ATT_TILE) {",
               "t0 < T becomes t0 <= T",
               "The tile too many has only queries that are not there: they are loaded as zeros and have p = 0."),
    Equivalent("attention_forward_tc_kernel", "for (int t0 = 0; t0 < end; t0 += TC_ROWS) {", "t0 < end becomes t0 <= end",
               "The tile too many was not copied and is looked at only by warps whose rows all come after T: none is stored."),
    Equivalent("attention_forward_tc_kernel", "if (t0 + TC_ROWS < end) {", "t0 + TC_ROWS < end becomes t0 + TC_ROWS <= end",
               "It copies one more tile, whose rows are checked against T, into the stage that is free; nobody reads it."),
    Equivalent("attention_backward_dq_tc_kernel", "for (int t0 = 0; t0 < end; t0 += TC_ROWS) {", "t0 < end becomes t0 <= end",
               "The tile too many begins at or after the warp's last row, or after T: every 16 keys of it are left at once, or "
               "looked at only by warps whose rows are not stored."),
    Equivalent("attention_backward_dq_tc_kernel", "if (t0 + TC_ROWS < end) {",
               "t0 + TC_ROWS < end becomes t0 + TC_ROWS <= end",
               "It copies one more tile, whose rows are checked against T, into the stage that is free; nobody reads it."),
    Equivalent("att_place", "int size = heads - first < together ? heads - first : together;",
               "heads - first < together becomes heads - first <= together", "Where they are equal either is the size."),
    Equivalent("attention_forward_tc_kernel", "if (ahead > 16 * M - 1) break;", "ahead > 16 * M - 1 becomes ahead >= 16 * M - 1",
               "ahead is a multiple of 16: they are never equal."),
    Equivalent("attention_forward_tc_kernel", "if (ahead + KEYS - 1 > 16 * m) {",
               "ahead + KEYS - 1 > 16 * m becomes ahead + KEYS - 1 >= 16 * m", "The left side is odd: they are never equal."),
    Equivalent("attention_forward_tc_kernel",
               "if (threadIdx.x % 4 == 0 && r < T) lse[((size_t)at.b * NH + at.h) * T + r] = max[m][half] * shape.scale + logf(total);",
               "threadIdx.x % 4 == 0 becomes threadIdx.x % 4 != 0",
               "quad_max and quad_sum have given the 4 lanes of a row the same bits: the other 3 write what lane 0 would have."),
    Equivalent("attention_backward_dq_tc_kernel", "if (threadIdx.x % 4 == 0 && r < T) delta[stat + r] = row_delta[m][half];",
               "threadIdx.x % 4 == 0 becomes threadIdx.x % 4 != 0",
               "quad_sum has given the 4 lanes of a row the same bits: the other 3 write what lane 0 would have."),
    Equivalent("attention_backward_dq_tc_kernel", "if (ahead > 16 * M - 1) break;", "ahead > 16 * M - 1 becomes ahead >= 16 * M - 1",
               "ahead is a multiple of 16: they are never equal."),
    Equivalent("attention_backward_dq_tc_kernel", "if (ahead + 8 * right + 7 > 16 * m) {",
               "ahead + 8 * right + 7 > 16 * m becomes ahead + 8 * right + 7 >= 16 * m", "The left side is odd: they are never equal."),
    Equivalent("attention_backward_dkv_tc_kernel", "if (ahead > 15) continue;", "ahead > 15 becomes ahead >= 15",
               "ahead is a multiple of 16: they are never equal."),
    Equivalent("attention_backward_dkv_tc_kernel", "if (ahead + 16 * m + 15 > 8 * n || t0 + j + 15 >= T) {",
               "ahead + 16 * m + 15 > 8 * n becomes ahead + 16 * m + 15 >= 8 * n", "The left side is odd: they are never equal."),
]

# ----------------------------------------------------------------------------
# finding the points

BARRIERS = [r"__syncthreads", r"__syncwarp", r"cp_async_wait\w*"]
BARRIER = re.compile(rf"(?<![\w:])(?:{'|'.join(BARRIERS)})\b(?=\s*[<(])")   # not simt::..., which emulates it
COMPARISON = re.compile(r"(?<=\s)(?:<=|>=|==|!=|<|>)(?=\s)")
UNBLANKED = re.compile(r"(?<![<>])(?:<=|>=)|==|!=")
FUNCTION = re.compile(r"\b__(?:global|device)__\b")
NO_FUNCTION = {"__launch_bounds__", "__align__", "alignas", "__attribute__"}   # words before a function's name, with brackets
CONSTANT = re.compile(r"\bconstexpr\b[^;=(){}]*?\b(\w+)\s*(?:\[[^\]]*\]\s*)*[={][^;]*;")
COMPILE_TIME = {
    "if constexpr": re.compile(r"\bif\s+constexpr\s*(?=\()"),
    "static_assert": re.compile(r"\bstatic_assert\s*(?=\()"),
    "compile-time operand": re.compile(r"\b(?:sizeof|alignof|decltype|noexcept|alignas)\s*(?=\()"),
    "template head": re.compile(r"\btemplate\s*(?=<)"),
    "constexpr initialiser": re.compile(r"\bconstexpr\b(?!\s*\()"),
}
TYPE_WORDS = {"sizeof", "const", "auto", "int", "unsigned", "long", "short", "char", "bool", "float", "size_t", "int32_t",
              "uint32_t", "int64_t", "uint64_t", "floatX"}
CLOSING = {"(": ")", "[": "]", "{": "}"}
KIND = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}
MUTATIONS = {"<": ["<=", ">="], "<=": ["<", ">"], ">": [">=", "<="], ">=": [">", "<"], "==": ["!="], "!=": ["=="]}

# begin, end: of the operator, or of the barrier's statement; number: of its first mutant
Point = namedtuple("Point", "kernel line code begin end operator left right number")
Mutant = namedtuple("Mutant", "number point mutation nth")   # nth: of the equal lines in its kernel


class MutateError(Exception):
    pass


def blank(text):
    return re.sub(r"[^\n]", " ", text)


def lines_without_comments(text):
    """A source's lines as they are quoted: a comment can be reworded, and nobody has to know."""
    bare = "".join(blank(t.text) if t.kind == "comment" else t.text for t in cu2cpp.tokenize(text))
    return [line.strip() for line in bare.split("\n")]


class Scan:
    """A source's text, with comments, strings and directives blanked out in `code`, and what was found in it."""

    def __init__(self, text, name="train_gpt2.cu"):
        self.text, self.name = text, name
        self.starts = [0] + [m.end() for m in re.finditer("\n", text)]
        self.lines = lines_without_comments(text)
        self.directives = []                    # (begin, end)
        self.code = self.blank_out()
        self.constants = {n for m in CONSTANT.finditer(self.code) for n in [m[1], *re.findall(r",\s*(\w+)\s*=", m[0])]}
        self.nvcc_only = self.find_nvcc_only()
        self.excluded = collections.Counter()
        self.points = []
        for kernel, begin, end, parameters in self.functions():
            self.scan(kernel, begin, end, parameters)

    def blank_out(self):
        code, position = [], 0
        for token in cu2cpp.tokenize(self.text):
            keep = token.kind not in ("comment", "string", "directive")
            code.append(token.text if keep else blank(token.text))
            if token.kind == "directive":
                self.directives.append((position, position + len(token.text)))
            position += len(token.text)
        return "".join(code)

    def line(self, position):
        return bisect.bisect_right(self.starts, position)

    def error(self, position, what):
        raise MutateError(f"{self.name}:{self.line(position)}: {what}")

    def closing(self, position):
        """The bracket that closes the one at position."""
        stack = []
        for i in range(position, len(self.code)):
            c = self.code[i]
            if c in CLOSING:
                stack.append(CLOSING[c])
            elif c in ")]}" and c != stack.pop():
                self.error(i, f"'{c}' does not match the bracket that it should close")
            if not stack:
                return i
        self.error(position, f"'{self.code[position]}' is never closed")

    def find_nvcc_only(self):
        """Ranges between #ifdef __CUDACC__ and its #else or #endif, or the other way round."""
        ranges, stack = [], []
        for begin, end in self.directives:
            text = self.text[begin:end]
            word = re.match(r"#\s*(\w*)", text)[1]
            if word in ("if", "ifdef", "ifndef"):
                known = re.fullmatch(r"#\s*(?:ifdef\s+|if\s+defined\s*\(?\s*)__CUDACC__\s*\)?\s*(?://.*)?", text)
                other = re.fullmatch(r"#\s*(?:ifndef\s+|if\s+!\s*defined\s*\(?\s*)__CUDACC__\s*\)?\s*(?://.*)?", text)
                stack.append([True if known else False if other else None, end])
            elif word in ("else", "elif", "endif") and stack:
                nvcc, since = stack[-1]
                if nvcc:
                    ranges.append((since, begin))
                stack[-1] = [None if nvcc is None or word == "elif" else not nvcc, end]
                if word == "endif":
                    stack.pop()
        return ranges

    def functions(self):
        """(name, begin and end of the body, names of template parameters) of each device function that has a body."""
        bodies, after = [], 0
        for mark in FUNCTION.finditer(self.code):
            if mark.start() < after or self.is_nvcc_only(mark.start()):
                continue
            head_start = max(self.code.rfind(c, 0, mark.start()) for c in ";}{") + 1
            i, name = mark.end(), None
            while self.code[i] not in "{;":
                if self.code[i] == "(":
                    before = re.search(r"(operator\s*\W{1,3}|[\w~]+)\s*$", self.code[mark.end():i])
                    if name is None and before and before[1] not in NO_FUNCTION:
                        name = "operator()" if before[1] == "operator" else re.sub(r"\s", "", before[1])
                    i = self.closing(i)
                i += 1
            if self.code[i] == ";" or name is None:
                continue
            after = self.closing(i)
            head = self.code[head_start:i]
            if re.search(r"\bconstexpr\b", head):
                self.excluded["constexpr function"] += len(COMPARISON.findall(self.code, i, after))
                continue
            template = re.match(r"\s*template\s*<(.*?)>\s*(?:__|inline|static)", head, re.S)
            parameters = names_of(template[1]) if template else set()
            bodies.append((name, i, after, parameters | self.outer_template(mark.start())))
        return bodies

    def outer_template(self, position):
        """Template parameters of the struct around a member function."""
        for m in re.finditer(r"\btemplate\s*<([^{};]*?)>\s*struct\b[^;{]*(?=\{)", self.code[:position]):
            if self.closing(m.end()) > position:
                return names_of(m[1])
        return set()

    def is_nvcc_only(self, position):
        return any(a <= position < b for a, b in self.nvcc_only)

    def compile_time(self, begin, end, parameters):
        """[(begin, end, reason)] of what is decided when compiling."""
        ranges = [(a, b, "compiled by nvcc alone") for a, b in self.nvcc_only]
        for reason, pattern in COMPILE_TIME.items():
            for m in pattern.finditer(self.code, begin, end):
                if reason == "constexpr initialiser":
                    last = self.code.index(";", m.end())
                elif reason == "template head":
                    last = self.code.index(">", m.end())
                else:
                    last = self.closing(m.end())
                ranges.append((m.start(), last, reason))
        loops = []          # (end of the loop, its variable) of the unrolled loops found so far
        for a, b in self.directives:
            if begin <= a < end and re.match(r"#\s*pragma\s+unroll\b", self.text[a:b]):
                ranges += self.unrolled(b, parameters | {v for last, v in loops if b < last}, loops)
        return ranges

    def unrolled(self, position, known, loops):
        """The head of the loop behind a #pragma unroll, if its condition is made of what the compiler knows."""
        loop = re.compile(r"\s*for\s*(?=\()").match(self.code, position)
        if not loop:
            self.error(position, "expected a for loop behind #pragma unroll")
        begin, end = loop.end(), self.closing(loop.end())
        parts = self.code[begin + 1:end].split(";")
        variable = re.search(r"(\w+)\s*=", parts[0])
        if len(parts) != 3 or not variable:
            self.error(position, "expected for (type name = a; b; c) behind #pragma unroll")
        names = set(re.findall(r"\b[A-Za-z_]\w*\b(?!\s*::)", parts[0] + " ; " + parts[1]))
        if not names <= known | {variable[1]} | self.constants | TYPE_WORDS:
            return []
        loops.append((self.statement_end(end + 1), variable[1]))
        return [(begin, end, "trip count of an unrolled loop")]

    def statement_end(self, position):
        """Where the statement at position ends."""
        i = position
        while self.code[i].isspace():
            i += 1
        head = re.compile(r"(?:for|while|if)\s*(?=\()").match(self.code, i)
        if head:
            return self.statement_end(self.closing(head.end()) + 1)
        while self.code[i] not in ";{":
            i = self.closing(i) + 1 if self.code[i] in "([" else i + 1
        return self.closing(i) if self.code[i] == "{" else i

    def scan(self, kernel, begin, end, parameters):
        skip = self.compile_time(begin, end, parameters)
        found = [*BARRIER.finditer(self.code, begin, end), *COMPARISON.finditer(self.code, begin, end)]
        found.sort(key=lambda m: m.start())
        for m in found:
            reason = next((r for a, b, r in skip if a <= m.start() < b), None)
            if reason:
                self.excluded[reason] += 1
            elif m[0] in KIND:
                self.add(kernel, m.start(), m.end(), m[0], self.left_of(m.start()), self.right_of(m.end()))
            else:
                self.add(kernel, *self.barrier(m), None, None, None)
        known = {m.start() for m in found}
        for m in UNBLANKED.finditer(self.code, begin, end):
            if m.start() not in known and not re.search(r"operator\s*$", self.code[:m.start()]):
                self.error(m.start(), f"'{m[0]}' without blanks around it: is it a comparison?")

    def barrier(self, m):
        before = re.search(r"(\S|else)\s*$", self.code[:m.start()])[1]
        opening = self.code.index("(", m.end())
        semicolon = re.compile(r"\s*;").match(self.code, self.closing(opening) + 1)
        if (before not in ";{})" and not re.search(r"\belse\s*$", self.code[:m.start()])) or not semicolon:
            self.error(m.start(), f"{m[0]} is no statement of its own")
        return m.start(), semicolon.end()

    def add(self, kernel, begin, end, operator, left, right):
        line = self.line(begin)
        code = self.lines[line - 1]
        number = self.points[-1].number + len(mutations(self.points[-1])) if self.points else 1
        self.points.append(Point(kernel, line, code, begin, end, operator, left, right, number))

    # The operands, as far as they are of use to a reader: up to what binds less than a comparison.

    def left_of(self, position):
        i = position - 1
        while not self.ends_operand(i, "([{"):
            depth = 0
            while True:
                depth += (self.code[i] in ")]") - (self.code[i] in "([")
                if depth == 0:
                    break
                i -= 1
            i -= 1
        return re.sub(r"\s+", " ", re.sub(r"^\s*return\b", "", self.code[i + 1:position])).strip()

    def right_of(self, position):
        i = position
        while not self.ends_operand(i, ")]}"):
            i = self.closing(i) + 1 if self.code[i] in "([" else i + 1
        return re.sub(r"\s+", " ", self.code[position:i]).strip()

    def ends_operand(self, i, brackets):
        c, beside = self.code[i], self.code[i - 1] + self.code[i + 1]
        alone = (c == "=" and "=" not in beside) or (c == ":" and ":" not in beside)
        return c in brackets + ";,?!&|" or alone or COMPARISON.match(self.code, i)


def names_of(template_parameters):
    return set(re.findall(r"(\w+)\s*(?:=[^,]*)?(?:,|$)", template_parameters))


def mutations(point):
    if point.operator is None:
        return ["removed"]
    left, right = point.left, point.right
    return [f"{left} {point.operator} {right} becomes {left} {o} {right}" for o in MUTATIONS[point.operator]]


def mutants_of(scan):
    found, seen = [], collections.Counter()
    for p in scan.points:
        for i, mutation in enumerate(mutations(p)):
            seen[p.kernel, p.code, mutation] += 1
            found.append(Mutant(p.number + i, p, mutation, seen[p.kernel, p.code, mutation]))
    return found


# ----------------------------------------------------------------------------
# the copy that has them all

HEADER = r"""// What dev/test/mutate.py puts in front of the trainer: see there.
#pragma once
#include <stdio.h>
#include <stdlib.h>
#define MUTATION_INLINE __attribute__((always_inline)) inline

namespace mutation {

const int COUNT = @COUNT@;
static unsigned char seen[COUNT + 2];              // by a mutant's number; 1: reached, 2: and it made a difference
static int low = COUNT + 2, high = -1, mutant = 0; // the mutants that are looked at; the one that is switched on
static struct Start {
    const char* coverage = getenv("MUTANT_COVERAGE");
    Start() {
        const char* value = getenv("MUTANT");
        if (coverage) low = 1, high = COUNT;
        if (!value) return;
        char* end;
        mutant = (int)strtol(value, &end, 10);
        if (coverage || *end || mutant < 1 || mutant > COUNT) {
            fprintf(stderr, "MUTANT=%s: expected a number from 1 to %d, and no MUTANT_COVERAGE\n", value, COUNT);
            exit(2);
        }
        low = high = mutant;
    }
    ~Start() {
        FILE* f = coverage ? fopen(coverage, "a") : nullptr;   // appended to: a program may run others of its kind
        if (!f) return;
        for (int i = 1; i <= COUNT; i++)
            if (seen[i]) fprintf(f, "%d %d\n", i, seen[i]);
        fclose(f);
    }
} start __attribute__((init_priority(101)));

MUTATION_INLINE bool unwatched(int first, int last) { return __builtin_expect(last < low || first > high, 1); }
inline bool decide(int first, bool original, bool one, bool two) {
    if (mutant) return mutant == first ? one : mutant == first + 1 ? two : original;
    seen[first] |= one != original ? 2 : 1;
    seen[first + 1] |= two != original ? 2 : 1;
    return original;
}
inline bool removed(int number) {
    if (unwatched(number, number)) return false;
    if (mutant) return true;
    seen[number] = 2;
    return false;
}

enum Kind { LT, LE, GT, GE, EQ, NE };
template <Kind K, class A, class B>
MUTATION_INLINE bool compare(A a, B b) {
    if constexpr (K == LT) return a < b;
    if constexpr (K == LE) return a <= b;
    if constexpr (K == GT) return a > b;
    if constexpr (K == GE) return a >= b;
    if constexpr (K == EQ) return a == b;
    if constexpr (K == NE) return a != b;
}
template <Kind K> struct Operator { int number; };
template <Kind K, class A> struct Left { A a; int number; };

template <Kind K, class A> MUTATION_INLINE Left<K, A> operator<=(A a, Operator<K> o) { return {a, o.number}; }
template <Kind K, class A> MUTATION_INLINE Left<K, A> operator==(A a, Operator<K> o) { return {a, o.number}; }
template <Kind K, class A, class B>
MUTATION_INLINE bool operator>=(Left<K, A> left, B b) {
    constexpr Kind moved = K == LT ? LE : K == LE ? LT : K == GT ? GE : GT;
    constexpr Kind reversed = K == LT ? GE : K == LE ? GT : K == GT ? LE : LT;
    if (unwatched(left.number, left.number + 1)) return compare<K>(left.a, b);
    return decide(left.number, compare<K>(left.a, b), compare<moved>(left.a, b), compare<reversed>(left.a, b));
}
template <Kind K, class A, class B>
MUTATION_INLINE bool operator==(Left<K, A> left, B b) {
    if (unwatched(left.number, left.number)) return compare<K>(left.a, b);
    bool original = compare<K>(left.a, b);
    if (mutant) return !original;
    seen[left.number] = 2;
    return original;
}

MUTATION_INLINE Operator<LT> lt(int number) { return {number}; }
MUTATION_INLINE Operator<LE> le(int number) { return {number}; }
MUTATION_INLINE Operator<GT> gt(int number) { return {number}; }
MUTATION_INLINE Operator<GE> ge(int number) { return {number}; }
MUTATION_INLINE Operator<EQ> eq(int number) { return {number}; }
MUTATION_INLINE Operator<NE> ne(int number) { return {number}; }

}  // namespace mutation
"""


def header(scan):
    return HEADER.replace("@COUNT@", str(len(mutants_of(scan))))


def mutated(scan):
    """The source with every point switchable; a line stays where it is."""
    pieces, position = [], 0
    for p in scan.points:
        pieces.append(scan.text[position:p.begin])
        if p.operator is None:
            pieces.append(f"::mutation::removed({p.number}) ? void() : {scan.text[p.begin:p.end]}")
        else:
            pair = ("==", "==") if p.operator in ("==", "!=") else ("<=", ">=")
            pieces.append(f"{pair[0]} ::mutation::{KIND[p.operator]}({p.number}) {pair[1]}")
        position = p.end
    return "".join(pieces) + scan.text[position:]


# ----------------------------------------------------------------------------
# building

Kind = namedtuple("Kind", "name fp32 san orders")
ORDERS = {"forward": {}, "reverse": {"SIMT_ORDER": "reverse"}, "priority, seed 1": {"SIMT_ORDER": "priority", "SIMT_SEED": "1"},
          "priority, seed 2": {"SIMT_ORDER": "priority", "SIMT_SEED": "2"}}
UNPOISONED = "forward, not poisoned"   # what nobody wrote is not NaN, which fmaxf would pass over, but what was there before
ORDERS[UNPOISONED] = {"SIMT_POISON": "0"}
KINDS = [Kind("bf16", 0, False, list(ORDERS)), Kind("bf16, sanitizers", 0, True, ["forward"]),
         Kind("fp32", 1, False, list(ORDERS))]


def make_variable(name):
    makefile = f"include dev/cpu/cpu.mk\nshow:\n\t@echo $({name})\n"
    done = subprocess.run(["make", "-s", "-f", "-", "show"], input=makefile, cwd=ROOT, universal_newlines=True, check=True,
                          stdout=subprocess.PIPE)
    return done.stdout.split()


def write_if_new(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class Builder:
    """Programs of dev/cuda with the mutated trainer, in build/mutate. A program whose text, headers and flags have not changed
    is not built again."""

    def __init__(self, scan):
        sources = OUT / "source"
        write_if_new(sources / "train_gpt2.cu", mutated(scan))
        write_if_new(sources / "mutation.h", header(scan))
        for path in [*ROOT.glob("dev/cuda/*.cu"), *ROOT.glob("dev/cuda/*.cuh")]:
            write_if_new(sources / "dev/cuda" / path.name, path.read_text())
        self.translate, self.cxx, self.ldlibs = (make_variable(f"CPU_{n}") for n in ("TRANSLATE", "CXX", "LDLIBS"))
        # a mutated comparison may look odd to -Wall; a file uses little of the trainer, and -fwhole-program compiles no more
        self.flags = make_variable("CPU_CXXFLAGS") + ["-w", "-O1", "-fwhole-program", "-include", sources / "mutation.h"]
        self.san = make_variable("CPU_SANFLAGS")
        version = subprocess.run([*self.cxx, "--version"], stdout=subprocess.PIPE, check=True).stdout
        self.common = hashlib.sha256(version + (sources / "mutation.h").read_bytes())
        for path in sorted(ROOT.glob("dev/cpu/include/**/*.h")):
            self.common.update(path.read_bytes())

    def build(self, name, kind):
        stem = f"{name}-{'fp32' if kind.fp32 else 'bf16'}{'-san' if kind.san else ''}"
        cpp = OUT / f"{stem}.cpp"
        self.call(*self.translate, f"build/mutate/source/dev/cuda/{name}.cu", "-o", cpp)
        flags = self.flags + (self.san if kind.san else []) + [f"-DFP32={kind.fp32}"]
        digest = self.common.copy()
        digest.update("\0".join(map(str, flags + self.ldlibs)).encode() + cpp.read_bytes())
        program = OUT / f"{stem}-{digest.hexdigest()[:16]}"
        if not program.exists():
            for old in OUT.glob(f"{stem}-{'[0-9a-f]' * 16}"):
                old.unlink()
            temporary = program.with_suffix(".new")
            self.call(*self.cxx, *flags, cpp, "-o", temporary, *self.ldlibs)
            os.replace(temporary, program)
        return program

    def call(self, *command):
        done = subprocess.run([str(c) for c in command], cwd=ROOT, universal_newlines=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        if done.returncode != 0:
            raise MutateError(f"{' '.join(map(str, command))}\n{done.stdout[:6000]}")


# ----------------------------------------------------------------------------
# running

Run = namedtuple("Run", "status out err seconds memory stopped")   # stopped: why we ended it, or None
OUTPUT_LIMIT = 8 << 20        # bytes of a file that a program may write
interrupted = threading.Event()


def resident(pid):
    try:
        with open(f"/proc/{pid}/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def run(program, env, seconds=600, memory=None):
    """A program to its end, or until it has had the time or the memory that it may. Resident memory is what counts: tests of
    large tensors reserve tens of GB of addresses, and the sanitizers more, so that a limit on those would limit nothing."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SIMT_", "OMP_", "MUTANT", "ASAN_", "UBSAN_"))}
    limits = f'ulimit -c 0; ulimit -f {OUTPUT_LIMIT // 512}; exec "$0"'
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin, stopped, most = time.monotonic(), None, 0
        process = subprocess.Popen(["/bin/sh", "-c", limits, str(program)], env={**clean, "OMP_NUM_THREADS": "1", **env},
                                   cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
        while process.returncode is None:
            try:
                process.wait(0.05)
                continue
            except subprocess.TimeoutExpired:
                most = max(most, resident(process.pid))
            stopped = ("interrupted" if interrupted.is_set() else "timeout" if time.monotonic() - begin > seconds else
                       "too much memory" if memory and most > memory else None)
            if stopped:
                break
        if stopped:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        took = time.monotonic() - begin
        texts = []
        for f in (out, err):
            f.seek(0)
            texts.append(f.read().decode(errors="replace"))
    return Run(process.returncode, *texts, took, most, stopped)


def seen_in(r):
    """What a run that did not end well shows, in a few words."""
    if r.stopped:
        return r.stopped
    for sign, name in [("AddressSanitizer", "sanitizer"), (": runtime error: ", "sanitizer"), ("segmentation fault", "crash")]:
        if sign in r.err:
            return name
    report = re.search(r"simt error: ([^:\n]{0,60})", r.err)
    if report:
        return "backend: " + re.sub(r" (at|calls) .*", "", report[1])
    if r.status < 0:
        return "output without end" if r.status == -signal.SIGXFSZ else "crash"
    if "written beside a tensor" in r.err:
        return "wrote beside a tensor"
    return "test failed" if "FAIL" in r.out else f"exit status {r.status}"


class Program:
    """One build, and what it did unmutated: seconds and output, and by order the mutants that would make a difference."""

    def __init__(self, name, kind, path):
        self.name, self.kind, self.path = name, kind, path
        self.seconds, self.memory, self.out = 0, 0, None
        self.reached, self.differs = set(), {}

    def measure(self):
        for order in self.kind.orders:
            with tempfile.TemporaryDirectory() as folder:
                coverage = Path(folder) / "coverage"
                r = run(self.path, {**ORDERS[order], "MUTANT_COVERAGE": str(coverage)})
                if r.stopped == "interrupted":
                    raise KeyboardInterrupt
                what = f"{self.name}, {self.kind.name}, {order}, without any mutant"
                if r.stopped or r.status != 0:
                    raise MutateError(f"{what}: {seen_in(r)}\n{r.out[-2000:]}{r.err[-2000:]}")
                if not coverage.exists():
                    raise MutateError(f"{what}: it reached no point of {SOURCE.name}")
                lines = [line.split() for line in coverage.read_text().splitlines()]
            if self.out not in (None, r.out):
                raise MutateError(f"{what}: other output than in {self.kind.orders[0]} order")
            self.out = r.out
            self.seconds, self.memory = max(self.seconds, r.seconds), max(self.memory, r.memory)
            self.reached |= {int(n) for n, _ in lines}
            self.differs[order] = {int(n) for n, how in lines if how == "2" or how == "3"}

    def notices(self, number):
        return any(number in d for d in self.differs.values())

    def try_mutant(self, number):
        """(order, what was seen) if it is killed, else None."""
        outputs = {self.out} if any(number not in d for d in self.differs.values()) else set()
        for order in self.kind.orders:
            if number not in self.differs[order]:
                continue
            r = run(self.path, {**ORDERS[order], "MUTANT": str(number)}, 10 * self.seconds + 5, 2 * self.memory + (1 << 30))
            if r.stopped == "interrupted":
                raise KeyboardInterrupt
            if r.stopped or r.status != 0:
                return order, seen_in(r)
            outputs.add(r.out)
            if len(outputs) > 1:
                return order, "other output than in another order"
        return None


class Mutants:
    """The state of the whole: which mutants are killed, and by what."""

    def __init__(self, mutants, jobs):
        self.mutants, self.jobs = mutants, jobs
        self.killed = {}                                  # number -> (program, kind, order, what was seen)
        self.tried = collections.defaultdict(list)        # number -> programs that ran it and saw nothing
        self.reached = set()
        self.shown = time.monotonic()

    def left(self):
        return [m for m in self.mutants if m.number not in self.killed]

    def killer(self, mutant):
        return "{} ({}), {}: {}".format(*self.killed[mutant.number])

    def phase(self, kind, programs):
        """Every mutant that is left, with every program that it makes a difference to."""
        programs = sorted(programs, key=lambda p: p.seconds)
        self.reached |= {n for p in programs for n in p.reached}
        work = [(m, [p for p in programs if p.notices(m.number)]) for m in self.left()]
        work = [(m, using) for m, using in work if using]
        say(f"{kind.name}: {len(work)} mutants of {len(self.left())} that are left make a difference to some program")
        done = 0
        for m, using, killer in pool_map(lambda w: (*w, self.one(*w)), work, self.jobs):
            done += 1
            if killer:
                self.killed[m.number] = killer
            else:
                self.tried[m.number] += [f"{p.name} ({kind.name})" for p in using]
            if time.monotonic() - self.shown > 15:
                self.shown = time.monotonic()
                say(f"{kind.name}: {done} of {len(work)}, {len(self.killed)} of {len(self.mutants)} killed")

    @staticmethod
    def one(mutant, using):
        for p in using:
            found = p.try_mutant(mutant.number)
            if found:
                return (p.name, p.kind.name, *found)
        return None


def pool_map(function, items, jobs):
    """Results as they come. Ctrl-C ends what runs."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(function, i) for i in items]
        try:
            for f in concurrent.futures.as_completed(futures):
                yield f.result()
        except BaseException:
            interrupted.set()
            for f in futures:
                f.cancel()
            raise


def say(text):
    print(text, flush=True)


# ----------------------------------------------------------------------------
# the result

def match_equivalents(mutants, entries=None):
    """({number: argument}, [what is wrong with the list])."""
    found, errors = {}, []
    for e in EQUIVALENT if entries is None else entries:
        if not e.argument.strip():
            errors.append(f"EQUIVALENT: no argument for {e.kernel}: {e.code}: {e.mutation}")
        fits = [m for m in mutants if (m.point.kernel, m.point.code, m.mutation) == (e.kernel, e.code, e.mutation)]
        fits = [m for m in fits if e.nth in (None, m.nth)]
        if not fits:
            which = f" (number {e.nth})" if e.nth else ""
            errors.append(f"EQUIVALENT: no mutant is {e.kernel}: {e.code}: {e.mutation}{which}")
        found.update({m.number: e.argument for m in fits})
    return found, errors


def describe(m):
    return {"kernel": m.point.kernel, "line": m.point.line, "code": m.point.code, "mutation": m.mutation}


def summary(scan, state, equivalent):
    """What goes into mutation.json."""
    survived, listed = [], []
    for m in state.left():
        if m.number in equivalent:
            listed.append({**describe(m), "argument": equivalent[m.number]})
        else:
            tried = ", ".join(state.tried[m.number])
            why = (f"run by {tried}" if tried else
                   "makes no difference to any program" if m.number in state.reached else "not reached")
            survived.append({**describe(m), "why": why})
    killed = [{**describe(m), "by": state.killer(m)} for m in state.mutants if m.number in state.killed]
    by = {which: dict(collections.Counter(k[i] for k in state.killed.values()).most_common())
          for i, which in enumerate(["program", "build", "order", "sign"])}
    barriers = sum(p.operator is None for p in scan.points)
    points = {"barriers": barriers, "comparisons": len(scan.points) - barriers, "excluded": dict(sorted(scan.excluded.items()))}
    counted = len(state.mutants) - len(listed)
    return {"source": hashlib.sha256(scan.text.encode()).hexdigest(), "points": points, "mutants": len(state.mutants),
            "killed": len(killed), "score": round(len(killed) / counted, 4) if counted else 1.0, "killed_by": by,
            "survived": survived, "equivalent": listed, "kills": killed}


def write_json(path, result):
    """One line for each mutant; all of the file or nothing."""
    def value(v):
        if not isinstance(v, list) or not v:
            return json.dumps(v)
        return "[\n" + ",\n".join("  " + json.dumps(x) for x in v) + "\n ]"
    text = "{\n" + ",\n".join(f" {json.dumps(k)}: {value(v)}" for k, v in result.items()) + "\n}\n"
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def show_list(scan, mutants):
    for m in mutants:
        which = f"  (number {m.nth})" if m.nth > 1 else ""
        say(f"{m.number:4} {SOURCE.name}:{m.point.line} {m.point.kernel}: {m.mutation}{which}\n     {m.point.code}")
    barriers = sum(p.operator is None for p in scan.points)
    say(f"{barriers} barriers and {len(scan.points) - barriers} comparisons, {len(mutants)} mutants; excluded comparisons: " +
        (", ".join(f"{n} {reason}" for reason, n in sorted(scan.excluded.items())) or "none"))


# ----------------------------------------------------------------------------

def parse_arguments():
    parser = argparse.ArgumentParser(description="Mutation testing of train_gpt2.cu's kernels by the programs of dev/cuda.")
    parser.add_argument("--only", metavar="REGEX", help="mutants of the kernels whose names match, alone")
    parser.add_argument("--programs", metavar="A,B", help="these programs of dev/cuda alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs at a time (one per core)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the result goes (dev/test/mutation.json; with --only "
                                                                  "or --programs nowhere, unless this is given)")
    parser.add_argument("--list", action="store_true", help="show points and mutants, and run nothing")
    parser.add_argument("--keep-going", action="store_true",
                        help="leave out a program that does not build, or fails without a mutant, instead of stopping; the "
                             "exit status is 1 all the same")
    a = parser.parse_args()
    if a.jobs < 1:
        parser.error(f"--jobs {a.jobs}: expected at least 1")
    return a


def program_names(wanted):
    there = sorted(p.stem for p in ROOT.glob("dev/cuda/*.cu"))
    names = wanted.split(",") if wanted else there
    for name in names:
        if name not in there:
            raise MutateError(f"--programs: expected some of {' '.join(there)}, found '{name}'")
    return names


def prepare(builder, names, kind, jobs, keep_going, errors):
    """Builds the programs of a kind, two at a time, and runs them without a mutant."""
    def one(name):
        try:
            p = Program(name, kind, builder.build(name, kind))
            p.measure()
            return p
        except MutateError as e:
            if not keep_going:
                raise
            return f"{name} ({kind.name}) was left out: {e}"
    done = list(pool_map(one, names, jobs))
    for text in (d for d in done if isinstance(d, str)):
        say(text)
        errors.append(text.split("\n")[0])
    return [d for d in done if not isinstance(d, str)]


def main():
    a = parse_arguments()
    begin = time.monotonic()
    scan = Scan(SOURCE.read_text(), SOURCE.name)
    everything = mutants_of(scan)
    equivalent, errors = match_equivalents(everything)
    mutants = [m for m in everything if not a.only or re.search(a.only, m.point.kernel)]
    if a.list:
        return show_list(scan, mutants)
    if not mutants:
        raise MutateError(f"--only {a.only}: no kernel with a mutant has such a name")
    names = program_names(a.programs)
    builder, state = Builder(scan), Mutants(mutants, a.jobs)
    for kind in KINDS:
        if not state.left():
            break
        programs = prepare(builder, names, kind, a.jobs, a.keep_going, errors)
        say(f"{kind.name}: {len(programs)} programs, {sum(p.seconds for p in programs):.1f} s to run one after the other "
            f"({time.monotonic() - begin:.0f} s so far)")
        state.phase(kind, programs)

    result = summary(scan, state, equivalent)
    for m in mutants:
        if m.number in equivalent and m.number in state.killed:
            where = f"{SOURCE.name}:{m.point.line} {m.point.kernel}"
            errors.append(f"EQUIVALENT: {where}: {m.mutation}: it was killed by {state.killer(m)}")
    for s in result["survived"]:
        say(f"survived: {SOURCE.name}:{s['line']} {s['kernel']}: {s['mutation']} ({s['why']})\n    {s['code']}")
    for e in errors:
        say(f"error: {e}")
    path = a.json or (None if a.only or a.programs or errors else RESULT)
    if path:
        write_json(path, result)
        say(f"{path} was written")
    say(f"{time.monotonic() - begin:.0f} s; {result['mutants']} mutants, {result['killed']} killed, "
        f"{len(result['survived'])} survived, {len(result['equivalent'])} equivalent")
    say(f"score: {100 * result['score']:.1f} % killed of those not argued equivalent ({100 * ENOUGH:.0f} % is enough)")
    return 0 if result["score"] >= ENOUGH and not errors else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (MutateError, OSError) as e:
        sys.exit(f"mutate: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
