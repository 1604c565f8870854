"""The scripts of dev/bench: traffic.py against the program that it describes, loss.py, finetune.py, the demos and memory.py on runs of a second.

What traffic.py says of a step is compared with the CPU build's profile (kernels, calls) and its ledger (tensors).
"""
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from helpers import ROOT, environment, execute, library, program, script, words, write_tokens

sys.path.insert(0, str(ROOT / "dev/bench"))
import common  # noqa: E402
import demo  # noqa: E402
import loss  # noqa: E402
import memory  # noqa: E402
import traffic  # noqa: E402

spec = importlib.util.spec_from_file_location("bench_finetune", ROOT / "dev/bench/finetune.py")  # dev/test has a finetune, too
tuning = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tuning)

VARIANT = {(0, False): "cpu-bf16", (2, False): "cpu-act-bf16", (0, True): "cpu-norm-bf16", (2, True): "cpu-approxbp-bf16"}  # (bits, norm)
TRY = "gpt2:L3,H2,C32,T32,V257"  # three layers: a first, a middle and a last one
B, T = 2, 32

USUAL = [mode for mode in loss.NAMES if mode not in loss.WHEN_ASKED]

# ---- traffic.py ----------------------------------------------------------------------------------

MODES = [*traffic.MODES,
         traffic.Mode("exact, -r 2 -ge 2", "-r 2 -ge 2", 0, False, 2, 2),
         traffic.Mode("codes, -r 2", "-r 2", 2, False, 2, 0),
         traffic.Mode("norm, -r 2 -ge 2", "-r 2 -ge 2", 0, True, 2, 2),
         traffic.Mode("both, -r 1", "-r 1", 2, True, 1, 0)]

def case(mode):
    """The program that is this mode, and its options."""
    return program(VARIANT[mode.bits, mode.norm]), ["-e", TRY, "-b", B, "-t", T, *mode.flags.split()]

def calls_of_a_step(lab, mode, *options, steps=2):
    """{kernel: calls} as the program makes them; a kernel's name without its template arguments."""
    path, shape = case(mode)
    done = execute(path, *shape, "-i", "train.bin", "-x", steps, "-v", 0, "-s", 0, *options, cwd=lab.folder,
                   env={"SIMT_PROFILE": 1, "OMP_NUM_THREADS": 1})
    assert done.status == 0, done.err
    table = re.findall(r"^ +[\d.]+ +[\d.]+% +(\d+) +\d+ +\d+ +\d+ +\d+  (\S.*)$", done.err, re.M)
    assert table, done.err
    calls = {}
    for n, name in table:
        name = {"kernel": "add_norm_backward_kernel"}.get(name, re.sub("<.*>", "", name))  # called by a variable
        if name not in ("init_kernel", "widen_kernel"):  # before the first step
            calls[name] = calls.get(name, 0) + int(n) / steps
    return calls

@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.name)
def test_kernels_and_calls_are_the_programs(shared_lab, mode):
    assert calls_of_a_step(shared_lab, mode) == traffic.Count(traffic.shape(TRY, B, T), mode).calls()
    if mode.name in (traffic.BASE, "USE_APPROXBP=1"):
        counted = traffic.Count(traffic.shape(TRY, B, T, total=3 * B * T, chunks=2), mode).calls()
        assert calls_of_a_step(shared_lab, mode, "-d", 3 * B * T, "--loss-chunks", 2, steps=1) == counted

@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.name)
def test_tensors_are_the_ledgers(mode, micro):
    """Every tensor of a layer, every gradient and every statistic has the bytes that the ledger gives it."""
    path, options = case(mode)
    rows = common.ledger(path, [*options, "-d", micro * B * T])
    shape = traffic.shape(TRY, B, T, total=micro * B * T)
    count = traffic.Count(shape, mode)
    here = {"resid_mid": "stream", "resid_out": "stream", "resid_in": "stream"}
    compared = 0
    for row in rows:
        name = here.get(row["name"], row["name"])
        if name in count.tensors and "alias_of" not in row and row["kind"] != "optimizer":
            assert count.tensors[name] * (shape.L if row["scope"] == "layer" else 1) == row["bytes"], row
            compared += 1
        elif row["kind"] in ("saved", "param", "grad"):
            pytest.fail(f"{row['name']} is not in traffic.py")
    assert compared >= 40
    assert count.kept() == pytest.approx(common.kept(rows)[1], rel=1e-12)
    for what, prefix in (("m", "m_"), ("master", "master_"), ("grads", "d_")):
        assert count.tensors[what] == sum(row["bytes"] for row in rows if row["name"].startswith(prefix)), what

def test_what_the_flag_promises():
    """No matmul more, no more passes over (B,T,4C) tensors and less traffic than with a separate GELU kernel; what README.md says."""
    for precision, size in (("BF16", "d48"), ("FP32", "d12"), ("BF16", "d12")):
        of = {m.name: traffic.Count(traffic.shape(size, 64, 1024, precision=precision), m) for m in traffic.MODES}
        base, approx = of[traffic.BASE], of["USE_APPROXBP=1"]
        assert all(a <= b for a, b in zip(approx.wide(), base.wide())) and approx.units() < base.units()
        assert approx.calls()[traffic.MATMUL] <= base.calls()[traffic.MATMUL]
    # 4 of fch written once and read twice, against 0.5 of codes and one pass in place
    assert base.units() - of["APPROX_ACT=2"].units() == pytest.approx(3.0)
    said = [f"{base.units() - approx.units():.1f} B·T·C", f"costs {of['MS_NORM=1'].units() - base.units():.1f}",
            *(f"{approx.units() - of[f'exact, -ge {ge}'].units():.1f} more" for ge in (1, 2))]
    said += [f"saves {of[traffic.BASE].units() - of['USE_APPROXBP=1'].units():.1f}" for of in
             [{m.name: traffic.Count(traffic.shape("d12", 8, 1024), m) for m in traffic.MODES}]]
    assert said == ["2.7 B·T·C", "costs 0.3", "1.3 more", "5.3 more", "saves 0.6"]  # if these change, README.md does

def test_traffic_prints():
    text = script("dev/bench/traffic.py")
    assert re.search(r"^  against exact -r 0 -ge 0 +\+0.00 .* -2.71$", text, re.M)
    assert len(re.findall(r"^(?:forward|backward) ", text, re.M)) == 39 and re.search(r"^sum +163.33  369", text, re.M)
    for wrong in (["-e", "d13"], ["-e", "gpt2:L2,H2"], ["-e", "gpt2:L2,H3,C32"], ["-t", "2048"], ["-d", "1000"]):
        assert wrong[1] in script("dev/bench/traffic.py", *wrong, status=2)

# ---- memory.py -----------------------------------------------------------------------------------

def test_memory_is_the_estimates(tmp_path, monkeypatch):
    """The bars add up to what --estimate says is the total, and that is what README.md has; nothing is drawn that is not in it."""
    library("matplotlib", "python3-matplotlib")
    drawn = {}
    monkeypatch.setattr(memory, "draw", lambda bars, title, path: drawn.update(bars))
    recipes, lengths = {}, {}
    monkeypatch.setattr(memory, "draw_recipes", lambda panels, path: recipes.update(panels))
    monkeypatch.setattr(memory, "draw_longest", lambda panels, path: lengths.update(panels))
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    memory.main()
    for name, variant, options in memory.MODES:
        done = execute(program(variant), "-e", "d12", "-b", 64, "-t", 1024, *options.split(), "--estimate=json", cwd=ROOT)
        estimate = json.loads(done.out)
        assert sum(drawn[name].values()) == estimate["total_bytes"] and list(drawn[name]) == memory.PARTS
        assert drawn[name]["activations kept for backward"] == common.kept(estimate["rows"])[0]
    for title, (trainer, shape, ways) in memory.PANELS.items():
        for (recipe, build), points in recipes[title].items():
            for saving, point in list(zip(memory.SAVINGS, points))[::5]:
                done = execute(program(memory.BUILDS[build], trainer), *shape.split(), *ways[recipe].split(), *saving.split(), "--estimate=json", cwd=ROOT)
                estimate = json.loads(done.out)
                assert point == (estimate["recompute_share"], estimate["total_bytes"])
            assert [share for share, _ in points] == sorted(share for share, _ in points) and points[-1][1] < points[0][1]
    readme = (ROOT / "README.md").read_text()
    for name in ("Llama-3.1-8B", "Llama-3.1-70B"):
        ours = lengths[name][memory.OURS]
        assert all(f" {n:,} " in readme for n in ours if n) and ours == sorted(ours, key=lambda n: n or 0)
        assert all(n is None or n > (other or 0) for line in lengths[name].values() if line is not ours for n, other in zip(ours, line))
    monkeypatch.undo()
    memory.draw(drawn, "title", str(tmp_path / "memory.png"))
    memory.draw_recipes(recipes, str(tmp_path / "recipes.png"))
    memory.draw_longest(lengths, str(tmp_path / "longest.png"))
    for name in ("memory.png", "recipes.png", "longest.png"):
        assert (tmp_path / name).read_bytes()[:4] == (ROOT / "dev/bench/results/cpu" / name).read_bytes()[:4] == b"\x89PNG"

# ---- loss.py -------------------------------------------------------------------------------------

def test_loss_trains_and_resumes(tmp_path):
    (tmp_path / "text.txt").write_bytes(bytes(words(6000)))
    programs = [f"--program={mode}={program(variant)}" for mode, variant in (("exact", "cpu-bf16"), ("both", "cpu-approxbp-bf16"))]
    arguments = ["--text", "text.txt", "--seeds", 1, "--steps", 4, "--modes", "exact,both", "--model", "gpt2:L2,H2,C32,T32,V257", "-b", 2,
                 "-t", 32, "--val-every", 2, "--val-batches", 2, "--out", "out", "--write", "results", *programs]
    script("dev/bench/loss.py", *arguments, cwd=tmp_path)
    result = json.loads((tmp_path / "results/loss.json").read_text())
    assert [(r["mode"], r["seed"]) for r in result["runs"]] == [("exact", 1), ("both", 1)]
    for r in result["runs"]:
        assert [step for step, _ in r["val"]] == [0, 2, 4] and r["peak_bytes"] == r["estimate_bytes"] > 0
    start = [r["val"][0][1] for r in result["runs"]]
    assert abs(start[0] - start[1]) < 0.01  # the same weights, but for rounding
    assert 12 < result["runs"][0]["units_per_layer"] < 12.6 and 10.5 < result["runs"][1]["units_per_layer"] < 11
    table = (tmp_path / "results/loss.md").read_text()
    assert table.count("\n| ") == 2 and "not known (that takes exact and two seeds)" in table

    # what is complete is not run again; what was cut off is; and other options make another run
    assert script("dev/bench/loss.py", *arguments, cwd=tmp_path).count("from before") == 2
    log = tmp_path / "out/both-seed1.jsonl"
    log.write_text("".join(log.read_text().splitlines(True)[:-1]))
    assert script("dev/bench/loss.py", *arguments, cwd=tmp_path).count("from before") == 1
    assert common.read_log(log)[-1]["done"]
    assert "from before" not in script("dev/bench/loss.py", *arguments, "--lr", "2e-3", cwd=tmp_path)

def made_up(mode, *finals):
    return [{"mode": mode, "seed": seed, "val": [[0, 5.5], [10, final]], "peak_bytes": 100, "units_per_layer": 12.0}
            for seed, final in enumerate(finals, 1)]

def test_loss_judges_by_the_spread(tmp_path):
    finals = {"exact": (2.0, 2.1, 2.05), "act": (2.1, 2.2, 2.1), "norm": (2.2, 2.2, 2.2), "both": (1.9, 1.8, 1.9)}
    runs = [run for mode in finals for run in made_up(mode, *finals[mode])]
    of = loss.summary(runs)
    assert of["exact"]["mean"] == pytest.approx(2.05) and of["exact"]["spread"] == pytest.approx(0.1)
    assert of["act"]["difference"] == pytest.approx(0.25 / 3)
    assert [of[mode]["no_worse"] for mode in USUAL] == [None, True, False, True]
    assert [("yes" in line, "NO" in line) for line in loss.verdict(of)] == [(True, False), (False, True), (True, False)]
    a = SimpleNamespace(seeds=3, steps=10, batch=2, seq_len=32, model="m")
    assert "| exact | 2.0000 | 2.1000 | 2.0500 | 2.0500 | 0.1000 |  | 100 | 12.00 |" in loss.markdown(
        a, {"files": ["x"], "train_tokens": 9, "val_tokens": 1}, of)
    assert loss.summary(made_up("exact", 2.0, 2.1) + made_up("both", 2.0, float("nan")))["both"]["no_worse"] is False
    library("matplotlib", "python3-matplotlib")
    assert loss.plot(a, runs, str(tmp_path / "x.png")) and (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"

def test_loss_builds_what_it_says(tmp_path):
    """make, asked what it would do, compiles each mode with that mode's flags."""
    act, norm = "-DAPPROX_ACT=2", "-DMS_NORM=1"
    for mode, defines in (("exact", set()), ("act", {act}), ("norm", {norm}), ("both", {act, norm})):
        command = loss.build_command(mode, str(tmp_path), ["CPU=1"])
        done = subprocess.run([*command, "-n"], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert set(re.findall(r"-D(?:APPROX_ACT|MS_NORM)=\w+", done.stdout)) == defines

def test_loss_says_what_is_wrong(tmp_path):
    for wrong, status, said in ((["--modes", "fast"], 2, "--modes fast"), (["--steps", 0], 2, "--steps 0"),
                                (["--text", "nowhere.txt", "--out", "out"], 1, "nowhere.txt: no such file")):
        assert said in script("dev/bench/loss.py", *wrong, status=status, cwd=tmp_path)

# ---- finetune.py, demo_llama.py -----------------------------------------------------------------------

CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TRAINERS = {"exact": "cpu-bf16", "norm": "cpu-norm-bf16", "both": "cpu-approxbp-bf16"}

def programs(trainer, *modes):
    return [f"--program={mode}={program(TRAINERS[mode], trainer)}" for mode in modes]

def tiny_llama(folder):
    """A stand-in for SmolLM2: it knows nothing, and reads bytes."""
    tokenizers = library("tokenizers")
    library("jinja2")
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    write_tokens(folder / "any.bin", [1, 2] * 300)
    done = execute(program("cpu-bf16", "train_llama"), "-e", f"llama:L2,H2,K1,C32,F64,T256,V{len(names) + 4}", "-i", "any.bin", "-b", 1, "-t", 256, "-x", 0,
                   "-v", 0, "-s", 0, "-o", "llama", cwd=folder)
    assert done.status == 0, done.err
    model = folder / "build/demo/smollm2"
    model.parent.mkdir(parents=True)
    (folder / "llama/step_00000000").rename(model)
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tok.pre_tokenizer, tok.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    tok.add_special_tokens(names[:3])
    tok.add_tokens(["system\n", "user\n", "assistant\n", "Answer in one word."])  # so that an example has fewer than 64 tokens
    tok.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}))
    return model

def test_finetune_plans():
    """LoRA on all matrices comes first, in each mode with every seed, then seed 1 of the others; full training is exact alone."""
    a = SimpleNamespace(seeds=3, sets=list(tuning.SETS), modes=USUAL, lr="1e-2", full_lr="1e-3", rank=8)
    plan = tuning.plan(a)
    assert plan[:12] == [(seed, "all", mode) for seed in (1, 2, 3) for mode in USUAL] and len(plan) == len(set(plan)) == 39
    assert [seed for seed, *_ in plan[12:]] == [1] * 9 + [2] * 9 + [3] * 9 and [p for p in plan if p[1] == "full"] == [(s, "full", "exact") for s in (1, 2, 3)]
    assert [" ".join(tuning.options_of(which, a)) for which in tuning.SETS] == [
        "-l 1e-2 --lora 8 --lora-targets q,v", "-l 1e-2 --lora 8", "-l 1e-2 --lora 8 --lora-freeze-a 1", "-l 1e-3"]
    for mode, flag in (("exact", "USE_APPROXBP=0"), ("both", "USE_APPROXBP=1")):
        assert loss.build_command(mode, "out", ["CPU=1"], "train_llama") == ["make", "-s", "train_llama", f"BUILD=out/{mode}", flag, "CPU=1"]

def test_finetune_trains_and_resumes(tmp_path):
    for name, seed in (("base.txt", 1), ("text.txt", 2)):
        (tmp_path / name).write_bytes(bytes(words(6000, seed=seed)))
    arguments = ["gpt2", "--text", "text.txt", "--base-text", "base.txt", "--base-steps", 4, "--seeds", 1, "--steps", 4, "--modes", "exact,both",
                 "--sets", "qv,all,full", "--model", "gpt2:L2,H2,C32,T32,V257", "-b", 2, "-t", 32, "--rank", 2, "--val-batches", 2, "--out", "out",
                 "--write", "results", *programs("train_gpt2", "exact", "both")]
    script("dev/bench/finetune.py", *arguments, cwd=tmp_path)
    result = json.loads((tmp_path / "results/finetune_gpt2.json").read_text())
    assert [(r["adapters"], r["mode"]) for r in result["runs"]] == [("all", "exact"), ("all", "both"), ("qv", "exact"), ("qv", "both"), ("full", "exact")]
    assert result["left_out"] == [] and all([step for step, _ in r["val"]] == [0, 2, 4] for r in result["runs"])
    start = [r["val"][0][1] for r in result["runs"]]  # adapters begin with nothing, so all of them are the base, but for rounding
    assert max(start) - min(start) < 0.01
    kept = {(r["adapters"], r["mode"]): (round(r["units_per_layer"]), round(r["units_per_layer_r2"])) for r in result["runs"]}
    assert kept["qv", "both"][0] < kept["all", "both"][0] < kept["full", "exact"][0] == kept["all", "exact"][0] and kept["all", "exact"][1] == 10
    table = (tmp_path / "results/finetune_gpt2.md").read_text()
    assert table.count("\n| ") == 5 and "Left out" not in table and "python3 dev/bench/finetune.py gpt2" in table

    # what is complete is not run again, in no time too; what was cut off is, if there is time
    assert script("dev/bench/finetune.py", *arguments, "--minutes", 1e-9, cwd=tmp_path).count("from before") == 6
    log = tmp_path / "out/gpt2/qv-both-seed1.jsonl"
    log.write_text("".join(log.read_text().splitlines(True)[:-1]))
    assert script("dev/bench/finetune.py", *arguments, "--minutes", 1e-9, cwd=tmp_path).count("from before") == 5
    assert "Left out for want of time: LoRA on q, v, USE_APPROXBP=1, seed 1\n" in (tmp_path / "results/finetune_gpt2.md").read_text()
    assert json.loads((tmp_path / "results/finetune_gpt2.json").read_text())["left_out"] == [["qv", "both", 1]]
    assert script("dev/bench/finetune.py", *arguments, cwd=tmp_path).count("from before") == 5
    assert common.read_log(log)[-1]["done"]
    for wrong, said in ((["gpt2", "--task", "instructions"], "--task instructions"), (["gpt2", "--sets", "dora"], "--sets dora"),
                        (["smollm2", "--modes", "fast"], "--modes fast")):
        assert said in script("dev/bench/finetune.py", *wrong, status=2, cwd=tmp_path)

def test_finetune_counts_answers(tmp_path):
    model = tiny_llama(tmp_path)
    arguments = ["smollm2", "--model", model, "--seeds", 1, "--steps", 2, "--modes", "exact,norm", "--sets", "all,fa", "--rank", 2, "--answers", 12,
                 "--out", "out", *programs("train_llama", "exact", "norm")]
    script("dev/bench/finetune.py", *arguments, "--task", "instructions", cwd=tmp_path)
    runs = json.loads((tmp_path / "out/finetune_smollm2_instructions.json").read_text())["runs"]
    answers = runs[0]["right"][0][2]  # in whole batches
    assert len(runs) == 4 and 4 < answers <= 12 and all([(s, n) for s, _, n in r["right"]] == [(step, answers) for step in (0, 1, 2)] for r in runs)
    table = (tmp_path / "out/finetune_smollm2_instructions.md").read_text()
    assert "| right, at first | at last |" in table and "| 0.0 % | " in table
    (tmp_path / "text.txt").write_bytes(bytes(words(9000)))
    script("dev/bench/finetune.py", *arguments, "--text", "text.txt", cwd=tmp_path)
    assert "right" not in (tmp_path / "out/finetune_smollm2_shakespeare.md").read_text()

def test_finetune_tables(tmp_path):
    runs = [{**run, "adapters": which, "units_per_layer_r2": 10.0, "right": [[0, 3, 60], [10, right, 60]]} for which, right in (("qv", 30), ("all", 45))
            for mode, finals in (("exact", (2.0, 2.1)), ("act", (2.3,))) for run in made_up(mode, *finals)]
    a = SimpleNamespace(seeds=2, steps=10, batch=2, seq_len=32, what="model", rank=8, lr="1e-3", full_lr="1e-4", modes=["exact", "act"])
    of = tuning.summary(runs)
    table = tuning.markdown(a, {"files": ["x"], "train_tokens": 9, "val_tokens": 1}, of, [["qv", "act", 2], ["fa", "exact", 1], ["fa", "exact", 2]], "command")
    assert "| LoRA on q, v | exact | 2.0000 | 2.1000 | 2.0500 | 0.1000 |  | 5.0 % | 50.0 % | 100 | 12.00 | 10.00 |" in table
    assert "| LoRA on all | APPROX_ACT=2 | 2.3000 |  | 2.3000 |  |  | 5.0 % | 75.0 % | 100 | 12.00 | 10.00 |" in table
    assert "Left out for want of time: LoRA on q, v, APPROX_ACT=2, seed 2; LoRA-FA on all, exact, seeds 1, 2\n" in table
    assert "LoRA on all, APPROX_ACT=2: no worse than exact by more than the spread over seeds: not known" in table
    library("matplotlib", "python3-matplotlib")
    assert tuning.plot(a, runs, str(tmp_path / "x.png")) and (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"

def test_demo_llama(tmp_path):
    """With instructions, and with a text: adapters that another program can load, and the memory that was announced."""
    tiny_llama(tmp_path)
    out = script("dev/bench/demo_llama.py", program("cpu-norm-bf16", "train_llama"), "--steps", 2, cwd=tmp_path)
    assert re.search(r"val loss \S+ at step 0, 0 of 64 answers right", out) and "(expected: " in out
    peak = int(re.search(r"device memory ([\d,]+) bytes at the peak", out)[1].replace(",", ""))
    assert f"{peak / 2**20:.1f} MiB; training all weights" in re.sub(" +", " ", out)
    adapter = tmp_path / "build/demo/llama/run/step_00000002"
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 16 and (adapter / "adapter_model.safetensors").exists()
    merge = re.search(r"^  (\S+ -e .* --merge \S+)", out, re.M)[1].split()
    assert execute(*merge, cwd=tmp_path).status == 0 and (tmp_path / merge[-1] / "config.json").exists()
    (tmp_path / "my text.txt").write_bytes(bytes(words(9000)))
    out = script("dev/bench/demo_llama.py", program("cpu-norm-bf16", "train_llama"), "--steps", 2, cwd=tmp_path, env={"DEMO_TEXT": "my text.txt"})
    assert "answers" not in out and "validation loss" in out and adapter.exists()

# ---- demo.py -------------------------------------------------------------------------------------

@pytest.mark.parametrize("typed, found", [("my text.txt", ["my text.txt"]), ("a.txt b.txt", ["a.txt", "b.txt"]),
                                          ("'my text.txt' a.txt", ["my text.txt", "a.txt"]), ("*.txt", ["a.txt", "b.txt", "my text.txt"]),
                                          ("it's $5 #1 [v2] \\ \"x\".txt", ["it's $5 #1 [v2] \\ \"x\".txt"]),
                                          ("it's.txt a.txt", ["it's.txt", "a.txt"]), ("gone.txt a.txt", ["gone.txt", "a.txt"])])
def test_demo_finds_texts(tmp_path, monkeypatch, typed, found):
    monkeypatch.chdir(tmp_path)
    for name in {"a.txt", "b.txt", "my text.txt", *(found if typed != "*.txt" else [])} - {"gone.txt"}:
        (tmp_path / name).write_text("text")
    assert demo.find_texts(typed) == found

def test_the_text_of_the_demo_is_fixed():
    """The README's figures are of this text, and its memory is that of today's programs."""
    (path,) = demo.find_texts("")
    with open(path, "rb") as f:
        text = f.read()
    model, batch, seq_len, *_ = demo.sizes(False, len(text) // 10)
    columns = []
    for variant in ("cpu-bf16", "cpu-approxbp-bf16"):
        rows = common.ledger(program(variant), ["-e", model, "-b", batch, "-t", seq_len])
        kept, units = common.kept(rows)
        columns.append([f"{sum(row['bytes'] for row in rows):,}", f"{kept:,}", f"{units:.2f}"])
    shown = re.search(r"^device memory, peak bytes +(\S+) +(\S+)\n.*backward +(\S+) +(\S+)\n.*C +(\S+) +(\S+)$",
                      (ROOT / "README.md").read_text(), re.M)
    assert [list(shown.groups())[i::2] for i in (0, 1)] == columns, "take the table of make demo into README.md"
    assert hashlib.sha256(text).hexdigest() == "2443e759d5c264434fae34891cf12cd9116876bdac5a66d46e77bfbf8fea8f99"

SMALL_DEMO = ["-i", "build/demo/train.bin", "-j", "build/demo/val.bin", "-e", TRY,
              *"-b 2 -t 32 -l 2e-3 -u 2 -q 0.05 -c 0.1 -s 0 -o out".split()]

@pytest.fixture
def demo_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_bytes(bytes(words(20000)))
    (tmp_path / demo.DIR).mkdir(parents=True)
    demo.tokens(["t.txt"])
    return tmp_path

def test_the_demo_goes_on(demo_folder):
    """Its last hint is the same run with more steps: every option is there again, and the trainer has nothing to say against it."""
    first = [str(program("cpu-bf16")), *SMALL_DEMO, "-x", "4", "--log", "log.jsonl"]
    more = demo.go_on(first, 12)
    assert [x for x in more if x not in first] == ["12", "-y", "1"] and [x for x in first if x not in more] == ["4"]
    demo.train(first, every=25)
    done = execute(*more, cwd=demo_folder)
    assert done.status == 0 and (demo_folder / "out/step_00000012").exists(), done.err
    assert not re.search("other|differ|change", done.err, re.I), done.err
    assert [line["step"] for line in common.read_log("log.jsonl") if "train_loss" in line] == list(range(1, 13))

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_is_interrupted(demo_folder, number):
    """At once, without a traceback, and with the checkpoint of the step that it was at."""
    command = [str(program("cpu-bf16")), *SMALL_DEMO, "-x", "1000000", "-v", "0"]
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'dev/bench')!r}); import demo; demo.train({command!r}, every=1)"
    process = subprocess.Popen([sys.executable, "-B", "-c", code], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    for line in process.stdout:
        if re.match(r"step +\d+/", line):
            break
    process.send_signal(number)
    begin = time.time()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err and time.time() - begin < 20, err
    assert "Interrupted" in out and list((demo_folder / "out").glob("step_*"))

def test_the_demo_of_make_is_interrupted(tmp_path):
    """While it reads the text, too."""
    os.mkfifo(tmp_path / "text")
    process = subprocess.Popen([sys.executable, "-B", ROOT / "dev/bench/demo.py", "exact", "approxbp", "text"], cwd=tmp_path,
                               env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() and process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in err, err

def test_demo_table():
    def log(last, peak):
        return [{"step": 0, "val_loss": 5.556}, {"step": 1, "train_loss": 5.5}, {"step": 9, "val_loss": last},
                {"done": True, "peak_bytes": peak}]
    lines = demo.result_table((log(2.5, 48123456), (12000000, 12.125)), (log(2.25, 46000000), (9000000, 10.56)))
    assert [line.split()[-2:] for line in lines[1:3] + lines[4:]] == [
        ["5.556", "5.556"], ["2.500", "2.250"], ["48,123,456", "46,000,000"], ["12,000,000", "9,000,000"], ["12.12", "10.56"]]
    assert lines[0].split() == ["exact", "USE_APPROXBP=1"] and lines[3].split() == ["of", "the", "first", "45", "%", "40", "%"]
    assert len({len(line) for line in lines}) == 1
