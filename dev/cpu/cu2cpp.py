#!/usr/bin/env python3
"""cu2cpp.py IN.cu -o OUT.cpp: make a CUDA source file digestible for g++.

CUDA adds two forms to C++ that no header can supply. This rewrites them and nothing else:

    kernel<T, 4><<<grid, block, smem, stream>>>(a, b);
        simt::launch("kernel<T, 4>", __FILE__, __LINE__, simt::Config(grid, block, smem, stream),
                     <lambda that calls the kernel>, <lambda that yields its address>, a, b);
        The arguments are evaluated once, before the launch, as on a GPU.

    __shared__ float tile[32][33], sum;
        struct simt_shared_1 { float tile[32][33]; };
        auto& tile = simt::shared<simt_shared_1>("tile", __FILE__, __LINE__).tile;  ... likewise sum
        One object per block, in an arena that the runtime poisons and checks.

    extern __shared__ float buffer[];
        float* buffer = simt::dynamic_shared<float>();

A quoted #include that lies beside the including file is translated and put in its place. Line
numbers are kept, and #line directives name the .cu files, so that compiler errors, sanitizers and
the runtime's own reports all speak of the source you wrote. A use of <<<, or of __shared__, that is
not one of the forms above is an error with its file and line: nothing unknown is passed through.
"""
import argparse
import os
import re
import sys

# One alternative per kind of token. The order matters: a raw string before a name (R"(...)"),
# a number with its digit separators (1'000) before a character literal.
TOKEN = re.compile(r'''
      (?P<space>   (?: [ \t\r\n\f\v] | \\\r?\n )+ )
    | (?P<comment> // (?: \\\r?\n | [^\n] )* | /\*.*?\*/ )
    | (?P<string>  (?:u8|[uUL])? R" (?P<delimiter>[^ ()\\\t\r\n\f\v]{0,16}) \( .*? \) (?P=delimiter) "
                 | (?:u8|[uUL])? " (?: \\. | [^"\\\n] )* "
                 | (?:u8|[uUL])? ' (?: \\. | [^'\\\n] )+ ' )
    | (?P<number>  \.?[0-9] (?: [eEpP][+-] | '?\w | \. )* )
    | (?P<name>    [A-Za-z_$][\w$]* )
    | (?P<punct>   <<< | >>> | -> | :: | . )''', re.X | re.S)

# A preprocessor directive is one token, to the end of its (continued) line.
DIRECTIVE = re.compile(r'''\# (?: \\\r?\n | //[^\n]* | /\*.*?\*/ | "(?: \\. | [^"\\\n] )*" | '(?: \\. | [^'\\\n] )' | [^\n] )*''',
                       re.X | re.S)
INCLUDE = re.compile(r'#[ \t]*include[ \t]*"([^"]+)"')
PRAGMA_ONCE = re.compile(r'#[ \t]*pragma[ \t]+once\b')
CUDA_FORM = re.compile(r'<<<|\b__shared__\b')
QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.S)

CLOSING = {'(': ')', '[': ']', '{': '}'}
KNOWN = ('cu2cpp knows  __shared__ T a[N][M], *b, c;  and  extern __shared__ T name[];  with alignas before the type or the '
         'keyword')
ALIGNMENT = re.compile(r'\b(?:alignas|__align__) \([^()]*\) ?')
# What may stand in front of a launch: the end of the statement before it, or a place where an
# expression begins. Anything else (an operator, a name) means that we misread the line.
BEFORE_LAUNCH = {';', '{', '}', '(', ')', ',', ':', '?', 'else', 'do', 'return'}


class CudaError(Exception):
    pass


class Token:
    __slots__ = ('kind', 'text', 'line')

    def __init__(self, kind, text, line):
        self.kind, self.text, self.line = kind, text, line


def tokenize(text):
    tokens, position, line, line_start = [], 0, 1, True
    while position < len(text):
        if line_start and text[position] == '#':
            kind, piece = 'directive', DIRECTIVE.match(text, position).group()
        else:
            match = TOKEN.match(text, position)
            kind, piece = match.lastgroup, match.group()
            if kind == 'delimiter':                     # the group inside a raw string
                kind = 'string'
        tokens.append(Token(kind, piece, line))
        position += len(piece)
        newlines = piece.count('\n')
        line += newlines
        if kind == 'space':
            line_start = line_start or newlines > 0
        elif kind != 'comment':
            line_start = False
    return tokens


class Translator:
    def __init__(self):
        self.once = set()        # files with #pragma once that have been inlined
        self.shared_count = 0    # numbers the structs made for __shared__

    def file(self, path, stack=()):
        real = os.path.realpath(path)
        if real in stack:
            raise CudaError(f'{path}:1: error: this file includes itself')
        try:
            with open(path, encoding='utf-8', errors='surrogateescape') as f:
                text = f.read()
        except OSError as e:
            raise CudaError(f'{path}:1: error: cannot read it: {e.strerror}')
        return f'#line 1 "{path}"\n' + Source(self, path, text, stack + (real,)).translate()


class Source:
    """One file. `significant` are the tokens without white space, comments and directives; a form
    is recognised among those, and written out with the gaps between them kept."""

    def __init__(self, translator, path, text, stack):
        self.translator, self.path, self.stack = translator, path, stack
        self.tokens = tokenize(text)
        self.significant = [i for i, t in enumerate(self.tokens) if t.kind not in ('space', 'comment', 'directive')]
        self.rank = {i: n for n, i in enumerate(self.significant)}     # its inverse
        self.launches = {}       # first token of the kernel's name -> (<<<, >>>, '(', ')')
        self.shared = {}         # first token of a declaration -> (__shared__, ';')

    def error(self, index, message):
        raise CudaError(f'{self.path}:{self.tokens[index].line}: error: {message}')

    def text(self, index):
        return self.tokens[index].text if 0 <= index < len(self.tokens) else ''

    def step(self, index, by):
        """The significant token before (by=-1) or after (by=1) a significant one; -1 at the ends."""
        n = self.rank[index] + by
        return self.significant[n] if 0 <= n < len(self.significant) else -1

    def words(self, first, last):
        """Tokens first..last on one line, without comments."""
        return ' '.join(self.text(i) for i in self.significant[self.rank[first]:self.rank[last] + 1])

    def newlines(self, first, last):
        return '\n' * sum(self.text(i).count('\n') for i in range(first, last + 1))

    def closing(self, index):
        """The bracket that closes the one at index."""
        stack, i = [], index
        while i >= 0:
            t = self.text(i)
            if self.tokens[i].kind == 'punct':
                if t in CLOSING:
                    stack.append(CLOSING[t])
                elif t in CLOSING.values():
                    if t != stack.pop():
                        self.error(i, f"'{t}' does not match the bracket it should close")
                    if not stack:
                        return i
            i = self.step(i, 1)
        self.error(index, f"'{self.text(index)}' is never closed")

    def opening(self, index):
        """The bracket, round or square, that the one at index closes."""
        depth, i = 0, index
        while i >= 0:
            depth += {')': 1, ']': 1, '(': -1, '[': -1}.get(self.text(i), 0)
            if depth == 0:
                return i
            i = self.step(i, -1)
        self.error(index, f"'{self.text(index)}' was never opened")

    def template_opening(self, index):
        """The < that belongs to the > (or >>, or >>>, lexed as one or several tokens) at index."""
        depth, i = 0, index
        while i >= 0:
            t = self.text(i)
            if t in (')', ']'):
                i = self.opening(i)
            elif t in (';', '{', '}', '('):
                break
            else:
                depth += {'>': 1, '>>>': 3, '<': -1}.get(t, 0)
                if depth == 0:
                    return i
            i = self.step(i, -1)
        self.error(index, 'cannot find where the template arguments of this launch begin')

    # ---- finding the forms ----------------------------------------------------------------------

    def find_launch(self, index):
        """index is at <<<. Find the name before it, then >>> and the arguments."""
        first, i = -1, self.step(index, -1)
        while i >= 0:                                        # the kernel, from its end backwards
            if self.text(i) in ('>', '>>>'):
                i = self.step(self.template_opening(i), -1)
            if i < 0 or self.tokens[i].kind != 'name' or self.text(i) in BEFORE_LAUNCH:
                break
            first, i = i, self.step(i, -1)
            if self.text(i) not in ('::', '.', '->'):
                break
            first, i = i, self.step(i, -1)                   # a leading :: is part of the name
        if first < 0:
            self.error(index, 'this <<< is no kernel launch: there is no kernel name before it')
        if i >= 0 and self.text(i) not in BEFORE_LAUNCH:
            self.error(index, f"this <<< is no kernel launch that cu2cpp knows: '{self.text(i)}' stands before the kernel's "
                              "name. Launch a kernel as a statement of its own")
        end = self.step(index, 1)
        while end >= 0 and self.text(end) != '>>>':
            if self.text(end) in CLOSING:
                end = self.closing(end)
            elif self.text(end) in (')', ']', '}', ';', '<<<'):
                end = -1
                break
            end = self.step(end, 1)
        if end < 0:
            self.error(index, 'a <<< without its >>>')
        if self.step(index, 1) == end:
            self.error(index, 'an empty <<<>>>: a launch needs a grid and a block')
        opening = self.step(end, 1)
        if self.text(opening) != '(':
            self.error(end, "a launch needs its arguments in parentheses after >>>")
        self.launches[first] = (index, end, opening, self.closing(opening))

    def find_shared(self, index, at_file_scope):
        """index is at __shared__. Find the first word of the declaration, and its end."""
        first, i = index, self.step(index, -1)
        while i >= 0:
            if self.text(i) == ')' and self.text(self.step(self.opening(i), -1)) in ('alignas', '__align__'):
                i = self.step(self.opening(i), -1)
            elif self.text(i) not in ('extern', 'static', 'volatile', 'const'):
                break
            first, i = i, self.step(i, -1)
        if i >= 0 and self.text(i) not in (';', '{', '}', ':'):
            self.error(index, f"__shared__ after '{self.text(i)}': cu2cpp knows it only at the start of a declaration")
        if at_file_scope:
            self.error(index, '__shared__ outside a function: declare it inside the kernel that uses it')
        end = index
        while self.text(end) != ';':
            end = self.closing(end) if self.text(end) in CLOSING else end
            end = self.step(end, 1)
            if end < 0:
                self.error(index, 'a __shared__ declaration without its ;')
        self.shared[first] = (index, end)

    def find_forms(self):
        """Walk the file once, following braces to know what is inside a function."""
        scopes, saved = [], []           # scopes: True for the braces of a namespace
        statement = []                   # words since the last ; { or }
        for i, token in enumerate(self.tokens):
            t = token.text
            if token.kind == 'directive':
                word = re.match(r'#\s*(\w*)', t).group(1)
                if word in ('if', 'ifdef', 'ifndef'):
                    saved.append(list(scopes))
                elif word in ('else', 'elif') and saved:
                    scopes = list(saved[-1])                 # each branch starts from the same braces
                elif word == 'endif' and saved:
                    saved.pop()
                elif word == 'define' and CUDA_FORM.search(QUOTED.sub('', t)):
                    self.error(i, 'a kernel launch or __shared__ inside a macro: write it out, or use a template')
                continue
            if token.kind in ('space', 'comment'):
                continue
            if token.kind == 'punct':
                if t == '<<<' and self.text(self.step(i, -1)) != 'operator':
                    self.find_launch(i)
                elif t == '{':
                    scopes.append('namespace' in statement or (len(statement) > 1 and statement[-2] == 'extern'))
                elif t == '}' and scopes:
                    scopes.pop()
            elif t == '__shared__':
                self.find_shared(i, all(scopes))
            statement = [] if t in (';', '{', '}') else statement + [t]

    # ---- writing them out -----------------------------------------------------------------------

    def translate(self):
        self.find_forms()
        return self.emit(0, len(self.tokens) - 1)

    def emit(self, first, last):
        out, i = [], first
        while i <= last:
            if i in self.launches:
                out.append(self.emit_launch(i))
                i = self.launches[i][3] + 1
            elif i in self.shared:
                out.append(self.emit_shared(i))
                i = self.shared[i][1] + 1
            else:
                out.append(self.emit_directive(i) if self.tokens[i].kind == 'directive' else self.text(i))
                i += 1
        return ''.join(out)

    def emit_launch(self, first):
        begin, end, opening, closing = self.launches[first]
        kernel = self.words(first, self.step(begin, -1))
        name = re.sub(r' ?(::|<|>|\(|\)|\[|\]|\.|->|&|\*) ?', r'\1', kernel).replace(' ,', ',').replace('\\', '\\\\').replace('"', '\\"')
        # NULL is an integer to C++, which a template parameter cannot turn back into a pointer
        for i in range(opening, closing):
            if self.text(i) == 'NULL' and self.text(self.step(i, -1)) in ('(', ',') and self.text(self.step(i, 1)) in (')', ','):
                self.tokens[i].text = 'nullptr'
        arguments = self.emit(opening + 1, closing - 1)
        comma = ', ' if self.step(opening, 1) != closing else ''
        return (f'simt::launch("{name}", __FILE__, __LINE__, simt::Config({self.emit(begin + 1, end - 1)}), '
                f'[&](const auto&... simt_arguments) {{ {kernel}(simt_arguments...); }}, '
                f'[&](auto simt_address_of) -> decltype(simt_address_of({kernel})) {{ return simt_address_of({kernel}); }}'
                f'{self.newlines(first, begin)}{self.newlines(end, opening)}{comma}{arguments})')

    def emit_shared(self, first):
        keyword, end = self.shared[first]
        whole, qualifiers = self.words(first, end), self.words(first, keyword).split()[:-1]
        is_extern = 'extern' in qualifiers
        declarations, angle, i = [[]], 0, self.step(keyword, 1)   # the words of each, a bracket and what is in it as one
        while i != end:
            last = self.closing(i) if self.text(i) in CLOSING else i
            angle += {'<': 1, '>': -1, '>>>': -3}.get(self.text(i), 0)
            if self.text(i) == ',' and angle == 0:
                declarations.append([])
            else:
                declarations[-1].append(self.words(i, last))
            i = self.step(last, 1)
        out, type_ = [], None
        for words in declarations:
            if any(w == '=' or w[0] == '{' for w in words):
                self.error(keyword, f"shared memory cannot be initialised where it is declared: '{whole}'")
            dimensions = ''
            while words and words[-1][0] == '[':
                dimensions = words.pop() + dimensions
            name, stars = words.pop() if words else '', ''
            while words and words[-1] == '*':
                stars += words.pop()
            if type_ is None:                                 # the first has the type in front
                type_ = ' '.join([w for w in qualifiers if w not in ('extern', 'static')] + words)
                words = [] if re.sub(r'\b(const|volatile)\b', '', ALIGNMENT.sub('', type_ + ' ')).strip() else ['no type']
            if words or '&' in type_ or not re.fullmatch(r'[A-Za-z_]\w*', name):
                self.error(keyword, f"'{whole}' is no form of __shared__ that cu2cpp knows: {KNOWN}")
            if is_extern:
                if len(declarations) > 1 or stars or not re.fullmatch(r'\[ *\]', dimensions):
                    self.error(keyword, f'extern __shared__ must be one array without a size: {KNOWN}')
                type_ = ALIGNMENT.sub('', type_)              # the arena is aligned to 1024
                out.append(f'{type_}* {name} = simt::dynamic_shared<{type_}>();')
                continue
            if re.match(r'\[ *\]', dimensions):
                self.error(keyword, f"__shared__ '{name}' has no size: write a size, or extern for dynamic shared memory")
            self.translator.shared_count += 1
            struct = f'simt_shared_{self.translator.shared_count}'
            out.append(f'struct {struct} {{ {type_} {stars}{name}{dimensions}; }}; '
                       f'auto& {name} = simt::shared<{struct}>("{name}", __FILE__, __LINE__).{name};')
        return ' '.join(out) + self.newlines(first, end)

    def emit_directive(self, index):
        token = self.tokens[index]
        match = INCLUDE.match(token.text)
        if PRAGMA_ONCE.match(token.text):
            self.translator.once.add(self.stack[-1])
            return '\n' * token.text.count('\n')
        if not match:
            return token.text
        path = os.path.normpath(os.path.join(os.path.dirname(self.path), match.group(1)))
        if not os.path.exists(path):                          # a system or project header: left to -I
            return token.text
        next_line = token.line + token.text.count('\n') + 1
        if os.path.realpath(path) in self.translator.once:
            return '\n' * token.text.count('\n')
        # the newline that follows the directive in the source brings us to next_line
        return f'{self.translator.file(path, self.stack)}\n#line {next_line - 1} "{self.path}"\n'


def main():
    parser = argparse.ArgumentParser(description='Rewrite kernel launches and __shared__ so that g++ can compile a CUDA file.')
    parser.add_argument('source', metavar='IN.cu')
    parser.add_argument('-o', dest='output', metavar='OUT.cpp', required=True)
    arguments = parser.parse_args()
    try:
        body = Translator().file(arguments.source)
    except CudaError as e:
        sys.exit(str(e))
    # nvcc includes cuda_runtime.h before the first line of every source; so do we
    with open(arguments.output, 'w', encoding='utf-8', errors='surrogateescape') as f:
        f.write('#include <cuda_runtime.h>\n' + body)


if __name__ == '__main__':
    main()
