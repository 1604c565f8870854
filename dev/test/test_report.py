"""report.py: the files are in step with dev/bench/results; what no GPU has run has no table; made-up results come out right."""
import json
import sys

import pytest

from helpers import ROOT

sys.path.insert(0, str(ROOT / "dev/bench"))
import gpu  # noqa: E402
import report  # noqa: E402
import traffic  # noqa: E402

def run(monkeypatch, *arguments):
    """Exit status."""
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        report.main()
    return ended.value.code

def test_the_files_are_in_step(monkeypatch):
    """If this fails: python3 dev/bench/report.py --write"""
    assert run(monkeypatch, "--check") == 0
    assert "<!-- budget:begin -->" in (ROOT / "dev/bench/README.md").read_text()

def rows_of(lines):
    """[cells] of Markdown tables' rows, without heads."""
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return [c for i, c in enumerate(cells) if "---" not in c[0] and not (i + 1 < len(cells) and "---" in cells[i + 1][0])]

def test_without_results_nothing_is_guessed(tmp_path):
    assert report.load(str(tmp_path)) == {}
    assert report.results_section({}) == report.shares_section({}) == report.NOT_YET
    budget = report.budget_section({})
    assert len(rows_of(budget)) > 25 and "measured" not in "".join(budget)

def test_the_budget_adds_up():
    """Against a second way to count: the trainer's own flops, which are 6 a weight and 6 L C T for attention."""
    s = traffic.shape("d12", 64, 1024)
    forward = sum(n for _, n in report.flops(s).values())
    assert 3 * forward == 6 * (12 * 12 * 768 * 768 + 50304 * 768)
    assert report.attention_flops(s) == 2 * 12 * 768 * 1025
    us = report.microseconds(report.counted(s, gpu.EXACT))
    assert sum(us) == pytest.approx(1.8, rel=0.02) and 1e6 / sum(us) == pytest.approx(550e3, rel=0.02)
    count = report.counted(s, gpu.BOTH)
    assert {report.term(k) for k in count.bytes()} == {"matmuls", "forward", "backward", "others"}
    *rows, sums = rows_of(report.passes_table(s, {}))
    assert float(sums[2]) == pytest.approx(us[3], abs=1e-4)
    assert sum(float(c[2]) for c in rows if c[2] != "–") == pytest.approx(us[3], abs=1e-3)

def test_the_mfu_is_the_trainers():
    """flops per token as the trainer has them: 6 for each weight of a matmul, the head unpadded, and 6 L C T."""
    s = traffic.shape("d12", 1, 1024)
    assert report.model_flops(s) == 6 * (50257 * 768 + 12 * 12 * 768 * 768) + 6 * 12 * 768 * 1024
    assert report.peak_flops("NVIDIA H200") == 989e12 and report.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert report.peak_flops("Fake 200") is None

# ---- made-up results -----------------------------------------------------------------------------

HEAD = {"gpu": "NVIDIA H200", "driver": "999.1", "cuda": "13.0", "commit": "0123456789abcdef", "source": "0", "python": "PyTorch 9"}

def entry(model, batch, row, speed, B, peak=20 << 30, program="ours", status="ok", **more):
    figures = {"tokens_per_s": speed, "peak_bytes": peak, "ledger_bytes": 18 << 30} if speed else {}
    return {"id": f"{model}, {batch}, {row}{more}", "status": status, "model": model, "batch": batch, "row": row, "program": program,
            "round": 1, "B": B, "T": 1024, **figures, **more}

@pytest.fixture
def results(tmp_path):
    bench = [entry("124M", "fixed", "exact, -r 0", 400000, 64), entry("124M", "fixed", "exact, -r 0", 410000, 64, round=2),
             entry("124M", "fixed", "USE_APPROXBP=1", 425250, 64, 14 << 30), entry("124M", "largest", "USE_APPROXBP=1", 450000, 512, 110 << 30),
             entry("124M", "fixed", "exact, -ge 0 --loss-chunks 8", 412345, 64), entry("124M", "fixed", "APPROX_ACT=2", None, 64, status="failed"),
             {"id": "profile", "status": "ok", "row": "exact, -r 0", "B": 64, "T": 1024, "kernels": {
                 gpu.LIBRARY: {"calls": 219, "ms": 100.0}, "attention_forward_tc_kernel": {"calls": 12, "ms": 6.0},
                 "attention_backward_dq_tc_kernel": {"calls": 12, "ms": 12.0}, "attention_backward_dkv_tc_kernel": {"calls": 12, "ms": 12.0},
                 "adamw_kernel": {"calls": 1, "ms": 1.0}}},
             {"id": "dev/cuda/gelu", "status": "ok", "rows": [{"case": "c", "version": "3", "ms": 0.5, "gb_s": 3900.0, "share": 0.91}]},
             {"id": "dev/cuda/other", "status": "failed"}]
    peers = [entry("124M", "fixed", "exact, -r 0", 390000, 64),
             {**entry("124M", "fixed", "torch.compile", 351000, 64, program="torch.compile"), "ledger_bytes": None}]
    check = [{"id": f"{i} race", "status": status} for i, status in enumerate(30 * ["ok"] + ["failed", "unfinished", "unfinished"])]
    (tmp_path / "results/h200").mkdir(parents=True)
    (tmp_path / "results/toy").mkdir()
    for name, head, entries in (("h200/bench", HEAD, bench), ("h200/peers", HEAD, peers), ("h200/check", HEAD, check),
                                ("toy/bench", {**HEAD, "source": "0-try"}, bench)):
        (tmp_path / f"results/{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [head, *entries]))
    return tmp_path / "results"

def test_results(results):
    found = report.load(str(results))
    assert set(found) == {"h200"}  # a try is no measurement
    lines = report.results_section(found)
    rows = {cells[0]: cells for cells in rows_of(lines)}
    mfu = round(100 * 405000 * report.model_flops(traffic.shape("d12", 1, 1024)) / 989e12)
    assert rows["exact, -r 0"][1:] == ["405,000", "100 %", f"{mfu} %", "20.0", "18.0", "–", "–", "–"]
    assert rows["USE_APPROXBP=1"][1:3] == ["425,250", "105 %"] and rows["USE_APPROXBP=1"][4:] == ["14.0", "18.0", "512", "450,000", "110.0"]
    assert rows["APPROX_ACT=2"][1] == "failed" and not {"exact, -r 2", "PyTorch, eager"} & set(rows)  # a table has what was run
    assert rows["torch.compile"][1:3] == ["351,000", "90 %"] and rows["torch.compile"][5] == "–"  # against exact of the same call
    text = "\n".join(lines)
    assert "1558M" not in text and "at commit 0123456789ab 30 passed, 1 failed (race), 2 not finished (race of 2 programs)." in text
    assert "exact, -r 0 400,000 and 410,000" in text and "PyTorch 9" in text
    terms = {cells[0].strip("*"): cells for cells in rows_of(report.budget_section(found))}
    assert terms["matmuls"][-1] == f"1.526 ({741.4 * 65536 / 100 / 1e3:.0f} TFLOP/s)"  # 100 ms of 65,536 tokens
    assert terms["attention, forward"][-1].startswith("0.092 (") and terms["attention, backward"][-1].startswith("0.366 (")
    assert terms["USE_APPROXBP=1"][-1] == "425,250 (76 %)"
    assert terms["`-r 0 -ge 0 --loss-chunks 8`"][1:] == ["412,345"] and terms["`-r 0 -ge 0 --loss-chunks 4`"][1:] == ["–"]
    shares = rows_of(report.shares_section(found))
    assert shares == [["`gelu.cu`", "c: 3", "0.500", "3,900 GB/s", "91 %"], ["`other.cu`", "failed", "–", "–", "–"]]

def test_write_and_check(results, tmp_path, monkeypatch):
    for path, name in report.PLACES:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"before\n<!-- {name}:begin -->\nold\n<!-- {name}:end -->\nafter\n")
    where = ["--results", results, "--root", tmp_path]
    readme = tmp_path / "README.md"
    assert run(monkeypatch, "--check", *where) == 1 and readme.read_text().splitlines()[2] == "old"
    assert run(monkeypatch, "--write", *where) == 0 and run(monkeypatch, "--check", *where) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- results:begin -->\n") and text.endswith("<!-- results:end -->\nafter\n") and "405,000" in text
    bench = results / "h200/bench.jsonl"
    bench.write_text(bench.read_text().replace("425250", "425350"))
    assert run(monkeypatch, "--check", *where) == 1
    for wrong in ("<!-- results:begin -->\n", "<!-- results:end --><!-- results:begin -->"):
        readme.write_text(wrong)
        assert "expected one" in run(monkeypatch, "--check", *where)
    bench.write_text("{")
    assert "does not say which GPU" in run(monkeypatch, *where)
