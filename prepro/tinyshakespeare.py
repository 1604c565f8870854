"""Tiny Shakespeare (1.1 MB, the plays' text of karpathy/char-rnn) to token files.

    python3 prepro/tinyshakespeare.py [--file COPY] [--out data/tinyshakespeare] [--tokenizer NAME] ...

Downloads the text to OUT/input.txt, unless that or a --file is there, checks its SHA-256 and hands
it over to text.py, whose options work here too.
"""
import argparse
import hashlib
import os
import urllib.request

import binfmt
import text
from binfmt import Error

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE = 1115394
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

def check(parts, source):
    digest, size = hashlib.sha256(), 0
    for part in parts:
        digest.update(part)
        size += len(part)
    if digest.hexdigest() != SHA256:
        raise Error(f"{source}: expected {SIZE} bytes with SHA-256 {SHA256}, found {size} bytes with {digest.hexdigest()}; "
                    f"it is damaged or another text (text.py takes any): get it again from {URL}")

def download(path):
    try:
        with urllib.request.urlopen(URL, timeout=60) as reply:
            data = reply.read(4 * SIZE)  # a page about an error may be of any size
    except (OSError, ValueError) as e:  # URLError and time-outs are OSErrors
        raise Error(f"{URL}: could not get it ({e}); without a network, bring a copy and use --file COPY") from None
    check([data], URL)
    with binfmt.writing(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with binfmt.atomic(path) as (f,):
            f.write(data)
    text.say(f"wrote {path}, from {URL}")

def prepare(file, out, **options):
    path = file or os.path.join(out, "input.txt")
    if not file and not os.path.exists(path):
        download(path)
    if os.path.exists(path) and not os.path.isfile(path):  # it is read twice
        raise Error(f"{path}: expected a file, found a folder, pipe or device")
    check(text.blocks(path), path)
    text.prepare([path], out, **options)

def main():
    parser = argparse.ArgumentParser(description="Tiny Shakespeare to token files.", epilog=__doc__.split("\n\n", 2)[2])
    parser.add_argument("--file", metavar="COPY", help="the text, where there is no network")
    text.add_options(parser, "data/tinyshakespeare")
    a = parser.parse_args()
    binfmt.run("tinyshakespeare.py", lambda: prepare(**vars(a)))

if __name__ == "__main__":
    main()
