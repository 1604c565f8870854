"""The command line: options and their aliases, what is refused and how, names of files, the log, --estimate, memory."""
import json
import os
import re
import resource
import socket
import subprocess

import pytest

from helpers import LONG, SMALL, Lab, environment, learned, names, options, program, says, write_tokens, words

@pytest.fixture(scope="module")
def base(shared_lab):
    return learned(shared_lab.train("--seed", 7))

# ---- options -------------------------------------------------------------------------------------

# a value for each alias: no default, and no two numbers of a kind that could be taken for each other
VALUES = {"-i": "other.bin", "-j": "other.bin", "-e": "gpt2:L1,H2,C32,T32,V257", "-o": "out", "-b": 1, "-t": 16, "-d": 32, "-x": 8, "-k": "wsd",
          "-l": 3e-3, "-u": 3, "-q": 0.5, "-c": 0.25, "-sl": 5, "-sg": 6, "-v": 4, "-m": 2, "-s": 7, "-g": 9, "-a": 1, "-f": 0, "-w": 0, "-ge": 2,
          "-z": 0, "-r": 2, "-n": 3, "-nk": 1, "-y": 0}

def test_aliases(tmp_path):
    """A run of all aliases is the run of all long options; gone on with from its checkpoint, no setting has changed."""
    assert set(VALUES) == set(LONG)
    seen = []
    for name in (str, LONG.get, None):
        folder = tmp_path / f"lab{len(seen)}"
        folder.mkdir()
        lab = Lab(folder)
        write_tokens(folder / "other.bin", words(3000, seed=5))
        result = lab.train(*[x for alias, value in VALUES.items() for x in (name(alias), value)] if name else ["-o", "out"])
        text = [line for line in result.out.splitlines() if not re.search(r"\bms\b|\bfree\b", line)]  # no clock, nor what others use
        seen.append((learned(result), lab.files("out"), text))
        if name == LONG.get:
            again = lab.train(*[x for alias, value in VALUES.items() for x in (alias, {"-x": 9, "-y": 1}.get(alias, value))])
            assert re.findall(r"^note: (.*)", again.out, re.M) == ["--steps was 8, is 9"]
    assert seen[0] == seen[1]
    assert all(a != b for a, b in zip(seen[0], seen[2]))
    assert [(line["step"], "val_loss" in line) for line in seen[0][0][:-1]].count((4, True)) == 1 and sorted(seen[0][1]) == sorted(names(8))

def test_options_without_alias(shared_lab, base):
    assert all(learned(shared_lab.train(*given)) != base for given in (["--seed", 8], ["--seed", 7, "--grad-clip", 1e-9]))

def test_help(lab):
    for option in ("-h", "--help"):
        text = lab.run(option).out
        for name in [*LONG, *LONG.values(), *"--seed --loss-chunks --workspace --grad-clip --log --estimate --top-k --temperature --tokenizer "
                     "--save-dtype --dump-gradients --write-bin".split()]:
            assert re.search(rf"(?<![\w-]){name}\b", text), f"{option} does not mention {name}"

def test_hellaswag_switch(shared_lab, base):
    assert learned(shared_lab.train("--seed", 7, "-h", "0")) == base
    says(shared_lab.run(*options(), "-h", "1", status=2).err, "-h 1")

# ---- what is refused -----------------------------------------------------------------------------

WRONG = {  # options: values that none of them takes
    "-b --batch -t -d --total-batch --loss-chunks --workspace": ["0", "-1", "many"],
    "-x --steps -u --warmup -v -m --val-batches -s -g -n --checkpoint-every -nk --top-k": ["-1", "x", "0.5"],
    "-l --lr -q --final-lr-fraction -c -sl --skip-loss-z -sg --grad-clip --temperature": ["-0.1", "nan", "x"],
    "-a --overfit -f --tf32 -w --master-weights -z --zero -y --resume": ["2", "-1", "on"],
    "-ge --gelu-fusion": ["3", "-1"], "-r --recompute": ["5", "-1"], "--optimizer": ["sgd", "adam"], "--offload": ["2", "on"],
    "-b": ["1.5", "2x", "", "99999999999999999999", "1e3", " 2", "2 ", "0x2"],
    "-l": ["inf", "1e999", "0x", " 1e-3", "0x1p-9", "1e", "infinity"],
    "--seed": ["x", "1.5"], "-k --schedule": ["cosinus"], "--save-dtype": ["f64", "fp32", "0"], "-o": ["-n"], "--log": ["--resume"],
    "-e --model": ["gpt2:d13", "gpt2:"] + [f"gpt2:{size},C32,T32,V257" for size in ("H2", "L0,H2", "L2,H3", "L2,L2,H2", "L-2,H2", "L99999999999,H2")] +
                  ["gpt2:L2,H2,C32,T32,V257,X1", "gpt2:L2,H2,C32,T32,Vx"],
    " ".join([*LONG, *LONG.values(), "--log", "--tokenizer", "--seed", "--top-k"]): [""]}
BAD = [("--bogus", "1"), ("-Q", "1"), ("--batches", "2"), ("nonsense",), ("-",), ("--",), ("-bb", "2"), ("-b",), ("--steps",), ("--log",),
       ("--estimate=xml",), ("--estimate=",), *[(name, value) for group, values in WRONG.items() for name in group.split() for value in values],
       *[(f"{name}=",) for name in (*LONG.values(), "--log", "--tokenizer", "--loss-chunks")],
       *[(f"{name}={value}",) for name, value in (("--recompute", 5), ("--schedule", "cosinus"), ("--model", "gpt2:L2,H3,C32,T32,V257"), ("--lr", "x"))]]

@pytest.mark.parametrize("arguments", BAD, ids=["_".join(a) for a in BAD])
def test_refused(shared_lab, arguments):
    """In one line, which quotes the option as it was typed."""
    name = arguments[0].split("=")[0]
    usual = options(name, None) if name in LONG or name in SMALL else options()
    message = shared_lab.run(*usual, *arguments, status=2).err.strip()
    assert "\n" not in message, f"expected one line, found {message}"
    says(message, name, *arguments[0].split("=")[1:])
    if len(arguments) > 1 and (name in LONG or name in LONG.values()):
        says(message, " ".join(" ".join(arguments).split()))

CONTRADICTIONS = [  # options, and what else the message must name
    ("-d", 100, [64]),       # not a multiple of batch times sequence
    ("-d", 32, [64]),        # less than one batch
    ("-t", 64, [32]),        # the model has 32 positions
    ("-y", 1, ["--out"]), ("-n", 2, ["--out"]), ("-nk", 2, ["--out"]),
    ("-u", 5, [4]),          # a warmup longer than the run
    ("--loss-chunks", 65, [64])]

@pytest.mark.parametrize("name, value, named", CONTRADICTIONS, ids=[f"{c[0]} {c[1]}" for c in CONTRADICTIONS])
def test_contradiction(shared_lab, name, value, named):
    for typed in {name, LONG.get(name, name)}:
        done = shared_lab.run(*options(name, None), typed, value, status=2)
        assert "\n" not in done.err.strip()
        says(done.err, f"{typed} {value}", *named)

def test_the_last_one_counts_and_is_said(shared_lab):
    done = shared_lab.run(*options("-x", 2), "--steps", "3")
    assert "step     3/3" in done.out
    says(done.err, "--steps", "more than once")

def test_a_warmup_longer_than_the_epoch(lab):
    write_tokens(lab.path("train.bin"), words(64 * 7 + 1))
    says(lab.run(*options("-x", None, "-u", 8), status=2).err, "-u 8", "7", "epoch")
    whole = lab.train("-x", None, "-u", 7).steps   # one epoch
    assert len(whole) == 7 and whole[-1]["lr"] == pytest.approx(1e-3)
    lab.train("-x", 0, "-u", 8)

@pytest.mark.parametrize("given", [["--help"], options("--estimate"), options(), options("-x", "1", "-s", "1"), options("-o", "out", "-y", "1", "-x", "2")],
                         ids=["help", "estimate", "training", "a sample", "nothing left to do"])
def test_output_that_does_not_arrive(lab, given):
    lab.train("-x", 2, "-o", "out")
    with open("/dev/full", "wb") as full:
        done = subprocess.run([program("cpu-bf16"), *given], cwd=lab.folder, env=environment(), stdin=subprocess.DEVNULL, stdout=full,
                              stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1 and b"could not write all of the output" in done.stderr

# ---- names of files ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["a*b.bin", "a?b.bin", "[ab].bin", "~.bin", "a\\b.bin", "with space.bin", "data [v1]/train.bin", "data [v1]/tr*.bin", "{a}$b'c\".bin"])
def test_any_name(lab, name):
    """A file of that name is that file, whatever else the name would match."""
    write_tokens(lab.path("ab.bin"), [1] * 300)
    for decoy in ("a.bin", "axb.bin", "a-long-b.bin"):
        lab.path(decoy).write_bytes(b"not tokens")
    lab.path("data [v1]").mkdir()
    lab.path(name.replace("tr*", "train")).write_bytes(lab.path("train.bin").read_bytes())
    assert learned(lab.train("-i", name)) == learned(lab.train())

def test_a_tokenizer_beside_a_pattern(lab):
    lab.path("d1").mkdir()
    for name in ("train.bin", "tokenizer.bin"):
        lab.path(name).rename(lab.path("d1") / name)
    assert "printed as ids" not in lab.train("-i", "d*/train.bin", "-x", 1, "-s", 1).out

def test_more_shards_than_files_can_be_open(lab):
    lab.path("many").mkdir()
    for i in range(300):
        write_tokens(lab.path(f"many/{i:04d}.bin"), words(65, seed=i))
    result = lab.train("-i", "many/*.bin", "-j", "many/*.bin", "-v", 2, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)))
    assert len(result.losses) == 4

@pytest.mark.parametrize("option", ["-i", "-j", "-e", "--tokenizer"])
@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
def test_what_is_no_file_is_not_waited_for(lab, option, kind):
    path = lab.path("it")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as s, pytest.MonkeyPatch.context() as there:
            there.chdir(lab.folder)  # an address has at most 107 bytes
            s.bind("it")
    done = lab.run(*options(option, "/dev/zero" if kind == "device" else "it", "-v", 1, "-s", 1), status=1, timeout=20)
    says(done.err, "/dev/zero is a device" if kind == "device" else "cannot open it" if kind == "socket" else
         "it/config.json" if kind == "folder" and option == "-e" else f"a {kind}")

def test_a_sequence_as_long_as_the_model(lab):
    result = lab.train("-t", None, "-x", 1)
    assert "x 32 tokens" in result.out
    assert estimate(lab, "-e", "gpt2:L1,H1,C8,T2048,V5")["total_bytes"] == estimate(lab, "-e", "gpt2:L1,H1,C8,T2048,V5", "-t", 1024)["total_bytes"]

@pytest.mark.parametrize("given", [[], ["-x", "0", "-v", "1"], ["-b", "64"]], ids=" ".join)
@pytest.mark.parametrize("tokenizer", [True, False])
def test_the_default_model_on_a_text_of_bytes(lab, given, tokenizer):
    """Said before anything slow, with the size that fits; -t 1024 is too long for this text, but that is not the mistake."""
    if not tokenizer:
        lab.path("tokenizer.bin").unlink()
    done = lab.run(*options("-e", None, "-t", None, *given), status=2, timeout=10)
    size = re.search(r"-e (gpt2:\S*V(\d+))", done.err)
    assert int(size[2]) == 257 if tokenizer else 100 < int(size[2]) < 257
    says(done.err, "50257", "-e d12")
    assert len(lab.train("-e", size[1], "-t", None).losses) == 4
    says(lab.run(*options("-e", "d12", "-t", None, "-b", 8), status=1).err, "train.bin", "of 1024", "-b or -t")  # it is meant

# ---- periods and the log -------------------------------------------------------------------------

def test_validation_steps(lab):
    """Each so many steps, before the first and after the last; 0 means never."""
    for every, steps, expected in ((2, 5, [0, 2, 4, 5]), (100, 3, [0, 3]), (10, 0, [0]), (0, 4, [])):
        result = lab.train("-v", every, "-s", every, "-x", steps, "-n", 0, "-o", f"out{steps}")
        assert [line["step"] for line in result.log if "val_loss" in line] == expected
        assert len(result.losses) == result.done["steps"] == steps and lab.files(f"out{steps}") == {}

def test_log(lab):
    result = lab.train("-v", 2, "-s", 2, "-q", 1)
    assert result.log[-1] is result.done and set(result.done) >= {"done", "steps", "peak_bytes", "estimate_bytes"}
    assert result.done["done"] is True and [line["step"] for line in result.steps] == [1, 2, 3, 4]
    for line in result.steps:
        assert set(line) >= {"step", "train_loss", "grad_norm", "lr", "ms", "tokens_per_s", "mfu"}
        assert 0 < line["train_loss"] < 20 and 0 < line["grad_norm"] and line["lr"] == pytest.approx(1e-3)
        assert line["ms"] > 0 and line["tokens_per_s"] == pytest.approx(64 / line["ms"] * 1000, rel=0.01)
    assert len(re.findall(r"^.*\bloss\b.*\bms\b.*$", result.out, re.M)) == 4, "a step is a line"

# ---- --estimate and memory -----------------------------------------------------------------------

KINDS = {"param", "grad", "optimizer", "saved", "scratch", "workspace"}

def estimate(lab, *given, **how):
    done = lab.run("--estimate=json", *given, **how)
    plan = json.loads(done.out)
    assert set(plan) >= {"total_bytes", "rows"}
    for row in plan["rows"]:
        assert set(row) >= {"name", "dtype", "shape", "bytes", "kind", "scope"}
        assert row["kind"] in KINDS and row["scope"] in ("layer", "model") and row["bytes"] >= 0
    assert len({row["name"] for row in plan["rows"]}) == len(plan["rows"])
    assert sum(row["bytes"] for row in plan["rows"]) == plan["total_bytes"]
    return plan

@pytest.fixture
def nothing(tmp_path):
    """A folder without any data."""
    lab = Lab(tmp_path)
    for name in ("train.bin", "val.bin", "tokenizer.bin"):
        lab.path(name).unlink()
    return lab

def test_estimate_of_124m(nothing):
    given = ["-e", "d12", "-b", 64, "-t", 1024]
    plan, out = estimate(nothing, *given), nothing.run("--estimate", *given).out   # what a layer keeps: see test_modes.py
    for row in plan["rows"]:
        assert re.search(rf"^\s*{re.escape(row['name'])}\b", out, re.M), f"no line for {row['name']} in\n{out}"
    says(out.lower(), "total", "free")
    assert list(nothing.folder.iterdir()) == []
    assert sum(row["bytes"] for row in plan["rows"] if row["kind"] == "param") == 2 * (124439808 + (50304 - 50257) * 768)
    assert row_of(plan, "logits")["bytes"] <= 2**30  # never the 6.6 GB of all rows
    assert not any(row["shape"][-2:] == [1024, 1024] for row in plan["rows"])

@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-fp32"])
@pytest.mark.parametrize("mode", [
    "-r 0", "-r 1", "-r 2", "-w 0", "-d 256", "--loss-chunks 1", "--loss-chunks 3", "--workspace 3", "-ge 1", "-ge 2", "-v 2 -s 2", "-b 1 -t 7", "-v 2 -m 3 -t 20"])
def test_estimate_is_the_truth(shared_lab, mode, variant):
    result = shared_lab.train(*mode.split(), variant=variant, env={"SIMT_REPORT": 1})
    peak, now = map(int, re.search(r"simt: peak (\d+) bytes, now (\d+) bytes", result.err).groups())
    plan = estimate(shared_lab, *options(*mode.split()), variant=variant)
    assert plan["total_bytes"] == result.done["estimate_bytes"] == result.done["peak_bytes"] == peak and now == 0

def row_of(plan, name):
    return next(row for row in plan["rows"] if row["name"] == name)

@pytest.mark.parametrize("given, rows", [
    ("-b 64 -t 1024", 9472), ("-b 8 -t 1024", 8192), ("-b 1 -t 7", 7), ("-b 3 -t 333", 999), ("-b 11 -t 1000", 5632),
    ("-b 3 -t 1000 -e gpt2:L1,H1,C8,T1024,V3000000", 256), ("-b 100 -t 1000 -e gpt2:L1,H1,C8,T1024,V50", 100000),
    ("-b 64 -t 1024 --loss-chunks 13", 5120), ("-b 64 -t 1024 --loss-chunks 25", 2622), ("-b 64 -t 1024 --loss-chunks 1", 65536),
    ("-b 3 -t 100 --loss-chunks 3", 100), ("-b 3 -t 171 --loss-chunks 2", 512), ("-b 1 -t 7 --loss-chunks 7", 1), ("-b 2 -t 5 --loss-chunks 6", 2)])
def test_chunks_of_logits(nothing, given, rows):
    """Whole tiles of 256 rows where that leaves as many chunks; below 1 GiB where nobody says how many."""
    plan = estimate(nothing, *["-e", "d12"] * ("-e" not in given), *given.split(), env={"SIMT_MEMORY": "900G"})
    assert row_of(plan, "logits")["shape"][0] == rows

def test_chunks_of_logits_where_memory_is_short(nothing):
    given = ["-e", "d12", "-b", 16, "-t", 1024]
    plenty = estimate(nothing, *given, env={"SIMT_MEMORY": "900G"})
    short = estimate(nothing, *given, env={"SIMT_MEMORY": plenty["total_bytes"]})   # which leaves no room for the libraries
    assert row_of(plenty, "logits")["shape"][0] == 8192 and row_of(short, "logits")["shape"][0] == 2560
    assert row_of(estimate(nothing, *given, "--loss-chunks", 2, env={"SIMT_MEMORY": plenty["total_bytes"]}), "logits")["shape"][0] == 8192

def test_workspace(nothing):
    """For 32 parts of the largest weight's gradient, up to 64 MiB, or as told."""
    def workspace(*given):
        return row_of(estimate(nothing, "-b", 1, "-t", 16, *given), "workspace")["bytes"]
    assert workspace("-e", "d12") == 64 << 20 and workspace("-e", "d12", "--workspace", 7) == 7 << 20
    assert workspace("-e", "gpt2:L1,H1,C32,T32,V257") == 32 * 4 * 32 * 384 and workspace("-e", "gpt2:L1,H1,C64,T32,V50") == 32 * 4 * 64 * 256

def memory_between(lab, fits, *given):
    """The environment of a device on which this batch fits well, and twice as much does not."""
    one, two = (estimate(lab, *given, "-b", batch)["total_bytes"] for batch in (fits, 2 * fits))
    return one, {"SIMT_MEMORY": (one + two) // 2}

@pytest.mark.parametrize("fits", [1, 8, 64])
@pytest.mark.parametrize("more", [[], ["-d", 128 * 1024]], ids=["", "accumulating"])
def test_batch_auto_of_124m(nothing, fits, more):
    given = ["-e", "d12", "-t", 1024, *more]
    need, memory = memory_between(nothing, fits, *given)
    assert estimate(nothing, *given, "-b", "auto", env=memory)["total_bytes"] == need

def test_batch_auto_trains(lab):
    need, memory = memory_between(lab, 64, *options("-b", None))
    result = lab.train("-b", "auto", "-x", 1, env=memory)
    assert result.done["peak_bytes"] == need and "64 sequences" in result.out
    says(lab.run(*options("-b", "auto"), status=1, env={"SIMT_MEMORY": 100000}).err, "-b auto")

def test_out_of_memory(shared_lab):
    given = options("-b", 16)
    plan = estimate(shared_lab, *given)
    done = shared_lab.run(*given, status=1, env={"SIMT_MEMORY": plan["total_bytes"] // 2})
    largest = sorted(plan["rows"], key=lambda row: -row["bytes"])
    assert largest[2]["bytes"] > largest[3]["bytes"], "this test wants three clear winners"
    says(done.err, "out of memory", "--batch", *[row["name"] for row in largest[:3]])
