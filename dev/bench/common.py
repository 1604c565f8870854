"""What the scripts of dev/bench share: sizes of models, the trainer's log and ledger, and which tree a figure comes from."""
import glob
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import namedtuple

ROOT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
sys.path.insert(0, os.path.join(ROOT, "prepro"))

# layers: (channels, heads), as -e d12 has them
DEPTHS = {6: (384, 6), 12: (768, 12), 24: (1024, 16), 36: (1280, 20), 48: (1600, 25), 60: (1920, 30), 72: (2880, 30), 84: (3456, 36)}
Size = namedtuple("Size", "L H C T V")

def model_size(text):
    """What -e says, as a Size: d12, or gpt2:L4,H4,C128,T64,V257."""
    name, given = text.removeprefix("gpt2:"), {"T": 1024, "V": 50257}
    if re.fullmatch(r"d\d+", name) and int(name[1:]) in DEPTHS:
        C, H = DEPTHS[int(name[1:])]
        given.update(L=int(name[1:]), C=C, H=H)
    elif re.fullmatch(r"([LHCTV]\d+)(,[LHCTV]\d+)*", name):
        given.update((part[0], int(part[1:])) for part in name.split(","))
    if not {"L", "H", "C"} <= set(given) or min(given.values()) < 1 or given["C"] % given["H"]:
        raise ValueError(f"{text}: expected one of {' '.join(f'd{d}' for d in DEPTHS)}, or a size like gpt2:L4,H4,C128,T64,V257")
    return Size(*(given[k] for k in Size._fields))

def padded(V):
    return -(-V // 128) * 128

def read_log(path):
    """The lines of a --log file; of a file that is not there or not whole, none."""
    try:
        with open(path) as f:
            return [json.loads(line) for line in f]
    except (OSError, ValueError):
        return []

def ledger(program, options):
    """The rows of --estimate=json."""
    done = subprocess.run([program, *map(str, options), "--estimate=json"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr.strip())
    return json.loads(done.stdout)["rows"]

def kept(rows):
    """What backward needs, of a ledger: (bytes of it all, what a layer keeps in units of B*T*C elements)."""
    saved = [row for row in rows if row["kind"] == "saved"]
    unit = next(row["bytes"] for row in saved if row["name"] == "atty")  # (L, B, T, C)
    return sum(row["bytes"] for row in saved), sum(row["bytes"] for row in saved if row["scope"] == "layer") / unit

def prepare(files, out):
    """Writes out/train.bin and val.bin, of bytes, and says nothing; returns how many tokens they have."""
    import contextlib
    import binfmt  # here, so that not every script needs NumPy
    import text
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        try:
            text.prepare(files, out=out)
        except binfmt.Error as e:
            sys.exit(f"{os.path.basename(sys.argv[0])}: {e}")
    return [len(binfmt.read_tokens(f"{out}/{name}.bin")) for name in ("train", "val")]

def count_tokens(path):
    """Of a token file, marked or not."""
    with open(path, "rb") as f:
        return int.from_bytes(f.read(12)[8:], "little")

def rows_of(files, T):
    """What text.py is told of rows, where examples are among its files."""
    import text  # prepro's; it wants NumPy
    try:
        return ["-t", T] if text.are_examples(files, None) else []
    except text.Error:  # which it will say itself
        return []

def script(path, *args):
    """Runs one of the project's, and ends as it does if it fails."""
    status = subprocess.run([sys.executable, "-B", os.path.join(ROOT, path), *map(str, args)], stdin=subprocess.DEVNULL).returncode
    if status != 0:
        sys.exit(status if status > 0 else 1)

def commit():
    """This tree's, with a + where files differ from it."""
    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

def digest(*patterns):
    """Of the files that match."""
    h = hashlib.sha256()
    for path in sorted({p for pattern in patterns for p in glob.glob(os.path.join(ROOT, pattern))}):
        with open(path, "rb") as f:
            h.update(os.path.relpath(path, ROOT).encode() + b"\0" + f.read())
    return h.hexdigest()

def pyplot():
    """Matplotlib's pyplot, drawing into files; None, said in a line, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: that needs Matplotlib (apt-get install python3-matplotlib)")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt

def save(plt, figure, path, dpi=120):
    """The same figure gives the same bytes."""
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    plt.close(figure)
