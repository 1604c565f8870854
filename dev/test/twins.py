"""Twins: sections that stand in both trainers, byte for byte.

    python3 dev/test/twins.py FILE FILE              compares
    python3 dev/test/twins.py --sync FROM FILE FILE  copies FROM's sections into the other file

A section runs from the line `// ==== twin: NAME` to the line `// ==== end twin`. One that is in
only one of the files is no twin, and neither compared nor copied.
"""
import argparse
import itertools
import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../prepro"))
from atomic import atomic  # noqa: E402

BEGIN = re.compile(r"// ==== twin: (\S.*?)\s*")
END = re.compile(r"// ==== end twin\s*")
LIKE_A_MARK = re.compile(r"\s*//\s*=+\s*(end\s+)?twin\b.*")  # so that a mistyped mark is not just a comment


class TwinError(Exception):
    pass


def read(path):
    """The lines of a file, with their ends, and its sections: {name: (first, last)}, the lines
    between the marks as a range."""
    with open(path, newline="") as f:
        lines = f.readlines()
    sections, name, start = {}, None, 0
    for i, line in enumerate(lines):
        begin, end = BEGIN.fullmatch(line), END.fullmatch(line)
        here = f"{path}:{i + 1}"
        if begin:
            if name is not None:
                raise TwinError(f"{here}: twin '{begin[1]}' begins inside of '{name}' (line {start})")
            if begin[1] in sections:
                raise TwinError(f"{here}: a second twin '{begin[1]}' in one file; the first is at line {sections[begin[1]][0]}")
            name, start = begin[1], i + 1
        elif end:
            if name is None:
                raise TwinError(f"{here}: an end without a twin")
            sections[name] = (start, i)
            name = None
        elif LIKE_A_MARK.fullmatch(line.rstrip("\r\n")):
            raise TwinError(f"{here}: expected '// ==== twin: NAME' or '// ==== end twin', found '{line.strip()}'")
    if name is not None:
        raise TwinError(f"{path}:{start}: twin '{name}' has no end")
    return lines, sections


def shared(a, b):
    return [name for name in a if name in b]


def compare(path_a, path_b):
    """Raises for the first section that differs; returns how many there are."""
    lines_a, a = read(path_a)
    lines_b, b = read(path_b)
    for name in shared(a, b):
        pairs = itertools.zip_longest(lines_a[slice(*a[name])], lines_b[slice(*b[name])])
        for i, (one, two) in enumerate(pairs):
            if one != two:
                def show(line):
                    return "(the section ends)" if line is None else line.rstrip("\n")
                raise TwinError(f"twin '{name}' differs, first at\n"
                                f"  {path_a}:{a[name][0] + i + 1}: {show(one)}\n"
                                f"  {path_b}:{b[name][0] + i + 1}: {show(two)}\n"
                                f"make twins SYNC={path_a} copies all of {path_a}'s into the other")
    return len(shared(a, b))


def sync(source, target):
    """Copies the source's sections over the target's of the same name; all of them, or none."""
    from_lines, a = read(source)
    lines, b = read(target)
    names = sorted(shared(a, b), key=lambda name: b[name], reverse=True)  # from the end: line numbers stay right
    changed = 0
    for name in names:
        new = from_lines[slice(*a[name])]
        changed += lines[slice(*b[name])] != new
        lines[slice(*b[name])] = new
    with atomic(target) as (f,):
        f.write("".join(lines).encode())
    return changed


def main():
    parser = argparse.ArgumentParser(description="Compares the sections that two files share.")
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--sync", metavar="FROM", help="copy the sections of this one into the other")
    a = parser.parse_args()
    if len(a.files) > 2:
        raise TwinError(f"expected two files, found {len(a.files)}")
    if a.sync and a.sync not in a.files:
        raise TwinError(f"--sync {a.sync}: expected one of {' '.join(a.files)}")
    if len(a.files) == 1:
        print(f"twins: {len(read(a.files[0])[1])} sections in {a.files[0]}, and no other file to compare with")
        return
    if a.sync:
        target = a.files[a.files[0] == a.sync]
        print(f"twins: {sync(a.sync, target)} sections of {target} changed")
    print(f"twins: {compare(*a.files)} sections are the same in both")


if __name__ == "__main__":
    try:
        main()
    except (TwinError, OSError) as e:
        sys.exit(f"twins: {e}")
