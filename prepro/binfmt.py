"""The .bin files of the trainers: readers and writers (numpy and the standard library only).

    python3 prepro/binfmt.py FILE...        says what each file is, after checking it

    import binfmt
    ids = binfmt.read_tokens("data/train.bin")
    config, tensors = binfmt.read_model("model.bin")

Everything is little-endian behind a header of 256 int32, in llm.c's format. A reader believes
nothing before it is checked: magic, version, and each size against the size the file really has.
A writer works under a temporary name, so that a file under its final name is always whole.
"""
import contextlib
import math
import mmap
import os
import re
import resource
import signal
import stat
import struct
import sys
from dataclasses import dataclass

from atomic import atomic

if os.path.dirname(os.path.abspath(sys.argv[0])) == os.path.dirname(os.path.abspath(__file__)):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # one of our scripts: no traceback where Ctrl-C meets an import; then see run()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # no more are of use here, and each wants memory
    # Under a memory limit (ulimit -v) NumPy's OpenBLAS may try for ever to get its buffer when it is loaded.
    limit, needed = resource.getrlimit(resource.RLIMIT_AS)[0], 320 << 20
    try:
        mmap.mmap(-1, needed).close() if limit != resource.RLIM_INFINITY else None
    except (OSError, ValueError, MemoryError):
        sys.exit(f"{os.path.basename(sys.argv[0])}: this process may use {limit >> 20} MB of memory (ulimit -v), and NumPy needs up to "
                 f"{needed >> 20} besides Python's own; expected a higher limit")

try:
    import numpy as np
except ImportError as e:
    if not isinstance(e, ModuleNotFoundError):
        sys.exit(f"{sys.executable} cannot load NumPy: {str(e).strip().splitlines()[-1]} (is there a limit on memory, ulimit -v?)")
    sys.exit(f"{sys.executable} has no NumPy. On Debian and Ubuntu: apt-get install python3-numpy, and use /usr/bin/python3; elsewhere: pip install numpy")

HEADER_BYTES = 256 * 4
MODEL_MAGIC, STATE_MAGIC, TOKENIZER_MAGIC = 20240326, 20240327, 20240328
TOKENS = {16: (20240520, 1, "<u2"), 32: (20240801, 7, "<u4")}  # bits: magic, version, dtype
MARKED = (20240801, 8, "<u4")  # tokens with marks: in the upper bits of a token
NO_LOSS, BEGINS = 1 << 31, 1 << 30  # it is no target of the loss; it begins a document, and then is no target either
ID = BEGINS - 1  # the bits of its id
TOKEN_VERSIONS = {magic: {version} for magic, version, _ in TOKENS.values()}
MODEL_VERSIONS = {3: "<f4", 5: "<u2"}  # fp32; bf16 as its upper 16 bits
MAX_COUNT = 2**31 - 1  # counts stand in an int32

class Error(Exception):
    """What went wrong, in a message for people: the file, what was expected, what was found."""

@contextlib.contextmanager
def writing(where):
    try:
        yield
    except OSError as e:
        raise Error(f"{where}: could not write there: {e.strerror}; no file of this run was left: "
                    "make room, or name another place") from None

# ---- the scripts -----------------------------------------------------------------------------------

class Stopped(BaseException):
    """A signal that ends the program; as an exception, so that what is half-written is cleaned up."""

def run(program, work):
    """Calls work(). Trouble is one line on stderr, and the exit status 1, or 128 + the signal's number."""
    def stop(number, frame):
        raise Stopped(number)
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = [signal.signal(number, stop) for number in numbers]
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # or a file of ours would be stdout, where that is closed
        pass
    os.close(fd)
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text
    try:
        work()
        say(end="", flush=True)
    except Error as e:
        sys.exit(f"{program}: {e}")
    except MemoryError as e:
        sys.exit(f"{program}: not enough memory: {e or 'an allocation failed'}; close something, or raise the limit (ulimit -v)")
    except Stopped as e:
        print(f"{program}: stopped by {signal.Signals(e.args[0]).name}; no file of this run was left", file=sys.stderr)
        sys.exit(128 + e.args[0])
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
    if say.failed:
        sys.exit(f"{program}: the files are written, but not all of the output: {say.failed}")

def say(*words, **how):
    """print(), but a stdout that takes no more does not end the work. Whoever closed a pipe (| head) has seen enough."""
    try:
        if sys.stdout is None:
            say.failed = "stdout is closed"
        else:
            print(*words, **how)
    except OSError as e:
        if not isinstance(e, BrokenPipeError):
            say.failed = e.strerror
        sys.stdout = open(os.devnull, "w")

say.failed = None

def _header(*values):
    return struct.pack("<256i", *values, *[0] * (256 - len(values)))

# ---- reading: checked before believed --------------------------------------------------------------

KINDS = {MODEL_MAGIC: "a GPT-2 model", STATE_MAGIC: "a debug state", TOKENIZER_MAGIC: "a tokenizer", 20240520: "16-bit tokens",
         20240801: "32-bit tokens", 20240803: "a Llama model", 20240527: "a run's state"}

def _read_header(path, kind, versions):
    """versions: {magic: versions that we read}. Returns the header as a list of int and the body's size."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):  # a pipe would be waited for, a device has no size
            raise Error(f"{path}: expected a {kind} in a regular file, found a pipe or a device")
        with open(path, "rb") as f:
            raw = f.read(HEADER_BYTES)
    except OSError as e:
        raise Error(f"{path}: cannot read it: {e.strerror}") from None
    if len(raw) < HEADER_BYTES:
        raise Error(f"{path}: expected a {kind} with a header of {HEADER_BYTES} bytes, found {found.st_size} bytes in all; "
                    "write the file again")
    header = [int(v) for v in np.frombuffer(raw, "<i4")]
    magic, version = header[:2]
    if magic not in versions:
        raise Error(f"{path}: expected a {kind} (magic {' or '.join(map(str, versions))}), found magic {magic}"
                    f"{', which is ' + KINDS[magic] if magic in KINDS else ''}; is it the right file?")
    if version not in versions[magic]:
        raise Error(f"{path}: expected {kind} version {' or '.join(map(str, sorted(versions[magic])))}, found version {version}")
    return header, found.st_size - HEADER_BYTES

def _check_body(path, what, expected, found):
    if expected != found:
        raise Error(f"{path}: expected {expected} bytes behind the header ({what}), found {found}; "
                    "the file is damaged or cut short: write it again")

# ---- tokens ----------------------------------------------------------------------------------------

def token_bits(vocab):
    return 16 if vocab <= 65536 else 32

def write_tokens(f, count, pieces, vocab, marked=False):
    """Writes arrays of ids, `count` in all, to an open file, 16 bits each where the vocabulary fits; or of ids with marks."""
    magic, version, dtype = MARKED if marked else TOKENS[token_bits(vocab)]
    if not 0 < count <= MAX_COUNT:
        raise Error(f"{f.name}: a token file holds 1 to {MAX_COUNT} tokens, not {count}")
    if marked and vocab > BEGINS:
        raise Error(f"{f.name}: beside marks there is room for ids below {BEGINS}, found a vocabulary of {vocab}")
    f.write(_header(magic, version, count))
    for ids in pieces:
        bare = ids & ID if marked else ids
        if int(bare.min()) < 0 or int(bare.max()) >= vocab:
            raise Error(f"{f.name}: ids run from {bare.min()} to {bare.max()}, the vocabulary from 0 to {vocab - 1}")
        f.write(memoryview(np.ascontiguousarray(ids, dtype)).cast("B"))

def _read_tokens(path, kind, versions):
    header, body = _read_header(path, kind, versions)
    dtype = np.dtype(next(d for magic, _, d in TOKENS.values() if magic == header[0]))
    count = header[2]
    if count <= 0:
        raise Error(f"{path}: expected at least one token, found a count of {count}")
    _check_body(path, f"{count} tokens of {dtype.itemsize} bytes", count * dtype.itemsize, body)
    return np.memmap(path, dtype, "r", HEADER_BYTES, (count,))

def read_tokens(path):
    """The ids, mapped and not loaded."""
    return _read_tokens(path, "token file", TOKEN_VERSIONS)

def read_marked_tokens(path):
    """The same of tokens with marks: NO_LOSS, BEGINS and ID take them apart."""
    return _read_tokens(path, "file of tokens with marks", {MARKED[0]: {MARKED[1]}})

# ---- tokenizer: what each id prints ----------------------------------------------------------------

def write_tokenizer(f, tokens, eot):
    """To an open file."""
    if not 0 <= eot < len(tokens):
        raise Error(f"{f.name}: end-of-text id {eot} is outside of the vocabulary of {len(tokens)}")
    for i, token in enumerate(tokens):
        if not 0 < len(token) < 256:  # one byte for the length, and llm.c refuses 0
            raise Error(f"{f.name}: a token has 1 to 255 bytes, but token {i} has {len(token)}")
    f.write(_header(TOKENIZER_MAGIC, 2, len(tokens), eot))
    f.write(b"".join(bytes([len(token)]) + token for token in tokens))

def read_tokenizer(path):
    """Returns a list of bytes, one per id, and the end-of-text id."""
    header, body_size = _read_header(path, "tokenizer", {TOKENIZER_MAGIC: {2}})
    count, eot = header[2], header[3]
    if not 0 < count <= body_size // 2:  # a token takes two bytes at least
        raise Error(f"{path}: expected {count} tokens, found {body_size} bytes for them")
    if not 0 <= eot < count:
        raise Error(f"{path}: expected an end-of-text id below {count}, found {eot}")
    with open(path, "rb") as f:
        f.seek(HEADER_BYTES)
        body = f.read()
    tokens, at = [], 0
    for i in range(count):
        end = at + 1 + (body[at] if at < len(body) else 0)
        if not at + 1 < end <= len(body):
            raise Error(f"{path}: expected {count} tokens of 1 to 255 bytes, found a bad one at id {i}; "
                        "the file is damaged or cut short: write it again")
        tokens.append(body[at + 1:end])
        at = end
    _check_body(path, f"{count} tokens", at, len(body))
    return tokens, eot

# ---- sizes, as in L2,H3,C96,T48,V301 ---------------------------------------------------------------

def sizes(text, model, needed, optional, expected):
    """'L2,H3', with or without a leading 'gpt2:' -> {"L": 2, "H": 3}. Channels divide into heads."""
    items = text.removeprefix(f"{model}:").split(",")
    found = {m[1]: int(m[2]) for m in (re.fullmatch(r"([A-Z]+)([1-9]\d{0,8})", item) for item in items) if m}
    if len(found) != len(items) or not set(needed) <= set(found) <= {*needed, *optional}:
        raise Error(f"{text}: expected {expected}")
    if found["C"] % found["H"]:
        raise Error(f"{text}: {found['C']} channels do not divide into {found['H']} heads")
    return found

# ---- GPT-2 models ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    L: int      # layers
    NH: int     # heads
    C: int      # channels
    maxT: int   # positions
    V: int      # vocabulary
    Vp: int     # vocabulary with padding: rows of wte

    @staticmethod
    def parse(text):
        """'L2,H3,C96,T48,V301', with or without a leading 'gpt2:'."""
        found = sizes(text, "gpt2", "L H C T V".split(), (), "layers, heads, channels, positions, vocabulary as in L2,H3,C96,T48,V301")
        V = found["V"]
        return Config(found["L"], found["H"], found["C"], found["T"], V, -(-V // 128) * 128)

    def shapes(self):
        """The 16 tensors in the order of the file; weights are (out, in), L is the layer."""
        L, C = self.L, self.C
        return {
            "wte": (self.Vp, C), "wpe": (self.maxT, C), "ln1w": (L, C), "ln1b": (L, C), "qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C),
            "attprojw": (L, C, C), "attprojb": (L, C), "ln2w": (L, C), "ln2b": (L, C), "fcw": (L, 4 * C, C), "fcb": (L, 4 * C),
            "fcprojw": (L, C, 4 * C), "fcprojb": (L, C), "lnfw": (C,), "lnfb": (C,),
        }

    def count(self):
        return sum(map(math.prod, self.shapes().values()))  # of Python's integers: a header's sizes cannot overflow here

def to_bf16(x):
    """float32 -> the upper 16 bits, to nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(x, "<f4").view("<u4")
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype("<u2")

def from_bf16(u):
    return (u.astype("<u4") << 16).view("<f4")

def write_model(path, config, tensors, version=3):
    with atomic(path) as (f,):
        f.write(_header(MODEL_MAGIC, version, config.maxT, config.V, config.L, config.NH, config.C, config.Vp))
        for name, shape in config.shapes().items():
            tensor = np.asarray(tensors[name], "<f4")
            if tensor.shape != shape:
                raise Error(f"{path}: expected {name} of shape {shape}, found {tensor.shape}")
            f.write((to_bf16(tensor) if version == 5 else tensor).tobytes())

def _read_arrays(path, arrays):
    """arrays: [(dtype, shape)], one after the other behind the header."""
    with open(path, "rb") as f:
        f.seek(HEADER_BYTES)
        return [np.fromfile(f, dtype, int(np.prod(shape))).reshape(shape) for dtype, shape in arrays]

def model_version(path):
    """3 for fp32, 5 for bf16."""
    return _read_header(path, "GPT-2 model", {MODEL_MAGIC: set(MODEL_VERSIONS)})[0][1]

def read_model(path):
    """Returns a Config and {name: float32 array}; version 5 is widened."""
    header, body = _read_header(path, "GPT-2 model", {MODEL_MAGIC: set(MODEL_VERSIONS)})
    maxT, V, L, NH, C, Vp = header[2:8]
    config = Config(L, NH, C, maxT, V, Vp)
    if min(maxT, V, L, NH, C) <= 0 or Vp < V or C % NH:
        raise Error(f"{path}: expected positive sizes, Vp of at least V, and C a multiple of NH; found {config}")
    dtype = np.dtype(MODEL_VERSIONS[header[1]])
    _check_body(path, f"{config}", config.count() * dtype.itemsize, body)
    arrays = _read_arrays(path, [(dtype, shape) for shape in config.shapes().values()])
    return config, dict(zip(config.shapes(), map(from_bf16, arrays) if header[1] == 5 else arrays))

# ---- debug states: what a model must compute -------------------------------------------------------

def _state_arrays(config, B, T, n):
    """What a state holds, in its order: ids, logits, the loss, all gradients, the losses of n steps."""
    return [("<i4", (B, T)), ("<i4", (B, T)), ("<f4", (B, T, config.V)), ("<f4", ()),
            *(("<f4", shape) for shape in config.shapes().values()), ("<f4", (n,))]

def write_state(path, config, x, y, logits, loss, grads, losses):
    """x, y (B,T); logits (B,T,V); grads as a model's tensors; losses: one per AdamW step."""
    values = [x, y, logits, loss, *(grads[name] for name in config.shapes()), losses]
    with atomic(path) as (f,):
        f.write(_header(STATE_MAGIC, 2, *x.shape, len(losses)))
        for value, (dtype, shape) in zip(values, _state_arrays(config, *x.shape, len(losses))):
            f.write(np.asarray(value, dtype).reshape(shape).tobytes())

def read_state(path, config):
    """Returns {"x", "y", "logits", "loss", "grads": {name: array}, "losses"}."""
    header, body = _read_header(path, "debug state", {STATE_MAGIC: {2}})
    B, T, n = header[2:5]
    if B <= 0 or not 0 < T <= config.maxT or n < 0:
        raise Error(f"{path}: expected B > 0, T of 1 to {config.maxT} and a count of losses, found B={B} T={T} n={n}; "
                    "was it made for this model?")
    _check_body(path, f"B={B} T={T} n={n} with {config}", 4 * (B * T * (2 + config.V) + 1 + config.count() + n), body)
    x, y, logits, loss, *grads, losses = _read_arrays(path, _state_arrays(config, B, T, n))
    for name, ids in (("x", x), ("y", y)):
        if ids.min() < 0 or ids.max() >= config.V:
            raise Error(f"{path}: expected ids from 0 to {config.V - 1} in {name}, found {ids.min()} to {ids.max()}")
    return {"x": x, "y": y, "logits": logits, "loss": loss, "grads": dict(zip(config.shapes(), grads)), "losses": losses}

# ----------------------------------------------------------------------------

def describe(path):
    versions = {**TOKEN_VERSIONS, MARKED[0]: {TOKENS[32][1], MARKED[1]}, MODEL_MAGIC: set(MODEL_VERSIONS), TOKENIZER_MAGIC: {2}, STATE_MAGIC: {2}}
    header, body = _read_header(path, "file of ours", versions)
    if header[0] == MODEL_MAGIC:
        config, _ = read_model(path)
        return f"GPT-2 model, {'bf16' if header[1] == 5 else 'fp32'}, {config.count()} parameters, {config}"
    if header[0] == TOKENIZER_MAGIC:
        tokens, eot = read_tokenizer(path)
        return f"tokenizer, {len(tokens)} tokens, end of text {eot} {tokens[eot]}"
    if header[0] == STATE_MAGIC:  # its size depends on a model that is not named here
        return f"debug state, B={header[2]} T={header[3]} n={header[4]}, {body} bytes"
    if tuple(header[:2]) == MARKED[:2]:
        ids, bits = read_marked_tokens(path), NO_LOSS | BEGINS
        parts = [ids[i:i + (1 << 20)] for i in range(0, len(ids), 1 << 20)]  # what & makes is in memory
        low, high, trained = zip(*((int((p & ID).min()), int((p & ID).max()), np.count_nonzero((p & bits) == 0)) for p in parts))
        return f"tokens with marks, 32 bit, {len(ids)} of them, {sum(trained)} trained, ids {min(low)} to {max(high)}"
    ids = read_tokens(path)
    return f"tokens, {ids.dtype.itemsize * 8} bit, {len(ids)} of them, ids {ids.min()} to {ids.max()}"

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(len(sys.argv) < 2)
    run("binfmt.py", lambda: [say(f"{path}: {describe(path)}") for path in sys.argv[1:]])
