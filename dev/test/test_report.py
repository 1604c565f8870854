"""report.py: the files are in step with dev/bench/results; what no GPU has run has no table; made-up results come out right."""
import json
import re
import sys

import pytest

from helpers import ROOT, execute, library

sys.path.insert(0, str(ROOT / "dev/bench"))
import gpu  # noqa: E402
import report  # noqa: E402
import traffic  # noqa: E402


def run(*arguments, status=0):
    done = execute(sys.executable, "-B", ROOT / "dev/bench/report.py", *arguments, cwd=ROOT)
    assert done.status == status and "Traceback" not in done.err, done.out + done.err
    return done


def test_the_files_are_in_step():
    """If this fails: python3 dev/bench/report.py --write"""
    run("--check")
    for path, name in report.PLACES:
        text = (ROOT / path).read_text()
        assert text.count(f"<!-- {name}:begin -->") == text.count(f"<!-- {name}:end -->") <= 1
    assert "<!-- budget:begin -->" in (ROOT / "dev/bench/README.md").read_text()


def rows_of(lines):
    """[cells] of Markdown tables' rows, without heads."""
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return [c for i, c in enumerate(cells) if "---" not in c[0] and not (i + 1 < len(cells) and "---" in cells[i + 1][0])]


def test_without_results_nothing_is_guessed(tmp_path):
    assert report.load(str(tmp_path)) == {}
    for section in (report.results_section({}, str(tmp_path)), report.shares_section({})):
        assert len(section) == 1 and "No GPU has run this yet" in section[0]
    budget = report.budget_section({})
    assert len(rows_of(budget)) > 25 and "measured" not in "".join(budget)
    for path, _ in report.PLACES:
        assert "not run |" not in (ROOT / path).read_text()


# ----------------------------------------------------------------------------
# the budget

def test_the_budget_adds_up():
    """Against a second way to count: the trainer's own flops, which are 6 a weight and 6 L C T for attention."""
    s = traffic.shape("d12", 64, 1024)
    forward = sum(n for _, n in report.flops(s).values())
    weights = 12 * 12 * 768 * 768 + 50304 * 768
    assert 3 * forward == 6 * weights
    assert report.attention_flops(s) == 2 * 12 * 768 * 1025
    assert 3 * forward + 3.5 * report.attention_flops(s) == pytest.approx(0.81e9, rel=0.01)
    for text, n in report.flops(s).values():
        assert eval(text.replace("·", "*")) == n
    us = report.microseconds(report.counted(s, "exact"))
    assert sum(us) == pytest.approx(1.8, rel=0.02) and 1e6 / sum(us) == pytest.approx(550e3, rel=0.02)
    # every kernel is in one of the four terms
    count = report.counted(s, "USE_APPROXBP=1")
    kernels = set(count.bytes())
    terms = [{traffic.MATMUL}, {k for k in kernels if report.is_forward(k)}, {k for k in kernels if report.is_backward(k)},
             set(report.element_wise(count))]
    assert sum(map(len, terms)) == len(kernels) == len(set.union(*terms))
    table = report.passes_table(s, {})
    sums = rows_of(table)[-1]
    assert float(sums[2]) == pytest.approx(us[3], abs=1e-4)
    assert sum(float(c[2]) for c in rows_of(table)[:-1] if c[2] != "–") == pytest.approx(us[3], abs=1e-3)


def test_the_mfu_is_the_trainers():
    """flops per token as the trainer has them: 6 for each weight of a matmul, the head unpadded, and 6 L C T."""
    s = traffic.shape("d12", 1, 1024)
    assert report.model_flops(s) == 6 * (50257 * 768 + 12 * 12 * 768 * 768) + 6 * 12 * 768 * 1024
    assert report.peak_flops("NVIDIA H200") == 989e12 and report.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert report.peak_flops("Fake 200") is None


# ----------------------------------------------------------------------------
# made-up results

HEAD = {"gpu": "NVIDIA H200", "driver": "999.1", "cuda": "13.0", "commit": "0123456789abcdef", "source": "0", "command": "c", "date": "d"}


def entry(model, batch, row, speed, B, peak=20 << 30, program="ours", **more):
    return {"model": model, "batch": batch, "row": row, "program": program, "round": 1, "B": B, "T": 1024, "tokens_per_s": speed, "ms": 1.0,
            "peak_bytes": peak, "ledger_bytes": 18 << 30, **more}


@pytest.fixture
def results(tmp_path):
    bench = [entry("124M", "fixed", "exact, -r 0", 400000, 64), entry("124M", "fixed", "exact, -r 0", 410000, 64, round=2),
             entry("124M", "fixed", "USE_APPROXBP=1", 425250, 64, 14 << 30), entry("124M", "largest", "USE_APPROXBP=1", 450000, 512, 110 << 30),
             entry("124M", "fixed", "exact, -ge 0 --loss-chunks 8", 412345, 64),
             {"model": "124M", "batch": "fixed", "row": "APPROX_ACT=2", "program": "ours", "error": ["it broke"]},
             {"model": "124M", "batch": "fixed", "row": "exact, -r 2", "program": "ours", "skipped": "out of time"}]
    peers = [entry("124M", "fixed", "exact, -r 0", 390000, 64), entry("124M", "fixed", "torch.compile", 351000, 64, program="torch.compile",
                                                                      ledger_bytes=None)]
    profile = [{"row": "exact, -r 0", "B": 64, "T": 1024, "kernels": {
        gpu.LIBRARY: {"calls": 219, "ms": 100.0}, "attention_forward_tc_kernel": {"calls": 12, "ms": 6.0},
        "attention_backward_dq_tc_kernel": {"calls": 12, "ms": 12.0}, "attention_backward_dkv_tc_kernel": {"calls": 12, "ms": 12.0},
        "adamw_kernel": {"calls": 1, "ms": 1.0}}}]
    kernels = [{"name": "dev/cuda/gelu", "rows": [{"case": "c", "version": "3", "ms": 0.5, "gb_s": 3900.0, "share": 0.91}]},
               {"name": "dev/cuda/other", "error": ["it broke"]}]
    folder = tmp_path / "results"
    for name, value in (("bench", {"runs": bench}), ("peers", {"runs": peers, "python": "PyTorch 9"}), ("profile", {"runs": profile}),
                        ("kernels", {"programs": kernels}), ("check", {"tests": {"passed": 30, "failed": 1, "unfinished": 2}, "items": []})):
        (folder / "h200").mkdir(parents=True, exist_ok=True)
        (folder / f"h200/{name}.json").write_text(json.dumps({**HEAD, **value}))
    (folder / "cpu").mkdir()
    (folder / "cpu/loss.json").write_text('{"runs": []}')
    (folder / "toy").mkdir()
    (folder / "toy/bench.json").write_text(json.dumps({**HEAD, "source": "0-try", "runs": []}))
    return folder


def test_results(results):
    found = report.load(str(results))
    assert set(found) == {"h200"}
    lines = report.results_section(found, str(results))
    rows = {cells[0]: cells for cells in rows_of(lines[:15])}
    mfu = round(100 * 405000 * report.model_flops(traffic.shape("d12", 1, 1024)) / 989e12)
    assert rows["exact, -r 0"][1:] == ["405,000", "100 %", f"{mfu} %", "20.0", "18.0", "–", "–", "–"]
    assert rows["USE_APPROXBP=1"][1:3] == ["425,250", "105 %"] and rows["USE_APPROXBP=1"][4:] == ["14.0", "18.0", "512", "450,000", "110.0"]
    assert rows["APPROX_ACT=2"][1] == "failed" and not {"exact, -r 2", "PyTorch, eager"} & set(rows)  # a table has what was run
    assert rows["torch.compile"][1:3] == ["351,000", "90 %"] and rows["torch.compile"][5] == "–"  # against exact of the same call
    text = "\n".join(lines)
    assert "1558M" not in text and "not run" not in text
    assert "30 passed, 1 failed, 2 not finished" in text and "exact, -r 0 400,000 and 410,000" in text and "PyTorch 9" in text
    terms = {cells[0].strip("*"): cells for cells in rows_of(report.budget_section(found))}
    assert terms["matmuls"][-1] == f"1.526 ({741.4 * 65536 / 100 / 1e3:.0f} TFLOP/s)"  # 100 ms of 65,536 tokens
    assert terms["attention, forward"][-1].startswith("0.092 (") and terms["attention, backward"][-1].startswith("0.366 (")
    assert terms["USE_APPROXBP=1"][-1] == "425,250 (76 %)"
    assert terms["`-r 0 -ge 0 --loss-chunks 8`"][1:] == ["412,345"] and terms["`-r 0 -ge 0 --loss-chunks 4`"][1:] == ["–"]
    shares = rows_of(report.shares_section(found))
    assert shares == [["`gelu.cu`", "c: 3", "0.500", "3,900 GB/s", "91 %"], ["`other.cu`", "failed", "–", "–", "–"]]


def test_write_and_check(results, tmp_path):
    root = tmp_path / "root"
    for path, name in report.PLACES:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"before\n<!-- {name}:begin -->\nold\n<!-- {name}:end -->\nafter\n")
    where = ["--results", results, "--root", root]
    assert "not in step" in run("--check", *where, status=1).err
    assert (root / "README.md").read_text().splitlines()[2] == "old"
    run("--write", *where)
    run("--check", *where)
    text = (root / "README.md").read_text()
    assert text.startswith("before\n<!-- results:begin -->\n") and text.endswith("<!-- results:end -->\nafter\n") and "405,000" in text
    bench = results / "h200/bench.json"
    bench.write_text(bench.read_text().replace("425250", "425350"))
    assert re.search("README.md: not in step", run("--check", *where, status=1).err)
    (root / "README.md").write_text("<!-- results:begin -->\n")
    assert "expected one" in run("--check", *where, status=1).err
    (root / "README.md").write_text("no markers\n")
    assert "has no markers" in run("--write", *where).out
    bench.write_text("{")
    assert "is not JSON" in run(*where, status=1).err


def test_plot(results, tmp_path):
    library("matplotlib", "python3-matplotlib")
    found = report.load(str(results))
    assert report.plot(found["h200"], str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert not report.plot({"check": HEAD}, str(tmp_path / "y.png"))
