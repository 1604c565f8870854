"""Twins: what the trainers share is the same in both, and dev/test/twins.py notices when not."""
import os
import stat

import pytest

import twins
from helpers import ROOT, execute

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

@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(a, b): what twins.py says of two files with these texts, or of how they differ."""
    monkeypatch.chdir(tmp_path)

    def call(a, b, *arguments, files=("a.cu", "b.cu")):
        (tmp_path / "a.cu").write_text(a)
        if not (tmp_path / "b.cu").exists() or b is not None:
            (tmp_path / "b.cu").write_text(b)
        try:
            return twins.main([*arguments, *files], ["sums", "files", "only a has this"], ["only a has this"])
        except twins.TwinError as e:
            return f"error: {e}"
    call.folder = tmp_path
    return call

def test_the_trainers():
    done = execute("make", "-s", "twins", cwd=ROOT)
    assert done.status == 0 and f"{len(twins.SECTIONS)} sections" in done.out, done.out + done.err

def test_same_in_any_place_and_order(run):
    assert run(A, B) == "twins: 2 sections are the same in both"
    assert run(A, B, files=["a.cu"]).startswith("twins: 3 sections in a.cu")

@pytest.mark.parametrize("old, new, line_a, line_b", [
    ("int sum;\n", "int  sum;\n", "a.cu:3: int sum;", "b.cu:6: int  sum;"),
    ("int sum;\n", "int sum; \n", "a.cu:3: int sum;", "b.cu:6: int sum; "),
    ("int more;\n", "", "a.cu:4: int more;", "b.cu:7: (the section ends)"),
    ("int more;\n", "int more;\nint most;\n", "a.cu:5: (the section ends)", "b.cu:8: int most;"),
])
def test_a_difference_is_named(run, old, new, line_a, line_b):
    output = run(A, B.replace(old, new))
    assert output.startswith("error: twin 'sums' differs") and f"{line_a}\n" in output and f"{line_b}\n" in output

@pytest.mark.parametrize("text, message", [
    (A[:A.rindex("// ==== end twin")], "'only a has this' has no end"),
    (A.replace("int sum;", "// ==== twin: inner"), "'inner' begins inside of 'sums'"),
    (A + A.replace("only a", "b"), "a second twin 'sums'"),
    ("// ==== end twin\n" + A, "an end without a twin"),
    (A.replace("// ==== twin: sums", "// === twin: sums"), "found '// === twin: sums'"),
    (A.replace("// ==== twin: sums", "// ==== twin:"), "found '// ==== twin:'"),
    (A.replace("sums", "sum"), "twin 'sum' is not in the list"),
    (A[A.index("only in a"):], "it has no twin 'sums'"),
    (A[:A.index("// ==== twin: only")], "it has no twin 'only a has this'"),
])
def test_bad_marks(run, text, message):
    for files in (["a.cu", "b.cu"], ["a.cu"]):
        output = run(text, B, files=files)
        assert output.startswith("error: a.cu") and message in output
    assert run(A, B[B.index("between"):]) == "error: b.cu: it has no twin 'files', which the list of dev/test/twins.py has"

def test_sync_copies_into_the_other(run):
    changed = A.replace("int more;", "int much;\nint more;").replace("open();", "close();")
    run(A, B)
    (run.folder / "b.cu").chmod(0o640)
    assert "2 sections of b.cu changed" in run(changed, None, "--sync", "a.cu")
    assert (run.folder / "a.cu").read_text() == changed
    assert (run.folder / "b.cu").read_text() == B.replace("int more;", "int much;\nint more;").replace("open();", "close();")
    assert stat.S_IMODE((run.folder / "b.cu").stat().st_mode) == 0o640 and sorted(os.listdir(run.folder)) == ["a.cu", "b.cu"]
    run(A, B.replace("int sum;", "long sum;"), "--sync", "b.cu")   # and the other way
    assert (run.folder / "a.cu").read_text() == A.replace("int sum;", "long sum;")

def test_sync_writes_nothing_when_a_mark_is_bad(run):
    bad = B + "// ==== twin: only a has this\n"
    assert "has no end" in run(A, bad, "--sync", "a.cu") and (run.folder / "b.cu").read_text() == bad
