"""Twins: sections that stand in both trainers, byte for byte.

    python3 dev/test/twins.py FILE FILE              compares
    python3 dev/test/twins.py --sync FROM FILE FILE  copies FROM's sections into the other file

A section runs from the line `// ==== twin: NAME` to the line `// ==== end twin`. SECTIONS lists them all, so that a mark that was
deleted is noticed; with one file alone, that file has them all.
"""
import argparse
import itertools
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "prepro"))
from atomic import atomic  # noqa: E402

SECTIONS = ["primer", "numbers and errors, embedding, column sums, norm, matmul, attention", "loss", "codes", "MS-LN",
            "tensor cores, optimizer, many GPUs, tensor table", "plan", "model", "allocation, linear layers", "loss over chunks",
            "update, files", "checkpoints, device, schedule, command line", "settings, plan, loop, main"]
IN_ONE_FILE = []   # those of SECTIONS that the other trainer does without

BEGIN = re.compile(r"// ==== twin: (\S.*?)\s*")
END = re.compile(r"// ==== end twin\s*")
LIKE_A_MARK = re.compile(r"\s*//\s*=+\s*(end\s+)?twin\b.*")  # so that a mistyped mark is not just a comment

class TwinError(Exception):
    pass

def read(path, listed):
    """The lines of a file, with their ends, and its sections: {name: (first, last)}, the lines between the marks as a range."""
    with open(path, newline="") as f:
        lines = f.readlines()
    sections, name = {}, None
    for i, line in enumerate(lines):
        begin, end, wrong = BEGIN.fullmatch(line), END.fullmatch(line), None
        if begin and name is not None:
            wrong = f"twin '{begin[1]}' begins inside of '{name}'"
        elif begin and begin[1] in sections:
            wrong = f"a second twin '{begin[1]}' in one file; the first is at line {sections[begin[1]][0]}"
        elif begin and begin[1] not in listed:
            wrong = f"twin '{begin[1]}' is not in the list of dev/test/twins.py"
        elif begin:
            name, start = begin[1], i + 1
        elif end and name is None:
            wrong = "an end without a twin"
        elif end:
            sections[name], name = (start, i), None
        elif LIKE_A_MARK.fullmatch(line.rstrip("\r\n")):
            wrong = f"expected '// ==== twin: NAME' or '// ==== end twin', found '{line.strip()}'"
        if wrong:
            raise TwinError(f"{path}:{i + 1}: {wrong}")
    if name is not None:
        raise TwinError(f"{path}:{start}: twin '{name}' has no end")
    return lines, sections

def compare(path_a, path_b, listed):
    """Raises for the first section that differs; returns how many there are."""
    (lines_a, a), (lines_b, b) = read(path_a, listed), read(path_b, listed)
    both = [name for name in a if name in b]
    for name in both:
        for i, (one, two) in enumerate(itertools.zip_longest(lines_a[slice(*a[name])], lines_b[slice(*b[name])])):
            if one != two:
                show = ["(the section ends)" if line is None else line.rstrip("\n") for line in (one, two)]
                raise TwinError(f"twin '{name}' differs, first at\n"
                                f"  {path_a}:{a[name][0] + i + 1}: {show[0]}\n"
                                f"  {path_b}:{b[name][0] + i + 1}: {show[1]}\n"
                                f"make twins SYNC={path_a} copies all of {path_a}'s into the other")
    return len(both)

def sync(source, target, listed):
    """Copies the source's sections over the target's of the same name; all of them, or none."""
    (from_lines, a), (lines, b) = read(source, listed), read(target, listed)
    changed = 0
    for name in sorted(a.keys() & b.keys(), key=b.get, reverse=True):  # from the end: line numbers stay right
        new = from_lines[slice(*a[name])]
        changed += lines[slice(*b[name])] != new
        lines[slice(*b[name])] = new
    with atomic(target) as (f,):
        f.write("".join(lines).encode())
    return changed

def main(arguments, listed=SECTIONS, in_one_file=IN_ONE_FILE):
    parser = argparse.ArgumentParser(description="Compares the sections that two files share.")
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--sync", metavar="FROM", help="copy the sections of this one into the other")
    a = parser.parse_args(arguments)
    if len(a.files) > 2:
        raise TwinError(f"expected two files, found {len(a.files)}")
    if a.sync and a.sync not in a.files:
        raise TwinError(f"--sync {a.sync}: expected one of {' '.join(a.files)}")
    files = {path: read(path, listed)[1] for path in a.files}
    for path, sections in files.items():
        for name in listed:
            if name not in sections and (name not in in_one_file or not any(name in other for other in files.values())):
                raise TwinError(f"{path}: it has no twin '{name}', which the list of dev/test/twins.py has")
    if len(a.files) == 1:
        return f"twins: {len(listed)} sections in {a.files[0]}, and no other file to compare with"
    said = ""
    if a.sync:
        target = a.files[a.files[0] == a.sync]
        said = f"twins: {sync(a.sync, target, listed)} sections of {target} changed\n"
    return f"{said}twins: {compare(*a.files, listed)} sections are the same in both"

if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except (TwinError, OSError) as e:
        sys.exit(f"twins: {e}")
