"""Models in Hugging Face's directories: what comes in goes out to the bit, and what is wrong with one is said before anything is written."""
import json
import os
import shutil

import pytest

from helpers import (Shape, Tensor, close, hf_config, hf_tensors, learned, model_bytes, names, options, pack, random_model,
                     read_model, read_safetensors, safetensors_bytes, says, unpack, write_hf)

SHAPE = Shape(L=2, H=2, C=32, T=32, V=259)
STILL = ["-x", 1, "-l", 0]   # a rate of 0 leaves every weight as it is

def tensors_of(dtype, shape=SHAPE, seed=1):
    """{name: Tensor} of values that no narrower type holds, among them subnormals of F16, and what rounds to infinity in it."""
    model = random_model(shape, seed)
    if dtype == "F32":
        model = {name: [x * 1.0001 for x in values] for name, values in model.items()}
    model["wpe"][:4] = [2.0**-24, -(2.0**-24) * 3, 2.0**-15, 60000.0 / 2**20]
    return hf_tensors(shape, model, dtype)

# ---- there and back ------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-fp32"])
@pytest.mark.parametrize("dtype, shards, prefix", [("F32", 1, True), ("F32", 3, False), ("BF16", 1, False), ("BF16", 7, True), ("F16", 1, True), ("F16", 2, True)])
def test_in_and_out(lab, variant, dtype, shards, prefix):
    """Whatever the build holds weights in, and however the file names and divides them. Masks and a second head are left out."""
    tensors = tensors_of(dtype)
    masks = {f"transformer.h.{l}.attn.{name}": Tensor("U8", [1, 1, 32, 32], bytes(1024)) for l in range(2) for name in ("bias", "masked_bias")}
    given = {**masks, **tensors, "lm_head.weight": Tensor(dtype, [259, 32], tensors["transformer.wte.weight"].data)}
    if not prefix:
        given = {name.replace("transformer.", ""): t for name, t in given.items()}
    more = {"task_specific_params": {"text-generation": {"do_sample": True, "é\"\\\n": [1, 2.5e-3, None]}}, "n_inner": None, "resid_pdrop": 0.0,
            "eos_token_id": [258, 3], "dtype" if shards > 1 else "torch_dtype": "float64"}
    write_hf(lab.path("in"), SHAPE, given, shards, **more)
    beside = {"tokenizer.json": b'{"a": 1}', "tokenizer_config.json": b"\xff\x00", "merges.txt": b"", "vocab.json": b"{}", "generation_config.json": b"{}",
              "special_tokens_map.json": b"{}", "README.md": b"no", "pytorch_model.bin": b"no"}
    for name, data in beside.items():
        lab.path(f"in/{name}").write_bytes(data)
    lab.train("-e", "in", *STILL, "-o", "out", variant=variant)
    assert read_safetensors(lab.path("out/step_00000001/model.safetensors")) == tensors
    copied = {name: data for name, data in beside.items() if name not in ("README.md", "pytorch_model.bin")}
    out = {name.split("/")[1]: data for name, data in lab.files("out").items()}
    assert {name: out[name] for name in copied} == copied and set(out) == {*copied, "config.json", "model.safetensors", "state_00000.bin"}
    config, word = json.loads(out["config.json"]), {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtype]
    assert config["torch_dtype"] == word and config.get("dtype", word) == word and ("dtype" in config) == (shards > 1)
    assert {**config, "torch_dtype": 0, "dtype": 0, "bos_token_id": 0} == {**hf_config(SHAPE), **more, "tie_word_embeddings": True, "torch_dtype": 0,
                                                                           "dtype": 0, "bos_token_id": 0}
    lab.train("-e", "out/step_00000001", *STILL, "-o", "again", variant=variant)   # and once more, from what we wrote
    assert [lab.files("again")[name] for name in names(1)[:2]] == [out[name] for name in ("model.safetensors", "config.json")]

def test_of_a_size(lab):
    """A model that came from nowhere has a config that transformers needs, in the type of the build."""
    for variant, dtype in (("cpu-bf16", "BF16"), ("cpu-fp32", "F32")):
        lab.train("-e", SHAPE.size(), "-x", 1, "-o", variant, variant=variant)
        tensors = read_safetensors(lab.path(f"{variant}/step_00000001/model.safetensors"))
        assert {t.dtype for t in tensors.values()} == {dtype} and {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in tensors_of("F32").items()}
        config = json.loads(lab.path(f"{variant}/step_00000001/config.json").read_text())
        assert {**hf_config(SHAPE), "tie_word_embeddings": True, "bos_token_id": 258, "eos_token_id": 258}.items() <= config.items()

@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-fp32"])
@pytest.mark.parametrize("asked", ["f32", "bf16", "f16"])
def test_save_dtype(lab, variant, asked):
    """From the fp32 masters, rounded once, to the nearest."""
    tensors = tensors_of("F32")
    write_hf(lab.path("in"), SHAPE, tensors)
    lab.train("-e", "in", *STILL, "--save-dtype", asked, "-o", "out", variant=variant)
    assert read_safetensors(lab.path("out/step_00000001/model.safetensors")) == {
        name: Tensor(asked.upper(), t.shape, pack(asked.upper(), unpack(t))) for name, t in tensors.items()}

@pytest.mark.parametrize("variant, asked", [("cpu-bf16", "f32"), ("cpu-bf16", "f16"), ("cpu-bf16", "bf16"), ("cpu-fp32", "bf16"), ("cpu-fp32", "f16")])
@pytest.mark.parametrize("w", [1, 0])
def test_resume_is_exact_in_every_type(lab, variant, asked, w):
    """The file of weights may be narrower than what is trained: the state has the rest."""
    write_hf(lab.path("in"), SHAPE, tensors_of("F32"))
    how = ["-e", "in", "-w", w, "-n", 3, "-k", "constant", "--save-dtype", asked]
    lab.train(*how, "-x", 6, "-o", "straight", variant=variant)
    lab.train(*how, "-x", 3, "-o", "half", variant=variant)
    lab.train(*how, "-x", 6, "-o", "half", "-y", 1, variant=variant)
    assert {n: x for n, x in lab.files("half").items() if "00006" in n} == {n: x for n, x in lab.files("straight").items() if "00006" in n}

@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-fp32"])
def test_write_bin(lab, variant):
    """llm.c's file in the type of the build, and the same model from either."""
    write_hf(lab.path("in"), SHAPE, tensors_of("BF16"))
    lab.train("-e", "in", *STILL, "--write-bin", "m.bin", "-o", "out", variant=variant)
    model = read_model(lab.path("out/step_00000001"), SHAPE)
    assert lab.path("m.bin").read_bytes() == model_bytes(SHAPE, model, 3 if variant == "cpu-fp32" else 5)
    assert learned(lab.train("-e", "m.bin", variant=variant)) == learned(lab.train("-e", "in", variant=variant))

def test_dump_gradients(lab):
    """Under the names and in the shapes of the weights; they are the first step's, and writing them changes nothing."""
    write_hf(lab.path("in"), SHAPE, {name.replace("transformer.", ""): t for name, t in tensors_of("F32").items()})
    plain = lab.train("-e", "in", "-d", 128, "-x", 2, variant="cpu-fp32")
    dumped = lab.train("-e", "in", "-d", 128, "-x", 2, "--dump-gradients", "g.safetensors", variant="cpu-fp32")
    assert learned(plain) == learned(dumped)
    found = read_safetensors(lab.path("g.safetensors"))
    loss, expected = found.pop("loss"), tensors_of("F32")
    assert loss.shape == [] and {n: (t.dtype, t.shape) for n, t in found.items()} == {n: ("F32", t.shape) for n, t in expected.items()}
    alone = lab.train("-e", "in", "-x", 1, "--dump-gradients", "one.safetensors", variant="cpu-fp32")
    assert close(unpack(loss)[0], alone.losses[0], 1e-5)
    norm = sum(x * x for n, t in read_safetensors(lab.path("one.safetensors")).items() if n != "loss" for x in unpack(t)) ** 0.5
    assert close(norm, alone.steps[0]["grad_norm"], 1e-4)
    says(lab.run(*options("-e", "in", "--dump-gradients", "none/g", "-o", "out"), status=1).err, "--dump-gradients none/g")

def test_the_tokenizer_goes_along_when_its_source_has_gone(lab):
    """A resumed run has it from its own checkpoint, which --keep removes."""
    write_hf(lab.path("in"), SHAPE, tensors_of("F32"))
    lab.path("in/tokenizer.json").write_text("{}")
    lab.train("-e", "in", "-x", 2, "-o", "out")
    lab.train("-e", None, "-x", 5, "-n", 1, "-nk", 1, "-o", "out", "-y", 1)
    assert set(lab.files("out")) == {*names(5), "step_00000005/tokenizer.json"}

@pytest.mark.parametrize("option", ["--write-bin", "--dump-gradients"])
@pytest.mark.parametrize("name", ["train.bin", "val.bin", "in/model.safetensors", "none/x", "out"])
def test_files_of_others_are_no_place_to_write_to(lab, option, name):
    """Said at the start."""
    write_hf(lab.path("in"), SHAPE, tensors_of("F32"))
    lab.path("out").mkdir()
    before = lab.files(".")
    done = lab.run(*options("-e", "in", "-v", 1, option, name), status=None)
    assert done.status in (1, 2) and "step     1" not in done.out
    says(done.err, f"{option} {name}")
    assert lab.files(".") == before

# ---- bad directories -----------------------------------------------------------------------------

def entry(name, **lies):
    return lambda entries: entries["transformer." + name].update(lies)

def moved(entries):
    """A tensor lies where another one does."""
    entries["transformer.ln_f.bias"]["data_offsets"] = entries["transformer.ln_f.weight"]["data_offsets"]

def gap(entries):
    for e in entries.values():
        if "data_offsets" in e and e["data_offsets"][0] > 0:
            e["data_offsets"] = [x + 4 for x in e["data_offsets"]]

NAME, END = "transformer.wte.weight", 259 * 32 * 4
# what is wrong with model.safetensors: what safetensors_bytes is told, how its bytes are changed, what the message must name
BAD_FILES = {
    "empty": (dict(), lambda b: b"", ["8 bytes"]),
    "7 bytes": (dict(), lambda b: b[:7], ["7"]),
    "half a header": (dict(), lambda b: b[:500], ["500", "cut off"]),
    "one byte less": (dict(), lambda b: b[:-1], ["cut off"]),
    "one byte more": (dict(), lambda b: b + b"\0", ["1 more bytes"]),
    "a header of 2^40 bytes": (dict(length=2**40), None, [2**40, "16 MiB"]),
    "a header of 2^64 - 1 bytes": (dict(length=2**64 - 1), None, [2**64 - 1]),
    "a header of 2^64 - 8 bytes": (dict(length=2**64 - 8), None, [2**64 - 8]),
    "a header of 0 bytes": (dict(length=0), None, ["no JSON"]),
    "no JSON": (dict(header=b'{"a": ' + b" " * 100), None, ["JSON"]),
    "a list": (dict(header=b"[]      "), None, ["object"]),
    "a number for a tensor": (dict(change=lambda e: e.update({NAME: 1})), None, [NAME]),
    "deep": (dict(header=b"[" * 100000), None, ["64 levels"]),
    "a zero byte": (dict(header=b'{"a\0b": {}}'), None, ["control character"]),
    "a name twice": (dict(header=b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}'),
                     None, ["name a only once"]),
    "past the end": (dict(change=entry("ln_f.bias", data_offsets=[0, 2**50])), None, ["transformer.ln_f.bias", 2**50]),
    "offsets beyond 64 bits": (dict(change=entry("ln_f.bias", data_offsets=[0, 2**64 + 128])), None, ["transformer.ln_f.bias"]),
    "offsets below 0": (dict(change=entry("ln_f.bias", data_offsets=[-128, 0])), None, ["transformer.ln_f.bias"]),
    "offsets backwards": (dict(change=entry("ln_f.bias", data_offsets=[128, 0])), None, ["transformer.ln_f.bias"]),
    "one offset": (dict(change=entry("ln_f.bias", data_offsets=[0])), None, ["transformer.ln_f.bias", "data_offsets"]),
    "offsets with a fraction": (dict(change=entry("ln_f.bias", data_offsets=[0.0, 128.0])), None, ["transformer.ln_f.bias", "data_offsets"]),
    "no offsets": (dict(change=entry("ln_f.bias", data_offsets=None)), None, ["transformer.ln_f.bias", "data_offsets"]),
    "no shape": (dict(change=entry("ln_f.bias", shape="32")), None, ["transformer.ln_f.bias", "shape"]),
    "a shape below 0": (dict(change=entry("ln_f.bias", shape=[-32])), None, ["transformer.ln_f.bias", "shape"]),
    "a shape over 64 bits": (dict(change=entry("ln_f.bias", shape=[2**32, 2**32, 32])), None, ["transformer.ln_f.bias", "2^64"]),
    "a shape of 2^62": (dict(change=entry("ln_f.bias", shape=[2**31, 2**31])), None, ["transformer.ln_f.bias", "2^64"]),
    "a shape over 2^53": (dict(change=entry("ln_f.bias", shape=[2**60])), None, ["transformer.ln_f.bias", "shape"]),
    "a shape that is not its bytes": (dict(change=entry("ln_f.bias", shape=[33])), None, ["transformer.ln_f.bias", "[33]", 132, 128]),
    "another type": (dict(change=entry("ln_f.bias", dtype="BF16")), None, ["transformer.ln_f.bias", 64, 128]),
    "an unknown type": (dict(change=entry("ln_f.bias", dtype="F12")), None, ["transformer.ln_f.bias", "F12"]),
    "a type that is a number": (dict(change=entry("ln_f.bias", dtype=32)), None, ["transformer.ln_f.bias", "type"]),
    "overlap": (dict(change=moved), None, ["transformer.ln_f."]),
    "a gap": (dict(change=gap), lambda b: b + bytes(4), ["begins at byte", END + 4, END]),
    "a gap at the start": (dict(change=lambda e: [x.update(data_offsets=[i + 4 for i in x["data_offsets"]]) for x in e.values() if "shape" in x]),
                           lambda b: b + bytes(4), [NAME, "begins at byte 4"]),
    "a pickle": (dict(), lambda b: b"PK\3\4" + b[8:], ["safetensors"]),
}

@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_safetensors(lab, name):
    how, change, named = BAD_FILES[name]
    write_hf(lab.path("in"), SHAPE, tensors_of("F32"))
    data = safetensors_bytes(tensors_of("F32"), **how)
    lab.path("in/model.safetensors").write_bytes(change(data) if change else data)
    refused(lab, "in/model.safetensors", *named)

def refused(lab, *named, status=1):
    """Under limits of memory and time; nothing is written."""
    done = lab.run(*options("-e", "in", "-o", "out", "--write-bin", "m.bin"), status=status, timeout=20, variant="cpu-fp32", env={"SIMT_MEMORY": 10**9})
    says(done.err, *named)
    assert lab.files("out") == {} and not lab.path("m.bin").exists() and done.err.count("train_gpt2: ") == 1

L0 = "transformer.h.0.attn.c_attn.weight"
BAD_TENSORS = {
    "missing": (lambda t: t.pop("transformer.h.1.ln_2.bias"), ["h.1.ln_2.bias"]),
    "one too many": (lambda t: t.update({"transformer.h.2.ln_1.bias": t["transformer.h.1.ln_1.bias"]}), ["h.2.ln_1.bias", "model.safetensors"]),
    "foreign": (lambda t: t.update({"model.embed_tokens.weight": t[NAME]}), ["model.embed_tokens.weight"]),
    "an adapter's": (lambda t: t.update({L0.replace("weight", "lora_A.weight"): t[NAME]}), ["lora_A"]),
    "not transposed": (lambda t: t.update({L0: Tensor("F32", [96, 32], t[L0].data)}), [L0, "[32, 96]", "[96, 32]", "model.safetensors"]),
    "flat": (lambda t: t.update({L0: Tensor("F32", [32 * 96], t[L0].data)}), [L0, "[32, 96]", "[3072]"]),
    "a vocabulary of another size": (lambda t: t.update({NAME: Tensor("F32", [258, 32], t[NAME].data[:-128])}), [NAME, "[259, 32]", "[258, 32]"]),
    "without elements": (lambda t: t.update({NAME: Tensor("F32", [0, 32], b"")}), [NAME, "[0, 32]"]),
    "a vector that is a number": (lambda t: t.update({"transformer.ln_f.bias": Tensor("F32", [], bytes(4))}), ["ln_f.bias", "[32]", "[]"]),
    **{f"of {dtype}": (lambda t, dtype=dtype, size=size: t.update({NAME: Tensor(dtype, [259, 32], bytes(259 * 32 * size))}), [NAME, "F32, BF16 or F16", dtype])
       for dtype, size in (("I64", 8), ("F64", 8), ("I8", 1), ("F8_E4M3", 1), ("BOOL", 1))},
    "nothing": (lambda t: t.clear(), ["wte.weight"]),
    "both with and without transformer.": (lambda t: t.update({"wte.weight": t[NAME]}), ["wte.weight"]),
}

@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(lab, name):
    change, named = BAD_TENSORS[name]
    tensors = tensors_of("F32")
    change(tensors)
    write_hf(lab.path("in"), SHAPE, tensors)
    refused(lab, "in", *named)

BAD_CONFIGS = {  # text of config.json, or what stands in it otherwise: what the message must name
    "llama": (dict(model_type="llama", architectures=["LlamaForCausalLM"]), ["model_type", "llama", "gpt2"]),
    "no type": (dict(model_type=None), ["model_type"]), "a number for a type": (dict(model_type=3), ["model_type"]),
    "n_inner": (dict(n_inner=129), ["n_inner", 129]), "relu": (dict(activation_function="relu"), ["activation_function", "relu"]),
    "epsilon": (dict(layer_norm_epsilon=2), ["layer_norm_epsilon"]), "untied": (dict(tie_word_embeddings=False), ["tie_word_embeddings"]),
    "by layer": (dict(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx"]),
    "unscaled": (dict(scale_attn_weights=False), ["scale_attn_weights"]), "cross": (dict(add_cross_attention=True), ["add_cross_attention"]),
    "a word for a flag": (dict(tie_word_embeddings="yes"), ["tie_word_embeddings", "true or false"]),
    "a text for a number": (dict(n_embd="32"), ["n_embd", "whole number"]), "a fraction": (dict(n_embd=32.5), ["n_embd", "32.5"]),
    "below 0": (dict(n_layer=-1), ["n_layer", "-1"]), "huge": (dict(n_embd=2**31), ["n_embd", 2**31]), "beyond 64 bits": (dict(vocab_size=2**65), ["vocab_size"]),
    "one layer more": (dict(n_layer=3), ["h.2."]), "one less": (dict(n_layer=1), ["h.1."]), "2^30 layers": (dict(n_layer=2**30), ["1073741824"]),
    "no layers": (dict(n_layer=0), ["n_layer"]), "no heads": (dict(n_head=0), ["n_head"]), "no channels": (dict(n_embd=0), ["n_embd"]),
    "no vocabulary": (dict(vocab_size=0), ["vocab_size"]), "no positions": (dict(n_positions=0), ["n_positions"]), "heads": (dict(n_head=3), ["H 3"]),
    "2^30 tokens": (dict(vocab_size=2**30), ["transformer.wte.weight", "[1073741824, 32]"]),
    "2^30 positions": (dict(n_positions=2**30), ["transformer.wpe.weight", "[1073741824, 32]"]),
    "empty": (b"", ["JSON"]), "cut": (b'{"model_type": "gpt2", ', ["JSON", "byte 23"]), "no object": (b'["gpt2"]', ["object"]),
    "twice": (b'{"model_type": "gpt2", "n_embd": 1, "n_embd": 32}', ["n_embd only once"]), "a comma": (b'{"model_type": "gpt2",}', ["JSON"]),
    "a comment": (b'{"model_type": "gpt2"} // x', ["JSON", "nothing more"]), "NaN": (b'{"model_type": "gpt2", "layer_norm_epsilon": NaN}', ["JSON"]),
    "01": (b'{"n_embd": 01}', ["JSON"]), "quotes": (b"{'model_type': 'gpt2'}", ["JSON"]), "UTF-16": ('{"a": 1}'.encode("utf-16"), ["JSON"]),
    "half a surrogate": (b'{"a": "\\ud800"}', ["JSON", "surrogate"]), "an escape": (b'{"a": "\\x41"}', ["JSON", "escape"]),
    "a line break in a text": (b'{"a": "b\nc"}', ["JSON"]), "deep": (b'{"a":' * 10000, ["64 levels"]),
    "an epsilon beyond doubles": (b'{"model_type": "gpt2", "layer_norm_epsilon": 1e999}', ["layer_norm_epsilon"]),
}

@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_config(lab, name):
    config, named = BAD_CONFIGS[name]
    write_hf(lab.path("in"), SHAPE, tensors_of("F32"), **(config if isinstance(config, dict) else {}))
    if isinstance(config, bytes):
        lab.path("in/config.json").write_bytes(config)
    done = lab.run(*options("-e", "in", "-o", "out"), status=None, timeout=20, variant="cpu-fp32", env={"SIMT_MEMORY": 10**9})
    assert done.status in (1, 2), (done.status, done.err)
    says(done.err, "in", *named)
    assert lab.files("out") == {}

BAD_INDICES = {  # changes to the index, and what the message must name
    "a missing shard": (lambda lab, m: lab.path("in/model-00002-of-00003.safetensors").unlink(), ["model-00002-of-00003.safetensors"]),
    "a tensor that is nowhere": (lambda lab, m: m.update({"transformer.h.9.x": "model-00001-of-00003.safetensors"}), ["transformer.h.9.x", "00001-of-00003"]),
    "a tensor in another shard": (lambda lab, m: m.update({NAME: "model-00002-of-00003.safetensors"}), [NAME, "model-00002-of-00003.safetensors"]),
    "a tensor that it does not name": (lambda lab, m: m.pop(NAME), ["wte.weight"]),
    "a path": (lambda lab, m: m.update({NAME: "../in/model-00001-of-00003.safetensors"}), ["same directory", "../in/"]),
    "an absolute path": (lambda lab, m: m.update({NAME: "/etc/passwd"}), ["same directory", "/etc/passwd"]),
    "the folder above": (lambda lab, m: m.update({NAME: ".."}), ["in/.."]), "no name": (lambda lab, m: m.update({NAME: ""}), ["same directory"]),
    "a number": (lambda lab, m: m.update({NAME: 1}), ["same directory"]), "a zero byte": (lambda lab, m: m.update({NAME: "model-00001-of-00003.safetensors\0x"}), ["in"]),
    "nothing": (lambda lab, m: m.clear(), ["weight_map"]),
    "a cut shard": (lambda lab, m: os.truncate(lab.path("in/model-00003-of-00003.safetensors"), 5000), ["model-00003-of-00003.safetensors", "cut off"]),
}

@pytest.mark.parametrize("name", BAD_INDICES)
def test_bad_index(lab, name):
    change, named = BAD_INDICES[name]
    write_hf(lab.path("in"), SHAPE, tensors_of("F32"), 3)
    path = lab.path("in/model.safetensors.index.json")
    index = json.loads(path.read_text())
    change(lab, index["weight_map"])
    path.write_text(json.dumps(index))
    refused(lab, "in", *named)

@pytest.mark.parametrize("index", [b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}', b""])
def test_an_index_that_is_none(lab, index):
    write_hf(lab.path("in"), SHAPE, tensors_of("F32"), 3)
    lab.path("in/model.safetensors.index.json").write_bytes(index)
    refused(lab, "in/model.safetensors.index.json")

@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link", "nothing"])
def test_what_is_no_file(lab, name, kind):
    """It is not waited for, and said before anything is computed; a file of the tokenizer may be missing."""
    write_hf(lab.path("in"), SHAPE, tensors_of("F32"), 3 if "index" in name else 1)
    lab.path(f"in/{name}").unlink(missing_ok=True)
    {"pipe": os.mkfifo, "folder": os.mkdir, "dangling link": lambda p: p.symlink_to("gone"), "nothing": lambda p: None}[kind](lab.path(f"in/{name}"))
    if name == "tokenizer.json" and kind in ("dangling link", "nothing"):
        lab.train("-e", "in", "-x", 2, "-o", "out", timeout=30)
    else:
        refused(lab, "in/" if "index" not in name else "in/model.safetensors")

def test_a_link_as_transformers_caches_have_them(lab):
    """Files in a cache of Hugging Face's are links into a folder of blobs."""
    write_hf(lab.path("in"), SHAPE, tensors_of("BF16"))
    lab.path("blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.move(lab.path(f"in/{name}"), lab.path(f"blobs/{name}"))
        lab.path(f"in/{name}").symlink_to(f"../blobs/{name}")
    lab.train("-e", "in/", *STILL, "-o", "out")
    assert read_safetensors(lab.path("out/step_00000001/model.safetensors")) == tensors_of("BF16")
    assert not lab.path("out/step_00000001/model.safetensors").is_symlink()
