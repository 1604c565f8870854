"""What the tests of fine-tuning share: models of prepro/reference.py as directories, adapters as PEFT writes them, marked tokens."""
import importlib
import json
import struct
import sys

import numpy as np

from helpers import ROOT, Tensor, close, header, library, pack, read_safetensors, safetensors_bytes, unpack

sys.path.insert(0, str(ROOT / "prepro"))
import binfmt  # noqa: E402
import hf  # noqa: E402

# a run on one batch again and again, as references compute it: plain AdamW with betas 0.9 and 0.95
PLAIN = ["-a", 1, "-k", "constant", "-c", 0, "--grad-clip", 0, "-f", 0]

def reference():
    library("torch", "python3-torch")
    return importlib.import_module("reference")

# ---- models -----------------------------------------------------------------------------------------

def trainer_of(config):
    return "train_gpt2" if isinstance(config, binfmt.Config) else "train_llama"

def model(sizes, seed=1, tied=False, kind="llama"):
    """(config, {name: array}), with names of GPT-2's file or of Hugging Face's Llama."""
    ref = reference()
    if sizes.startswith("gpt2:"):
        config = binfmt.Config.parse(sizes)
        return config, ref.gpt2_model(config, seed)
    config = ref.LlamaConfig.parse(sizes, kind, 1e4, None, 1e-5, tied)
    return config, ref.llama_model(config, seed)

GPT2_NAMES = {"ln1": "ln_1", "qkv": "attn.c_attn", "attproj": "attn.c_proj", "ln2": "ln_2", "fc": "mlp.c_fc", "fcproj": "mlp.c_proj"}

def hf_names(config, tensors):
    """{Hugging Face's name: array}: GPT-2's layers apart, its matrices transposed, without padding."""
    if trainer_of(config) == "train_llama":
        return dict(tensors)
    found = {"transformer.wte.weight": tensors["wte"][:config.V], "transformer.wpe.weight": tensors["wpe"],
             "transformer.ln_f.weight": tensors["lnfw"], "transformer.ln_f.bias": tensors["lnfb"]}
    for l in range(config.L):
        for ours, theirs in GPT2_NAMES.items():
            found[f"transformer.h.{l}.{theirs}.weight"] = tensors[f"{ours}w"][l].T
            found[f"transformer.h.{l}.{theirs}.bias"] = tensors[f"{ours}b"][l]
    return found

def config_json(config, dtype="float32"):
    if trainer_of(config) == "train_llama":
        return config.json(4, dtype)
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.V, "n_positions": config.maxT, "n_embd": config.C,
            "n_layer": config.L, "n_head": config.NH, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "torch_dtype": dtype}

def write_base(folder, config, tensors, dtype="F32"):
    """A model's directory."""
    named = {name: t if dtype == "F32" else binfmt.to_bf16(t) for name, t in hf_names(config, tensors).items()}
    named = {name: np.ascontiguousarray(t) for name, t in named.items()}
    hf.write_directory(str(folder), {"config.json": config_json(config, {"F32": "float32", "BF16": "bfloat16"}[dtype]), "model.safetensors": named})

def modules(config):
    """{path of each matrix that can have an adapter: (out, in)}."""
    if trainer_of(config) == "train_llama":
        return {name.removesuffix(".weight"): shape for name, shape in config.shapes().items() if name.endswith("_proj.weight")}
    return {f"transformer.h.{l}.{GPT2_NAMES[ours]}": config.shapes()[f"{ours}w"][1:] for l in range(config.L) for ours in ("qkv", "attproj", "fc", "fcproj")}

# ---- adapters ---------------------------------------------------------------------------------------

PEFT = "base_model.model."

def adapters(config, wanted, alpha=6, seed=1, layers=None):
    """{module: (A, B, alpha / rank)}, of values that bf16 can hold; wanted: {suffix of a module: rank}."""
    rng, found = np.random.RandomState(seed), {}
    for module, (outs, ins) in modules(config).items():
        rank = next((r for suffix, r in wanted.items() if module.endswith(f".{suffix}")), 0)
        if rank and (layers is None or int(module.split(".")[2]) in layers):
            A, B = rng.randn(rank, ins) / ins**0.5, rng.randn(outs, rank) * (0.3 / rank**0.5)
            found[module] = tuple(binfmt.from_bf16(binfmt.to_bf16(x.astype(np.float32))) for x in (A, B)) + (alpha / rank,)
    assert found
    return found

def peft_tensors(made, dtype="F32"):
    """{PEFT's name: Tensor} of {module: (A, B, s)}."""
    return {f"{PEFT}{module}.lora_{which}.weight": Tensor(dtype, list(x.shape), pack(dtype, x.flatten().tolist()))
            for module, (A, B, _) in made.items() for which, x in (("A", A), ("B", B))}

def peft_config(made, alpha=6, **more):
    """adapter_config.json: the rank that most have, and rank_pattern for the others."""
    ranks = {module: A.shape[0] for module, (A, _, _) in made.items()}
    r = max(set(ranks.values()), key=list(ranks.values()).count)
    layers = sorted({int(module.split(".")[2]) for module in made})
    gpt2 = any(module.startswith("transformer.") for module in made)
    found = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "in", "r": r, "lora_alpha": alpha, "lora_dropout": 0.0,
             "target_modules": sorted({".".join(module.split(".")[3:]) for module in made}), "bias": "none", "fan_in_fan_out": gpt2,
             "inference_mode": True, "init_lora_weights": True, "use_rslora": False, "use_dora": False, "modules_to_save": None,
             "layers_to_transform": layers if len(layers) == 1 else None, "rank_pattern": {m: n for m, n in ranks.items() if n != r}, "alpha_pattern": {}, "revision": None, **more}
    return {name: value for name, value in found.items() if value != "absent"}

def write_adapter(folder, made, dtype="F32", tensors=None, **config):
    """PEFT's directory of {module: (A, B, s)}; tensors, or what is said of config, in place of what they would be."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(peft_config(made, **config)))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(peft_tensors(made, dtype) if tensors is None else tensors))

def arrays(path):
    """{name: array} of a safetensors file."""
    return {name: np.array(unpack(t), np.float64).reshape(t.shape) for name, t in read_safetensors(path).items()}

def distance(found, expected):
    """Of two arrays, relative."""
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / max(np.linalg.norm(expected), 1e-30))

def settled(weights):
    """Weights after some steps, as arrays(), without GPT-2's biases of keys: softmax takes no notice of those, so that their gradient is
    rounding, and an optimizer that scales gradients makes steps of it that are as large as any."""
    return {name: np.delete(t, np.s_[len(t) // 3:2 * len(t) // 3]) if name.endswith("c_attn.bias") else t for name, t in weights.items()}

# ---- tokens with marks --------------------------------------------------------------------------------

NO_LOSS, BEGINS = 1 << 31, 1 << 30

def write_marked(path, ids, begins=(), untrained=(), magic=20240801, version=8, count=None, cut=0):
    """Token files, version 8. begins: where documents begin; untrained: tokens that have no loss as targets."""
    begins, untrained = set(begins), set(untrained)
    words = [id | (BEGINS if i in begins else 0) | (NO_LOSS if i in untrained else 0) for i, id in enumerate(ids)]
    data = header(magic, version, len(words) if count is None else count) + struct.pack(f"<{len(words)}I", *words)
    path.write_bytes(data[:len(data) - cut])

def batch(ids, B, T, begins=(), untrained=(), first=0):
    """x, y, where each token's document begins in its row, and which targets are trained: (B,T) each, of consecutive rows."""
    shape = np.arange(first * T, (first + B) * T).reshape(B, T)
    ids, starts, silent = np.array(ids, np.int64), np.zeros(len(ids), bool), np.zeros(len(ids), bool)
    starts[list(begins)], silent[list(untrained)] = True, True
    at = np.where(starts[shape], np.arange(T), 0)
    return ids[shape], ids[shape + 1], np.maximum.accumulate(at, 1), ~(silent | starts)[shape + 1]

# ---- comparing ------------------------------------------------------------------------------------------

def check_gradients(found, loss, gradients, for_loss, for_gradients, zero=0):
    """What --dump-gradients wrote, as arrays(), against a loss and {name: array}; none is missing, and none more than expected."""
    found = dict(found)
    assert close(float(found.pop("loss")), loss, for_loss)
    assert set(found) == set(gradients)
    for name, values in gradients.items():
        assert found[name].shape == values.shape, name
        assert distance(found[name], values) < for_gradients or np.abs(values).max() <= zero, (name, distance(found[name], values))
