"""Text files to the token files that the trainers read.

    python3 prepro/text.py FILE... [--out data] [--tokenizer bytes|gpt2|PATH/tokenizer.json]
                           [--eot TOKEN] [--val-fraction 0.1] [--shard-tokens N]

Each FILE is one document; - is standard input. Writes OUT/train.bin, OUT/val.bin and
OUT/tokenizer.bin, from which the trainer prints its samples. With --shard-tokens the tokens go
to train_000000.bin, train_000001.bin, ... of at most N tokens each, and val_000000.bin, ...
Token files of an earlier run in OUT are replaced: all of them have one vocabulary.

Tokenizers:
  bytes           ids 0 to 255 are bytes, 256 stands between documents. Needs nothing, takes any file.
  gpt2            GPT-2's, through tiktoken, which downloads its vocabulary once.
  tokenizer.json  any of Hugging Face's, through the tokenizers library.
"""
import argparse
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from typing import Callable

import binfmt  # before numpy: it says what to install where that is missing
import numpy as np
from binfmt import Error

VENV = "python3 -m venv --system-site-packages venv && venv/bin/pip install {0}, then venv/bin/python prepro/text.py ..."


@dataclass
class Tokenizer:
    encode: Callable  # the bytes of a document -> its ids
    tokens: list      # the bytes that each id prints
    eot: int          # the id that stands between documents


# ----------------------------------------------------------------------------
# tokenizers

def bytes_tokenizer():
    # llm.c's files have no token without bytes, so the end of a text gets the name GPT-2 gave it
    tokens = [bytes([i]) for i in range(256)] + [b"<|endoftext|>"]
    return Tokenizer(lambda data: np.frombuffer(data, np.uint8), tokens, 256)


def gpt2_tokenizer():
    try:
        import tiktoken
    except ImportError:
        raise Error("--tokenizer gpt2 needs the tiktoken library: " + VENV.format("tiktoken")) from None
    try:
        enc = tiktoken.get_encoding("gpt2")
    except Exception as e:  # requests' errors, a proxy's, a bad checksum: no common class
        raise Error(f"--tokenizer gpt2: tiktoken could not get its vocabulary ({type(e).__name__}: {str(e)[:200]}). "
                    "It downloads it once. Without a network, run it where there is one with TIKTOKEN_CACHE_DIR=dir "
                    "set, copy that dir here and set the same; or use --tokenizer bytes") from None
    # "ordinary": a text that mentions <|endoftext|> has not ended
    return Tokenizer(lambda data: np.array(enc.encode_ordinary(data.decode()), np.int64),
                     [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab)], enc.eot_token)


EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "[SEP]")


def json_tokenizer(path, eot_name=None):
    if not os.path.isfile(path):
        raise Error(f"--tokenizer {path}: expected bytes, gpt2 or the path of a tokenizer.json, found no such file")
    try:
        import tokenizers
    except ImportError:
        raise Error(f"--tokenizer {path} needs the tokenizers library: " + VENV.format("tokenizers")) from None
    try:
        tok = tokenizers.Tokenizer.from_file(path)
    except Exception as e:
        raise Error(f"{path}: expected a Hugging Face tokenizer.json, found something else: {str(e)[:200]}") from None
    tok.no_truncation()  # a file made for inference may cut every text at 512 tokens
    tok.no_padding()
    if hasattr(tok, "encode_special_tokens"):
        tok.encode_special_tokens = True  # a text that mentions </s> has not ended

    vocab = tok.get_vocab(with_added_tokens=True)
    if eot_name is None:
        eot_name = next((name for name in EOT_NAMES if name in vocab), None)
        if eot_name is None:
            raise Error(f"{path}: has none of {' '.join(EOT_NAMES)}; name the token that ends a text with --eot TOKEN")
    if eot_name not in vocab:
        raise Error(f"--eot {eot_name}: is not in the vocabulary of {path}")
    tokens = [b"<unused %d>" % i for i in range(max(vocab.values()) + 1)]  # a vocabulary may have holes
    spell = speller(tok)
    for name, i in vocab.items():
        tokens[i] = spell(name, i) or name.encode()
        if len(tokens[i]) > 255:
            raise Error(f"{path}: token {i} has {len(tokens[i])} bytes, and tokenizer.bin has room for 255; "
                        "train a tokenizer with shorter tokens")
    return Tokenizer(lambda data: np.array(tok.encode(data.decode(), add_special_tokens=False).ids, np.int64),
                     tokens, vocab[eot_name])


def byte_alphabet():
    """Byte-level BPE writes each byte as one printable character: itself if that is printable,
    else the next free one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


def speller(tok):
    """The function from a token's name in the vocabulary (and id) to the bytes that it prints.

    decode() of a single id will not do: it drops a leading space and garbles part of a character.
    """
    spec = json.loads(tok.to_str())
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


# ----------------------------------------------------------------------------
# documents

def read_document(path):
    if path == "-":
        return sys.stdin.buffer.read()
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError as e:
        raise Error(f"{path}: cannot read it: {e.strerror}") from None


def encode_documents(paths, tokenizer):
    """One array of ids per document that has any text, each with the end-of-text id in front.

    In front, as GPT-2's data has it: between two documents it is the same as behind, and the first
    document gets one too, so that sampling, which starts from this id, starts where training did.
    """
    dtype = binfmt.TOKENS[binfmt.token_bits(len(tokenizer.tokens))][2]
    documents = []
    for path in paths:
        data = read_document(path)
        try:
            ids = tokenizer.encode(data)
        except UnicodeDecodeError as e:
            raise Error(f"{path}: expected UTF-8, found byte 0x{data[e.start]:02x} at offset {e.start}; "
                        "convert it (iconv), or use --tokenizer bytes, which takes any file") from None
        if len(ids) == 0:
            print(f"{path}: is empty, left out")
            continue
        documents.append(np.concatenate([[tokenizer.eot], ids]).astype(dtype))
    if not documents:
        raise Error(f"{' '.join(paths)[:200]}: expected text, found nothing in any of them")
    return documents


def split(documents, fraction, eot):
    """Returns training and validation tokens.

    Validation is the tail of *each* document, so that it asks about every kind of text that was
    trained on, and not about the last file alone; of one document it is simply the last fraction.
    A tail is one piece: cutting out blocks here and there would train on both sides of each.
    Documents too small to give 1024 tokens save up, and the one after goes over whole (the one
    after, because the one that makes up the sum is more often a long one).
    """
    total = sum(map(len, documents))
    piece = min(1024, fraction * total / 10)
    train, val, owed = [], [], 0.0
    for i, ids in enumerate(documents):
        share = fraction * len(ids)
        gives = max(owed, share) >= piece or i == len(documents) - 1
        owed += share
        n = min(round(owed), len(ids)) if gives else 0
        owed -= n
        train.append(ids[:len(ids) - n])
        if n:
            tail = ids[len(ids) - n:]
            if val and tail[0] != eot:  # it does not go on where the piece before it stopped
                val.append(np.array([eot], ids.dtype))
            val.append(tail)
    train = np.concatenate(train)
    val = np.concatenate(val) if val else train[:0]
    if len(train) == 0 or (fraction > 0 and len(val) == 0):
        raise Error(f"{total} tokens are too few to split: give more text, or --val-fraction 0")
    return train, val


# ----------------------------------------------------------------------------
# files

def shards(folder, stem, ids, limit):
    """[(path, ids)]: one file, or as many of nearly equal length as the limit asks for. Equal,
    because a short last one might hold less than one batch."""
    if len(ids) == 0:
        return []
    if limit is None:
        if len(ids) > binfmt.MAX_COUNT:
            raise Error(f"{stem}: {len(ids)} tokens are too many for one file; use --shard-tokens 100000000")
        return [(os.path.join(folder, f"{stem}.bin"), ids)]
    parts = np.array_split(ids, -(-len(ids) // limit))
    return [(os.path.join(folder, f"{stem}_{i:06d}.bin"), part) for i, part in enumerate(parts)]


def write_all(folder, outputs, tokenizer):
    """All files or none; then drops what an earlier run left under the same names."""
    paths = [path for path, _ in outputs] + [os.path.join(folder, "tokenizer.bin")]
    try:
        with binfmt.atomic(*paths) as files:
            for f, (_, ids) in zip(files, outputs):
                binfmt.put_tokens(f, ids, len(tokenizer.tokens))
            binfmt.put_tokenizer(files[-1], tokenizer.tokens, tokenizer.eot)
    except OSError as e:
        raise Error(f"{folder}: could not write there: {e.strerror}; no file of this run was left") from None
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if re.fullmatch(r"(train|val)(_\d{6})?\.bin", name) and path not in paths:
            os.unlink(path)
            print(f"removed {path}, which an earlier run had left")


def batch_that_fits(tokens):
    """-b and -t for the command that we print: 16 x 64, or less where the shortest file is short.
    A batch reads one token more than it has, the last one's target."""
    T = 64
    while T > 8 and T + 1 > tokens:
        T //= 2
    B = 16
    while B > 1 and B * T + 1 > tokens:
        B //= 2
    return B, T


def prepare(paths, out="data", tokenizer="bytes", eot=None, val_fraction=0.1, shard_tokens=None):
    """Does what the command does; trouble comes as a binfmt.Error."""
    if not 0 <= val_fraction < 1:
        raise Error(f"--val-fraction {val_fraction}: expected a number from 0 to less than 1")
    if shard_tokens is not None and not 0 < shard_tokens <= binfmt.MAX_COUNT:
        raise Error(f"--shard-tokens {shard_tokens}: expected 1 to {binfmt.MAX_COUNT}")
    for path in paths:  # what can fail at once fails before the long part
        if path != "-" and not os.path.exists(path):
            raise Error(f"{path}: no such file")
        if os.path.isdir(path):
            raise Error(f"{path}: is a folder; name its files, as in {path.rstrip('/')}/*.txt")
    tok = make_tokenizer(tokenizer, eot)
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as e:
        raise Error(f"{out}: cannot make this folder: {e.strerror}; choose another with --out") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise Error(f"{out}: cannot write into this folder; choose another with --out")

    documents = encode_documents(paths, tok)
    train, val = split(documents, val_fraction, tok.eot)
    outputs = shards(out, "train", train, shard_tokens) + shards(out, "val", val, shard_tokens)
    write_all(out, outputs, tok)

    V = len(tok.tokens)
    print(f"{len(documents)} document{'s' * (len(documents) > 1)}, {len(train) + len(val)} tokens, "
          f"vocabulary {V} ({os.path.basename(tokenizer)}), end of text {tok.eot}")
    for path, ids in outputs:
        print(f"wrote {path}: {len(ids)} tokens of {binfmt.token_bits(V)} bits")
    print(f"wrote {os.path.join(out, 'tokenizer.bin')}")
    B, T = batch_that_fits(min(len(ids) for _, ids in outputs))
    pattern = "{}.bin" if shard_tokens is None else "{}_*.bin"
    flags = [f"{flag} {shlex.quote(os.path.join(out, pattern.format(stem)))}"
             for flag, stem in [("-i", "train")] + [("-j", "val")] * (len(val) > 0)]
    if len(val) == 0:
        flags.append("-v 0")
    print("to train a small model on it:")
    print(f"./train_gpt2 -e gpt2:L4,H4,C128,T64,V{V} {' '.join(flags)} -b {B} -t {T}")


def add_options(parser, out):
    parser.add_argument("--out", default=out, metavar="DIR", help=f"folder to write to ({out})")
    parser.add_argument("--tokenizer", default="bytes", metavar="NAME",
                        help="bytes (default), gpt2, or the path of a tokenizer.json")
    parser.add_argument("--eot", metavar="TOKEN", help="the end of a text in a tokenizer.json, if it is not found")
    parser.add_argument("--val-fraction", type=float, default=0.1, metavar="X", help="share kept for validation (0.1)")
    parser.add_argument("--shard-tokens", type=int, metavar="N", help="several files, of at most N tokens each")


def run(program, work):
    """Calls work(); trouble is one line on stderr and exit status 1."""
    try:
        work()
    except Error as e:
        sys.exit(f"{program}: {e}")
    except KeyboardInterrupt:
        sys.exit(f"{program}: stopped; no file of this run was left")


def main():
    parser = argparse.ArgumentParser(description="Text files to token files.", epilog=__doc__.split("\n\n", 2)[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="a text, one document; - is standard input")
    add_options(parser, "data")
    a = parser.parse_args()
    run("text.py", lambda: prepare(a.files, a.out, a.tokenizer, a.eot, a.val_fraction, a.shard_tokens))


if __name__ == "__main__":
    main()
