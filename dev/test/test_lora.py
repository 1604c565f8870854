"""LoRA in both trainers: gradients and memory against prepro/reference.py and PEFT; adapters that come in, go on, go out and are merged."""
import json
import re
import resource
import shutil
import warnings

import numpy as np
import pytest

from finetune import (PEFT, PLAIN, adapters, arrays, batch, check_gradients, distance, model, modules, peft_config,
                      peft_tensors, reference, trainer_of, write_adapter, write_base)
from helpers import (Lab, Tensor, allocated_peak, close, execute, learned, library, mpirun, options, pack, program, read_log, read_safetensors,
                     safetensors_bytes, says, unpack, words, write_tokens)

B, T, STEPS = 2, 19, 5

# ---- against prepro/reference.py ----------------------------------------------------------------------

ALL = {name: 5 for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}
ALL_GPT2 = {name: 5 for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
GQA, GPT2 = "llama:L2,H4,K2,C40,F56,T32,V131,HS8", "gpt2:L2,H2,C48,T32,V131"

# name: sizes, what model() is told, ranks of modules, layers that have them. Something in each is no power of two, and no rank a multiple of 8
CASES = {
    "q,v": (GQA, {}, {"q_proj": 3, "v_proj": 3}, None),
    "all": (GQA, {}, ALL, None),
    "many ranks": ("llama:L2,H3,K1,C48,F88,T32,V131,HS16", {}, {"q_proj": 12, "k_proj": 3, "up_proj": 5, "down_proj": 12}, None),
    "the last layer": (GQA, {"tied": True}, {"o_proj": 3, "gate_proj": 4}, [1]),
    "the first layer": (GQA, {}, {"k_proj": 3, "down_proj": 7}, [0]),
    "qwen2": (GQA, {"kind": "qwen2", "tied": True}, ALL, None),
    "qwen3": ("llama:L2,H2,K2,C32,F48,T32,V131,HS24", {"kind": "qwen3"}, {"q_proj": 3, "k_proj": 5, "o_proj": 12}, None),
    "c_attn": (GPT2, {}, {"attn.c_attn": 3}, None),
    "gpt2 all": (GPT2, {}, ALL_GPT2, None),
    "gpt2 fc, proj": (GPT2, {}, {"mlp.c_fc": 12, "mlp.c_proj": 3}, None),
    "gpt2 o in the last layer": (GPT2, {}, {"attn.c_proj": 3}, [1]),
}

@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """make(case, ...): a model, an adapter and a batch in a folder, and what a trainer must find: (lab, loss, gradients, losses, adapters
    after the steps). bits: of an activation's code; then no pre-activation comes near a threshold."""
    made = {}

    def make(case, bits=0, **tune):
        key = case, bits, *tune.items()
        if key in made:
            return made[key]
        ref = reference()
        sizes, how, wanted, layers = CASES[case]
        for seed in range(1, 500):
            config, tensors = model(sizes, seed, **how)
            given = adapters(config, wanted, seed=seed, layers=layers)
            ids = [int(id) for id in 130 * np.random.RandomState(seed).rand(B * T + 1) ** 2]
            x, y, _, _ = batch(ids, B, T)
            activation = ref.CodedActivation(bits, "gelu-tanh" if trainer_of(config) == "train_gpt2" else "silu") if bits else None
            _, *expected = ref.compute(config, tensors, x, y, STEPS, activation, beta2=0.95, decay=0, lr=1e-3, tune=ref.Tuning(given, **tune))
            if not bits or min(distance for _, distance in activation.calls) > 2e-6:
                break
        lab = Lab(tmp_path_factory.mktemp("bench"))
        write_base(lab.path("in"), config, tensors)
        write_adapter(lab.path("adapter"), given)
        write_tokens(lab.path("batch.bin"), ids)
        lab.how = {"trainer": trainer_of(config)}
        lab.config, lab.tensors, lab.given = config, tensors, given
        made[key] = lab, *expected
        return made[key]
    return make

def train(lab, *given, **how):
    return lab.train("-e", "in", "-i", "batch.bin", "-b", B, "-t", T, "-x", STEPS, "-l", 1e-3, *PLAIN, *given, **{**lab.how, **how})

def check(made, variant, tolerances, *given):
    """Loss, gradients, the losses of steps, the adapter after them; and the ledger is what is taken."""
    lab, loss, gradients, losses, after = made
    for_loss, for_gradients, for_steps, for_moves = tolerances
    shutil.rmtree(lab.path("out"), ignore_errors=True)
    ran = train(lab, "--adapter", "adapter", "--dump-gradients", "g.safetensors", "-o", "out", *given, variant=variant)
    check_gradients(arrays(lab.path("g.safetensors")), loss, gradients, for_loss, for_gradients)
    assert close(ran.losses, losses, for_steps)
    assert ran.done["peak_bytes"] == ran.done["estimate_bytes"]
    before = {name: np.array(unpack(t)).reshape(t.shape) for name, t in peft_tensors(lab.given).items()}
    found = arrays(lab.path(f"out/step_{STEPS:08d}/adapter_model.safetensors"))
    assert set(before) <= set(found)
    for name, values in found.items():
        if name in before and name not in after:
            assert (values == before[name]).all(), name
        elif name in before:
            assert distance(values - before[name], after[name] - before[name]) < for_moves, name
        else:
            assert distance(values, after[name]) < for_moves, name

FP32, BF16 = (2e-6, 1e-5, 1e-5, 2e-3), (1e-3, 4e-2, 2e-2, 0.5)

@pytest.mark.parametrize("case", CASES)
def test_exact(bench, case):
    for r in (0, 2) if case in ("all", "gpt2 all") else (1,):
        check(bench(case), "cpu-fp32", FP32, "-r", r, "--loss-chunks", r + 1)

@pytest.mark.parametrize("case", ["all", "qwen3", "many ranks", "gpt2 all", "gpt2 fc, proj"])
def test_codes_and_shared_norms(bench, case):
    """The activation's derivative from codes; A acts on what the norm gives, gamma folded in or not."""
    for r in (0, 2) if "all" in case else (1,):
        check(bench(case, bits=2), "cpu-approxbp-fp32", FP32, "-r", r)

@pytest.mark.parametrize("case", ["all", "gpt2 all"])
def test_codes_by_the_slope(bench, case):
    """make APPROX_FIT=slope, of SiLU and of GELU."""
    check(bench(case, bits="slope"), "cpu-slope-fp32", FP32)

@pytest.mark.parametrize("case", ["all", "gpt2 all"])
@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-norm-bf16"])
def test_bf16(bench, case, variant):
    check(bench(case), variant, BF16)

@pytest.mark.parametrize("case, variant", [("all", "cpu-approxbp-bf16"), ("gpt2 all", "cpu-approxbp-bf16"), ("gpt2 all", "cpu-act-bf16")])
def test_codes_in_bf16(bench, case, variant):
    """A pre-activation of bf16 may lie on the other side of a threshold than the reference's."""
    check(bench(case, bits=2), variant, (1e-3, 0.15, 2e-2, 0.7))

@pytest.mark.parametrize("case, variant", [("many ranks", "cpu-fp32"), ("all", "cpu-approxbp-fp32"), ("gpt2 all", "cpu-fp32"), ("gpt2 all", "cpu-approxbp-fp32")])
def test_frozen_a(bench, case, variant):
    """LoRA-FA: A stays to the bit, and has neither a gradient nor a row for one."""
    made = bench(case, bits=2 if "approxbp" in variant else 0, freeze_a=True)
    assert all(name.endswith("lora_B.weight") for name in made[2])
    for r in (0, 2):
        check(made, variant, FP32, "--lora-freeze-a", 1, "-r", r)

@pytest.mark.parametrize("case, variant", [("all", "cpu-fp32"), ("all", "cpu-approxbp-fp32"), ("gpt2 all", "cpu-fp32"), ("gpt2 all", "cpu-approxbp-fp32")])
def test_trained_norms(bench, case, variant):
    check(bench(case, bits=2 if "approxbp" in variant else 0, norms=True), variant, FP32, "--lora-train-norms", 1)

# ---- against PEFT -------------------------------------------------------------------------------------

# name: kind of model, LoraConfig
THEIRS = {
    "q,v": ("Llama", dict(r=3, lora_alpha=4, target_modules=["q_proj", "v_proj"])),
    "all-linear": ("Llama", dict(r=5, lora_alpha=7, target_modules="all-linear")),
    "regex, patterns": ("Llama", dict(r=5, lora_alpha=8, target_modules=r".*\.(q_proj|down_proj|up_proj)", rank_pattern={"down_proj": 12},
                                      alpha_pattern={r"layers\.1\.self_attn\.q_proj": 3, "down_proj": 5})),
    "rslora, paths": ("Llama", dict(r=12, lora_alpha=6, use_rslora=True, target_modules=["k_proj", "model.layers.0.mlp.up_proj", "self_attn.o_proj"])),
    "one layer": ("Qwen2", dict(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "o_proj"], layers_to_transform=[1], layers_pattern="layers")),
    "c_attn": ("GPT2", dict(r=3, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True)),
    "gpt2 all-linear": ("GPT2", dict(r=5, lora_alpha=7, target_modules="all-linear", fan_in_fan_out=True)),
    "gpt2 regex": ("GPT2", dict(r=12, lora_alpha=8, target_modules=r"transformer\.h\.\d\.(attn\.c_proj|mlp\.c_fc)", rank_pattern={"c_fc": 5}, fan_in_fan_out=True)),
}
SIZES = {
    "Llama": dict(vocab_size=131, hidden_size=48, intermediate_size=88, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
                  max_position_embeddings=32),
    "GPT2": dict(vocab_size=131, n_embd=48, n_layer=2, n_head=3, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)}

def transformers_model(kind, seed=1):
    transformers = library("transformers")
    import torch
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SIZES.get(kind, SIZES["Llama"])))
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(torch.randn_like(p) * (0.2 if p.dim() == 1 else 0.1) + (p.dim() == 1 and "bias" not in name))
    return made

def logits_and_loss(made, ids):
    import torch
    x, y = torch.tensor(ids[:-1]).view(B, T), torch.tensor(ids[1:])
    logits = made(x).logits
    return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y)

def applied(made):
    """How many modules have an adapter."""
    return sum(hasattr(module, "lora_A") and len(module.lora_A) > 0 for module in made.modules())

def load_adapter(base, folder):
    """PEFT's model of a base and our adapter: without a warning, with every tensor of the file in it and none that the file lacks."""
    peft = library("peft")
    from peft.utils import get_peft_model_state_dict
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)   # what PEFT finds missing or unknown
        made = peft.PeftModel.from_pretrained(base, str(folder))
    there, file = get_peft_model_state_dict(made), arrays(folder / "adapter_model.safetensors")
    assert set(there) == set(file)
    assert all(np.abs(there[name].numpy() - values).max() < 1e-7 for name, values in file.items())
    assert applied(made) == sum(name.endswith("lora_A.weight") for name in file)
    return made.eval()

class Case:
    """A model of transformers' with an adapter of PEFT's, saved, and its numbers."""

    def __init__(self, folder, name):
        peft = library("peft")
        import torch
        self.lab, (self.kind, how) = Lab(folder), THEIRS[name]
        self.lab.how = {"trainer": "train_gpt2" if self.kind == "GPT2" else "train_llama"}
        transformers_model(self.kind).save_pretrained(self.lab.path("in"))
        made = peft.get_peft_model(transformers_model(self.kind), peft.LoraConfig(task_type="CAUSAL_LM", **how))
        with torch.no_grad():
            for n, p in made.named_parameters():
                if "lora_" in n:
                    p.copy_(torch.randn_like(p) * 0.1)
        made.save_pretrained(self.lab.path("adapter"))
        self.ids, self.modules = words(B * T + 1, 131), applied(made)
        write_tokens(self.lab.path("batch.bin"), self.ids)
        self.logits, self.loss = logits_and_loss(made, self.ids)
        self.loss.backward()
        leaves = {n.replace(".default", ""): p for n, p in made.named_parameters() if p.requires_grad}
        self.gradients = {n: p.grad.numpy().astype(np.float64) for n, p in leaves.items()}
        self.before = {n: p.detach().numpy().astype(np.float64) for n, p in leaves.items()}
        adamw = torch.optim.AdamW(leaves.values(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
        for _ in range(10):
            adamw.zero_grad()
            logits_and_loss(made, self.ids)[1].backward()
            adamw.step()
        self.after = logits_and_loss(made, self.ids)[0].detach()

@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            made[name] = Case(tmp_path_factory.mktemp("theirs"), name)
        return made[name]
    return make

@pytest.mark.parametrize("name", THEIRS)
def test_the_reference_is_peft(theirs, name):
    """prepro/reference.py's loss and gradients of the same model and adapter."""
    case, ref = theirs(name), reference()
    said, file = json.loads(case.lab.path("adapter/adapter_config.json").read_text()), case.before
    if case.kind == "GPT2":
        config = ref.Config.parse("L2,H3,C48,T32,V131")
        named, tensors = arrays(case.lab.path("in/model.safetensors")), {}
        for ours, theirs_ in {"ln1": "ln_1", "qkv": "attn.c_attn", "attproj": "attn.c_proj", "ln2": "ln_2", "fc": "mlp.c_fc", "fcproj": "mlp.c_proj"}.items():
            for letter, part in (("w", "weight"), ("b", "bias")):
                tensors[ours + letter] = np.stack([named[f"transformer.h.{l}.{theirs_}.{part}"].T for l in range(2)])
        tensors |= {"wte": named["transformer.wte.weight"], "wpe": named["transformer.wpe.weight"], "lnfw": named["transformer.ln_f.weight"],
                    "lnfb": named["transformer.ln_f.bias"]}
    else:
        config = ref.LlamaConfig.parse("L2,H6,K2,C48,F88,T32,V131", case.kind.lower(), 1e4, None, 1e-6, False)
        tensors = arrays(case.lab.path("in/model.safetensors"))

    def scale(module, rank):
        alpha = next((a for key, a in said["alpha_pattern"].items() if re.match(rf"(.*\.)?({key})$", module)), said["lora_alpha"])
        return alpha / (rank**0.5 if said["use_rslora"] else rank)
    names = [n.removeprefix(PEFT).removesuffix(".lora_A.weight") for n in file if "lora_A" in n]
    pairs = {m: (file[f"{PEFT}{m}.lora_A.weight"], file[f"{PEFT}{m}.lora_B.weight"]) for m in names}
    given = {m: (A, B_, scale(m, len(A))) for m, (A, B_) in pairs.items()}
    x, y, _, _ = batch(case.ids, B, T)
    logits, loss, gradients, _, _ = ref.compute(config, tensors, x, y, 0, tune=ref.Tuning(given))
    assert np.abs(logits - case.logits.detach().numpy()).max() < 1e-4 and case.modules == len(given)
    check_gradients({"loss": np.float64(case.loss.item()), **case.gradients}, loss, gradients, 1e-6, 1e-5)

def merged(lab, *given, **how):
    base = [] if "-e" in given else ["-e", "in"]
    return lab.run(*base, "--adapter", "adapter", "--merge", "merged", *given, **{**lab.how, **how})

@pytest.mark.parametrize("name", THEIRS)
def test_against_peft(theirs, name):
    """Its adapter in: loss, gradients, ten steps; ours out: PEFT applies every module of it; and merged: transformers' logits."""
    case, transformers = theirs(name), library("transformers")
    lab = case.lab
    ran = lab.train("-e", "in", "--adapter", "adapter", "-i", "batch.bin", "-b", B, "-t", T, "-x", 10, "-l", 1e-3, *PLAIN, "-o", "out",
                    "--dump-gradients", "g.safetensors", variant="cpu-fp32", **lab.how)
    check_gradients(arrays(lab.path("g.safetensors")), case.loss.item(), case.gradients, 1e-5, 1e-4)
    out = lab.path("out/step_00000010")
    assert set(arrays(out / "adapter_model.safetensors")) == set(case.gradients)
    ours = load_adapter(transformers_model(case.kind), out)
    assert applied(ours) == case.modules
    assert (logits_and_loss(ours, case.ids)[0] - case.after).abs().max().item() < 1e-3
    assert (case.after - case.logits).abs().max().item() > 2e-2 and ran.losses[-1] < ran.losses[0]
    merged(lab, variant="cpu-fp32")
    again = transformers.AutoModelForCausalLM.from_pretrained(lab.path("merged")).eval()
    assert (logits_and_loss(again, case.ids)[0] - case.logits).abs().max().item() < 1e-4

EXPORTS = [("Llama", "q,v"), ("Llama", "k,o,down"), ("Llama", "all"), ("Qwen2", "gate,up"), ("GPT2", "q,v"), ("GPT2", "q,k,v"), ("GPT2", "all"),
           ("GPT2", "k"), ("GPT2", "q,v,o,fc"), ("GPT2", "proj"), ("GPT2", "v,proj")]

@pytest.mark.parametrize("kind, targets", EXPORTS)
def test_what_targets_write(theirs, kind, targets):
    """PEFT loads what --lora-targets trained, of a rank that is no multiple of 8, and computes the loss that the trainer does."""
    case = theirs({"Llama": "q,v", "Qwen2": "one layer", "GPT2": "c_attn"}[kind])
    lab, out = case.lab, "export-" + targets
    ran = lab.train("-e", "in", "--lora", 3, *(["--lora-targets", targets] if targets != "all" else []), "-i", "batch.bin", "-b", B, "-t", T, "-x", 3,
                    "-l", 1e-2, *PLAIN, "-o", out, "--lora-alpha", 5, variant="cpu-fp32", **lab.how)
    folder = lab.path(f"{out}/step_00000003")
    made = load_adapter(transformers_model(kind), folder)
    parts = targets.split(",")
    in_qkv = sum(name in ("q", "k", "v") for name in parts)
    each = (4 if kind == "GPT2" else 7) if targets == "all" else len(parts) - (in_qkv - (in_qkv > 0) if kind == "GPT2" else 0)
    assert applied(made) == 2 * each
    loss = logits_and_loss(made, case.ids)[1].item()
    lab.train("-e", "in", "--adapter", f"{out}/step_00000003", "-i", "batch.bin", "-b", B, "-t", T, "-x", 0, "--dump-gradients", "g.safetensors",
              "-f", 0, variant="cpu-fp32", **lab.how)
    assert close(float(arrays(lab.path("g.safetensors"))["loss"]), loss, 1e-5)
    assert loss < ran.losses[-1] < ran.losses[0]
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["peft_type"] == "LORA" and said["task_type"] == "CAUSAL_LM" and said["fan_in_fan_out"] == (kind == "GPT2") and said["bias"] == "none"

def test_trained_norms_go_along(theirs):
    """As modules_to_save, which PEFT puts in the place of the base's."""
    for name in ("q,v", "c_attn"):
        case = theirs(name)
        lab = case.lab
        for i, given in enumerate((["--lora", 3], ["--adapter", "adapter"])):
            lab.train("-e", "in", *given, "--lora-train-norms", 1, "-i", "batch.bin", "-b", B, "-t", T, "-x", 3, "-l", 1e-2, *PLAIN, "-o", f"norms{i}",
                      variant="cpu-fp32", **lab.how)
            folder = f"norms{i}/step_00000003"
            made = load_adapter(transformers_model(case.kind), lab.path(folder))
            assert sum("norm" in n or "ln_" in n for n in arrays(lab.path(f"{folder}/adapter_model.safetensors"))) >= 4
            for more in ([], ["--lora-train-norms", 1]):   # they are the adapter's, whether they are trained on or not
                lab.train("-e", "in", "--adapter", folder, *more, "-i", "batch.bin", "-b", B, "-t", T, "-x", 0, "--dump-gradients", "g.safetensors", "-f", 0,
                          variant="cpu-fp32", **lab.how)
                assert close(float(arrays(lab.path("g.safetensors"))["loss"]), logits_and_loss(made, case.ids)[1].item(), 1e-5)

# ---- a new adapter ------------------------------------------------------------------------------------

def started(lab, *given, **how):
    """{name: array} of an adapter before any step."""
    shutil.rmtree(lab.path("start"), ignore_errors=True)
    lab.run(*options("-e", "in", "--lora", 3, "-x", 0, "-o", "start", *given), **{**lab.how, "variant": "cpu-fp32", **how})
    return arrays(lab.path("start/step_00000000/adapter_model.safetensors"))

@pytest.mark.parametrize("case", ["all", "gpt2 all"])
def test_a_new_adapter_changes_nothing_yet(bench, case):
    """A is uniform within 1/sqrt(in), B is 0: the loss is the base's. The seed decides, and each matrix has other numbers."""
    lab = bench(case)[0]
    first, again, other = started(lab), started(lab), started(lab, "--seed", 2)
    shapes = {f"{PEFT}{module}.lora_{which}.weight": ((3, ins) if which == "A" else (outs, 3)) for module, (outs, ins) in modules(lab.config).items() for which in "AB"}
    assert {name: t.shape for name, t in first.items()} == shapes
    for name, t in first.items():
        if name.endswith("lora_B.weight"):
            assert (t == 0).all()
        else:
            bound = t.shape[1] ** -0.5
            assert 0.8 * bound < np.abs(t).max() <= bound and close(float(t.std()), bound / 3**0.5, 0.2) and abs(t.mean()) < 0.3 * bound
            assert (t == again[name]).all() and (t != other[name]).mean() > 0.99
    values = [t.flatten()[:20].tolist() for name, t in first.items() if "lora_A" in name]
    assert len(set(map(tuple, values))) == len(values)
    losses = [train(lab, *given, "-x", 1, variant="cpu-fp32").losses[0] for given in ([], ["--lora", 3])]
    assert close(losses[1], losses[0], 1e-6)

def test_gpt2s_own_q_and_v(bench):
    """c_attn's rows of q and v alone have adapters, each of its rank: in the file as one of rank 2r, its other blocks 0. Against
    adapters of q and v in the reference; alpha / r stays what it was."""
    ref, lab = reference(), bench("c_attn")[0]
    how = ["--lora", 3, "--lora-alpha", 5, "--lora-targets", "q,v"]
    before = started(lab, *how)
    train(lab, *how, "-o", "qv", "--dump-gradients", "g.safetensors", variant="cpu-fp32")
    ran = train(lab, *how, "-o", "qv", "-y", 1, "-x", 10, "--dump-gradients", "g.safetensors", variant="cpu-fp32")
    after = arrays(lab.path("qv/step_00000010/adapter_model.safetensors"))
    said = json.loads(lab.path("qv/step_00000010/adapter_config.json").read_text())
    assert said["r"] == 6 and said["lora_alpha"] == 10 and said["target_modules"] == ["c_attn"] and not said["rank_pattern"] and not said["alpha_pattern"]
    C = lab.config.C

    def parts(found):
        """{module: (A, B, s)} of q and v."""
        made = {}
        for l in range(lab.config.L):
            module = f"transformer.h.{l}.attn.c_attn"
            A, b = found[f"{PEFT}{module}.lora_A.weight"], found[f"{PEFT}{module}.lora_B.weight"]
            assert A.shape == (6, C) and b.shape == (3 * C, 6) and not b[:C, 3:].any() and not b[C:2 * C].any() and not b[2 * C:, :3].any()
            made |= {f"{module}.q": (A[:3], b[:C, :3], 5 / 3), f"{module}.v": (A[3:], b[2 * C:, 3:], 5 / 3)}
        return made
    x, y, _, _ = batch(np.fromfile(lab.path("batch.bin"), "<u2")[512:], B, T)
    _, _, gradients, losses, expected = ref.compute(lab.config, lab.tensors, x, y, 10, beta2=0.95, decay=0, lr=1e-3, tune=ref.Tuning(parts(before)))
    assert close(ran.losses, losses[STEPS:], 1e-5)
    for name, (A, b, _) in parts(after).items():
        for which, values in (("A", A), ("B", b)):
            start = dict(zip("AB", parts(before)[name]))[which]
            assert distance(values - start, expected[f"{PEFT}{name}.lora_{which}.weight"] - start) < 2e-3, name
    middle = parts(arrays(lab.path(f"qv/step_{STEPS:08d}/adapter_model.safetensors")))
    _, loss, gradients, _, _ = ref.compute(lab.config, lab.tensors, x, y, 0, tune=ref.Tuning(middle))
    found = arrays(lab.path("g.safetensors"))
    assert close(float(found.pop("loss")), loss, 2e-6)
    for name, values in parts(found).items():
        for which, t in zip("AB", values):
            assert distance(t, gradients[f"{PEFT}{name}.lora_{which}.weight"]) < 1e-5, name

def test_names_of_targets(bench):
    """PEFT's and ours mean the same."""
    for case, pairs in (("all", [("q,v", "q_proj,v_proj"), ("all", "q,k,v,o,gate,up,down"), ("all", None), ("o,down", "down_proj,o_proj")]),
                        ("gpt2 all", [("q,k,v", "c_attn"), ("o,fc,proj", "attn.c_proj,c_fc,mlp.c_proj"), ("all", "q,k,v,o,fc,proj")])):
        lab = bench(case)[0]
        for one, other in pairs:
            found = [started(lab, *([] if targets is None else ["--lora-targets", targets])) for targets in (one, other)]
            assert {name: t.tolist() for name, t in found[0].items()} == {name: t.tolist() for name, t in found[1].items()}, (one, other)

# ---- what a layer keeps -------------------------------------------------------------------------------

def estimate(lab, *given, variant="cpu-bf16", trainer="train_gpt2"):
    return json.loads(lab.run("--estimate=json", *given, variant=variant, trainer=trainer).out)

def units(table, L, rows, C):
    """A layer's share of what is saved, in units of B*T*C elements, without and with statistics and what has the rank's width."""
    saved = [row for row in table["rows"] if row["kind"] == "saved" and row["scope"] == "layer"]
    wide = [row for row in saved if row["dtype"] != "fp32" and (row["shape"][-1] >= C or "code" in row["name"])]
    return [sum(row["bytes"] for row in some) / (L * rows * C * 2) for some in (wide, saved)]

GPT2_UNITS = [("cpu-bf16", ["--lora-targets", "q,v"], 2, 10), ("cpu-approxbp-bf16", ["--lora-targets", "q,v"], 1, 6.5),
              ("cpu-approxbp-bf16", ["--lora-targets", "q,v"], 2, 6.5), ("cpu-approxbp-bf16", ["--lora-freeze-a", 1], 1, 6.5),
              ("cpu-approxbp-bf16", ["--lora-targets", "proj"], 2, 10.5), ("cpu-bf16", [], 2, 10), ("cpu-approxbp-bf16", ["--lora-targets", "o,fc"], 1, 6.5)]

@pytest.mark.parametrize("variant, given, r, expected", GPT2_UNITS)
def test_units(lab, variant, given, r, expected):
    """Codes need no GELU's output where the matmul after it keeps its input for nobody: 6.5 for 10."""
    wide, every = units(estimate(lab, "-e", "d12", "-b", 64, "-t", 1024, "-r", r, "--lora", 8, *given, variant=variant), 12, 64 * 1024, 768)
    assert close(wide, expected, 0.005) and expected <= every <= 1.03 * expected

@pytest.mark.parametrize("given", [["--lora", 16, "--base", "nf4"], ["--lora", 16, "--base", "nf4", "--lora-targets", "q,v"], ["--lora", 16]])
def test_units_of_llama(lab, given):
    """An 8B model's QLoRA in 14 GB: adapters of all matrices add no activation."""
    table = estimate(lab, "-e", "llama3.1-8b", "-b", 1, "-t", 2048, "-r", 2, *given, trainer="train_llama")
    wide, every = units(table, 32, 2048, 4096)
    assert close(wide, 11.5, 0.005) and every <= 1.03 * 11.5
    assert "nf4" not in given or table["total_bytes"] < 14e9

@pytest.mark.parametrize("size, trainer, given", [
    ("gpt2:L2,H2,C64,T64,V257", "train_gpt2", []), ("llama:L2,H4,K2,C64,F128,T64,V257", "train_llama", []),
    ("llama:L2,H4,K2,C64,F128,T64,V257", "train_llama", ["--base", "nf4"]), ("llama:L2,H4,K2,C64,F128,T64,V257", "train_llama", ["--lora-freeze-a", 1])])
def test_what_is_frozen_has_no_row(lab, size, trainer, given):
    """Gradients, moments and masters of the adapter, and nothing else: 16 bytes a parameter in fp32 states."""
    table = estimate(lab, "-e", size, "-b", 1, "-t", 64, "--lora", 8, *given, variant="cpu-fp32", trainer=trainer)
    config, _ = model(size)
    trained = sum(8 * (outs + (0 if "--lora-freeze-a" in given else ins)) for outs, ins in modules(config).values())
    for kind, bytes_ in (("grad", 4), ("optimizer", 8)):
        found = sum(row["bytes"] for row in table["rows"] if row["kind"] == kind)
        assert bytes_ * trained <= found <= 1.02 * bytes_ * trained, kind   # and the sums of squares, one for a block of threads
    full = estimate(lab, "-e", size, "-b", 1, "-t", 64, variant="cpu-fp32", trainer=trainer)
    assert table["total_bytes"] < full["total_bytes"]

# ---- runs -----------------------------------------------------------------------------------------------

def checkpoint(lab, out, step):
    return {name.split("/", 1)[1]: data for name, data in lab.files(out).items() if name.startswith(f"step_{step:08d}/")}

def small(lab, *given, **how):
    """A run on words."""
    return lab.train("-e", "in", "-d", 2 * 32 * 2, "-k", "constant", *given, **{**lab.how, **how})

@pytest.mark.parametrize("case, variant, given", [
    ("all", "cpu-bf16", ["--lora", 5]), ("all", "cpu-bf16", ["--lora", 5, "-w", 0]), ("all", "cpu-norm-bf16", ["--adapter", "adapter"]),
    ("all", "cpu-fp32", ["--lora", 3, "--lora-dropout", 0.2, "--lora-targets", "q,down"]), ("all", "cpu-bf16", ["--lora", 5, "--base", "nf4"]),
    ("gpt2 all", "cpu-bf16", ["--lora", 3, "--lora-targets", "q,v,o"]), ("gpt2 all", "cpu-bf16", ["--adapter", "adapter", "--save-dtype", "bf16", "-w", 0]),
    ("gpt2 all", "cpu-approxbp-bf16", ["--lora", 3, "--lora-freeze-a", 1, "--lora-dropout", 0.1]), ("gpt2 all", "cpu-fp32", ["--lora", 3, "--lora-train-norms", 1])])
def test_resume_is_bit_equal(bench, case, variant, given):
    """With the same -e, and without what made the adapter: the state says it."""
    lab = bench(case)[0]
    for name in ("whole", "parts"):
        shutil.rmtree(lab.path(name), ignore_errors=True)
    whole = small(lab, *given, "-n", 3, "-x", 6, "-v", 3, "-m", 1, "-o", "whole", variant=variant)
    small(lab, *given, "-x", 3, "-o", "parts", variant=variant)
    rest = small(lab, *given, "-x", 6, "-n", 3, "-v", 3, "-m", 1, "-o", "parts", "-y", 1, variant=variant)
    assert [line for line in learned(rest) if line.get("step", 6) > 3] == [line for line in learned(whole) if line.get("step", 6) > 3]
    assert checkpoint(lab, "whole", 6) == checkpoint(lab, "parts", 6) and whole.losses[-1] < whole.losses[0]

def test_the_files_of_a_checkpoint(bench):
    """An adapter's directory without the base's weights; F32, or as it came, or as asked for. Tokenizers go along."""
    lab = bench("all")[0]
    lab.path("in/tokenizer.json").write_text("{}")
    for given, dtype in ((["--lora", 3], "F32"), (["--adapter", "adapter"], "F32"), (["--adapter", "narrow"], "BF16"), (["--adapter", "half"], "F16"),
                         (["--lora", 3, "--save-dtype", "bf16"], "BF16"), (["--adapter", "narrow", "--save-dtype", "f32"], "F32")):
        for name, kind in (("narrow", "BF16"), ("half", "F16")):
            write_adapter(lab.path(name), lab.given, kind)
        shutil.rmtree(lab.path("out"), ignore_errors=True)
        small(lab, *given, "-x", 1, "-l", 0, "-o", "out")
        files = checkpoint(lab, "out", 1)
        assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "state_00000.bin", "tokenizer.json"}
        found = read_safetensors(lab.path("out/step_00000001/adapter_model.safetensors"))
        assert {t.dtype for t in found.values()} == {dtype}
        if given[0] == "--adapter":
            assert found == peft_tensors(lab.given, dtype)
        said = json.loads(files["adapter_config.json"])
        assert said["base_model_name_or_path"] in ("in", str(lab.path("in"))) and said["r"] == (3 if given[0] == "--lora" else 5)
        assert said["lora_alpha"] == 6   # of --lora 3: twice the rank
        assert set(said) >= set(peft_config(lab.given)) and said["lora_dropout"] == 0 and said["inference_mode"] is True
    lab.path("in/tokenizer.json").unlink()

def test_no_step_writes_an_adapter_as_it_came(bench):
    """-x 0 with --out: to the bit, whatever the build, without data."""
    for case, variant in (("many ranks", "cpu-bf16"), ("gpt2 all", "cpu-fp32")):
        lab = bench(case)[0]
        shutil.rmtree(lab.path("out"), ignore_errors=True)
        tensors = {name: Tensor("F32", t.shape, pack("F32", [x * 1.0001 for x in unpack(t)])) for name, t in peft_tensors(lab.given).items()}
        write_adapter(lab.path("fine"), lab.given, tensors=tensors)
        lab.run(*options("-e", "in", "--adapter", "fine", "-x", 0, "-i", "nothing.bin", "-o", "out"), variant=variant, **lab.how)
        assert read_safetensors(lab.path("out/step_00000000/adapter_model.safetensors")) == tensors

def test_micro_batches_and_ranks_are_one_batch(bench):
    """Losses and the adapter, of one process with all rows, with half of them twice, and of two processes."""
    for case in ("all", "gpt2 all"):
        lab, found = bench(case)[0], []
        for name, launch, rows in (("one", [], 4), ("twice", [], 2), ("ranks", mpirun(2), 2), ("shared", mpirun(2), 2)):
            shutil.rmtree(lab.path(name), ignore_errors=True)
            arguments = options("-e", "in", "--adapter", "adapter", "-b", rows, "-t", 16, "-d", 64, "-x", 3, "-o", name, "--log", f"{name}.jsonl", "-f", 0,
                                "-z", int(name == "shared"))
            done = execute(*launch, program("cpu-multi-fp32", lab.how["trainer"]), *arguments, cwd=lab.folder, env={"OMP_NUM_THREADS": 1})
            assert done.status == 0, done.err[-2000:]
            losses = [line["train_loss"] for line in read_log(lab.path(f"{name}.jsonl")) if "train_loss" in line]
            found.append((losses, arrays(lab.path(f"{name}/step_00000003/adapter_model.safetensors"))))
        for losses, after in found[1:]:
            assert close(losses, found[0][0], 1e-5)
            assert all(np.abs(after[name] - t).max() < 1e-5 for name, t in found[0][1].items())
        assert lab.files("ranks")["step_00000003/adapter_model.safetensors"] == lab.files("shared")["step_00000003/adapter_model.safetensors"]

def test_dropout(bench):
    """On the adapter's input, while training alone: by the seed, other each step, and right on average."""
    for case in ("all", "gpt2 all"):
        lab = bench(case)[0]

        def losses(*given, **how):
            return train(lab, "--adapter", "adapter", "-l", 0, *given, variant="cpu-fp32", **how).losses
        plain, dropped = losses("-x", 2), losses("--lora-dropout", 0.3, "-x", 40)
        assert dropped == losses("--lora-dropout", 0.3, "-x", 40) and len(set(dropped)) == 40 and plain[0] == plain[1]
        assert losses("--lora-dropout", 0.3, "-x", 2, "--seed", 9) != dropped[:2]
        spread = np.std(dropped)
        assert 0 < spread and abs(np.mean(dropped) - plain[0]) < 0.05 * plain[0]
        vals = [train(lab, "--adapter", "adapter", "-l", 0, "-x", 1, "-v", 1, "-m", 1, "-j", "batch.bin", *given, variant="cpu-fp32").vals
                for given in ([], ["--lora-dropout", 0.3])]
        assert vals[0] == vals[1]

@pytest.mark.parametrize("case", ["q,v", "gpt2 all"])
def test_dropout_is_unbiased(bench, case):
    """Of an adapter so small that the loss is linear in what it adds, along its gradient: the mean over many masks is the loss without."""
    lab = bench(case)[0]

    def write(name, scale, towards):
        write_adapter(lab.path(name), {m: (A, (-scale * towards[f"{PEFT}{m}.lora_B.weight"]).astype(np.float32), s) for m, (A, _, s) in lab.given.items()})
    zero = {f"{PEFT}{m}.lora_B.weight": np.zeros_like(b) for m, (_, b, _) in lab.given.items()}
    write("zero", 1, zero)
    train(lab, "--adapter", "zero", "-x", 0, "--dump-gradients", "g.safetensors", variant="cpu-fp32")
    g = arrays(lab.path("g.safetensors"))
    write("small", 0.002 / sum((g[name]**2).sum() for name in zero), g)
    base, exact = (train(lab, "--adapter", name, "-x", 1, "-l", 0, variant="cpu-fp32").losses[0] for name in ("zero", "small"))
    masked = np.array(train(lab, "--adapter", "small", "-x", 150, "-l", 0, "--lora-dropout", 0.5, variant="cpu-fp32").losses)
    error = masked.std() / len(masked)**0.5
    assert 0.001 < base - exact < 0.0021 and 0 < error < 0.1 * (base - exact)
    assert abs(masked.mean() - exact) < 4 * error + 0.05 * (base - exact), (base, exact, masked.mean(), error)

@pytest.mark.parametrize("case, given", [("all", ["-r", 2]), ("all", ["--base", "nf4", "--lora-dropout", 0.1]), ("gpt2 all", ["-r", 2, "--lora-dropout", 0.1])])
def test_sanitizers_find_nothing(bench, case, given):
    lab = bench(case)[0]
    train(lab, "--adapter", "adapter", "-x", 2, "-v", 1, "-m", 1, "-j", "batch.bin", *given, variant="san-bf16")

def test_thread_orders_and_poison_change_nothing(bench):
    for case in ("many ranks", "gpt2 all"):
        lab = bench(case)[0]
        runs = [learned(train(lab, "--adapter", "adapter", "-x", 2, "--lora-dropout", 0.1, variant="cpu-bf16", env={"SIMT_ORDER": order, "SIMT_SEED": 7}))
                for order in ("forward", "reverse", "priority")]
        assert runs[0] == runs[1] == runs[2]

MODES = [("all", "cpu-bf16", ["-r", r, *more]) for r in (0, 1, 2) for more in ([], ["--base", "nf4"], ["--lora-freeze-a", 1])] + \
        [("gpt2 all", variant, ["-r", r, "--lora-freeze-a", a]) for variant in ("cpu-bf16", "cpu-approxbp-bf16") for r in (0, 2) for a in (0, 1)] + \
        [("all", "cpu-norm-bf16", []), ("all", "cpu-bf16", ["--lora-dropout", 0.1]), ("all", "cpu-bf16", ["--base", "nf4", "--double-quant", 0, "-w", 0]),
         ("all", "cpu-bf16", ["--base", "nf4", "--embedding-on", "device"]), ("all", "cpu-bf16", ["--embedding-on", "host", "--lora-train-norms", 1]),
         ("gpt2 all", "cpu-act-bf16", ["--lora-dropout", 0.1, "--loss-chunks", 3]), ("gpt2 all", "cpu-norm-bf16", ["--lora-targets", "q,v", "--lora-train-norms", 1]),
         ("gpt2 all", "cpu-approxbp-bf16", ["--base", "nf4", "--lora-targets", "k,proj"]), ("all", "cpu-approxbp-bf16", ["--lora-targets", "o", "-d", 3 * B * T]),
         ("all", "cpu-bf16", ["-b", "auto"]), ("qwen3", "cpu-norm-bf16", ["--base", "nf4", "-r", 2])]

@pytest.mark.parametrize("case, variant, given", MODES)
def test_the_ledger_is_the_truth(bench, case, variant, given):
    """What is taken is what the run said, and what --estimate says without data."""
    lab = bench(case)[0]
    how = ["--lora", 3, *given]
    ran = train(lab, *how, "-x", 1, "-v", 1, "-m", 1, "-j", "batch.bin", variant=variant, env={"SIMT_REPORT": 1, "SIMT_MEMORY": "30M"})
    assert allocated_peak(ran) == ran.done["peak_bytes"] == ran.done["estimate_bytes"]
    if "auto" not in given:
        said = json.loads(lab.run("--estimate=json", *options("-e", "in", "-b", B, "-t", T, "-v", 1, *how)[2:], variant=variant, **lab.how).out)
        assert said["total_bytes"] == ran.done["estimate_bytes"]

# ---- merging ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case, dtype", [("all", "F32"), ("all", "BF16"), ("gpt2 all", "BF16"), ("qwen2", "BF16"), ("c_attn", "F32"), ("many ranks", "BF16")])
def test_merge(bench, case, dtype):
    """W + s B A in fp32, rounded once to the type that the base has; all else to the bit. Without data, and with -j three losses."""
    lab = bench(case)[0]
    lab.path("in/tokenizer.json").write_text("{}")
    shutil.move(lab.path("in"), lab.path("wide"))
    try:
        write_base(lab.path("in"), lab.config, lab.tensors, dtype)
        lab.path("in/tokenizer.json").write_text("{}")
        shutil.rmtree(lab.path("merged"), ignore_errors=True)
        quiet = merged(lab, "-i", "nothing.bin")
        assert set(lab.files("merged")) == {"config.json", "model.safetensors", "tokenizer.json"}
        before, after = (read_safetensors(lab.path(f"{name}/model.safetensors")) for name in ("in", "merged"))
        assert {name: (t.dtype, t.shape) for name, t in before.items()} == {name: (t.dtype, t.shape) for name, t in after.items()}
        adapted = {f"{module}.weight": s * b.astype(np.float64) @ A for module, (A, b, s) in lab.given.items()}
        for name, t in before.items():
            if name not in adapted:
                assert after[name] == t, name
                continue
            change = adapted[name].T if case in ("gpt2 all", "c_attn") else adapted[name]
            exact = np.array(unpack(t)).reshape(t.shape) + change
            found = np.array(unpack(after[name])).reshape(t.shape)
            rounded = np.array(unpack(Tensor(dtype, [], pack(dtype, exact.flatten().tolist())))).reshape(t.shape)
            assert np.abs(found - exact).max() < 1e-6 if dtype == "F32" else (found == rounded).mean() > 0.998, name   # but for a sum near a middle
        theirs_, ours = (json.loads(lab.path(f"{name}/config.json").read_text()) for name in ("in", "merged"))
        assert {**ours, **theirs_} == ours
        loss = {}
        for name, given in (("base", ["-e", "in"]), ("adapter", ["-e", "in", "--adapter", "adapter"]), ("merged", ["-e", "merged"])):
            lab.run(*options(*given, "-i", "batch.bin", "-b", B, "-t", T, "-x", 0, "-f", 0, "--dump-gradients", f"{name}.safetensors"), variant="cpu-fp32", **lab.how)
            loss[name] = float(arrays(lab.path(f"{name}.safetensors"))["loss"])
        assert close(loss["adapter"], loss["merged"], 1e-5 if dtype == "F32" else 2e-3) and not close(loss["base"], loss["adapter"], 1e-4)
        shutil.rmtree(lab.path("merged"))
        said = merged(lab, "-j", "batch.bin", "-b", B, "-t", T, variant="cpu-fp32").out
        told = re.search(r"base (\d+\.\d+), base with adapter (\d+\.\d+), merged (\d+\.\d+)", said)
        for (name, value), x in zip(loss.items(), told.groups()):
            assert close(float(x), value, 2e-4 if dtype == "F32" or name != "merged" else 5e-3), (name, value, said)
        assert "loss" not in quiet.out.lower() or not re.findall(r"\d+\.\d{3,}", quiet.out)
    finally:
        shutil.rmtree(lab.path("in"), ignore_errors=True)
        shutil.move(lab.path("wide"), lab.path("in"))

def test_merging_norms_and_parts_of_c_attn(bench):
    """What a run has trained, with its norms, of q and v alone: the merged model has its loss."""
    for case, given in (("q,v", ["--lora-train-norms", 1]), ("c_attn", ["--lora-targets", "q,v", "--lora-train-norms", 1])):
        lab, losses = bench(case)[0], []
        for name in ("out", "merged"):
            shutil.rmtree(lab.path(name), ignore_errors=True)
        train(lab, "--lora", 3, *given, "-l", 1e-2, "-o", "out", variant="cpu-fp32")
        lab.run("-e", "in", "--adapter", f"out/step_{STEPS:08d}", "--merge", "merged", variant="cpu-fp32", **lab.how)
        for model_ in (["--adapter", f"out/step_{STEPS:08d}"], ["-e", "merged"], []):
            train(lab, *model_, "-x", 0, "--dump-gradients", "g.safetensors", variant="cpu-fp32")
            losses.append(float(arrays(lab.path("g.safetensors"))["loss"]))
        assert close(losses[0], losses[1], 1e-5) and not close(losses[1], losses[2], 1e-2)

def test_merging_shards(bench):
    """The model is the same, whatever it came in; one that has no directory is none to merge with."""
    lab = bench("all")[0]
    tensors = read_safetensors(lab.path("in/model.safetensors"))
    for name in ("merged", "shards", "bin"):
        shutil.rmtree(lab.path(name), ignore_errors=True)
    merged(lab)
    whole = read_safetensors(lab.path("merged/model.safetensors"))
    shutil.copytree(lab.path("in"), lab.path("shards"), ignore=lambda *_: ["model.safetensors"])
    weight_map = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        lab.path(f"shards/{file}").write_bytes(safetensors_bytes({name: t for name, t in tensors.items() if weight_map[name] == file}))
    lab.path("shards/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.rmtree(lab.path("merged"))
    merged(lab, "-e", "shards")
    found = {name: t for path in lab.path("merged").glob("*.safetensors") for name, t in read_safetensors(path).items()}
    assert found == whole
    says(lab.run("-e", GQA.replace("HS", "D"), "--adapter", "adapter", "--merge", "merged", status=2, **lab.how).err, "--merge merged", "expected -e DIR")

def test_a_merge_that_fails_leaves_nothing(bench):
    """A limit on a file's size stands in for a full disk. And what is there stays."""
    lab = bench("all")[0]
    shutil.rmtree(lab.path("merged"), ignore_errors=True)
    before = set(lab.files("."))
    merged(lab, status=1, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)))
    assert set(lab.files(".")) == before
    lab.path("merged").mkdir()
    lab.path("merged/mine").write_text("mine")
    done = merged(lab, status=None)
    assert done.status in (1, 2) and lab.files("merged") == {"mine": b"mine"}
    says(done.err, "--merge merged")

def test_merging_needs_no_device(bench):
    """Tensor by tensor on the host."""
    lab = bench("all")[0]
    shutil.rmtree(lab.path("merged"), ignore_errors=True)
    merged(lab, env={"SIMT_MEMORY": 1000})
    whole = lab.files("merged")
    shutil.rmtree(lab.path("merged"))   # losses do need one, and come last
    done = merged(lab, "-j", "batch.bin", "-b", B, "-t", T, env={"SIMT_MEMORY": 200000}, status=1)
    says(done.err, "out of memory")
    says(done.out, "--base nf4", "without -j")
    assert lab.files("merged") == whole

def test_a_sample_is_the_merged_models(bench):
    """What is written while training, and with -x 0, is base and adapter."""
    for case in ("all", "gpt2 all"):
        lab, said = bench(case)[0], []
        shutil.rmtree(lab.path("merged"), ignore_errors=True)
        merged(lab, variant="cpu-fp32")
        for given in (["-e", "in", "--adapter", "adapter"], ["-e", "merged"], ["-e", "in"]):
            said.append(lab.run(*options(*given, "-x", 0, "-s", 1, "-g", 12, "-t", T), variant="cpu-fp32", **lab.how).out.split("---- sample")[1].split("----")[0])
        assert said[0] == said[1] != said[2]

# ---- what is refused ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with a Llama and a GPT-2, in which an adapter is written anew for each test."""
    lab = Lab(tmp_path_factory.mktemp("room"))
    for name, sizes in (("in", "llama:L2,H2,C16,F24,T32,V257"), ("gpt2", "gpt2:L2,H2,C16,T32,V257")):
        write_base(lab.path(name), *model(sizes))
    return lab

def refused(lab, *given, parts, trainer="train_llama", base="in"):
    """One line with these parts; nothing is written, and what was there stays."""
    for name in ("out", "merged"):
        shutil.rmtree(lab.path(name), ignore_errors=True)
    before = lab.files(".")
    done = lab.run(*options("-e", base, "-o", "out", *given), status=None, trainer=trainer, timeout=30)
    assert done.status in (1, 2), done.out[-300:]
    says(done.err, *parts)
    assert done.err.count(f"{trainer}: ") == 1 and "simt" not in done.err
    assert {name: data for name, data in lab.files(".").items() if name != "out"} == before

Q0, V1 = (f"{PEFT}model.layers.{l}.self_attn.{name}_proj.lora_" for l, name in ((0, "q"), (1, "v")))
GIVEN = {"q_proj": 3, "v_proj": 3}

def of(dtype, shape, value=0.5):
    n = int(np.prod(shape))
    return Tensor(dtype, list(shape), pack(dtype, [value] * n) if dtype in ("F32", "BF16", "F16") else bytes(n * 4))

BAD_CONFIGS = {
    "DoRA": (dict(use_dora=True), ["use_dora"]), "biases": (dict(bias="all"), ["bias"]), "biases of LoRA's": (dict(bias="lora_only"), ["bias"]),
    "B's bias": (dict(lora_bias=True), ["lora_bias"]), "LoKr": (dict(peft_type="LOKR"), ["peft_type", "LOKR"]), "IA3": (dict(peft_type="IA3"), ["IA3"]),
    "no type": (dict(peft_type="absent"), ["peft_type"]), "a type that is a number": (dict(peft_type=1), ["peft_type"]),
    "embeddings": (dict(modules_to_save=["embed_tokens", "lm_head"]), ["modules_to_save", "embed_tokens"]),
    "QA-LoRA": (dict(use_qalora=True), ["use_qalora"]), "layers twice": (dict(layer_replication=[[0, 2], [1, 2]]), ["layer_replication"]),
    "parameters": (dict(target_parameters=["mlp.experts"]), ["target_parameters"]), "tokens": (dict(trainable_token_indices=[1]), ["trainable_token_indices"]),
    "activated LoRA": (dict(alora_invocation_tokens=[1]), ["alora_invocation_tokens"]), "PiSSA": (dict(init_lora_weights="pissa"), ["init_lora_weights", "pissa"]),
    "only q": (dict(target_modules=["q_proj"]), ["layers.0.self_attn.v_proj", "target_modules"]),
    "none": (dict(target_modules=[]), ["target_modules"]), "a number": (dict(target_modules=3), ["target_modules"]),
    "null": (dict(target_modules=None), ["target_modules"]), "a regex of others": (dict(target_modules=r".*\.(k|o)_proj"), ["target_modules"]),
    "a regex of q": (dict(target_modules=r".*\.q_proj"), ["v_proj", "target_modules"]), "no regex": (dict(target_modules=r".*\.(q_proj"), ["regular expression"]),
    "one more": (dict(target_modules=["q_proj", "v_proj", "o_proj"]), ["layers.0.self_attn.o_proj"]), "all-linear": (dict(target_modules="all-linear"), ["k_proj"]),
    "of another model": (dict(target_modules=["c_attn"]), ["target_modules"]), "the head": (dict(target_modules=["q_proj", "v_proj", "lm_head"]), ["lm_head"]),
    "one layer": (dict(layers_to_transform=[1]), ["layers.0.self_attn.q_proj"]),
    "not v": (dict(exclude_modules=["v_proj"]), ["v_proj"]),
    "another rank": (dict(r=4), ["lora_A", "[4, 16]", "[3, 16]"]), "another rank of v": (dict(rank_pattern={"v_proj": 5}), ["v_proj.lora_A", "[5, 16]", "[3, 16]"]),
    "rank 0": (dict(r=0), ["r"]), "a rank below 0": (dict(r=-3), ["r -3"]), "a rank of 1e300": (dict(r=1e300), ["r 1e+300"]),
    "dropout below 0": (dict(lora_dropout=-0.1), ["lora_dropout"]), "BD-LoRA": (dict(use_bdlora={"nblocks": 2}), ["use_bdlora"]), "KaSA": (dict(kasa_config={"r": 1}), ["kasa_config"]),
    "an embedding": (dict(target_modules=["q_proj", "v_proj", "embed_tokens"]), ["embed_tokens"]), "half a rank": (dict(r=2.5), ["r"]), "a rank in words": (dict(r="three"), ["r"]), "a rank of 2^40": (dict(r=2**40), ["r"]),
    "no alpha": (dict(lora_alpha="absent"), ["lora_alpha"]), "alpha in words": (dict(lora_alpha="six"), ["lora_alpha"]), "alpha 1e999": (dict(lora_alpha=float("inf")), ["adapter_config.json"]),
    "patterns that are a list": (dict(rank_pattern=[3]), ["rank_pattern"]), "alpha_pattern in words": (dict(alpha_pattern={"q_proj": "x"}), ["alpha_pattern"]),
    "dropout 1": (dict(lora_dropout=1.0), ["lora_dropout"]), "rslora in words": (dict(use_rslora="yes"), ["use_rslora"]),
}

@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_config(room, name):
    change, parts = BAD_CONFIGS[name]
    write_adapter(room.path("adapter"), adapters(model("llama:L2,H2,C16,F24,T32,V257")[0], GIVEN), **change)
    refused(room, "--adapter", "adapter", parts=["adapter", *parts])

REGEXES = [r".*\.(q|v)_proj", r"model\.layers\.\d+\.self_attn\.[qk]_proj", r".*layers\.(1|2|11)\.mlp\.(up|down)_proj", r".*(?:q|v)_proj", r".*\.\w+_proj", r".*?q_proj",
           r".*q_proj|.*v_proj", r".*\.[0-9]{2}\.mlp\..*", r"^model\..*k_proj$", r"[\w\.]+q_proj", r"\A[a-z.]+[\d]+[\w.]+\.(?P<which>q|k)_proj\Z", "All-Linear", r".*layers.1.mlp.*",
           r"(?:.*?(?:language|text).*?(?:self_attn|attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))"]  # Unsloth's

@pytest.mark.parametrize("regex", REGEXES)
def test_regular_expressions(room, regex):
    """Of target_modules mean what they mean to Python: 12 layers, of whose matrices an adapter has those that match and no other."""
    config = reference().LlamaConfig.parse("L12,H2,K1,C16,F24,T32,V257", "llama", 1e4, None, 1e-5, False)
    if not room.path("deep").exists():
        write_base(room.path("deep"), config, reference().llama_model(config, 1))
    hit = [m for m in modules(config) if regex == "All-Linear" or re.fullmatch(regex, m)]
    for some in (hit, hit[1:]):   # all of them, or one is missing
        write_adapter(room.path("adapter"), {m: (np.ones((3, modules(config)[m][1])), np.ones((modules(config)[m][0], 3)), 2) for m in some},
                      target_modules=regex, layers_to_transform=None)
        done = room.run(*options("-e", "deep", "--adapter", "adapter", "-x", 0), status=0 if some is hit else 1, trainer="train_llama")
        assert some is hit or hit[0] in done.err

BAD_ADAPTERS = {
    "no B": (lambda t: t.pop(V1 + "B.weight"), ["layers.1.self_attn.v_proj", "no lora_B"]), "no A": (lambda t: t.pop(Q0 + "A.weight"), ["layers.0.self_attn.q_proj", "no lora_A"]),
    "no q in a layer": (lambda t: [t.pop(Q0 + f"{which}.weight") for which in "AB"], ["layers.0.self_attn.q_proj"]), "nothing": (lambda t: t.clear(), ["adapter_model.safetensors"]),
    "A of another width": (lambda t: t.update({Q0 + "A.weight": of("F32", [3, 24])}), [Q0 + "A.weight", "[3, 16]", "[3, 24]"]),
    "A turned": (lambda t: t.update({Q0 + "A.weight": of("F32", [16, 3])}), [Q0 + "A.weight", "[3, 16]", "[16, 3]"]),
    "B of another height": (lambda t: t.update({V1 + "B.weight": of("F32", [8, 3])}), [V1 + "B.weight", "[16, 3]", "[8, 3]"]),
    "ranks that differ": (lambda t: t.update({V1 + "B.weight": of("F32", [16, 4])}), [V1 + "B.weight", "[16, 3]", "[16, 4]"]),
    "flat": (lambda t: t.update({V1 + "B.weight": of("F32", [48])}), [V1 + "B.weight", "[48]"]),
    "NaN": (lambda t: t.update({V1 + "B.weight": of("F32", [16, 3], float("nan"))}), [V1 + "B.weight"]),
    "infinity": (lambda t: t.update({Q0 + "A.weight": of("F16", [3, 16], float("inf"))}), [Q0 + "A.weight"]),
    "integers": (lambda t: t.update({Q0 + "A.weight": of("I32", [3, 16])}), [Q0 + "A.weight", "I32"]),
    "DoRA's magnitudes": (lambda t: t.update({Q0 + "magnitude_vector": of("F32", [16])}), ["lora_magnitude_vector"]),
    "B's bias": (lambda t: t.update({Q0 + "B.bias": of("F32", [16])}), [Q0 + "B.bias"]),
    "an embedding's": (lambda t: t.update({f"{PEFT}model.embed_tokens.lora_embedding_A": of("F32", [3, 257])}), ["lora_embedding_A"]),
    "the head's": (lambda t: t.update({f"{PEFT}lm_head.lora_{w}.weight": of("F32", s) for w, s in (("A", [3, 16]), ("B", [257, 3]))}), ["lm_head"]),
    "a head to save": (lambda t: t.update({f"{PEFT}lm_head.weight": of("F32", [257, 16])}), ["lm_head.weight"]),
    "of a layer that is not there": (lambda t: t.update({Q0.replace("layers.0", "layers.2") + f"{w}.weight": of("F32", s) for w, s in (("A", [3, 16]), ("B", [16, 3]))}), ["layers.2"]),
    "without base_model.model": (lambda t: [t.update({n.removeprefix(PEFT): t.pop(n)}) for n in list(t)], ["model.layers.0.self_attn", PEFT.rstrip(".")]),
    "with an adapter's name": (lambda t: [t.update({n.replace(".weight", ".default.weight"): t.pop(n)}) for n in list(t)], ["lora_A.weight"]),
    "LoKr's": (lambda t: t.update({Q0.replace("lora_", "lokr_w1"): of("F32", [4, 4])}), ["lokr_w1"]),
    "a base's": (lambda t: t.update({"model.norm.weight": of("F32", [16])}), ["model.norm.weight"]),
}

@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_bad_tensors(room, name):
    change, parts = BAD_ADAPTERS[name]
    made = adapters(model("llama:L2,H2,C16,F24,T32,V257")[0], GIVEN)
    tensors = peft_tensors(made)
    change(tensors)
    write_adapter(room.path("adapter"), made, tensors=tensors)
    refused(room, "--adapter", "adapter", parts=["adapter", *parts])

BAD_FOLDERS = {
    "no weights": (lambda p: (p / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors"]),
    "no config": (lambda p: (p / "adapter_config.json").unlink(), ["adapter_config.json"]),
    "a pickle": (lambda p: (p / "adapter_model.safetensors").rename(p / "adapter_model.bin"), ["adapter_model.safetensors"]),
    "a cut file": (lambda p: (p / "adapter_model.safetensors").write_bytes((p / "adapter_model.safetensors").read_bytes()[:-1]), ["adapter_model.safetensors", "cut off"]),
    "an empty file": (lambda p: (p / "adapter_model.safetensors").write_bytes(b""), ["adapter_model.safetensors"]),
    "no JSON": (lambda p: (p / "adapter_config.json").write_text("{"), ["adapter_config.json"]),
    "a list": (lambda p: (p / "adapter_config.json").write_text("[]"), ["adapter_config.json"]),
    "a folder for a file": (lambda p: ((p / "adapter_config.json").unlink(), (p / "adapter_config.json").mkdir()), ["adapter_config.json"]),
    "nothing": (shutil.rmtree, ["adapter"]),
}

@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folder(room, name):
    change, parts = BAD_FOLDERS[name]
    shutil.rmtree(room.path("adapter"), ignore_errors=True)
    write_adapter(room.path("adapter"), adapters(model("llama:L2,H2,C16,F24,T32,V257")[0], GIVEN))
    change(room.path("adapter"))
    refused(room, "--adapter", "adapter", parts=parts)
    shutil.rmtree(room.path("adapter"), ignore_errors=True)

@pytest.mark.parametrize("trainer, base, given, parts", [
    ("train_llama", "in", ["--lora", 4, "--adapter", "adapter"], ["--lora 4", "--adapter"]),
    ("train_llama", "in", ["--adapter", "adapter", "--lora-targets", "q"], ["--lora-targets", "--adapter"]),
    ("train_llama", "in", ["--adapter", "adapter", "--lora-alpha", 4], ["--lora-alpha", "--adapter"]),
    ("train_llama", "in", ["--merge", "merged"], ["--merge", "--adapter"]), ("train_llama", "in", ["--merge", "merged", "--lora", 4], ["--merge", "--adapter"]),
    ("train_llama", "in", ["--adapter", "adapter", "--merge", "in"], ["--merge in"]), ("train_llama", "in", ["--adapter", "adapter", "--merge", "adapter"], ["--merge adapter"]),
    ("train_llama", "in", ["--adapter", "adapter", "--merge", "train.bin"], ["--merge train.bin"]),
    ("train_llama", "in", ["--adapter", "in"], ["adapter_config.json"]), ("train_llama", "adapter", [], ["config.json"]),
    ("train_llama", "in", ["--adapter", "of_gpt2"], ["of_gpt2/adapter_model.safetensors"]), ("train_gpt2", "gpt2", ["--adapter", "adapter"], ["adapter/adapter_model.safetensors"]),
    ("train_llama", "llama:L2,H2,C32,F24,T32,V257", ["--adapter", "adapter"], ["[3, 32]", "[3, 16]"]),
    ("train_llama", "in", ["--lora", -1], ["--lora -1"]), ("train_llama", "in", ["--lora", 1.5], ["--lora 1.5"]), ("train_llama", "in", ["--lora", 1 << 30], ["--lora"]),
    ("train_llama", "in", ["--lora", 3, "--lora-targets", "c_attn"], ["c_attn"]), ("train_llama", "in", ["--lora", 3, "--lora-targets", ""], ["--lora-targets"]),
    ("train_llama", "in", ["--lora", 3, "--lora-targets", "q,,v"], ["--lora-targets q,,v"]), ("train_llama", "in", ["--lora", 3, "--lora-targets", "q,lm_head"], ["lm_head"]),
    ("train_gpt2", "gpt2", ["--lora", 3, "--lora-targets", "gate"], ["gate", "q,k,v,o,fc,proj"]), ("train_gpt2", "gpt2", ["--lora", 3, "--lora-targets", "c_proj"], ["c_proj"]),
    *[("train_llama", "in", ["--lora", 3, name, x], [f"{name} {x}"]) for name, x in (("--lora-dropout", 1), ("--lora-dropout", -0.1), ("--lora-dropout", "nan"),
                                                                                ("--lora-alpha", 0), ("--lora-alpha", -1), ("--lora-freeze-a", 2), ("--lora-train-norms", 2))],
    *[("train_llama", "in", [name, x], [name, "--lora"]) for name, x in (("--lora-targets", "q"), ("--lora-alpha", 3), ("--lora-dropout", 0.1), ("--lora-freeze-a", 1), ("--lora-train-norms", 1))],
    ("train_llama", "in", ["--base", "nf4"], ["--base nf4", "--lora"]), ("train_llama", "in", ["--lora", 3, "--base", "fp4"], ["--base fp4", "nf4"]),
    ("train_llama", "in", ["--lora", 3, "--embedding-on", "disk"], ["--embedding-on disk", "host"]), ("train_llama", "in", ["--lora", 3, "--double-quant", 2], ["--double-quant 2"]),
    ("train_llama", "in", ["--adapter", "adapter", "--dump-gradients", "adapter/adapter_model.safetensors"], ["--dump-gradients adapter/adapter_model.safetensors"]),
    ("train_llama", "in", ["--adapter", "adapter", "--log", "adapter/adapter_config.json"], ["--log adapter/adapter_config.json"]),
])
def test_what_contradicts(room, trainer, base, given, parts):
    write_adapter(room.path("adapter"), adapters(model("llama:L2,H2,C16,F24,T32,V257")[0], GIVEN))
    write_adapter(room.path("of_gpt2"), adapters(model("gpt2:L2,H2,C16,T32,V257")[0], {"attn.c_attn": 3}))
    refused(room, *given, parts=parts, trainer=trainer, base=base)

@pytest.mark.parametrize("out, given, parts", [
    ("lora", ["--lora", 4], ["--lora 4"]), ("lora", ["--lora", 3, "--lora-targets", "q"], ["--lora-targets"]), ("lora", ["--lora-alpha", 9], ["--lora-alpha"]),
    ("lora", ["--lora-freeze-a", 1], ["--lora-freeze-a"]), ("lora", ["--lora-train-norms", 1], ["--lora-train-norms"]), ("lora", ["-e", "wider"], ["lora_A"]),
    ("full", ["--lora", 3], ["lora"])], ids=str)
def test_resume_asks_for_what_it_was(room, out, given, parts):
    """Another rank, other targets, full training, another base: said, and nothing of the folder changes."""
    if not room.path("wider").exists():
        write_base(room.path("wider"), *model("llama:L2,H2,C32,F24,T32,V257"))
        for name in ("lora", "full"):
            room.train("-e", "in", *(["--lora", 3] if name == "lora" else []), "-x", 2, "-o", name, trainer="train_llama")
    shutil.rmtree(room.path("again"), ignore_errors=True)
    shutil.copytree(room.path(out), room.path("again"))
    done = room.run(*options("-e", "in", *given, "-x", 4, "-o", "again", "-y", 1), status=None, trainer="train_llama")
    assert done.status in (1, 2) and room.files("again") == room.files(out), done.out[-300:]
    says(done.err, *parts)

def test_resume_names_another_base(room):
    """Which may be the same one elsewhere."""
    for name in ("started", "elsewhere"):
        shutil.rmtree(room.path(name), ignore_errors=True)
    room.train("-e", "in", "--lora", 3, "-x", 1, "-o", "started", trainer="train_llama")
    shutil.copytree(room.path("in"), room.path("elsewhere"))
    said = room.train("-e", "elsewhere", "-x", 2, "-o", "started", "-y", 1, trainer="train_llama").out
    assert any(line.startswith("note: ") and "elsewhere" in line for line in said.splitlines()), said[-800:]

def test_a_resumed_run_has_its_own_dropout_and_no_fusion(room):
    """What an adapter's config says was the run's; and GELU in a matmul's epilogue is refused as it is in the first run."""
    shutil.rmtree(room.path("dropped"), ignore_errors=True)
    room.train("-e", "gpt2", "--lora", 3, "--lora-dropout", 0.1, "-x", 1, "-o", "dropped", trainer="train_gpt2")
    says(room.run(*options("-e", "gpt2", "-x", 2, "-o", "dropped", "-y", 1, "-ge", 2), status=2, trainer="train_gpt2").err, "-ge 2", "adapter", "expected 0")
    room.train("-e", "gpt2", "--lora-dropout", 0.3, "-x", 2, "-o", "dropped", "-y", 1, trainer="train_gpt2")
    said = [json.loads(room.path(f"dropped/step_{n:08d}/adapter_config.json").read_text())["lora_dropout"] for n in (1, 2)]
    assert said == [pytest.approx(0.1), pytest.approx(0.3)]

def test_backward_stops_below_the_lowest_adapter(room):
    """Matmuls are counted: with an adapter on one layer alone, each layer below it costs its forward and nothing else."""
    count = {}
    for layers in (2, 5):
        config, tensors = model(f"llama:L{layers},H4,K2,C32,F56,T32,V131", 3)
        write_base(room.path(f"deep{layers}"), config, tensors)
        for layer in (0, layers - 1):
            write_adapter(room.path("one"), adapters(config, {"q_proj": 4}, layers=[layer]))
            said = room.run(*options("-e", f"deep{layers}", "--adapter", "one", "-x", 1, "-v", 0, "-s", 0), trainer="train_llama", env={"SIMT_PROFILE": 1}).err
            count[layers, layer] = int(re.search(r"(\d+)(?: +\d+){4}  \[matmul\]", said)[1])
        shutil.rmtree(room.path("one"))
    forward = 4   # qkv, o, gate and up, down
    assert count[5, 4] - count[2, 1] == 3 * (forward + 2) and count[5, 0] - count[2, 0] > 3 * (2 * forward)

def test_no_adapter_that_is_not_finite(room):
    """Steps that explode change nothing and write nothing; a folder that is there holds numbers."""
    shutil.rmtree(room.path("boom"), ignore_errors=True)
    done = room.run(*options("-e", "in", "--lora", 3, "-x", 40, "-n", 1, "-l", 1e9, "-c", 1e9, "--grad-clip", 0, "-k", "constant", "-o", "boom"),
                    trainer="train_llama", variant="cpu-fp32", status=3)   # as ten such steps in a row end it
    written = [int(path.parent.name[5:]) for path in room.path("boom").rglob("adapter_model.safetensors")]
    first = int(re.search(r"no checkpoint of step (\d+)", done.err)[1])
    assert all(step < first for step in written)
    for step in written:
        assert all(np.isfinite(t).all() for t in arrays(room.path(f"boom/step_{step:08d}/adapter_model.safetensors")).values()), step

# ---- norms that an adapter brings, merges, and what a run goes on with ------------------------------------

NORMS = {"train_llama": ["input_layernorm", "post_attention_layernorm", "norm"], "train_gpt2": ["ln_1", "ln_2", "ln_f"]}

@pytest.mark.parametrize("variant", ["cpu-fp32", "cpu-approxbp-fp32"])
@pytest.mark.parametrize("case", ["all", "gpt2 all"])
def test_some_norms_alone(bench, case, variant):
    """An adapter that holds a part of the norms: these are trained, and the gradients are those of all that are; it goes on so, and merges."""
    lab = bench(case)[0]
    for name in ("out", "went", "merged", "some"):
        shutil.rmtree(lab.path(name), ignore_errors=True)
    train(lab, "--lora", 3, "--lora-train-norms", 1, "-l", 1e-2, "-o", "out", variant=variant)
    file = read_safetensors(lab.path(f"out/step_{STEPS:08d}/adapter_model.safetensors"))
    config = json.loads(lab.path(f"out/step_{STEPS:08d}/adapter_config.json").read_text())
    first = NORMS[lab.how["trainer"]][0]
    kept = {name: t for name, t in file.items() if ".lora_" in name or f".{first}." in name}
    assert set(kept) < set(file) and any(f".{first}." in name for name in kept)
    lab.path("some").mkdir()
    lab.path("some/adapter_config.json").write_text(json.dumps({**config, "modules_to_save": [first]}))
    lab.path("some/adapter_model.safetensors").write_bytes(safetensors_bytes(kept))
    lab.run("-e", "in", "--adapter", "some", "--merge", "merged", variant=variant, **lab.how)
    found = {}
    for name, given in (("some", ["--adapter", "some", "-o", "went"]), ("all", ["--adapter", "some", "--lora-train-norms", 1, "-x", 0]), ("merged", ["-e", "merged", "-x", 0])):
        ran = train(lab, *given, "--dump-gradients", "g.safetensors", variant=variant)
        assert ran.done["peak_bytes"] == ran.done["estimate_bytes"]
        found[name] = arrays(lab.path("g.safetensors"))
    assert set(found["some"]) == {"loss", *kept}
    for name in kept:
        assert distance(found["some"][name], found["all"][name]) < 1e-6, name
    assert close(float(found["merged"]["loss"]), float(found["some"]["loss"]), 1e-5)
    went = f"went/step_{STEPS:08d}"
    assert json.loads(lab.path(f"{went}/adapter_config.json").read_text())["modules_to_save"] == [first]
    assert set(read_safetensors(lab.path(f"{went}/adapter_model.safetensors"))) == set(kept)
    assert len(train(lab, "-x", STEPS + 1, "-o", "went", "-y", 1, variant=variant).losses) == 1
    says(train(lab, "--adapter", "some", "--lora-train-norms", 0, status=2, variant=variant).err, "--lora-train-norms 0", "some")

def test_norms_that_are_not_there(bench):
    """modules_to_save names norms of which there is no tensor, or does not name one that is there."""
    lab = bench("all")[0]
    norm = {f"{PEFT}model.layers.{l}.input_layernorm.weight": Tensor("F32", [40], pack("F32", [1.0] * 40)) for l in (0, 1)}
    for tensors, saved, parts in ((norm, None, ["does not name", "input_layernorm"]), ({}, ["input_layernorm"], ["does not hold", "input_layernorm"]),
                                  (norm, ["input_layernorm", "norm"], ["does not hold", "model.norm"]), ({}, ["embed_tokens"], ["embed_tokens"])):
        write_adapter(lab.path("odd"), lab.given, tensors={**peft_tensors(lab.given), **tensors}, modules_to_save=saved)
        says(lab.run("-e", "in", "--adapter", "odd", "-i", "batch.bin", "-b", B, "-t", T, "-x", 0, "-v", 0, status=1, **lab.how).err, "odd/adapter_", *parts)

@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_merge_with_what_is_not_finite(bench, value):
    lab = bench("all")[0]
    write_adapter(lab.path("odd"), lab.given)
    tensors = read_safetensors(lab.path("odd/adapter_model.safetensors"))
    name = sorted(tensors)[-1]
    tensors[name] = Tensor("F32", tensors[name].shape, pack("F32", [float(value)] * int(np.prod(tensors[name].shape))))
    lab.path("odd/adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    for given in ([], ["-j", "batch.bin", "-b", 1, "-t", T]):
        shutil.rmtree(lab.path("merged"), ignore_errors=True)
        says(lab.run("-e", "in", "--adapter", "odd", "--merge", "merged", *given, status=1, **lab.how).err, name, "finite")
        assert not lab.path("merged").exists() and not lab.path("merged.tmp").exists()

def test_what_merging_takes(bench):
    """A slash at the end, what a killed one has left, -v 0; and options that have no place there are refused by name."""
    lab = bench("all")[0]
    for name in ("merged", "merged.tmp"):
        shutil.rmtree(lab.path(name), ignore_errors=True)
    lab.path("merged.tmp").mkdir()
    lab.path("merged.tmp/half").write_text("half")
    done = lab.run("-e", "in", "--adapter", "adapter", "--merge", "merged/", "-j", "batch.bin", "-b", 1, "-t", T, "-v", 0, **lab.how)
    assert "loss of a batch" in done.out and not lab.path("merged.tmp").exists() and not lab.path("merged/half").exists()
    for given in (["-o", "out2"], ["-x", 3], ["--estimate"], ["--dump-gradients", "g2"], ["--log", "l2"], ["-o", "out2", "-y", 1]):
        says(lab.run("-e", "in", "--adapter", "adapter", "--merge", "m2", *given, status=2, **lab.how).err, "--merge m2", given[0])
        assert not lab.path("m2").exists() and not lab.path("out2").exists()

def test_a_base_that_is_drawn(room):
    """Of a model by its size the seed makes the weights: a resumed run has them too, and says the same as one that went through."""
    for name in ("through", "apart"):
        shutil.rmtree(room.path(name), ignore_errors=True)
    how = {"trainer": "train_llama", "variant": "cpu-fp32"}
    base = ["-e", "llama:L2,H2,C16,F24,T32,V257", "--lora", 3, "-k", "constant"]
    room.train(*base, "--seed", 7, "-x", 2, "-o", "apart", **how)
    assert "no file" in room.train(*base, "--seed", 7, "-x", 4, "-o", "through", **how).out
    for given in (["--seed", 7], [], ["--seed", 8]):
        shutil.rmtree(room.path("again"), ignore_errors=True)
        shutil.copytree(room.path("apart"), room.path("again"))
        room.train(*base, *given, "-x", 4, "-o", "again", "-y", 1, **how)
        assert room.files("again/step_00000004")["adapter_model.safetensors"] == room.files("through/step_00000004")["adapter_model.safetensors"], given

def test_the_base_is_named(room):
    """As it was loaded, whatever the adapter's config said; a config that names none asks for it."""
    shutil.rmtree(room.path("named"), ignore_errors=True)
    write_adapter(room.path("adapter"), adapters(model("llama:L2,H2,C16,F24,T32,V257")[0], GIVEN), base_model_name_or_path=None, task_type=None)
    room.train("-e", "in", "--adapter", "adapter", "-x", 1, "-o", "named", trainer="train_llama")
    path = room.path("named/step_00000001/adapter_config.json")
    config = json.loads(path.read_text())
    assert config["base_model_name_or_path"] == str(room.path("in").resolve()) and config["task_type"] == "CAUSAL_LM"
    path.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    says(room.run("-i", "train.bin", "-j", "val.bin", "-b", 2, "-t", 32, "-x", 2, "-o", "named", "-y", 1, trainer="train_llama", status=2).err,
         "expected -e DIR")

def test_a_resumed_run_keeps_what_it_was(room):
    """Without the options that its first part had: A stays frozen, norms in training, weights in 4 bits."""
    for name in ("kept", "typed"):
        shutil.rmtree(room.path(name), ignore_errors=True)
    given = ["--lora-freeze-a", 1, "--lora-train-norms", 1, "--base", "nf4", "--double-quant", 0, "--lora-dropout", 0.25]
    room.train("-e", "in", "--lora", 3, *given, "-x", 2, "-o", "kept", trainer="train_llama")
    shutil.copytree(room.path("kept"), room.path("typed"))
    room.train("-e", "in", "-x", 4, "-o", "kept", "-y", 1, trainer="train_llama")
    room.train("-e", "in", "--lora", 3, *given, "-x", 4, "-o", "typed", "-y", 1, trainer="train_llama")
    assert room.files("kept/step_00000004") == room.files("typed/step_00000004")

def test_parts_of_c_attn_stay_parts(room):
    """While B is still zero, too; and an adapter of c_attn as a whole stays whole."""
    for targets in ("q,v", "k", "qkv"):
        for name in ("parts", "parts2"):
            shutil.rmtree(room.path(name), ignore_errors=True)
        room.train("-e", "gpt2", "--lora", 4, "--lora-targets", targets, "-x", 1, "-l", 0, "-o", "parts")
        for given in (["-x", 2, "-o", "parts", "-y", 1], ["--adapter", "parts/step_00000001", "-x", 1, "-o", "parts2"]):
            assert f"rank 4 on {targets}," in room.train("-e", "gpt2", *given).out
        found = read_safetensors(room.path("parts2/step_00000001/adapter_model.safetensors"))
        assert found["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"].shape[0] == 4 * len(targets.split(","))

def test_write_bin_has_no_adapters(room):
    shutil.rmtree(room.path("bin"), ignore_errors=True)
    room.train("-e", "gpt2", "--lora", 4, "-x", 1, "-o", "bin")
    for given in (["-e", "gpt2", "-x", 2, "-o", "bin", "-y", 1], ["-e", "gpt2", "--lora", 4], ["-e", "gpt2", "--base", "nf4", "-x", 0]):
        says(room.run(*options(*given, "--write-bin", "w.bin"), status=2).err, "--write-bin w.bin", "adapters")
        assert not room.path("w.bin").exists()

@pytest.mark.parametrize("given, parts", [(["--double-quant", 0], ["--double-quant 0", "--base nf4"]), (["--lora", 3, "--double-quant", 1], ["--double-quant 1"])], ids=str)
def test_double_quant_of_nothing(room, given, parts):
    refused(room, *given, parts=parts)
