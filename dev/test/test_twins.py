"""Twins: what the trainers share is the same in both, and dev/test/twins.py notices when not."""
import stat
import subprocess
import sys

import pytest

from helpers import ROOT

A = """top of a
// ==== twin: sums
int sum;
int more;
// ==== end twin
only in a
// ==== twin: files
open();
// ==== end twin
// ==== twin: only a has this
a();
// ==== end twin
"""
B = """// ==== twin: files
open();
// ==== end twin
between, in b
// ==== twin: sums
int sum;
int more;
// ==== end twin
the end of b
"""


def twins(*args, cwd):
    done = subprocess.run([sys.executable, ROOT / "dev/test/twins.py", *args], cwd=cwd, capture_output=True, text=True, timeout=20)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def pair(tmp_path):
    def write(a, b):
        (tmp_path / "a.cu").write_text(a)
        (tmp_path / "b.cu").write_text(b)
        return tmp_path
    return write


def test_the_trainers():
    files = [f for f in ("train_gpt2.cu", "train_llama.cu") if (ROOT / f).exists()]
    status, output = twins(*files, cwd=ROOT)
    assert status == 0, output


def test_same_in_any_place_and_order(pair):
    status, output = twins("a.cu", "b.cu", cwd=pair(A, B))
    assert status == 0 and "2 sections" in output


@pytest.mark.parametrize("old, new, line_a, line_b", [
    ("int sum;\n", "int  sum;\n", "a.cu:3: int sum;", "b.cu:6: int  sum;"),
    ("int more;\n", "int less;\n", "a.cu:4: int more;", "b.cu:7: int less;"),
    ("int more;\n", "", "a.cu:4: int more;", "b.cu:7: (the section ends)"),
    ("int more;\n", "int more;\nint most;\n", "a.cu:5: (the section ends)", "b.cu:8: int most;"),
])
def test_a_difference_is_named(pair, old, new, line_a, line_b):
    status, output = twins("a.cu", "b.cu", cwd=pair(A, B.replace(old, new)))
    assert status != 0
    assert "'sums'" in output and line_a in output and line_b in output


def test_white_space_at_the_end_of_a_line_is_a_difference(pair):
    assert twins("a.cu", "b.cu", cwd=pair(A, B.replace("int sum;", "int sum; ")))[0] != 0


@pytest.mark.parametrize("name, text, message", [
    ("unclosed", A + "// ==== twin: open\n", "'open' has no end"),
    ("nested", A.replace("int sum;", "// ==== twin: inner"), "'inner' begins inside of 'sums'"),
    ("twice", A + A.replace("only a", "b"), "a second twin 'sums'"),
    ("end alone", "// ==== end twin\n" + A, "an end without a twin"),
    ("no name", A + "// ==== twin:\n", "found '// ==== twin:'"),
    ("mistyped", A.replace("// ==== twin: sums", "// === twin: sums"), "found '// === twin: sums'"),
])
def test_bad_marks(pair, name, text, message):
    for files in (["a.cu", "b.cu"], ["a.cu"]):
        status, output = twins(*files, cwd=pair(text, B))
        assert status != 0 and "a.cu:" in output and message in output, name


def test_sync_copies_into_the_other(pair):
    changed = A.replace("int more;", "int much;\nint more;").replace("open();", "close();")
    folder = pair(changed, B)
    (folder / "b.cu").chmod(0o640)
    status, output = twins("--sync", "a.cu", "a.cu", "b.cu", cwd=folder)
    assert status == 0 and "2 sections of b.cu changed" in output
    assert (folder / "a.cu").read_text() == changed
    assert (folder / "b.cu").read_text() == B.replace("int more;", "int much;\nint more;").replace("open();", "close();")
    assert stat.S_IMODE((folder / "b.cu").stat().st_mode) == 0o640
    assert sorted(p.name for p in folder.iterdir()) == ["a.cu", "b.cu"]
    assert twins("a.cu", "b.cu", cwd=folder)[0] == 0


def test_sync_goes_both_ways(pair):
    folder = pair(A, B.replace("int sum;", "long sum;"))
    assert twins("--sync", "b.cu", "a.cu", "b.cu", cwd=folder)[0] == 0
    assert (folder / "a.cu").read_text() == A.replace("int sum;", "long sum;")


def test_sync_writes_nothing_when_a_mark_is_bad(pair):
    folder = pair(A, B + "// ==== twin: open\n")
    status, _ = twins("--sync", "a.cu", "a.cu", "b.cu", cwd=folder)
    assert status != 0
    assert (folder / "b.cu").read_text() == B + "// ==== twin: open\n"
