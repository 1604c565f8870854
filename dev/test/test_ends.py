"""How runs end: by a signal, without a reader, on a full disk, beside another run, with numbers that are not finite. What was good stays."""
import contextlib
import json
import math
import os
import pty
import re
import resource
import signal
import stat
import subprocess
import threading
import time

import pytest

from helpers import Shape, ends, environment, execute, names, options, program, random_model, read_log, says, words, write_model, write_tokens

LONG = ["-x", 100000, "-o", "out"]

@contextlib.contextmanager
def started(lab, *given, when=b"train_loss", times=3, where="log.jsonl", **how):
    """A long run whose log (or output, out.txt) has these words so many times; it is killed in the end."""
    out = lab.path("out.txt").open("wb") if where == "out.txt" else subprocess.PIPE
    process = subprocess.Popen([str(program("cpu-bf16")), *options("--log", "log.jsonl", *given)], cwd=lab.folder, env=environment(),
                               stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, **how)
    try:
        for _ in range(6000):
            if lab.path(where).exists() and lab.path(where).read_bytes().count(when) >= times:
                break
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()

def ended(lab, process):
    """(exit status, stderr, last step) of a run that was told to end; it has left a whole checkpoint of that step, and no more."""
    out, err = ends(process)
    log = read_log(lab.path("log.jsonl"))
    step = [line["step"] for line in log if "train_loss" in line][-1]
    assert set(lab.files("out")) == set(names(step)), err
    assert log[-1]["done"] is False and log[-1]["steps"] == step
    return process.returncode, err.decode(), step

TERM, HUP = signal.SIGTERM, signal.SIGHUP

@pytest.mark.parametrize("sent, ignored", [*(([n], None) for n in (signal.SIGINT, TERM, HUP, signal.SIGXCPU, signal.SIGUSR1)),
                                           ([TERM, HUP] * 5, None), ([HUP, TERM], HUP)])
def test_a_signal_saves(lab, sent, ignored):
    """Many are one: timeout sends two SIGTERMs, a terminal that closes two SIGHUPs. One that nohup has ignored is none."""
    with started(lab, *LONG, preexec_fn=lambda: ignored and signal.signal(ignored, signal.SIG_IGN)) as process:
        for number in sent:
            process.send_signal(number)
            if number == ignored:
                time.sleep(0.5)
                assert process.poll() is None
        status, err, step = ended(lab, process)
    assert status in {128 + number for number in sent if number != ignored}   # of several that wait the kernel picks the first
    assert len(lab.train("-o", "out", "-y", 1, "-x", step + 1).losses) == 1

def interrupted(lab, *given, **how):
    """(stderr, stdout, log) of a long run without --out that is ended by Ctrl-C when its output has these words."""
    with started(lab, "-x", 100000, *given, where="out.txt", times=1, **how) as process:
        process.send_signal(signal.SIGINT)
        err = ends(process)[1].decode()
    assert process.returncode == 130, err
    return err, lab.path("out.txt").read_text(errors="replace"), read_log(lab.path("log.jsonl"))

def test_ctrl_c_without_a_folder(lab):
    err, out, log = interrupted(lab, "-b", 64, "-e", "gpt2:L4,H2,C32,T32,V257", when=b"step     3")
    step = log[-1]["steps"]
    assert "stopping after this step; a second Ctrl-C ends at once" in err and f"interrupted after step {step}; without --out" in out
    assert re.search(r"steps of about \d+\.\d s are to come: 0?\d+:\d\d:\d\d", out), "a long run says how long"

@pytest.mark.parametrize("given, when", [
    (["-v", 1, "-m", 10**6], b"start "), (["-s", 1, "-g", 10**6], b"---- sample"), (["-x", 0, "-v", 1, "-m", 10**6], b"start ")])
def test_ctrl_c_ends_what_takes_long(lab, given, when):
    """A validation or a sample that would go on for minutes; what it has so far is no result."""
    write_tokens(lab.path("val.bin"), words(10**6, seed=2))
    err, out, log = interrupted(lab, "-o", "out", *given, when=when)
    assert "stopping after this step" in err
    assert not any("val_loss" in line for line in log) and "val loss" not in out and log[-1]["done"] is False
    assert (names(1)[0] in lab.files("out")) == ("-s" in given)

def test_a_terminal_sees_a_validation_go_on(lab):
    ours, theirs = pty.openpty()
    done = subprocess.run([program("cpu-bf16"), *options("-x", 0, "-v", 1, "-m", 3)], cwd=lab.folder, env=environment(), stdin=subprocess.DEVNULL,
                          stdout=theirs, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 0 and b"\rvalidating 1/3\rvalidating 2/3\rvalidating 3/3" in os.read(ours, 1 << 16)
    os.close(theirs)
    os.close(ours)

@pytest.mark.parametrize("number", [None, signal.SIGINT])
def test_nobody_reads_the_output(lab, number):
    """ | head -5; and | tee, which Ctrl-C ends too."""
    with started(lab, *LONG) as process:
        process.stdout.close()
        process.stdout = None
        if number:
            process.send_signal(number)
        status, err, step = ended(lab, process)
    assert status == 128 + (number or signal.SIGPIPE)
    says(err, f"interrupted after step {step}", f"--resume 1 goes on after step {step}")

def test_closed_stdout_gets_into_no_file(lab):
    done = execute("sh", "-c", 'exec "$@" >&-', "sh", program("cpu-bf16"), *options("-o", "out", "--log", "log.jsonl"), cwd=lab.folder)
    assert done.status == 1 and len(read_log(lab.path("log.jsonl"))) == 5
    lab.train("-o", "out", "-y", 1, "-x", 5)

# ---- disks that are full -------------------------------------------------------------------------

@pytest.mark.parametrize("failing, kept, status", [([4], [2, 6], 0), ([4, 6], [2], 1)])
def test_a_checkpoint_that_fails_ends_nothing(lab, failing, kept, status):
    """A folder that is not ours stands where it should be made. The exit status tells of the last one."""
    theirs = [f"step_{step:08d}.tmp/mine/x" for step in failing]
    for name in theirs:
        lab.path(f"out/{name}").mkdir(parents=True)
    result = lab.train("-x", 6, "-n", 2, "-nk", 3 - len(failing), "-o", "out", status=status)
    says(result.err, "step_00000004", "no checkpoint of step 4")
    assert len(result.steps) == 6 and set(lab.files("out")) == {*theirs, *(name for step in kept for name in names(step))}

@pytest.mark.parametrize("log", ["/dev/full", "reader gone"])
def test_a_log_that_fails_ends_nothing(lab, log):
    if log != "/dev/full":
        os.mkfifo(lab.path(log))
        reader = os.open(lab.path(log), os.O_RDONLY | os.O_NONBLOCK)
        threading.Timer(0.3, os.close, [reader]).start()
    done = lab.run(*options("-x", 60, "--log", log, "-o", "out"), status=1)
    assert done.err.count("cannot write") == 1
    says(done.err, log, "training goes on")
    assert set(lab.files("out")) == set(names(60))

def test_a_limit_that_no_checkpoint_fits_is_said_at_the_start(lab):
    done = lab.run(*options("-o", "out"), status=1, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000)))
    says(done.err, "-o out", "ulimit -f")
    assert "step     1" not in done.out and lab.files("out") == {}

# ---- one folder, one run -------------------------------------------------------------------------

def test_one_folder_one_run(lab):
    with started(lab, *LONG) as first:
        before = lab.files("out")
        for resume in (0, 1):
            done = lab.run(*options("-o", "out", "-y", resume), status=1)
            says(done.err, "-o out", f"process {first.pid}")
        says(lab.run(*options("--log", "log.jsonl"), status=1).err, "--log log.jsonl", "another run")
        assert lab.files("out") == before and first.poll() is None
        lab.path("out/.lock").unlink()   # somebody may take it for a leftover
        says(lab.run(*options("-o", "out"), status=1).err, "-o out", "another process")
        first.kill()
        first.wait()
        assert len(lab.train("-o", "out").losses) == 4, "the kernel has released it"

@pytest.mark.parametrize("make", [lambda p: p.symlink_to("../train.bin"), lambda p: p.symlink_to("../nothing"), os.mkfifo, os.mkdir],
                         ids=["link", "dangling link", "fifo", "folder"])
def test_a_lock_that_is_not_ours(lab, make):
    lab.path("out").mkdir()
    make(lab.path("out/.lock"))
    before = lab.path("train.bin").read_bytes()
    says(lab.run(*options("-o", "out"), status=1).err, "-o out", ".lock")
    assert lab.path("train.bin").read_bytes() == before and not lab.path("nothing").exists()

def test_two_that_start_together(lab):
    runs = [subprocess.Popen([str(program("cpu-bf16")), *options("-x", 20, "-n", 2, "-nk", 2, "-o", "out", "--seed", i)], cwd=lab.folder,
                             env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for i in range(3)]
    said = [run.communicate()[1].decode() for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1, 1], said
    assert set(lab.files("out")) == set(names(18) + names(20))

def test_evaluation_needs_no_lock(lab):
    with started(lab, *LONG, "-n", 1):
        lab.run(*options("-x", 0, "-v", 1, "-o", "out", "-y", 1, "--log", "other.jsonl"))

# ---- names that are no files of ours -------------------------------------------------------------

def node(path, device=(1, 3)):
    """A device of our own: /dev/null, or what the numbers say."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(*device))
        path.write_bytes(b"")
    except OSError as e:
        pytest.skip(f"cannot make a device: {e}")

def test_a_device_as_a_log_stays_one(lab):
    node(lab.path("null"))
    lab.run(*options("-x", 2, "-o", "out", "--log", "null"))
    lab.run(*options("-x", 4, "-o", "out", "-y", 1, "--log", "null"))
    assert stat.S_ISCHR(os.stat(lab.path("null")).st_mode)

@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_a_log_to_what_is_open_already(lab, name):
    for resume in (0, 1):
        done = lab.run(*options("-x", 2 + resume, "-o", "out", "-y", resume, "--log", name))
        lines = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
        assert [line["step"] for line in lines if "train_loss" in line] == [[1, 2], [3]][resume]
    with open(lab.path("all"), "wb") as f:   # an open file has one position for both
        subprocess.run([program("cpu-bf16"), *options("--log", name)], cwd=lab.folder, env=environment(), stdout=f, check=True)
    text = lab.path("all").read_text()
    assert text.count("train_loss") == 4 and "device " in text and "step     4/4" in text

def test_a_log_behind_links(lab):
    lab.path("place").mkdir()
    lab.path("a").symlink_to("place/b")        # relative, in a chain that ends nowhere yet
    lab.path("place/b").symlink_to("../c")
    lab.train("-x", 2, "-o", "out", "--log", "a")
    os.chmod(lab.path("c"), 0o640)
    lab.train("-x", 4, "-o", "out", "-y", 1, "--log", "a")
    assert lab.path("a").is_symlink() and lab.path("place/b").is_symlink()
    assert stat.S_IMODE(lab.path("c").stat().st_mode) == 0o640
    assert [line["step"] for line in read_log(lab.path("c")) if "train_loss" in line] == [1, 2, 3, 4]

def test_a_fifo_as_a_log(lab):
    os.mkfifo(lab.path("fifo"))
    says(lab.run(*options("--log", "fifo"), status=1).err, "--log fifo", "nobody reads")
    reader = subprocess.Popen(["cat", "fifo"], cwd=lab.folder, stdout=subprocess.PIPE)
    time.sleep(0.2)
    lab.run(*options("--log", "fifo"))
    assert reader.communicate(timeout=30)[0].count(b"train_loss") == 4

@pytest.mark.parametrize("resume", [0, 1])
@pytest.mark.parametrize("name", ["train.bin", "val.bin", "start.bin", "out/step_00000002/model.safetensors", "out/step_00000002/config.json", "out/step_00000002", "notes.jsonl", "out", "link"])
def test_what_is_no_log_is_refused(lab, name, resume):
    write_model(lab.path("start.bin"), Shape(), random_model(Shape()))
    lab.path("notes.jsonl").write_text('{"step": 1, "train_loss": 5}\n{"messages": []}\n')
    lab.path("link").symlink_to("train.bin")
    lab.train("-x", 2, "-e", "start.bin", "-o", "out")
    before = {name: lab.path(name).read_bytes() for name in ("train.bin", "val.bin", "start.bin", "notes.jsonl")}, lab.files("out")
    folder = "out" if resume else "new"
    done = lab.run(*options("-e", "start.bin", "-o", folder, "-y", resume, "--log", name), status=1)
    says(done.err, f"--log {name}")
    assert before == ({name: lab.path(name).read_bytes() for name in before[0]}, lab.files("out"))

@pytest.mark.parametrize("log", ["out/step_00000004", "./out/../out/step_00000004.tmp"])
def test_a_log_where_a_checkpoint_will_be(lab, log):
    """It would be lost, or the checkpoint would."""
    says(lab.run(*options("-o", "out", "--log", log), status=1).err, f"--log {log}", "a checkpoint's")
    assert not lab.files("out")

def test_checkpoints_behind_links(lab):
    """--out may be a link, and so may a checkpoint that is gone on from."""
    lab.path("far").mkdir()
    lab.path("out").symlink_to("far")
    lab.train("-x", 2, "-o", "out")
    lab.path("far/step_00000002").rename(lab.path("elsewhere"))
    lab.path("far/step_00000002").symlink_to("../elsewhere")
    lab.train("-x", 4, "-o", "out", "-y", 1)
    assert lab.path("out").is_symlink() and set(lab.files("far")) >= set(names(4)) and lab.files("elsewhere")

@pytest.mark.parametrize("kind", ["file", "link to nothing", "link to a file"])
def test_out_is_no_folder(lab, kind):
    lab.path("out").write_text("mine") if kind == "file" else lab.path("out").symlink_to("none" if "nothing" in kind else "train.bin")
    says(lab.run(*options("-o", "out"), status=1).err, "-o out", "expected a folder")

@pytest.mark.parametrize("mode", [0o500, 0o600, 0o300])
def test_out_without_permission(lab, mode):
    if os.geteuid() == 0:
        pytest.skip("root may do everything")
    lab.path("out").mkdir(mode=mode)
    for resume in (0, 1):
        says(lab.run(*options("-o", "out", "-y", resume), status=1).err, "out", "cannot")
    lab.path("out").chmod(0o700)

def test_leftovers_are_swept(lab):
    lab.path("out").mkdir()
    for name in ("step_00000007.tmp/model.safetensors", "step_00000007.tmp/state_00000.bin.tmp", "step_00000002.tmp/x", "mine.tmp/x"):
        lab.path(f"out/{name}").parent.mkdir(parents=True, exist_ok=True)
        lab.path(f"out/{name}").write_bytes(b"half")
    lab.train("-x", 2, "-o", "out")
    assert set(lab.files("out")) == {*names(2), "mine.tmp/x"}

def test_what_others_have_in_the_folder_stays(lab):
    """Only what has a checkpoint's name is one, and nothing is removed through a link."""
    theirs = ["step_mine.tmp/x", "step_00000009.tmp.old/x", "far/x", "old/x"]
    for name in theirs:
        lab.path(f"out/{name}").parent.mkdir(parents=True)
        lab.path(f"out/{name}").write_bytes(b"mine")
    lab.path("out/step_00000009.tmp").symlink_to("far")
    lab.train("-x", 1, "-o", "out")
    for name in names(1):
        lab.path(f"out/{name}").rename(lab.path(f"out/old/{name.split('/')[1]}"))
    lab.path("out/step_00000001").rmdir()
    lab.path("out/step_00000001").symlink_to("old")
    lab.train("-x", 2, "-o", "out", "-y", 1, "-nk", 1)
    assert set(theirs) <= set(lab.files("out")) and len(lab.files("out/old")) == 4

# ---- models that are no good ---------------------------------------------------------------------

@pytest.mark.parametrize("rate, every, keep", [(1e9, 5, 2), (1e3, 1, 1)])
@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-fp32"])
def test_bad_news_do_not_push_out_good_news(lab, rate, every, keep, variant):
    """A rate at which the weights explode in one step: their loss is huge, and finite for a while."""
    lab.train("-x", 6, "-n", 1, "-nk", 2, "-o", "out", variant=variant)
    before = lab.files("out")
    result = lab.train("-l", rate, "--grad-clip", 0, "-x", 26, "-n", every, "-nk", keep, "-o", "out", "-y", 1, variant=variant, status=3)
    assert result.losses[1] is None or result.losses[1] > 1e5
    says(result.err, "no checkpoint of step")
    assert lab.files("out") == before
    assert lab.train("-x", 8, "-o", "out", "-y", 1, variant=variant).losses[-1] < 6

@pytest.mark.parametrize("variant, w", [("cpu-fp32", 1), ("cpu-bf16", 1), ("cpu-bf16", 0)])
def test_a_step_that_is_not_finite_changes_nothing(lab, variant, w):
    """The loss is finite, so that each step's validation shows the weights, but the gradient's squares are not."""
    tensors = random_model(Shape())
    tensors["lnfw"] = [1e25] * 32
    tensors["wte"] = [x * 1e-25 for x in tensors["wte"]]
    write_model(lab.path("steep.bin"), Shape(), tensors)
    result = lab.train("-e", "steep.bin", "-x", 5, "-c", 0.1, "-w", w, "-v", 1, "-m", 2, "-o", "out", variant=variant, status=3)
    assert [line["grad_norm"] for line in result.steps] == [None] * 5
    assert len(result.vals) == 6 and len(set(result.vals)) == 1 and result.vals[0] > 1
    assert lab.files("out") == {}

def test_a_model_that_is_not_finite(lab):
    tensors = random_model(Shape())
    tensors["lnfb"][3] = math.nan
    write_model(lab.path("nan.bin"), Shape(), tensors)
    done = lab.run(*options("-e", "nan.bin", "-x", 0, "-v", 1), status=3)
    says(done.out, "val loss nan")
    says(done.err, "not finite")
    lab.run(*options("-e", "nan.bin", "-x", 0, "-s", 1), status=3)
    for given in ([], ["-n", 1, "-o", "out"], ["-n", 0, "-o", "none"], ["-v", 1]):
        result = lab.train("-e", "nan.bin", "-x", 5, *given, status=3)
        assert len(result.steps) == 5 and lab.files("out") == lab.files("none") == {}
    result = lab.train("-e", "nan.bin", "-x", 50, status=3)
    assert len(result.steps) == 10, "ten in a row end the run"
    assert "rate" in result.err and "resume" in result.err

def test_a_validation_that_is_not_finite_keeps_checkpoints_out(lab):
    """Token 200 has a logit of minus infinity: no harm, until it is a target, and that it is in the validation data alone."""
    shape = Shape()
    tensors = random_model(shape)
    tensors["lnfw"], tensors["lnfb"] = [0.0] * 32, [1.0] * 32
    tensors["wte"][200 * 32:201 * 32] = [-1e38] * 32
    write_model(lab.path("start.bin"), shape, tensors)
    assert len(lab.train("-e", "start.bin", "-v", 1, "-x", 2, "-o", "fine").vals) == 3
    write_tokens(lab.path("val.bin"), words(500) + [200] * 500)
    result = lab.train("-e", "start.bin", "-v", 1, "-x", 2, "-n", 1, "-o", "out", status=3)
    assert None not in result.losses and result.vals == [None] * 3 and lab.files("out") == {}

# ---- data that change while a run reads them: what was learned is saved --------------------------

def cut_off(path):
    os.truncate(path, 2000)

def other_ids(path):
    with open(path, "r+b") as f:
        f.seek(1024)
        f.write(b"\xff" * 6000)

@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@pytest.mark.parametrize("change", [cut_off, other_ids, os.unlink])
def test_data_that_change_under_a_run(lab, name, change):
    if name == "train.bin" and change is os.unlink:   # the open file stays until its epoch ends
        write_tokens(lab.path("train.bin"), words(1000))
    with started(lab, *LONG, "-v", 1, "-m", 1) as process:
        change(lab.path(name))
        status, err, step = ended(lab, process)
    assert status == 1
    says(err, name)
    write_tokens(lab.path("train.bin"), words(1000 if change is os.unlink and name == "train.bin" else 4000))
    assert len(lab.train("-o", "out", "-y", 1, "-x", step + 1).losses) == 1
