"""Files: what the trainer writes is llm.c's layout to the byte, and what is wrong with a file it reads is said."""
import math
import os
import resource
import shutil
import struct
import subprocess

import pytest

from helpers import (MATRICES, Shape, ends, environment, header, learned, library, model_bytes, names, options, padded, program, random_model,
                     read_model, says, to_bf16, write_model, write_tokens, words)

VERSIONS = {"cpu-fp32": 3, "cpu-bf16": 5}  # what each build writes

# ---- models that the trainer writes --------------------------------------------------------------

@pytest.mark.parametrize("variant", VERSIONS)
def test_initialisation(lab, variant):
    shape = Shape(L=3, H=4, C=64, T=64, V=257)
    lab.train("-e", shape.size(), "-x", 1, "-l", 0, "-o", "out", variant=variant)
    tensors = read_model(lab.path("out/step_00000001"), shape)
    tensors["wte"] = tensors["wte"][:shape.V * shape.C]
    for name, values in tensors.items():
        if name in MATRICES:
            std = 0.02 / math.sqrt(2 * shape.L) if name in ("attprojw", "fcprojw") else 0.02
            mean = sum(values) / len(values)
            assert abs(mean) < 5 * std / math.sqrt(len(values)), name
            assert math.sqrt(sum((x - mean) ** 2 for x in values) / len(values)) == pytest.approx(std, rel=0.05), name
            assert 2 * std < max(values) < 6 * std and 2 * std < -min(values) < 6 * std, name
            assert len(set(values)) > len(values) / 64, name
        else:
            assert set(values) == {1.0 if name in ("ln1w", "ln2w", "lnfw") else 0.0}, name
    layer = len(tensors["qkvw"]) // shape.L
    assert tensors["qkvw"][:layer] != tensors["qkvw"][layer:2 * layer]

# ---- models that it did not write ----------------------------------------------------------------

@pytest.mark.parametrize("variant, V", [("cpu-fp32", 257), ("cpu-bf16", 300), ("cpu-bf16", 384)])
def test_a_model_of_an_independent_writer_loads(lab, variant, V):
    """Both versions, into both builds; a rate of 0 writes back what was read, in the layout to the byte. What the layout means is shown
    by test_gpt2_numbers.py."""
    shape = Shape(L=2, H=2, C=32, T=48, V=V)
    tensors = random_model(shape)
    seen = []
    for version in (3, 5):
        write_model(lab.path(f"v{version}.bin"), shape, tensors, version)
        result = lab.train("-e", f"v{version}.bin", "-x", 1, "-l", 0, "-v", 1, "--write-bin", f"out{version}.bin", variant=variant)
        assert lab.path(f"out{version}.bin").read_bytes() == model_bytes(shape, tensors, VERSIONS[variant])
        seen.append(learned(result))
    assert seen[0] == seen[1]  # the values are such that bf16 holds them

def test_a_model_with_wider_values_is_rounded_to_nearest(lab):
    shape = Shape(L=1, H=1, C=32, T=32, V=257)
    tensors = {name: [x * 1.001 for x in values] for name, values in random_model(shape).items()}
    write_model(lab.path("wide.bin"), shape, tensors, 3)
    lab.train("-e", "wide.bin", "-x", 1, "-l", 0, "--write-bin", "out.bin", variant="cpu-bf16")
    body = lab.path("out.bin").read_bytes()[1024:]
    flat = [x for values in tensors.values() for x in values]
    assert list(struct.unpack(f"<{len(flat)}H", body)) == to_bf16(flat)

# ---- tokens --------------------------------------------------------------------------------------

def test_ids_beyond_16_bits(lab):
    """A vocabulary of 70,000: ids that 16 bits would fold back are told apart."""
    write_tokens(lab.path("high.bin"), [65536 + x for x in words(300)], bits=32)
    write_tokens(lab.path("low.bin"), words(300), bits=32)
    size = ["-e", "gpt2:L1,H1,C16,T16,V70000", "-t", 16, "-b", 1, "-x", 2]
    assert lab.train("-i", "high.bin", *size).losses != lab.train("-i", "low.bin", *size).losses

def test_shards(lab):
    """An epoch sees each window of each shard once; the order depends on the seed and changes with the epoch. The weights stay as
    they are and a step is one sequence, so that each window shows as its own loss."""
    shape = Shape()
    write_model(lab.path("still.bin"), shape, random_model(shape, std=0.3))

    def epochs(pattern, seed, steps):
        return lab.train("-i", pattern, "-e", "still.bin", "-l", 0, "-b", 1, "-x", steps, "--seed", seed).losses
    alone = []
    for i in range(3):
        write_tokens(lab.path(f"shard_{i}.bin"), words(4 * 32 + 1, seed=20 + i))
        alone += epochs(f"shard_{i}.bin", 1, None)
    assert len(set(alone)) == 12
    one = epochs("shard_*.bin", 1, 24)
    assert sorted(one[:12]) == sorted(alone) and sorted(one[12:]) == sorted(alone)
    assert one[:12] != one[12:]
    orders = {tuple(epochs("shard_*.bin", seed, None)) for seed in range(1, 6)}
    assert len(orders) > 1 and all(sorted(order) == sorted(alone) for order in orders)

# ---- bad input -----------------------------------------------------------------------------------

def model_with(**lies):
    """A model file whose header lies; the body is that of the truth."""
    shape = Shape()
    data = bytearray(model_bytes(shape, random_model(shape), 3))
    for slot, value in lies.items():
        struct.pack_into("<i", data, 4 * int(slot[1:]), value)
    return bytes(data)

SIZE = 156160  # of the truth: 1024 + 4 * 38784

BAD_MODELS = {  # what the message must name: what was expected and what was found
    "magic": (lambda: model_with(s0=20240803), ["20240326", "20240803"]),
    "a token file": (lambda: header(20240520, 1, 10) + b"\0" * 20, ["20240326", "20240520"]),
    "version": (lambda: model_with(s1=4), ["version 3", "5", "version 4"]),
    "empty": (lambda: b"", ["1024", "0 bytes"]),
    "half a header": (lambda: model_with()[:500], ["1024", "500"]),
    "header alone": (lambda: model_with()[:1024], [SIZE, 1024]),
    "cut": (lambda: model_with()[:-1], [SIZE, SIZE - 1]),
    "longer": (lambda: model_with() + b"\0", [SIZE, SIZE + 1]),
    "fp32 body with bf16 header": (lambda: model_with(s1=5), [1024 + 2 * 38784, SIZE]),
    "maxT": (lambda: model_with(s2=33), [SIZE + 4 * 32, SIZE]),
    "L": (lambda: model_with(s4=3), [SIZE + 4 * (12 * 32 * 32 + 13 * 32), SIZE]),
    "maxT of 0": (lambda: model_with(s2=0), ["T 0"]),
    "V over Vp": (lambda: model_with(s3=385), ["385", "384"]),
    "V negative": (lambda: model_with(s3=-257), ["-257"]),
    "L of 0": (lambda: model_with(s4=0), ["L 0"]),
    "heads of 0": (lambda: model_with(s5=0), ["NH 0"]),
    "heads that do not divide": (lambda: model_with(s5=5), ["NH 5", "C 32"]),
    "C negative": (lambda: model_with(s6=-32), ["-32"]),
    "Vp negative": (lambda: model_with(s7=-384), ["-384"]),
    "over 32 bits": (lambda: model_with(s2=2**27), [SIZE + 4 * 32 * (2**27 - 32), SIZE]),
    "over 64 bits": (lambda: model_with(s2=2**31 - 1, s3=2**31 - 1, s4=2**31 - 1, s6=2**31 - 2, s5=2, s7=2**31 - 1), [2**31 - 1]),
}

@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model(lab, name):
    make, named = BAD_MODELS[name]
    lab.path("bad.bin").write_bytes(make())
    done = lab.run(*options("-e", "bad.bin", "-o", "out"), status=1, env={"SIMT_MEMORY": 10**9})
    says(done.err, "bad.bin", "-e", *named)
    assert lab.files("out") == {}

BAD_TOKENS = {
    "magic": (dict(magic=20240521), ["20240520", "20240521"]),
    "version": (dict(version=2), ["version", "2"]),
    "cut": (dict(cut=2), ["9024", "9022"]),
    "cut inside of a token": (dict(cut=1), ["9024", "9023"]),
    "count too large": (dict(count=4001), ["4001"]),
    "count too small": (dict(count=3999), ["3999"]),
    "count of 0": (dict(count=0), ["0"]),
    "count negative": (dict(count=-1), []),
    "half a header": (dict(cut=8000 + 100), ["924"]),
    "empty": (dict(cut=8000 + 1024), ["0"]),
}

@pytest.mark.parametrize("option", ["-i", "-j"])
@pytest.mark.parametrize("name", BAD_TOKENS)
def test_bad_tokens(lab, name, option):
    how, named = BAD_TOKENS[name]
    write_tokens(lab.path("bad.bin"), words(4000), **how)
    done = lab.run(*options(option, "bad.bin", "-v", 1), status=1)
    says(done.err, "bad.bin", "expected", "found", "prepro/", *named)

@pytest.mark.parametrize("option, bits, where, wrong", [("-i", 16, 0, 257), ("-i", 16, 3999, 257), ("-i", 32, 40, 257), ("-i", 32, 7, 2**32 - 1),
                                                        ("-j", 16, 2000, 257), ("-j", 32, 3999, 257)])
def test_id_beyond_the_vocabulary(lab, option, bits, where, wrong):
    ids = words(4000)
    ids[where] = wrong
    write_tokens(lab.path("bad.bin"), ids, bits=bits)
    done = lab.run(*options(option, "bad.bin", "-v", 1, "-x", None), status=1)
    says(done.err, "bad.bin", wrong, "256", "prepro/")

@pytest.mark.parametrize("option", ["-i", "-j"])
@pytest.mark.parametrize("pattern", ["none.bin", "none_*.bin", "empty/*.bin", "empty", "no/folder.bin"])
def test_missing_data(lab, option, pattern):
    lab.path("empty").mkdir()
    done = lab.run(*options(option, pattern, "-v", 1), status=1)
    says(done.err, pattern, *["prepro/text.py"] * (pattern != "empty"))
    says(lab.run(*options("-e", pattern), status=1).err, pattern)

@pytest.mark.parametrize("option", ["-i", "-j"])
def test_a_batch_larger_than_the_shard(lab, option):
    write_tokens(lab.path("short.bin"), words(64))  # a batch of 2 x 32 takes one more
    done = lab.run(*options(option, "short.bin", "-v", 1), status=1)
    says(done.err, "short.bin", "64", "-b", "-t")
    write_tokens(lab.path("short.bin"), words(65))
    lab.train(option, "short.bin", "-v", 1, "-x", 2)

def test_a_bad_shard_among_good_ones(lab):
    for i in range(3):
        write_tokens(lab.path(f"shard_{i}.bin"), words(1000), cut=10 * (i == 2))
    says(lab.run(*options("-i", "shard_*.bin", "-x", 1), status=1).err, "shard_2.bin")

def test_tokenizers(lab):
    """Damaged ones; and without one ids are printed."""
    good = lab.path("tokenizer.bin").read_bytes()
    for bad in (good[:-3], header(20240328, 9, 257, 256) + good[1024:], header(1, 2, 257, 256) + good[1024:], good[:100]):
        lab.path("bad.bin").write_bytes(bad)
        done = lab.run(*options("--tokenizer", "bad.bin", "-s", 2), status=1)
        says(done.err, "bad.bin", "expected")
    lab.path("tokenizer.bin").unlink()
    assert "printed as ids" in lab.train("-s", 2).out

# ---- places that cannot be written to. Tests may run as root, for whom every folder is writable, so: not a folder. 

@pytest.mark.parametrize("option, place", [("-o", "train.bin/out"), ("-o", "/proc/none/out"), ("-o", "/dev/null/out"),
                                           ("--log", "train.bin/log"), ("--log", "none/log.jsonl")])
def test_a_place_that_cannot_be(lab, option, place):
    """It is said before the first step."""
    done = lab.run(*options(option, place), status=1)
    says(done.err, place)
    assert "step     1" not in done.out

def small_disk(lab, size, *given):
    """(exit status, stderr) of a run whose files can grow to so many bytes, as on a full disk; the limit comes after the run has
    begun, because what is known to be too small at the start is refused."""
    with subprocess.Popen([str(program("cpu-bf16")), *options("-v", 1, *given)], cwd=lab.folder, env=environment(), stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while "val loss" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
        err = ends(process)[1]
    return process.returncode, err

@pytest.mark.parametrize("culprit, fraction", [("model.safetensors", 0), ("model.safetensors", 0.999), ("state_00000.bin", 0.5), ("state_00000.bin", 0.999)])
def test_full_disk(lab, culprit, fraction):
    """The limit strikes in the model, or in the state, which is larger. The checkpoint before is whole, and nothing else is left."""
    given = ["-x", 16, "-k", "constant", "-n", 8, "-nk", 1]
    straight = lab.train(*given, "-o", "straight")
    lab.train("-x", 2, "-k", "constant", "-o", "out")
    before = lab.files("out")
    limit = len(lab.files("straight")[f"step_00000016/{culprit}"]) * fraction
    status, err = small_disk(lab, int(limit), *given, "-o", "out", "-y", 1)
    assert status == 1 and lab.files("out") == before
    says(err, f"step_00000008.tmp/{culprit}", "no checkpoint of step 8", f"step_00000016.tmp/{culprit}")
    assert learned(lab.train(*given, "-o", "out", "-y", 1))[:14] == learned(straight)[2:16]
    assert lab.files("out") == lab.files("straight")

@pytest.fixture
def disk(lab):
    """disk(kilobytes): a folder on a disk of its own."""
    where = lab.path("disk")
    where.mkdir()

    def unmount():
        if os.path.ismount(where):
            subprocess.run(["umount", where], check=True)

    def mount(size):
        unmount()
        if not shutil.which("mount") or os.geteuid() != 0 or subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", where], capture_output=True).returncode != 0:
            pytest.skip("a tmpfs cannot be mounted here")
    yield mount
    unmount()

def test_a_disk_that_is_too_small(lab, disk):
    """A checkpoint of SMALL has 0.5 MB. Where not one fits this is said at the start; where some do, how many."""
    disk(400)
    done = lab.run(*options("-x", 4, "-o", "disk"), status=1)
    says(done.err, "-o disk", "free")
    assert "step     1" not in done.out and lab.files("disk") == {}
    disk(1300)
    result = lab.train("-x", 6, "-n", 1, "-o", "disk", status=1)
    says(result.out, "room for 2 more", "would add 6")
    says(result.err, "No space left", "no checkpoint of step 3")
    assert len(result.steps) == 6 and sorted(lab.files("disk")) == sorted(names(1) + names(2))
    lab.train("-x", 7, "-o", "away", "-e", "disk/step_00000002")
