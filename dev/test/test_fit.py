"""--fit: what fits into so much memory, by the table that --estimate prints; and sequences of up to 2^24 tokens."""
import json
import os
import re
import shlex
import time

import numpy as np
import pytest

from finetune import write_marked
from helpers import ROOT, execute, program, says, words, write_tokens

GIB, RESERVE = 2**30, 0.75 * 2**30
LLAMA, GPT2 = "llama3.1-8b", "gpt2-xl"
TRAINER = {LLAMA: "train_llama", GPT2: "train_gpt2"}
RECIPES = ["full, adamw", "full, adamw8", "full, adalomo", "LoRA", "QLoRA"]
SAVINGS = ["-r 1", "-r 2", "-r 4", "-r 4 --offload 1"]
PLAN = ["batch", "seq_len", "device_bytes", "host_bytes", "recompute_share", "beyond_trained", "command"]

def run(trainer, *arguments, variant="cpu-bf16", status=0, **how):
    done = execute(program(variant, trainer), *arguments, cwd=how.pop("cwd", ROOT), **how)
    assert done.status == status, done.out[-500:] + done.err[-1000:]
    return done

def fit(trainer, *arguments, **how):
    return json.loads(run(trainer, *arguments, **how).out)

def estimate(command, *more, **how):
    trainer, *arguments = shlex.split(command)
    return json.loads(run(trainer.removeprefix("./"), *arguments, *more, "--estimate=json", **how).out)

def row(table, recipe, saving):
    return next(r for r in table["recipes"] if r["recipe"] == recipe and r["options"].endswith(saving))

def auto(command):
    """Without the number of loss chunks that it names."""
    return re.sub(r" --loss-chunks \d+", "", command)

# ---- the table -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model, size, more", [(LLAMA, 24, []), (LLAMA, 80, ["-t", 4096, "--lora", 8]), (GPT2, 8, []), (GPT2, 24, ["-w", 0, "-t", 512])])
def test_each_plan_is_what_estimate_says_and_the_next_one_does_not_fit(model, size, more):
    table = fit(TRAINER[model], f"--fit={size}G,json", "-e", model, *more)
    assert table["size_bytes"] == size * GIB and table["reserve_bytes"] == RESERVE and table["model"] == model
    assert [r["recipe"] for r in table["recipes"]] == [name for name in RECIPES for _ in SAVINGS]
    room, seen = size * GIB - RESERVE, 0
    for found in table["recipes"]:
        for kind in ("largest_batch", "longest_sequence"):
            plan = found[kind]
            if plan is None:
                continue
            assert list(plan) == PLAN
            said = estimate(plan["command"])
            assert (said["total_bytes"], said["host_bytes"]) == (plan["device_bytes"], plan["host_bytes"]) and plan["device_bytes"] <= room
            assert plan["recompute_share"] == pytest.approx(said["recompute_share"], abs=1e-6)
            B, T = plan["batch"], plan["seq_len"]
            assert (T == table["seq_len"]) if kind == "largest_batch" else (B == 1 and T % 256 == 0)
            if kind == "longest_sequence" and model == GPT2:
                assert T <= 1024
            if T == 1024 and kind == "longest_sequence" and model == GPT2:
                continue  # it has no more positions
            larger = ["-b", B + 1] if kind == "largest_batch" else ["-t", T + 256]
            assert estimate(auto(plan["command"]), *larger)["total_bytes"] > room
            seen += 1
    assert seen >= 8

def test_what_does_not_fit_is_a_dash_and_null():
    table = fit("train_llama", "--fit", "24G,json", "-e", LLAMA)
    assert row(table, "full, adamw", "-r 1")["largest_batch"] is row(table, "full, adamw", "-r 1")["longest_sequence"] is None
    assert estimate("train_llama -e llama3.1-8b -r 1 -b 1 -t 256 --loss-chunks 1")["total_bytes"] > 24 * GIB - RESERVE
    text = run("train_llama", "--fit", "24G", "-e", LLAMA).out
    assert re.search(r"^full, adamw +-r 1 +- +-\s*$", text, re.M) and "24.00 GiB, less 0.75 in reserve for the driver and the libraries" in text

@pytest.mark.parametrize("model, size", [(LLAMA, 24), (GPT2, 16)])
def test_the_text_has_what_the_json_has(model, size):
    text, table = run(TRAINER[model], "--fit", f"{size}G", "-e", model).out, fit(TRAINER[model], f"--fit={size}G", "--fit=json", "-e", model)
    lines = [line.split() for line in re.findall(r"^(?:full|LoRA|QLoRA)\b.* -r .*$", text, re.M)]
    assert len(lines) == len(table["recipes"])
    for line, found in zip(lines, table["recipes"]):
        numbers = [x for x in line if re.fullmatch(r"\d+\*?|-", x)]  # the levels of -r and of --offload come first
        batch, longest = numbers[-2:]
        plans = found["largest_batch"], found["longest_sequence"]
        assert batch == (str(plans[0]["batch"]) if plans[0] else "-")
        assert longest == (str(plans[1]["seq_len"]) + "*" * plans[1]["beyond_trained"] if plans[1] else "-")
        assert all(f"  {plan['command']}\n" in text for plan in plans if plan)

def test_beyond_what_a_model_was_made_for():
    """Llama's positions go on, and are marked; GPT-2's end."""
    table = fit("train_llama", "--fit=80G,json", "-e", LLAMA)
    assert table["trained_for"] == 131072
    for found in table["recipes"]:
        plan = found["longest_sequence"]
        assert plan is None or plan["beyond_trained"] == (plan["seq_len"] > 131072)
    assert row(table, "QLoRA", "--offload 1")["longest_sequence"]["beyond_trained"]
    assert row(table, "full, adalomo", "--offload 1")["longest_sequence"]["command"].startswith(
        "./train_llama -e llama3.1-8b --optimizer adalomo -w 0 -r 4 --offload 1 -b 1 -t ")
    assert "* beyond the 131072 positions that the model was made for" in run("train_llama", "--fit=80G", "-e", LLAMA).out
    text = run("train_gpt2", "--fit=80G", "-e", "gpt2:L2,H2,C32,T1000,V257").out
    assert "no sequence is longer than 1000" in text and "-b 1 -t 1000 " in text and "*" not in text

def test_a_directory_and_the_options_beside(tmp_path):
    """A model of a directory, of which only headers are read; what else is asked for goes into plan and command."""
    execute(program("cpu-bf16", "train_llama"), "-e", "llama:L2,H4,K2,C64,F96,T64,V300", "-x", 0, "-v", 0, "-s", 0, "-o", tmp_path / "it's",
            cwd=tmp_path)
    folder = str(next((tmp_path / "it's").glob("step_*")))
    table = fit("train_llama", "--fit", "2G,json", "-e", folder, "--lora", 4, "--lora-targets", "q,v", "-w", 0)
    plan = row(table, "QLoRA", "-r 2")["longest_sequence"]
    assert shlex.split(plan["command"])[:3] == ["./train_llama", "-e", folder] and "--lora 4 --base nf4 -r 2" in plan["command"]
    assert "--lora-targets q,v" in plan["command"] and "--lora" not in row(table, "full, adamw", "-r 2")["longest_sequence"]["command"]
    assert all("-w 0" in r["longest_sequence"]["command"] for r in table["recipes"])
    assert estimate(plan["command"])["total_bytes"] == plan["device_bytes"] <= 2 * GIB - RESERVE

def test_options_that_are_not_for_every_recipe(tmp_path):
    """GELU in a matmul's epilogue is nothing for adapters; llm.c's -h 0 is nothing at all; a number of chunks wants so many rows."""
    table = fit("train_gpt2", "--fit=8G,json", "-e", "d12", "-ge", 1, "-h", 0)
    commands = {recipe: row(table, recipe, "-r 1")["largest_batch"]["command"] for recipe in ("full, adamw8", "LoRA")}
    assert "-ge 1" in commands["full, adamw8"] and "-ge" not in commands["LoRA"]
    for command in commands.values():
        estimate(command)
    says(run("train_gpt2", "--fit=8G", "-e", "d12", "--write-bin", tmp_path / "m.bin", status=2).err, "--write-bin: not with --fit")
    few, many = (row(fit("train_llama", "--fit=6G,json", "-e", "llama3.2-1b", "--row-chunks", n), "QLoRA", "-r 4")["largest_batch"] for n in (3000, 20000))
    assert few["batch"] > 0 and many["batch"] * 1024 >= 20000

def test_more_than_the_host_can_pin(tmp_path):
    """Plans for this machine stay within its memory; a run that does not is refused before it asks for it."""
    here, there = (fit("train_llama", *how, "-e", LLAMA, env={"SIMT_MEMORY": 4000 * GIB}) for how in (["--fit=json"], ["--fit=4000G,json"]))
    most = lambda table: max(plan["host_bytes"] for r in table["recipes"] for plan in (r["largest_batch"], r["longest_sequence"]))
    assert most(here) < 0.9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < most(there)
    assert "this machine can pin" in run("train_llama", "--fit=4000G", "-e", LLAMA).out
    write_tokens(tmp_path / "t.bin", np.zeros(2**20 + 1, int))
    done = run("train_llama", *"-e llama:L64,H64,C8192,F64,V257 -i t.bin -r 4 --offload 1 -b 1 -t 1048576 -x 1 -v 0 -s 0".split(), status=1,
               env={"SIMT_MEMORY": 4000 * GIB}, cwd=tmp_path)   # a MiB a token
    says(done.err, "out of memory", "pins", "--offload 0")

def test_what_is_free_on_the_device():
    table = fit("train_gpt2", "--fit=json", "-e", "d12", env={"SIMT_MEMORY": 4 * GIB})
    assert table["size_bytes"] <= 4 * GIB and table["reserve_bytes"] == table["size_bytes"] // 32
    plan = row(table, "LoRA", "-r 2")["largest_batch"]
    assert plan["device_bytes"] <= table["size_bytes"] - table["reserve_bytes"]
    assert fit("train_gpt2", "--fit=", "--fit", "json", "-e", "d12", env={"SIMT_MEMORY": 4 * GIB}) == table

def test_shared_norms_have_a_table_of_their_own():
    norm, exact = (fit("train_llama", "--fit=24G,json", "-e", LLAMA, variant=v) for v in ("cpu-norm-bf16", "cpu-bf16"))
    assert (norm["ms_norm"], exact["ms_norm"]) == (1, 0)
    at = [row(t, "QLoRA", "-r 1")["longest_sequence"]["seq_len"] for t in (norm, exact)]
    assert at[0] > at[1]
    assert "MS_NORM=1" in run("train_llama", "--fit=24G", "-e", LLAMA).out
    assert "MS_NORM=1" not in run("train_llama", "--fit=24G", "-e", LLAMA, variant="cpu-norm-bf16").out

@pytest.mark.parametrize("model", [LLAMA, "llama3.1-70b", GPT2])
def test_it_takes_a_moment(model):
    begin = time.monotonic()
    run(TRAINER.get(model, "train_llama"), "--fit", "80G", "-e", model)
    assert time.monotonic() - begin < 5

EXPECTED = "expected one size in GiB (2^30 bytes), more than the 0.75 that driver and libraries may take, such as 24G; json; or both as 24G,json"

@pytest.mark.parametrize("trainer", ["train_gpt2", "train_llama"])
@pytest.mark.parametrize("given, message", [
    *[(["--fit", size], [f"--fit {size}: {EXPECTED}"]) for size in ("8", "8GB", "0G", "x", "G", "0.5G", "1e3G", "1.2.3G", "9999999G")],
    (["--fit=8G,16G"], ["--fit 16G: expected one size"]), (["--fit=-8G"], ["--fit -8G: expected one size"]),
    (["--fit", "8G", "-r", 4], ["-r: not with --fit", "leave one of them out"]),
    (["--fit", "8G", "--base", "nf4"], ["--base: not with --fit"]),
    (["--fit", "8G", "--optimizer", "adamw8"], ["--optimizer: not with --fit"]),
    (["--fit", "8G", "--estimate"], ["--estimate: not with --fit"]),
    (["--fit", "8G", "-d", 65536], ["-d: not with --fit", "one micro-batch a step"]),
    *[(["--fit", "8G", option, value], [f"{option}: not with --fit"]) for option, value in   # adalomo would refuse the command
      (("--grad-clip", 1), ("--skip-loss-z", 3), ("--skip-grad-z", 3), ("--zero", 1), ("--dump-gradients", "g.safetensors"))],
    (["-x", 0, "--fit"], ["-x 0: --fit is about training"])])
def test_errors(trainer, given, message):
    says(run(trainer, *given, status=2).err, *message)

# ---- length --------------------------------------------------------------------------------------------------------------

QLORA = "-e llama3.1-8b --base nf4 --lora 32 -b 1 -r 4 --offload 1"

def test_the_longest_context_of_each_card():
    """The slope is what one layer needs of all its tokens; nothing else grows with them. And all of an 8B model is trained on 24 GiB."""
    assert estimate("train_llama -e llama3.1-8b --optimizer adalomo -w 0 -b 1 -t 32768 -r 4 --offload 1")["total_bytes"] < 24 * GIB - RESERVE
    def total(model, T):
        return estimate(f"train_llama {QLORA.replace('llama3.1-8b', model)} -t {T}")["total_bytes"]
    assert (total("llama3.1-8b", 131072) - total("llama3.1-8b", 65536)) / 65536 <= 57344
    for model, cards in (("llama3.1-8b", {8: 25000, 12: 100000, 16: 180000, 24: 330000, 40: 620000, 48: 770000, 80: 1300000}),
                         ("llama3.1-70b", {48: 60000, 80: 350000})):
        for size, T in cards.items():
            assert total(model, T) <= size * GIB - RESERVE, (model, size)

@pytest.mark.parametrize("command", [f"train_llama {QLORA}", "train_gpt2 -e gpt2:L2,H2,C64,T16777216,V257 -b 1"])
def test_the_longest_sequence(command):
    T = 2**24
    at, half = (estimate(f"{command} -t {t}") for t in (T, T // 2))
    assert at["rows"][-1]["bytes"] == half["rows"][-1]["bytes"] and 1.5 < at["total_bytes"] / half["total_bytes"] <= 2
    stream = next(r for r in at["rows"] if r["name"] == "dresid")
    assert stream["shape"][1] == T and stream["bytes"] == 2 * T * stream["shape"][2] > 2**30
    trainer, *arguments = command.split()
    says(run(trainer, *arguments, "-t", T + 1, "--estimate", status=2).err, f"-t {T + 1}: expected a whole number from 1 to {T}")
    says(run(trainer, *arguments, "-b", 64, "-t", T, "--estimate", status=2).err, "expected fewer than 2^30")

def test_longer_than_the_model():
    assert "-t 2048: the model was made for 1024 positions" in run("train_llama", "-e", "llama:L2,H2,C32,V257", "-t", 2048, "--estimate").err
    says(run("train_gpt2", "-e", "d12", "-t", 2048, "--estimate", status=2).err, "-t 2048: the model's longest sequence is 1024")

@pytest.mark.parametrize("size, document, more", [("C16,H1,D8,F32", 16384, []), ("C64,H2,K1,D16,F128", 100, ["--base", "nf4", "--lora", 4])], ids=["whole", "nf4"])
def test_a_step_of_16384_tokens(tmp_path, size, document, more):
    """As one text, of which attention takes most of a minute here, and in documents of a hundred."""
    ids = words(16385, 257)
    write_marked(tmp_path / "train.bin", ids, range(0, len(ids), document))
    command = ["-e", f"llama:L2,{size},V257", "-i", "train.bin", "-b", 1, "-t", 16384, "-r", 4, "--offload", 1, "--row-chunks", 4,
               "-x", 1, "-v", 0, "-s", 0, *more]
    done = run("train_llama", *command, cwd=tmp_path)
    device, announced, host, pinned = map(int, re.search(r"device memory: (\d+) bytes at the peak, (\d+) announced; of the host, pinned: (\d+), (\d+)",
                                                         done.out).groups())
    said = json.loads(run("train_llama", *command, "--estimate=json", cwd=tmp_path).out)
    assert device == announced == said["total_bytes"] and host == pinned == said["host_bytes"]
    assert 5 < float(re.search(r"loss (\d+\.\d+)", done.out)[1]) < 6
