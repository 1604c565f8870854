"""Hugging Face's files: safetensors, and a model's directory (numpy and the standard library only).

safetensors: 8 bytes that count a header, the header in JSON (of each tensor its type, shape and place), the tensors. A bf16 tensor is
an array of uint16 here, its upper 16 bits (binfmt.to_bf16).
"""
import importlib
import json
import os
import struct

import binfmt  # before numpy: it says what to install where that is missing
import numpy as np
from binfmt import Error

TYPES = {"F32": "<f4", "I32": "<i4", "BF16": "<u2"}

def library(name, what):
    """A module of PyPI's that something needs."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Error(f"{what} needs the {name} library: python3 -m venv --system-site-packages venv && venv/bin/pip install {name}, then "
                    "venv/bin/python prepro/text.py ...") from None

def write_safetensors(f, tensors):
    """{name: array of float32, int32 or, for bf16, uint16} to an open file."""
    header, at = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses a file without it
    for name, t in tensors.items():
        kind = next(kind for kind, dtype in TYPES.items() if t.dtype == dtype)
        header[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    f.write(struct.pack("<Q", len(text)) + text)
    for t in tensors.values():
        f.write(memoryview(np.ascontiguousarray(t)).cast("B"))

def read_safetensors(path):
    """Returns {name: array}; bf16 comes as float32."""
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError as e:
        raise Error(f"{path}: cannot read it: {e.strerror}") from None
    try:
        end = 8 + struct.unpack_from("<Q", data)[0]
        header, tensors = json.loads(data[8:end]), {}
        for name, t in header.items():
            if name != "__metadata__":
                begin, stop = t["data_offsets"]
                values = np.frombuffer(data[end + begin:end + stop], TYPES[t["dtype"]]).reshape(t["shape"])
                tensors[name] = binfmt.from_bf16(values) if t["dtype"] == "BF16" else values
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as e:
        raise Error(f"{path}: expected safetensors with tensors of {', '.join(TYPES)}, found something else ({str(e)[:200]})") from None
    return tensors

def read_json(path):
    """An object, which is empty where there is no such file."""
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise Error(f"{path}: cannot read it: {e.strerror}") from None
    except ValueError as e:
        raise Error(f"{path}: expected JSON, found something else: {str(e)[:200]}") from None
    if not isinstance(found, dict):
        raise Error(f"{path}: expected a JSON object")
    return found

def write_directory(folder, files, beside=None):
    """files: {name: a dict for a .json, or tensors for a .safetensors}; beside: the same with whole paths. All are written, or none."""
    with binfmt.writing(folder):
        os.makedirs(folder, exist_ok=True)
        every = {**{os.path.join(folder, name): what for name, what in files.items()}, **(beside or {})}
        with binfmt.atomic(*every) as opened:
            for f, (path, what) in zip(opened, every.items()):
                if path.endswith(".safetensors"):
                    write_safetensors(f, what)
                else:
                    f.write(json.dumps(what, indent=2, ensure_ascii=False).encode() + b"\n")
