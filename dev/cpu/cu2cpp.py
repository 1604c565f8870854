#!/usr/bin/env python3
"""cu2cpp.py IN.cu -o OUT.cpp: make a CUDA source file digestible for g++.

CUDA adds two forms to C++ that no header can supply. This rewrites them and nothing else:

    kernel<T, 4><<<grid, block, smem, stream>>>(a, b);
        simt::launch("kernel<T, 4>", __FILE__, __LINE__, simt::Config(grid, block, smem, stream),
                     <lambda that calls the kernel>, <lambda that yields its address>, a, b);
        The arguments are evaluated once, before the launch, as on a GPU; what the lambda that calls needs of the function around it
        it has by value, since a stream may run the kernel later.

    __shared__ float tile[32][33], sum;
        struct simt_shared_1 { float tile[32][33]; };
        auto& tile = simt::shared<simt_shared_1>("tile", __FILE__, __LINE__).tile;  ... likewise sum
        One object per block, in an arena that the runtime poisons and checks.

    extern __shared__ float buffer[];
        float* buffer = simt::dynamic_shared<float>();

A quoted #include that lies beside the including file is translated and put in its place. Line numbers are kept, and #line directives
name the .cu files, so that compiler errors, sanitizers and the runtime's own reports all speak of the source you wrote. A use of <<<,
or of __shared__, that is not one of the forms above is an error with its file and line: nothing unknown is passed through.
"""
import argparse
import os
import re
import sys

# What is no code: literals, comments and directives. Names and numbers stand here because R"(, u8" and 1'000 begin or contain one.
TOKEN = re.compile(r'''
      (?P<literal>   (?:u8|[uUL])? R" (?P<delimiter>[^ ()\\\s]{0,16}) \( .*? \) (?P=delimiter) "
                   | (?:u8|[uUL])? (?: " (?: \\. | [^"\\\n] )* " | ' (?: \\. | [^'\\\n] )+ ' ) )
    | (?P<comment>   // (?: \\\n | [^\n] )* | /\*.*?\*/ )
    | (?P<directive> ^[ \t]*\# (?: \\\n | //[^\n]* | /\*.*?\*/ | "(?: \\. | [^"\\\n] )*" | [^\n] )* )
    | \.?[0-9] (?: '?\w | \. )* | [A-Za-z_$][\w$]*''', re.X | re.S | re.M)
INCLUDE = re.compile(r'\s*#[ \t]*include[ \t]*"([^"]+)"')

BRACKETS = {'(': ')', '[': ']', '{': '}'}
NAME = r'[A-Za-z_]\w*'
ANGLES = r'<(?:[^<>;{}()]|\((?:[^()]|\([^()]*\))*\))*>'
for _ in range(3):                                       # template arguments that are templates
    ANGLES = ANGLES.replace('[^<>;{}()]|', '[^<>;{}()]|' + ANGLES + '|', 1)
# A kernel's name at the end of the text before <<<, after the end of another statement or where an expression begins.
KERNEL = re.compile(rf'(?:^|[(),:?]|\b(?:else|do|return)\b)\s*((?:::\s*)?{NAME}\s*(?:{ANGLES})?(?:\s*(?:::|\.|->)\s*{NAME}\s*(?:{ANGLES})?)*)\s*$')
QUALIFIERS = re.compile(r'(?:[\w\s]*:)?\s*((?:(?:extern|static|volatile|const|(?:alignas|__align__)\s*\([^()]*\))\s*)*)$')
ALIGNMENT = re.compile(r'\b(?:alignas|__align__)\s*\([^()]*\)\s*')
DECLARATOR = re.compile(rf'\s*((?:{ALIGNMENT.pattern})?[^&()]*?)\s*(\**)\s*({NAME})\s*((?:\[[^]]*\]\s*)*)', re.S)
KNOWN = 'cu2cpp knows  __shared__ T a[N][M], *b, c;  and  extern __shared__ T name[];  with alignas before the type or the keyword'

class CudaError(Exception):
    pass

class Source:
    """One file. `code` is its text with blanks where literals, comments and directives stand, so that a place in one is the same place
    in the other: forms are looked for in `code`, and written out from `text`."""
    once = set()        # files with #pragma once that have been put in
    shared_count = 0    # numbers the structs made for __shared__

    def __init__(self, path):
        self.path, self.directives = path, []
        try:
            with open(path, encoding='utf-8', errors='surrogateescape') as f:
                self.text = f.read()
        except OSError as e:
            raise CudaError(f'{path}:1: error: cannot read it: {e.strerror}')
        self.code = TOKEN.sub(self.blank, self.text)

    def blank(self, match):
        kind = match.lastgroup if match.lastgroup != 'delimiter' else 'literal'
        if kind == 'directive':
            self.directives.append(match.span())
            bare = re.sub(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', '', match[0], flags=re.S)
            if re.match(r'\s*#\s*define\b', bare) and re.search(r'<<<|\b__shared__\b', bare):
                self.error(match.start(), 'a kernel launch or __shared__ inside a macro: write it out, or use a template')
        return re.sub(r'[^\n]', ' ', match[0]) if kind else match[0]

    def error(self, at, message):
        at += len(self.text[at:]) - len(self.text[at:].lstrip())
        raise CudaError(f'{self.path}:{self.text.count(chr(10), 0, at) + 1}: error: {message}')

    def closing(self, opening):
        """Where the bracket is that closes the one here."""
        stack = []
        for m in re.compile(r'[][(){}]').finditer(self.code, opening):
            if m[0] in BRACKETS:
                stack.append(BRACKETS[m[0]])
            elif m[0] != stack.pop():
                self.error(m.start(), f"'{m[0]}' does not match the bracket it should close")
            if not stack:
                return m.start()
        self.error(opening, f"'{self.code[opening]}' is never closed")

    def end_of(self, begin, wanted):
        """Where the first of these is that is in no brackets; None if the statement or what encloses it ends before."""
        at = begin
        while m := re.compile(rf'{wanted}|<<<|[][(){{}};]').search(self.code, at):
            if re.fullmatch(wanted, m[0]):
                return m.start()
            if m[0] not in BRACKETS:
                return None
            at = self.closing(m.start()) + 1
        return None

    def translate(self):
        """The whole file, left to right."""
        out = [f'#line 1 "{self.path}"\n']
        done = 0
        forms = [(m.start(), m[0]) for m in re.finditer(r'(?<!operator)<<<|\b__shared__\b', self.code)]
        for at, form in sorted(forms + [(begin, '#') for begin, _ in self.directives]):
            begin, end, new = self.launch(at) if form == '<<<' else self.shared(at) if form == '__shared__' else self.directive(at)
            if begin < done:
                self.error(at, 'one form within another: write it as a statement of its own')
            out += self.text[done:begin], new
            done = end
        return ''.join(out) + self.text[done:]

    def statement_before(self, at):
        """Where the statement begins in which this stands."""
        return max(self.code.rfind(c, 0, at) for c in ';{}') + 1

    def launch(self, at):
        begin = self.statement_before(at)
        kernel = KERNEL.search(self.code[begin:at])
        if not kernel:
            self.error(at, f"this <<< is no kernel launch that cu2cpp knows: '{self.code[begin:at].strip()}' stands before it. "
                           "Launch a kernel as a statement of its own")
        end = self.end_of(at + 3, '>>>')
        if end is None:
            self.error(at, 'a <<< without its >>>')
        if not self.code[at + 3:end].strip():
            self.error(at, 'an empty <<<>>>: a launch needs a grid and a block')
        opening = re.compile(r'\s*').match(self.code, end + 3).end()
        if self.code[opening:opening + 1] != '(':
            self.error(end, 'a launch needs its arguments in parentheses after >>>')
        closing = self.closing(opening)
        name, config, arguments = ' '.join(kernel[1].split()), self.text[at + 3:end], self.text[opening + 1:closing]
        begin += kernel.start(1)
        lines = '\n' * (self.text.count('\n', begin, opening) - config.count('\n'))
        return begin, closing + 1, (
            f'simt::launch("{name}", __FILE__, __LINE__, simt::Config({config}), '
            f'[=](const auto&... simt_arguments) {{ {name}(simt_arguments...); }}, '
            f'[&](auto simt_address_of) -> decltype(simt_address_of({name})) {{ return simt_address_of({name}); }}'
            f'{lines}{", " if self.code[opening + 1:closing].strip() else ""}{arguments})')

    def shared(self, at):
        begin, end = self.statement_before(at), self.end_of(at, ';')
        qualifiers = QUALIFIERS.match(self.code[begin:at])
        if not qualifiers:
            before = re.findall(r'\w+|\S', self.code[begin:at])[-1]
            self.error(at, f"__shared__ after '{before}': cu2cpp knows it only at the start of a declaration")
        begin += qualifiers.start(1)
        if end is None:
            self.error(at, 'a __shared__ declaration without its ;')
        declaration, whole = self.code[at + len('__shared__'):end], ' '.join(self.code[begin:end].split())
        if re.search(r'[={]', declaration):
            self.error(at, f"shared memory cannot be initialised where it is declared: '{whole}'")
        out, type_ = ['simt::must_be_in_a_function = 0;'], ''            # outside, an error of g++'s
        declarators = re.findall(rf'(?:[^][,<>()]|{ANGLES}|\[[^]]*\]|\([^()]*\))+', declaration)
        for declarator in declarators:
            m = DECLARATOR.fullmatch(declarator)
            if not m or bool(re.sub(r'\b(const|volatile)\b', '', ALIGNMENT.sub('', m[1])).strip()) == bool(type_):   # the first has it
                self.error(at, f"'{whole}' is no form of __shared__ that cu2cpp knows: {KNOWN}")
            type_, stars, name, size = type_ or re.sub(r'\b(?:extern|static)\b\s*', '', qualifiers[1]) + m[1], m[2], m[3], m[4].strip()
            if re.search(r'\bextern\b', qualifiers[1]):
                if len(declarators) > 1 or stars or not re.fullmatch(r'\[\s*\]', size):
                    self.error(at, f'extern __shared__ must be one array without a size: {KNOWN}')
                type_ = ALIGNMENT.sub('', type_)              # the arena is aligned to 1024
                out.append(f'{type_}* {name} = simt::dynamic_shared<{type_}>();')
            elif re.match(r'\[\s*\]', size):
                self.error(at, f"__shared__ '{name}' has no size: write a size, or extern for dynamic shared memory")
            else:
                Source.shared_count += 1
                struct = f'simt_shared_{Source.shared_count}'
                out.append(f'struct {struct} {{ {type_} {stars}{name}{size}; }}; '
                           f'auto& {name} = simt::shared<{struct}>("{name}", __FILE__, __LINE__).{name};')
        new = ' '.join(' '.join(out).split())
        return begin, end + 1, new + '\n' * self.text.count('\n', begin, end)

    def directive(self, begin):
        end = next(e for b, e in self.directives if b == begin)
        text = self.text[begin:end]
        include = INCLUDE.match(text)
        path = include and os.path.normpath(os.path.join(os.path.dirname(self.path), include[1]))
        if re.match(r'\s*#\s*pragma\s+once\b', text):
            self.once.add(os.path.realpath(self.path))
        elif not include or not os.path.exists(path):         # a header that is found by -I
            return begin, end, text
        elif os.path.realpath(path) not in self.once:         # the newline after the directive brings us to the line after it
            return begin, end, f'{Source(path).translate()}\n#line {self.text.count(chr(10), 0, end) + 1} "{self.path}"\n'
        return begin, end, '\n' * text.count('\n')

def main():
    parser = argparse.ArgumentParser(description='Rewrite kernel launches and __shared__ so that g++ can compile a CUDA file.')
    parser.add_argument('source', metavar='IN.cu')
    parser.add_argument('-o', dest='output', metavar='OUT.cpp', required=True)
    arguments = parser.parse_args()
    try:
        body = Source(arguments.source).translate()
    except CudaError as e:
        sys.exit(str(e))
    # nvcc includes cuda_runtime.h before the first line of every source; so do we
    with open(arguments.output, 'w', encoding='utf-8', errors='surrogateescape') as f:
        f.write('#include <cuda_runtime.h>\n' + body)

if __name__ == '__main__':
    main()
