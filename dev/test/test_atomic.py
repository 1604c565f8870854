"""prepro/atomic.py: files are written whole or not at all, and what is no file is not replaced."""
import os
import stat
import subprocess
import sys
import time

import pytest

from helpers import ROOT, Shape, random_model, write_model

sys.path.insert(0, str(ROOT / "prepro"))
from atomic import atomic  # noqa: E402

def merge(folder, out, status=0):
    """merge_norm.py, a script that writes one file; what it says."""
    done = subprocess.run([sys.executable, ROOT / "prepro/merge_norm.py", "m.bin", out], cwd=folder, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == status and b"Traceback" not in done.stderr, done.stderr
    return done.stderr.decode() if status else done.stdout

def names(folder):
    return sorted(os.listdir(folder))

def test_what_a_killed_process_left_is_swept(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f"t.bin.{dead.pid}.tmp", f"t.bin.{os.getpid()}.tmp", "t.bin.1.tmp", "t.bin.mine.tmp"):
        (tmp_path / name).write_bytes(b"half")
    with atomic(tmp_path / "t.bin") as (f,):
        f.write(b"whole")
    assert names(tmp_path) == ["t.bin", "t.bin.1.tmp", "t.bin.mine.tmp"], "process 1 is alive"

def test_links_stay_links(tmp_path):
    """A link, a chain of them that ends nowhere yet, one to another folder; and what is replaced keeps its permissions."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far/old").write_bytes(b"old")
    (tmp_path / "far/old").chmod(0o640)
    (tmp_path / "a").symlink_to("far/old")
    (tmp_path / "b").symlink_to("far/c")
    (tmp_path / "far/c").symlink_to("../d")
    with atomic(tmp_path / "a", tmp_path / "b") as (f, g):
        f.write(b"1")
        g.write(b"2")
    assert all(os.path.islink(tmp_path / name) for name in ("a", "b", "far/c"))
    assert [(tmp_path / name).read_bytes() for name in ("far/old", "d")] == [b"1", b"2"]
    assert (tmp_path / "far/old").stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["a", "b", "d", "far"] and names(tmp_path / "far") == ["c", "old"]

def test_what_is_no_file_is_not_replaced(tmp_path):
    """Devices and FIFOs are written to, and what this process has open; a folder is refused, and so is a FIFO that nobody reads."""
    write_model(tmp_path / "m.bin", Shape(L=1), random_model(Shape(L=1)))
    size = (tmp_path / "m.bin").stat().st_size
    out = tmp_path / "full"
    try:
        os.mknod(out, stat.S_IFCHR | 0o666, os.makedev(1, 7))  # a /dev/full of our own
        out.open("rb").close()
    except OSError as e:
        pytest.skip(f"cannot make a device: {e}")
    assert "No space left" in merge(tmp_path, "full", status=1)
    assert stat.S_ISCHR(out.stat().st_mode)
    os.mkfifo(tmp_path / "fifo")
    merge(tmp_path, "fifo", status=1)
    with subprocess.Popen(["cat", tmp_path / "fifo"], stdout=subprocess.PIPE) as reader:
        time.sleep(0.2)
        merge(tmp_path, "fifo")
        assert len(reader.stdout.read()) == size
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    (tmp_path / "folder").mkdir()
    assert "folder" in merge(tmp_path, "folder", status=1)
    for name in ("/dev/stdout", "/dev/fd/1"):
        assert len(merge(tmp_path, name)) > size  # and what it says
    assert names(tmp_path) == ["fifo", "folder", "full", "m.bin"]
