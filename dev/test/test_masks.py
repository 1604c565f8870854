"""Token files with marks: what has a loss, where documents begin, and that each document is trained on as if it stood alone."""
import random
import shutil
import struct

import numpy as np
import pytest

from finetune import PLAIN, adapters, arrays, batch, check_gradients, distance, hf_names, model, reference, settled, trainer_of, write_adapter, write_base, write_marked
from helpers import Lab, close, execute, learned, mpirun, options, program, read_log, says, write_tokens

V = 131
LLAMA, GPT2 = "llama:L2,H4,K2,C40,F56,T200,V131,HS{}", "gpt2:L2,H2,C48,T200,V131"

def ids_of(n, seed=1):
    return [int(V * x**2) for x in np.random.RandomState(seed).rand(n)]

def documents(n, seed, longest):
    """Where documents begin among n tokens: of one token and of many, and now and then where a tile of 16 or 64 rows does."""
    rng, at, found = random.Random(seed), 0, []
    while at < n:
        found.append(at)
        at += rng.choice([1, 1, 2, rng.randint(3, longest), 16, 64])
    return found

def some(n, seed, share=0.4):
    rng = random.Random(seed)
    return [i for i in range(n) if rng.random() < share]

@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """make(sizes): a lab with that model in folder in, and an adapter."""
    labs = {}

    def make(sizes, dtype="F32", **how):
        if (sizes, dtype) not in labs:
            lab = labs[sizes, dtype] = Lab(tmp_path_factory.mktemp("masks"))
            lab.config, lab.tensors = model(sizes, 4, **how)
            lab.how = {"trainer": trainer_of(lab.config)}
            write_base(lab.path("in"), lab.config, lab.tensors, dtype)
            lab.given = adapters(lab.config, {"q_proj": 3, "up_proj": 5, "attn.c_attn": 3, "mlp.c_proj": 5}, seed=4)
            write_adapter(lab.path("adapter"), lab.given)
        return labs[sizes, dtype]
    return make

def gradients(lab, *given, file="batch.bin", variant="cpu-fp32", **how):
    """{name: array} of --dump-gradients: loss, and of everything that is trained."""
    lab.run(*options("-e", "in", "-i", file, "-x", 0, "-f", 0, "--dump-gradients", "g.safetensors", *given), variant=variant, **{**lab.how, **how})
    return arrays(lab.path("g.safetensors"))

# ---- against the reference -----------------------------------------------------------------------------------

def expected(lab, ids, B, T, begins, untrained, bits=0, tune=False):
    ref = reference()
    x, y, starts, trained = batch(ids, B, T, begins, untrained)
    _, loss, found, _, _ = ref.compute(lab.config, lab.tensors, x, y, 0, beta2=0.95, begins=starts, trained=trained, tune=ref.Tuning(lab.given) if tune else None)
    return loss, found if tune else hf_names(lab.config, found)

CASES = [(LLAMA.format(8), 3, 37), (LLAMA.format(24), 2, 70), (LLAMA.format(64), 1, 130), (GPT2, 3, 37), (GPT2, 1, 140), ("llama:L1,H2,K1,C32,F40,T90,V131,HS128", 2, 80)]

@pytest.mark.parametrize("tune", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("sizes, B, T", CASES)
def test_against_the_reference(bench, sizes, B, T, tune):
    """Loss over what is trained, attention and positions within documents; rows begin in the middle of one."""
    lab, ids = bench(sizes), ids_of(B * T + 1)
    begins, untrained = documents(len(ids), 2, 50)[1:], some(len(ids), 3)
    write_marked(lab.path("batch.bin"), ids, begins, untrained)
    for r in (0, 2) if tune else (1,):
        found = gradients(lab, "-b", B, "-t", T, "-r", r, "--loss-chunks", r + 1, *(["--adapter", "adapter"] if tune else []))
        check_gradients(found, *expected(lab, ids, B, T, begins, untrained, tune=tune), 2e-6, 1e-5)

@pytest.mark.parametrize("sizes, variant", [("llama:L2,H2,K1,C64,F72,T200,V131,HS64", "cpu-bf16"), ("gpt2:L2,H2,C128,T200,V131", "cpu-bf16"),
                                            ("llama:L2,H2,K1,C64,F72,T200,V131,HS64", "cpu-norm-bf16")])
def test_tensor_cores(bench, sizes, variant):
    """Heads of 64 in bf16, which tiles of tensor cores do, within rounding."""
    lab, T = bench(sizes), 150
    ids = ids_of(2 * T + 1)
    begins, untrained = documents(len(ids), 5, 90)[1:], some(len(ids), 6)
    write_marked(lab.path("batch.bin"), ids, begins, untrained)
    check_gradients(gradients(lab, "-b", 2, "-t", T, variant=variant), *expected(lab, ids, 2, T, begins, untrained), 2e-3, 5e-2)

def test_no_marks_are_no_documents(bench):
    """A file of version 8 without a mark is the file of the same ids in 16 bits, to the bit."""
    for sizes in (LLAMA.format(8), GPT2):
        lab, ids = bench(sizes), ids_of(2 * 40 + 1)
        write_marked(lab.path("marked.bin"), ids)
        write_tokens(lab.path("plain.bin"), ids)
        one, other = (gradients(lab, "-b", 2, "-t", 40, file=file) for file in ("marked.bin", "plain.bin"))
        assert one.keys() == other.keys() and all((one[name] == t).all() for name, t in other.items())

def test_the_reference_on_documents(bench):
    """A row of documents is, in the reference, the sum of them, each computed alone."""
    ref = reference()
    for sizes in (LLAMA.format(8), GPT2):
        config, tensors = bench(sizes).config, bench(sizes).tensors
        ids, marks, total, count = ids_of(41, 3), [0, 7, 8, 30, 41], {}, 0
        x, y, starts, trained = batch(ids, 1, 40, marks[:-1])
        _, loss, whole, _, _ = ref.compute(config, tensors, x, y, 0, begins=starts, trained=trained)
        for begin, end in zip(marks, marks[1:]):
            if end - begin > 1:
                _, one, found, _, _ = ref.compute(config, tensors, *batch(ids[begin:end], 1, end - begin - 1)[:2], 0)
                for name, t in {"loss": one, **found}.items():
                    total[name] = total.get(name, 0) + t * (end - begin - 1)
                count += end - begin - 1
        assert count == trained.sum() == 37 and close(total.pop("loss") / count, loss, 1e-12)
        assert all(distance(whole[name], t / count) < 1e-12 for name, t in total.items())

# ---- documents that stand alone ----------------------------------------------------------------------------------

def alone(lab, ids, begin, end, T, *given, others=None, **how):
    """Loss and gradients of a row in which one document alone has a loss; other tokens in the other documents, if asked for."""
    ids, marks = list(ids), sorted({0, begin, end} | {b for b in documents(T, begin, 30) if b < begin or b > end})
    if others is not None:
        rng = random.Random(others)
        ids = [id if begin <= i < end else rng.randrange(V) for i, id in enumerate(ids)]
    write_marked(lab.path("row.bin"), ids[:T + 1], [m for m in marks if m <= T], [i for i in range(T + 1) if not begin <= i < end])
    return gradients(lab, "-b", 1, "-t", T, *given, file="row.bin", **how)

def same(one, two):
    """To the bit, but for the embedding's gradient: its sums take places of a token together, whatever document they are in."""
    for name, t in one.items():
        inputs = name in ("transformer.wte.weight", "model.embed_tokens.weight")
        assert distance(two[name], t) < 1e-6 if inputs else (two[name] == t).all(), name

PLACES = [(0, 17), (15, 48), (16, 80), (63, 66), (61, 130), (64, 129), (128, 150)]   # in rows of 150: across and within tiles of 16 and 64

@pytest.mark.parametrize("sizes", [LLAMA.format(HS) for HS in (8, 16, 24, 32, 40, 48, 64)] + [GPT2, "gpt2:L1,H1,C64,T200,V131", "gpt2:L1,H2,C16,T200,V131"])
def test_what_stands_beside_changes_nothing(bench, sizes):
    """A document's loss and gradients are to the bit those beside any other documents, and close to those of the document alone."""
    lab, T = bench(sizes), 150
    ids = ids_of(T + 1, 7)
    for begin, end in PLACES if sizes in (LLAMA.format(24), GPT2) else random.Random(sizes).sample(PLACES, 2):
        one, two = (alone(lab, ids, begin, end, T, others=others) for others in (None, 1))
        same(one, two)
        write_marked(lab.path("alone.bin"), ids[begin:end])
        own = gradients(lab, "-b", 1, "-t", end - begin - 1, file="alone.bin")
        assert close(float(one["loss"]), float(own["loss"]), 2e-6)
        assert all(distance(one[name], t) < 5e-6 for name, t in own.items()), (begin, end)

@pytest.mark.parametrize("sizes, variant", [("llama:L2,H2,K1,C64,F72,T200,V131,HS64", "cpu-bf16"), ("gpt2:L2,H2,C128,T200,V131", "cpu-bf16"),
                                            (LLAMA.format(24), "cpu-approxbp-fp32")])
def test_what_stands_beside_changes_nothing_in_other_builds(bench, sizes, variant):
    lab, T = bench(sizes), 150
    ids = ids_of(T + 1, 7)
    for begin, end in PLACES[1:5:3]:
        one, two = (alone(lab, ids, begin, end, T, others=others, variant=variant) for others in (None, 1))
        same(one, two)
        write_marked(lab.path("alone.bin"), ids[begin:end])
        own = gradients(lab, "-b", 1, "-t", end - begin - 1, file="alone.bin", variant=variant)
        near = 5e-6 if "fp32" in variant else 4e-2
        assert close(float(one["loss"]), float(own["loss"]), near) and all(distance(one[name], t) < near for name, t in own.items())

def test_a_row_is_the_sum_of_its_documents(bench):
    """By their trained targets; one of a single token has none."""
    for sizes in (LLAMA.format(8), GPT2):
        lab, T = bench(sizes), 60
        ids, marks = ids_of(T + 1, 9), [0, 7, 8, 30, 31, 32, 49, T + 1]
        write_marked(lab.path("row.bin"), ids, marks[:-1])
        whole, total, count = gradients(lab, "-b", 1, "-t", T, file="row.bin"), {}, 0
        for begin, end in zip(marks, marks[1:]):
            if end - begin > 1:
                write_marked(lab.path("alone.bin"), ids[begin:end])
                for name, t in gradients(lab, "-b", 1, "-t", end - begin - 1, file="alone.bin").items():
                    total[name] = total.get(name, 0) + t * (end - begin - 1)
                count += end - begin - 1
        assert count == T + 1 - 7
        assert all(distance(whole[name], t / count) < 5e-6 for name, t in total.items())

# ---- steps ---------------------------------------------------------------------------------------------------------

def uneven(lab, rows, T, name="uneven.bin", seed=11):
    """Rows with 0, 1, few and many trained targets."""
    n = rows * T + 1
    rng = random.Random(seed)
    untrained = [i for i in range(n) if rng.random() < [1, 0.9, 0.2, 0.6][(i - 1) // T % 4]]
    write_marked(lab.path(name), ids_of(n, seed), documents(n, seed, 20)[1:], untrained)

def weights(lab, folder):
    path = next(lab.path(folder).rglob("*model.safetensors"))
    return arrays(path)

@pytest.mark.parametrize("given", [[], ["--adapter", "adapter"]], ids=["full", "lora"])
@pytest.mark.parametrize("sizes", [LLAMA.format(8), GPT2])
def test_accumulation_and_ranks_are_one_batch(bench, sizes, given):
    """A step divides by the trained targets of all its micro-batches and ranks, however they are spread."""
    lab, T, found = bench(sizes), 24, []
    uneven(lab, 8, T)
    for name, launch, rows in (("one", [], 4), ("rows", [], 1), ("ranks", mpirun(2), 2), ("both", mpirun(2), 1)):
        shutil.rmtree(lab.path(name), ignore_errors=True)
        arguments = options("-e", "in", "-i", "uneven.bin", "-b", rows, "-t", T, "-d", 4 * T, "-x", 2, "-o", name, "--log", f"{name}.jsonl", "-f", 0, "-l", 1e-3, *given)
        done = execute(*launch, program("cpu-multi-fp32", lab.how["trainer"]), *arguments, cwd=lab.folder, env={"OMP_NUM_THREADS": 1})
        assert done.status == 0, done.err[-2000:]
        steps = [line for line in read_log(lab.path(f"{name}.jsonl")) if "train_loss" in line]
        found.append(([x for line in steps for x in (line["train_loss"], line["grad_norm"])], settled(weights(lab, name))))
    for numbers, after in found[1:]:
        assert close(numbers, found[0][0], 1e-5)
        assert all(np.abs(after[name] - t).max() < 5e-5 for name, t in found[0][1].items())   # AdamW's first steps are of 1e-3, whatever the gradient

def test_a_step_without_anything_to_train(bench):
    """It is counted, said and left out: weights and moments stay, and the next step is what it would have been without it."""
    for sizes in (LLAMA.format(8), GPT2):
        lab, T = bench(sizes), 24
        row, runs = ids_of(T), []   # again and again, so that their order, which the seed decides, is none
        write_marked(lab.path("with.bin"), row * 3 + row[:1], untrained=range(T + 1, 2 * T + 1))
        write_marked(lab.path("without.bin"), row * 2 + row[:1])
        for name, steps in (("with", 3), ("without", 2)):
            shutil.rmtree(lab.path(name), ignore_errors=True)
            runs.append(lab.train("-e", "in", "-i", f"{name}.bin", "-b", 1, "-t", T, "-x", steps, "-n", 1, "-k", "constant", "-o", name, variant="cpu-fp32", **lab.how))
        k = next(i for i, x in enumerate(runs[0].losses) if x is None)
        losses = [x for x in runs[0].losses if x is not None]
        assert losses == runs[1].losses and len(losses) == 2
        for step, other in enumerate([0, *(i for i in (1, 2, 3) if i != k + 1)]):
            if step:
                one, two = weights(lab, f"with/step_{other:08d}"), weights(lab, f"without/step_{step:08d}")
                assert all((two[name] == t).all() for name, t in one.items()), step
        says(runs[0].out, f"step {k + 1}/3 | skipped: none of its tokens has a loss (1 such")

def test_nothing_to_train_at_all(bench):
    """Pads as targets, or a mask that is wrong: the run ends, and never has a loss of 0."""
    lab = bench(LLAMA.format(8))
    n = 8 * 24 + 1
    write_marked(lab.path("silent.bin"), ids_of(n), untrained=range(n))
    shutil.rmtree(lab.path("out"), ignore_errors=True)
    ran = lab.train("-e", "in", "-i", "silent.bin", "-b", 2, "-t", 24, "-x", 12, "-o", "out", status=3, **lab.how)
    says(ran.err, "has a loss")
    assert set(ran.losses) == {None} and "loss 0.0" not in ran.out
    says(lab.train("-e", "in", "-j", "silent.bin", "-b", 2, "-t", 24, "-x", 1, "-v", 1, status=1, **lab.how).err, "silent.bin", "nothing to validate")

@pytest.mark.parametrize("steps", [1, 5])
def test_nothing_to_train_in_a_short_run(bench, steps):
    """Is a failure as well, and writes no adapter that has learnt nothing; nor is a loss of 0 dumped, or compared in a merge."""
    lab = bench(LLAMA.format(8))
    write_marked(lab.path("silent.bin"), ids_of(8 * 24 + 1), untrained=range(8 * 24 + 1))
    for name in ("out", "merged"):
        shutil.rmtree(lab.path(name), ignore_errors=True)
    how = ["-e", "in", "--lora", 3, "-i", "silent.bin", "-b", 1, "-t", 24, "-x", steps]
    ran = lab.train(*how, "-o", "out", status=3, **lab.how)
    says(ran.err, f"none of the tokens of {steps} steps in a row")
    assert not list(lab.path("out").glob("step_*")) and "steps after the first" not in ran.out
    says(lab.run(*options(*how, "--dump-gradients", "g0.safetensors"), status=1, **lab.how).err, "--dump-gradients g0.safetensors", "has a loss")
    done = lab.run("-e", "in", "--adapter", "adapter", "--merge", "merged", "-j", "silent.bin", "-b", 1, "-t", 24, status=1, **lab.how)
    says(done.err, "silent.bin", "has a loss")
    assert "loss of a batch" not in done.out and not lab.path("g0.safetensors").exists() and not lab.path("merged").exists()

def test_rows_of_another_length(bench):
    """Data packed into rows of 24 and read in sequences of 16: said, with how many begin within a document. Not where they fit."""
    lab = bench(LLAMA.format(8))
    n = 8 * 24 + 1
    write_marked(lab.path("rows.bin"), ids_of(n), [i for i in range(n) if i % 24 in (0, 9)])
    for T, inside in ((24, 0), (16, 8), (8, 16)):
        for data in (["-i", "rows.bin"], ["-i", "plain.bin", "-j", "rows.bin", "-v", 1]):
            write_tokens(lab.path("plain.bin"), ids_of(n))
            err = lab.train("-e", "in", *data, "-b", 1, "-t", T, "-x", 1, "-s", 0, **lab.how).err
            assert ("begin within a document" in err) == (inside > 0), (T, err)
            if inside:
                says(err, f"rows.bin: {inside} sequences of {T} tokens", "--seq-len")

def test_answers_are_counted_where_there_are_some(bench):
    """Not of plain validation data beside marked ones to train on."""
    lab = bench(LLAMA.format(8))
    write_marked(lab.path("rows.bin"), ids_of(8 * 24 + 1), range(0, 8 * 24, 24), some(8 * 24 + 1, 1))
    write_tokens(lab.path("plain.bin"), ids_of(8 * 24 + 1))
    for val, counted in (("plain.bin", False), ("rows.bin", True)):
        ran = lab.train("-e", "in", "-i", "rows.bin", "-j", val, "-b", 2, "-t", 24, "-x", 1, "-v", 1, **lab.how)
        assert ("answers right" in ran.out) == counted == any("answers" in line for line in ran.log)

def test_validation(bench):
    """The mean over trained targets of all its batches; positions and attention as in training."""
    for sizes in (LLAMA.format(8), GPT2):
        lab, T, ref = bench(sizes), 24, reference()
        n = 8 * T + 1
        ids, rng = ids_of(n, 11), random.Random(12)
        begins, untrained = documents(n, 11, 20)[1:], [i for i in range(n) if rng.random() < [1, 0.95, 0.2, 0.6][(i - 1) // (2 * T)]]
        write_marked(lab.path("val.bin"), ids, begins, untrained)
        x, y, starts, trained = batch(ids, 8, T, begins, untrained)
        _, loss, _, _, _ = ref.compute(lab.config, lab.tensors, x, y, 0, begins=starts, trained=trained)
        for rows in (2, 1):
            ran = lab.train("-e", "in", "-i", "val.bin", "-j", "val.bin", "-b", rows, "-t", T, "-x", 0, "-v", 1, "-m", 8 // rows, "-f", 0, variant="cpu-fp32", **lab.how)
            assert close(ran.vals[-1], loss, 2e-6)

def test_the_ledger(bench):
    """Peaks are what was estimated, and a resumed run goes on to the bit, with documents and masks."""
    for sizes, given in ((LLAMA.format(64), ["--adapter", "adapter"]), (GPT2, [])):
        lab, T = bench(sizes), 24
        uneven(lab, 12, T)
        how = ["-e", "in", "-i", "uneven.bin", "-b", 2, "-t", T, "-d", 4 * T, "-k", "constant", *given]
        for name in ("whole", "parts"):
            shutil.rmtree(lab.path(name), ignore_errors=True)
        whole = lab.train(*how, "-x", 4, "-o", "whole", **lab.how)
        assert whole.done["peak_bytes"] == whole.done["estimate_bytes"]
        lab.train(*how, "-x", 2, "-o", "parts", **lab.how)
        lab.train(*how, "-x", 4, "-o", "parts", "-y", 1, **lab.how)
        ends = [{name: data for name, data in lab.files(folder).items() if "00004/" in name} for folder in ("whole", "parts")]
        assert ends[0] == ends[1] and ends[0]

def test_thread_orders_poison_and_sanitizers(bench):
    for sizes in (LLAMA.format(64), GPT2):
        lab, T = bench(sizes), 70
        n = 2 * T + 1
        write_marked(lab.path("batch.bin"), ids_of(n), documents(n, 3, 40)[1:], some(n, 4))
        how = ["-e", "in", "-i", "batch.bin", "-b", 2, "-t", T, "-x", 1, "-a", 1]
        runs = [learned(lab.train(*how, env={"SIMT_ORDER": order, "SIMT_SEED": 7}, **lab.how)) for order in ("forward", "priority")]
        assert runs[0] == runs[1]
        lab.train(*how, variant="san-bf16", **lab.how)

# ---- files that are wrong ------------------------------------------------------------------------------------------

BAD = {
    "an id of the vocabulary's size": (dict(ids=[1, 2, V] * 100), [V]), "under both marks": (dict(ids=[1, 2, V] * 100, begins=[2], untrained=[2]), [V]),
    "an id of 2^29": (dict(ids=[1, 1 << 29] * 100), [1 << 29]), "one byte less": (dict(ids=[1] * 300, cut=1), ["bad.bin"]), "one token less": (dict(ids=[1] * 300, cut=4), ["bad.bin"]),
    "a count that lies": (dict(ids=[1] * 300, count=301), ["bad.bin"]), "a count below 0": (dict(ids=[1] * 300, count=-1), ["bad.bin"]),
    "version 9": (dict(ids=[1] * 300, version=9), ["version"]), "16 bits with marks": (dict(ids=[1] * 300, magic=20240520), ["version"]),
    "too few": (dict(ids=[1] * 20), ["bad.bin"]),
}

@pytest.mark.parametrize("name", BAD)
def test_bad_files(bench, name):
    """As training data and as validation's; nothing is written."""
    how, parts = BAD[name]
    for sizes in (LLAMA.format(8), GPT2):
        lab = bench(sizes)
        write_marked(lab.path("bad.bin"), **how)
        write_marked(lab.path("good.bin"), ids_of(300))
        for data in (["-i", "bad.bin"], ["-i", "good.bin", "-j", "bad.bin", "-v", 1]):
            done = lab.run(*options("-e", "in", "-b", 1, "-t", 24, "-o", "refused", *data), status=None, timeout=30, **lab.how)
            assert done.status in (1, 2), done.out[-500:]
            says(done.err, "bad.bin", *parts)
            assert "simt" not in done.err and not (lab.path("refused").exists() and lab.files("refused"))

def test_plain_ids_of_32_bits_have_no_marks(bench):
    """Version 7 means what it meant: an id there is all 32 bits."""
    lab = bench(LLAMA.format(8))
    write_marked(lab.path("bad.bin"), [1, 2] * 100, begins=[4], version=7)
    says(lab.run(*options("-e", "in", "-i", "bad.bin", "-b", 1, "-t", 24), status=None, **lab.how).err, "bad.bin", 1 + (1 << 30))

def test_shards_of_both_kinds(bench):
    """Marked and plain shards beside each other: each is what it says."""
    lab, T = bench(LLAMA.format(8)), 24
    write_marked(lab.path("s_0.bin"), ids_of(4 * T + 1), documents(4 * T + 1, 1, 9)[1:], some(4 * T + 1, 1))
    lab.path("s_1.bin").write_bytes(struct.pack("<256i", 20240801, 7, 4 * T + 1, *[0] * 253) + struct.pack(f"<{4 * T + 1}I", *ids_of(4 * T + 1, 2)))
    ran = lab.train("-e", "in", "-i", "s_*.bin", "-b", 2, "-t", T, "-x", 4, *PLAIN[2:], "-l", 0, variant="cpu-fp32", **lab.how)
    assert len(ran.losses) == 4
