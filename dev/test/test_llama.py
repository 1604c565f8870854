"""train_llama: its numbers against PyTorch's (prepro/reference.py llama) and transformers', what a layer keeps, directories, resume."""
import json
import re
import struct

import pytest

from helpers import (Lab, Tensor, close, execute, learned, library, mpirun, names, options, pack, program, read_safetensors,
                     safetensors_bytes, says, script, unpack, words, write_tokens)

SIZE = "llama:L2,H4,K2,C32,F56,T32,V257"
LLAMA = {"trainer": "train_llama"}
# a run of one batch again and again, as the references compute it
ONE_BATCH = ["-a", 1, "-x", 10, "-l", 1e-4, "-k", "constant", "-c", 0.01, "--grad-clip", 0, "-f", 0]

def train(lab, *given, model=SIZE, **how):
    return lab.train("-e", model, *given, **LLAMA, **how)

def norm(values):
    return sum(x * x for x in values) ** 0.5

def distance(found, expected):
    return norm([a - b for a, b in zip(found, expected)]) / norm(expected)

# ---- against prepro/reference.py ------------------------------------------------------------------

# In each, something that is no power of two; together all heads that the kernels know, all scalings, both layouts of config.json.
CASES = {
    "llama": ["--config", "L2,H3,C48,F88,T40,V131"],
    "gqa llama3": ["--config", "L2,H6,K2,C96,F104,T48,V301,HS24", "--rope", "llama3", "--tied"],
    "linear": ["--config", "L2,H4,K1,C32,F40,T48,V77,HS8", "--rope", "linear", "--tied", "--transformers", 5],
    "mistral": ["--config", "L1,H2,K1,C64,F72,T48,V300,HS128", "--type", "mistral", "--theta", 1e6],
    "qwen2": ["--config", "L2,H4,K2,C96,F120,T48,V301", "--type", "qwen2", "--tied", "--eps", 1e-6],
    "qwen3": ["--config", "L2,H4,K2,C64,F96,T48,V301,HS40", "--type", "qwen3", "--eps", 1e-6, "--transformers", 5],
    "qwen3 llama3": ["--config", "L2,H2,K2,C48,F48,T48,V140,HS96", "--type", "qwen3", "--tied", "--rope", "llama3"],
}
B, T = 3, 38

@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Makes a model and its numbers once: (folder of the lab, {name: values} that are expected)."""
    made = {}

    def make(case, *more):
        if (case, *more) not in made:
            library("torch", "python3-torch")
            lab = Lab(tmp_path_factory.mktemp("reference"))
            script("prepro/reference.py", "llama", *CASES[case], *more, "--batch", B, "--seq", T, "--out", lab.path("in"))
            data = (lab.folder / "in_expected.safetensors").read_bytes()
            begin = 8 + struct.unpack("<Q", data[:8])[0]
            expected = {}
            for name, e in json.loads(data[8:begin]).items():
                if name != "__metadata__":
                    raw = data[begin + e["data_offsets"][0]:begin + e["data_offsets"][1]]
                    expected[name] = struct.unpack(f"<{len(raw) // 4}{'i' if e['dtype'] == 'I32' else 'f'}", raw)
            write_tokens(lab.path("batch.bin"), [*expected["x"], expected["y"][-1]])
            made[case, *more] = lab, expected
        return made[case, *more]
    return make

def check(made, variant, tolerances, *given):
    lab, expected = made
    for_loss, for_gradients, for_steps = tolerances
    ran = train(lab, *ONE_BATCH, "-i", "batch.bin", "-b", B, "-t", T, "--dump-gradients", "g.safetensors", *given, model="in", variant=variant)
    found = {name: unpack(t) for name, t in read_safetensors(lab.path("g.safetensors")).items()}
    assert close(found.pop("loss"), expected["loss"], for_loss)
    assert set(found) == set(expected) - {"x", "y", "logits", "loss", "losses"}
    for name, values in found.items():
        assert distance(values, expected[name]) < for_gradients, name
    assert close(ran.losses, list(expected["losses"]), for_steps)
    assert ran.done["peak_bytes"] == ran.done["estimate_bytes"]

# bf16: of steps, because AdamW moves weights by 1e-4, of which the first are less than half a step of bf16
FP32, BF16 = (1e-6, 1e-5, 1e-5), (1e-3, 4e-2, 2e-2)

@pytest.mark.parametrize("case", CASES)
def test_exact(reference, case):
    for r in (0, 1, 2):
        check(reference(case), "cpu-fp32", FP32, "-r", r, "--loss-chunks", r + 1)

@pytest.mark.parametrize("case", CASES)
def test_bf16(reference, case):
    for variant in ("cpu-bf16", "cpu-norm-bf16"):
        check(reference(case), variant, BF16)

@pytest.mark.parametrize("case", ["gqa llama3", "qwen2", "qwen3"])
def test_codes_and_shared_norms(reference, case):
    """The derivative from codes is an autograd function's; the norms' parameters get their exact gradients, through the folding."""
    for r in (0, 2):
        check(reference(case, "--approxbp", "--margin", 1e-5), "cpu-approxbp-fp32", FP32, "-r", r)

def test_codes_by_the_slope(reference):
    """make APPROX_FIT=slope. And GPT-2's, in test_lora.py."""
    check(reference("gqa llama3", "--approxbp", "--act-fit", "slope", "--margin", 1e-5), "cpu-slope-fp32", FP32)

# ---- against transformers ---------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "GPT2"])
def test_against_transformers(lab, kind):
    """What transformers writes, in shards, is read, and the other way round; in between a step that changes nothing."""
    transformers = library("transformers")
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip("transformers is older than 4.51, which brought Qwen3")
    import torch
    torch.manual_seed(1)
    sizes = {"vocab_size": 301, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} \
        if kind == "GPT2" else {"vocab_size": 301, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 6,
                                "num_key_value_heads": 2, "max_position_embeddings": 64}
    if kind == "Qwen3":
        sizes["head_dim"] = 16
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**sizes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.2 if p.dim() == 1 else 0.1) + (p.dim() == 1 and "bias" not in name))
    model.save_pretrained(lab.path("in"), max_shard_size="50KB")
    assert lab.path("in/model.safetensors.index.json").exists()
    ids = words(2 * 40 + 1, 301)
    write_tokens(lab.path("batch.bin"), ids)
    lab.train("-e", "in", "-i", "batch.bin", "-b", 2, "-t", 40, "-x", 1, "-l", 0, "-f", 0, "-o", "out", "--dump-gradients", "g.safetensors",
              variant="cpu-fp32", trainer="train_gpt2" if kind == "GPT2" else "train_llama")
    found = {name: unpack(t) for name, t in read_safetensors(lab.path("g.safetensors")).items()}
    x, y = torch.tensor(ids[:-1]).view(2, 40), torch.tensor(ids[1:])
    logits = model(x).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y)
    loss.backward()
    assert close(found.pop("loss"), [loss.item()], 1e-6) and set(found) == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        assert distance(found[name], p.grad.flatten().tolist()) < 1e-5, name
    again = transformers.AutoModelForCausalLM.from_pretrained(lab.path("out/step_00000001"))
    assert type(again) is type(model) and (again(x).logits - logits).abs().max().item() < 1e-6

# ---- what a layer keeps -------------------------------------------------------------------------------

UNITS = {"cpu-bf16": [17, 13.5, 11.5], "cpu-norm-bf16": [15, 11.5, 11.5], "cpu-approxbp-bf16": [15.44, 11.94, 11.94]}

@pytest.mark.parametrize("variant", UNITS)
def test_units(lab, variant):
    """Of Llama-3.1-8B: f 3.5, k 0.25. The codes of SwiGLU's gate come on top, f/8."""
    for r, units in enumerate(UNITS[variant]):
        table = json.loads(lab.run("--estimate=json", "-e", "llama3.1-8b", "-b", 1, "-t", 8192, "-r", r, variant=variant, **LLAMA).out)
        kept = sum(row["bytes"] for row in table["rows"] if row["kind"] == "saved" and row["scope"] == "layer")
        assert close(kept / (32 * 8192 * 4096 * 2), units, 0.015)

PARAMETERS = {   # of those that people have, as their pages say
    "llama2-7b": 6738.4, "llama3.1-8b": 8030.3, "llama3.1-70b": 70553.7, "llama3.2-1b": 1235.8, "mistral-7b": 7248.0, "qwen2.5-0.5b": 494.0,
    "qwen2.5-7b": 7615.6, "qwen3-0.6b": 596.0, "qwen3-8b": 8190.7, "smollm2-135m": 134.5, "tinyllama-1.1b": 1100.0}

def test_sizes_by_name(lab):
    """Their parameters are counted, without the rows that pad a vocabulary; a directory of such a name comes first."""
    for name, millions in PARAMETERS.items():
        rows = json.loads(lab.run("--estimate=json", "-e", name, "-b", 1, "-t", 8, **LLAMA).out)["rows"]
        count = sum(row["bytes"] / 2 for row in rows if row["kind"] == "param")
        assert close(count / 1e6, millions, 2e-3), name
    lab.path("llama2-7b").mkdir()
    says(lab.run("--estimate", "-e", "llama2-7b", status=1, **LLAMA).err, "llama2-7b/config.json")

# ---- runs ------------------------------------------------------------------------------------------------

def same_checkpoint(lab, one, other, step):
    assert [lab.files(one)[name] for name in names(step)] == [lab.files(other)[name] for name in names(step)]

@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-norm-bf16", "cpu-fp32"])
def test_resume_is_bit_equal(lab, variant):
    how = ["-n", 3, "-v", 3, "-m", 2, "-d", 128, "-k", "constant"]
    whole = train(lab, *how, "-x", 6, "-o", "whole", variant=variant)
    train(lab, *how, "-x", 3, "-o", "parts", variant=variant)
    rest = train(lab, *how, "-x", 6, "-o", "parts", "-y", 1, variant=variant, model=None)
    assert [line for line in learned(rest) if line.get("step", 6) > 3] == [line for line in learned(whole) if line.get("step", 6) > 3]
    same_checkpoint(lab, "whole", "parts", 6)
    assert whole.losses[-1] < whole.losses[0]

def test_thread_orders_and_poison_change_nothing(lab):
    for model, options_ in ((SIZE, []), ("in", ["-w", 0])):
        if model == "in":   # norms of q and k, from a directory that a run of ours has made of nothing but their shapes
            train(lab, "-x", 1, "-o", "plain")
            qwen3(lab, "plain/step_00000001", "in")
        runs = [learned(train(lab, "-x", 2, *options_, model=model, env={"SIMT_ORDER": order, "SIMT_SEED": 7})) for order in ("forward", "reverse", "priority")]
        assert runs[0] == runs[1] == runs[2]

def qwen3(lab, from_folder, folder):
    """A Qwen3 that differs from a Llama of ours by its norms of q and k."""
    tensors = read_safetensors(lab.path(f"{from_folder}/model.safetensors"))
    for layer in range(2):
        for which in "qk":
            tensors[f"model.layers.{layer}.self_attn.{which}_norm.weight"] = Tensor("BF16", [8], pack("BF16", [1 + 0.1 * i for i in range(8)]))
    lab.path(folder).mkdir()
    lab.path(f"{folder}/model.safetensors").write_bytes(safetensors_bytes(tensors))
    config = json.loads(lab.path(f"{from_folder}/config.json").read_text())
    lab.path(f"{folder}/config.json").write_text(json.dumps({**config, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))

def test_ranks_are_one_process_with_their_batches(lab):
    """Untied: the gradient of the embedding is zeroed once a step, that of the head is a sum over chunks, micro-batches and ranks."""
    one = train(lab, "-b", 4, "-d", 256, "--loss-chunks", 2, "-x", 3, variant="cpu-multi-fp32")
    for zero in (0, 1):
        arguments = options("--log", "ranks.jsonl", "-e", SIZE, "-b", 2, "-d", 256, "--loss-chunks", 2, "-x", 3, "-z", zero, "-o", f"out{zero}")
        done = execute(*mpirun(2), program("cpu-multi-fp32", "train_llama"), *arguments, cwd=lab.folder)
        assert done.status == 0, done.err
        losses = [json.loads(line)["train_loss"] for line in lab.path("ranks.jsonl").read_text().splitlines() if "train_loss" in line]
        assert close(losses, one.losses, 1e-6)
    assert lab.files("out0")[names(3)[0]] == lab.files("out1")[names(3)[0]]

def test_sanitizers_find_nothing(lab):
    """With heads of 24 channels in two key-value heads, a vocabulary that is padded, and what is not a multiple of a block."""
    train(lab, "-x", 2, "-r", 2, "-v", 1, "-m", 1, "-s", 2, "-g", 3, model="llama:L2,H4,K2,C40,D24,F72,T40,V259", variant="san-bf16")

# ---- directories ---------------------------------------------------------------------------------------

def directory(lab, **change):
    """A small Llama as a directory; change is made to its config. Returns {name: Tensor}."""
    train(lab, "-x", 1, "-o", "made")
    tensors = read_safetensors(lab.path("made/step_00000001/model.safetensors"))
    config = {**json.loads(lab.path("made/step_00000001/config.json").read_text()), **change}
    lab.path("in").mkdir()
    lab.path("in/config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))
    lab.path("in/model.safetensors").write_bytes(safetensors_bytes(tensors))
    return tensors

def test_every_tensor_keeps_its_type(lab):
    """Norms in F32 and a head in F16 beside weights in bf16: what no step has changed is written as it came, and a resume is bit-equal."""
    tensors = directory(lab)
    for name, t in tensors.items():
        if "norm" in name or "lm_head" in name:
            dtype = "F32" if "norm" in name else "F16"
            tensors[name] = Tensor(dtype, t.shape, pack(dtype, [x * 1.0009765625 for x in unpack(t)]))
    lab.path("in/model.safetensors").write_bytes(safetensors_bytes(tensors))
    train(lab, "-x", 1, "-l", 0, "-o", "out", model="in")
    assert read_safetensors(lab.path(f"out/{names(1)[0]}")) == tensors
    train(lab, "-x", 4, "-n", 2, "-k", "constant", "-o", "whole", model="in")
    train(lab, "-x", 2, "-n", 2, "-k", "constant", "-o", "parts", model="in")
    train(lab, "-x", 4, "-n", 2, "-k", "constant", "-o", "parts", "-y", 1, model=None)
    same_checkpoint(lab, "whole", "parts", 4)

@pytest.mark.parametrize("variant", ["cpu-bf16", "cpu-fp32"])
def test_no_step_writes_the_model_as_it_came(lab, variant):
    """-x 0 with --out: whatever the build, to the bit, zeros with a sign among them; without data. And in another type, if one is asked for."""
    tensors = directory(lab)
    tensors["lm_head.weight"] = Tensor("F32", [257, 32], pack("F32", [-0.0, 1 + 2**-20] * (257 * 16)))
    lab.path("in/model.safetensors").write_bytes(safetensors_bytes(tensors))
    train(lab, "-x", 0, "-i", "nothing.bin", "-o", "out", model="in", variant=variant)
    assert read_safetensors(lab.path(f"out/{names(0)[0]}")) == tensors
    train(lab, "-x", 0, "-i", "nothing.bin", "-o", "wide", "--save-dtype", "f32", model=f"out/step_{0:08d}", variant=variant)
    assert {name: (t.dtype, unpack(t)) for name, t in read_safetensors(lab.path(f"wide/{names(0)[0]}")).items()} == \
        {name: ("F32", unpack(t)) for name, t in tensors.items()}

def test_gradients_without_a_step(lab):
    """The same as before a step; the file of an earlier run is replaced, and no other."""
    for steps in (1, 0):
        train(lab, "-x", steps, "--dump-gradients", f"g{steps}.safetensors")
    assert lab.path("g0.safetensors").read_bytes() == lab.path("g1.safetensors").read_bytes()
    train(lab, "-x", 0, "--dump-gradients", "g1.safetensors")
    directory(lab)
    for name in ("in/model.safetensors", "train.bin"):
        before = lab.path(name).read_bytes()
        says(train(lab, "-x", 0, "--dump-gradients", name, status=1).err, f"--dump-gradients {name}", "another kind of file")
        assert lab.path(name).read_bytes() == before

def test_names_without_model_and_frequencies_in_the_file(lab):
    tensors = directory(lab)
    found = {name.removeprefix("model."): t for name, t in tensors.items()}
    found["layers.0.self_attn.rotary_emb.inv_freq"] = Tensor("F32", [4], pack("F32", [1, 0.1, 0.01, 0.001]))
    lab.path("in/model.safetensors").write_bytes(safetensors_bytes(found))
    train(lab, "-x", 1, "-l", 0, "-o", "out", model="in")
    assert read_safetensors(lab.path(f"out/{names(1)[0]}")) == tensors

def test_what_it_does_not_know_of_a_config_stays(lab):
    """And what transformers 5 calls rope_parameters is written in the words of 4, too, which would not find it there."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 16}
    directory(lab, rope_parameters=rope, rope_theta="absent", torch_dtype="absent", dtype="bfloat16", eos_token_id=[1, 2], pad_token_id=None, some={"a": [1.5]})
    train(lab, "-x", 1, "-l", 0, "-o", "out", model="in")
    before, after = (json.loads(lab.path(name).read_text()) for name in ("in/config.json", f"out/{names(1)[1]}"))
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    assert after == {**before, "torch_dtype": "bfloat16", "rope_theta": 5e5, "rope_scaling": scaling}

@pytest.mark.parametrize("change, parts", [
    ({"model_type": "gemma2"}, ["model_type is 'gemma2'", "expected llama, mistral, qwen2 or qwen3"]),
    ({"model_type": "absent"}, ["model_type is ''"]),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, ["rope_type is 'yarn'", "default, linear or llama3"]),
    ({"rope_scaling": {"type": "dynamic", "factor": 2}}, ["rope_type is 'dynamic'"]),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 4}}, ["rope_type llama3 needs low_freq_factor, between 0"]),
    ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, ["rope_type linear needs factor, between 0"]),
    ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn", "factor": 4}}, ["rope_type is 'yarn'"]),
    ({"layer_types": "sliding_attention"}, ["layer_types: expected a list"]),
    ({"num_experts": 8}, ["num_experts"]),
    ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None}, ["no size of a head"]),
    ({"model_type": "a\u001b[31m"}, ["model_type is 'a?[31m'"]),
    ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, ["factor: expected a number"]),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters", "'full_attention'"]),
    ({"rope_theta": 0}, ["rope_theta"]),
    ({"attention_bias": True}, ["attention_bias is true", "expected false"]),
    ({"mlp_bias": True}, ["mlp_bias is true"]),
    ({"hidden_act": "gelu"}, ["hidden_act is gelu", "expected silu"]),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, ["quantization_config"]),
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ({"layer_types": ["chunked_attention"]}, ["layer_types", "chunked_attention"]),
    ({"num_attention_heads": 0}, ["num_attention_heads", "from 1 to 2^30"]),
    ({"num_key_value_heads": 3}, ["key-value heads that divide the heads"]),
    ({"head_dim": 12}, ["heads of 12 channels", "multiple of 8"]),
    ({"head_dim": 16}, ["model.layers.0.self_attn.q_proj.weight", "expected the shape [64, 32]", "found [32, 32]"]),
    ({"intermediate_size": "absent"}, ["has no intermediate_size"]),
    ({"rms_norm_eps": 2}, ["rms_norm_eps", "between 0 and 1"]),
    ({"hidden_size": 1 << 29}, ["C 536870912"]),
    ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings: expected true or false"]),
    ({"model_type": "qwen2"}, ["no tensor model.layers.0.self_attn.q_proj.bias"]),
    ({"sliding_window": 16, "model_type": "mistral"}, ["--seq-len 32", "longest sequence is 16"]),
    ({"sliding_window": 24, "model_type": "mistral", "max_position_embeddings": 20}, ["--seq-len 32", "longest sequence is 24"]),
    ({"num_hidden_layers": 1}, ["model.layers.1.input_layernorm.weight is none of the model"]),
], ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items())[:60] if isinstance(value, dict) else "")
def test_what_a_config_asks_for_and_we_do_not(lab, change, parts):
    directory(lab, **change)
    done = train(lab, "-o", "out", model="in", status=None)
    assert done.status in (1, 2) and not lab.path("out").exists() or not lab.files("out")
    says(done.err, *parts)
    assert "simt" not in done.err and "Segmentation" not in done.err

def test_a_tied_head_in_the_file(lab):
    """It may be the embedding once more. transformers 4 takes the embedding where they differ, 5 takes the head: neither is ours to choose."""
    tensors = directory(lab, tie_word_embeddings=True)
    says(train(lab, "-o", "out", model="in", status=1).err, "lm_head.weight is another than model.embed_tokens.weight", "tie_word_embeddings")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    lab.path("in/model.safetensors").write_bytes(safetensors_bytes(tensors))
    train(lab, "-x", 1, "-l", 0, "-o", "out", model="in")
    assert read_safetensors(lab.path(f"out/{names(1)[0]}")) == {name: t for name, t in tensors.items() if name != "lm_head.weight"}

def test_notes_do_not_spoil_an_estimate(lab):
    directory(lab, attention_dropout=0.1, model_type="mistral", sliding_window=16)
    done = lab.run("--estimate=json", "-e", "in", "-b", 1, "-t", 16, **LLAMA)
    assert json.loads(done.out)["total_bytes"] > 0
    says(done.err, "attention_dropout 0.1", "sliding window")

def test_what_is_refused_leaves_no_folder(lab):
    """Weights that are missing are found before a folder is made."""
    directory(lab, num_hidden_layers=3)
    says(train(lab, "-o", "out", model="in", status=1).err, "no tensor model.layers.2.")
    assert not lab.path("out").exists()

@pytest.mark.parametrize("given, parts", [
    (["--dump-gradients", "in/model-9.safetensors"], ["would make it another"]), (["--log", "in/tokenizer.txt"], ["would make it another"]),
    (["--log", "x", "--dump-gradients", "x"], ["--log as well"]), (["-o", "out", "--dump-gradients", "out/.lock"], ["the lock's"]),
    (["--dump-gradients", "g"], ["g.tmp", "written first"])])
def test_outputs_that_collide(lab, given, parts):
    directory(lab)
    lab.path("out").mkdir()
    lab.path("g.tmp").write_text("mine")
    before = {name: lab.files(name) for name in ("in", "out")}
    says(lab.run(*options("-e", "in", "-x", 1, *given), status=1, **LLAMA).err, *parts)
    assert before == {name: lab.files(name) for name in ("in", "out")} and lab.path("g.tmp").read_text() == "mine"

@pytest.mark.parametrize("typed, parts", [
    ("llama:L2,H4", ["expected C among the sizes", "llama:L4,H4,K2,C128,F352,T128,V257"]), ("llama:L2,H4,C32,Z1", ["expected a size like"]),
    ("llama:L2,H4,K3,C32", ["key-value heads that divide the heads"]), ("llama:L2,H4,C32,F60", ["multiples of 8"]),
    ("lama3.1-8b", ["no directory of that name", "llama3.1-8b", "smollm2-135m"]), ("./nothing", ["nothing/config.json"]),
    ("train.bin", ["expected a directory, found a file"])])
def test_models_that_do_not_exist(lab, typed, parts):
    says(train(lab, model=typed, status=None).err, *parts)

def test_the_sample_and_the_ledger(lab):
    """A run from nothing that writes text; the ledger names the mode."""
    ran = train(lab, "-x", 2, "-s", 2, "-g", 5)
    says(ran.out, "---- sample", "exact SiLU, separate norms, --recompute 1", "gateup", "angles")
    assert re.search(r"model +llama:.*: L 2, NH 4, NKV 2, HS 8, C 32, F 56, T 32, V 257", ran.out)
