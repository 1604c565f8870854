"""AdamW in 8 bits and AdaLomo: steps of each against NumPy, from gradients that another run dumps; what they keep, and what they refuse."""
import json

import numpy as np
import pytest

from finetune import arrays, settled
from helpers import MATRICES, Shape, Tensor, execute, from_hf, learned, mpirun, names, options, pack, program, says

LLAMA = "llama:L2,H4,K2,C32,F56,T32,V257"
GPT2 = Shape().size()
OPTIMIZERS = ["adamw8", "adalomo"]
TRAINERS = [("train_gpt2", GPT2), ("train_llama", LLAMA)]
ALL = ["-e", LLAMA, "-a", 1, "-k", "constant", "-f", 0]

def steps(lab, trainer, size, count, *given, variant="cpu-fp32"):
    """For each step of a run on one batch: the weights before it, the gradients that a run of AdamW dumps of them, and the weights after
    it, by Hugging Face's names."""
    how = {"variant": variant, "trainer": trainer}
    mode = [x for pair in zip(given[::2], given[1::2]) if pair[0] in ("-r", "--row-chunks") for x in pair]
    lab.train("-e", size, "-x", 0, "-o", "first", "-f", 0, **how)
    lab.train("-e", size, "-a", 1, "-k", "constant", "-f", 0, "-x", count, "-n", 1, "-o", "out", *given, **how)
    folders = ["first/step_00000000"] + [f"out/step_{step:08d}" for step in range(1, count + 1)]
    for before, after in zip(folders, folders[1:]):
        lab.train("-e", before, "-x", 0, "-f", 0, "--dump-gradients", "g.safetensors", *mode, **how)
        yield tuple(arrays(lab.path(name)) for name in (f"{before}/model.safetensors", "g.safetensors", f"{after}/model.safetensors"))

# ---- AdaLomo: OpenLMLab/LOMO's formula ---------------------------------------------------------------

def adalomo(state, step, x, g, lr, decay):
    """One tensor's new value; state: its second moment, of rows and columns or of all elements."""
    beta, squares = 1 - step**-0.8, g * g + 1e-30
    means = [squares.mean(1), squares.mean(0)] if g.ndim == 2 else [squares]
    state[:] = [beta * (state[i] if state else 0) + (1 - beta) * mean for i, mean in enumerate(means)]
    v = np.outer(state[0], state[1]) / state[0].mean() if g.ndim == 2 else state[0]
    u = g / np.sqrt(v)
    u /= max(1, np.sqrt((u * u).mean()))
    return x - lr * max(1e-3, np.sqrt((x * x).mean())) * (u + decay * x * (g.ndim == 2))

@pytest.mark.parametrize("variant", ["cpu-fp32", "cpu-approxbp-fp32"])
@pytest.mark.parametrize("mode", [["-r", 1], ["-r", 4, "--row-chunks", 3]], ids=["plain", "chunks"])
@pytest.mark.parametrize("trainer, size", TRAINERS)
def test_adalomo(lab, trainer, size, mode, variant):
    """Every tensor, with an embedding that is the head and with one that is not; rows of tokens that do not occur; norms that are folded
    into weights. A second moment that is wrong shows from the second step on."""
    states, moved = {}, 0
    for step, (before, gradients, after) in enumerate(steps(lab, trainer, size, 3, "--optimizer", "adalomo", "-l", 0.05, "-c", 0.1, *mode, variant=variant), 1):
        assert set(before) == set(after) == set(gradients) - {"loss"}
        for name, x in before.items():
            expected = adalomo(states.setdefault(name, []), step, x, gradients[name], 0.05, 0.1)
            update = np.abs(expected - x).max()
            moved += update > 1e-5
            assert np.abs(after[name] - expected).max() < 5e-3 * update + 5e-7 * np.abs(x).max(), (name, step)
    assert moved == 3 * len(states)

def test_adalomo_does_not_mind_how_gradients_come(lab):
    """A layer's weights are not updated while anything still reads them: to the bit, whatever is computed again."""
    made = []
    for i, mode in enumerate((["-r", 0], ["-r", 3], ["-r", 4], ["-r", 4, "--offload", 1])):
        run = lab.train(*ALL, "--optimizer", "adalomo", "-l", 0.05, "-x", 4, "-o", f"o{i}", *mode, "--row-chunks", 1, variant="cpu-fp32", trainer="train_llama")
        made.append((run.losses, lab.files(f"o{i}")[names(4)[0]]))
    assert made[1:] == made[:1] * 3

# ---- AdamW in 8 bits -----------------------------------------------------------------------------------

def dynamic_map(signed):
    """Dettmers et al., arXiv 2110.02861: an exponent of 10 and, for it, evenly spaced fractions, of which the means count."""
    values = [0.0, 1.0]
    for decade in range(7):
        borders = np.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        means = (borders[1:] + borders[:-1]) / 2 * 10.0 ** (decade - 6)
        values += [*means, *(-means if signed else [])]
    return np.array(sorted(values))

def read_moments(path, shape):
    """{slot: (m, v, scales of m, of v, codes of v)} of a state of one rank."""
    data, at, found = path.read_bytes(), 1024, [{}, {}]
    for signed, of in zip((True, False), found):
        for slot, n in shape.counts().items():
            if slot in MATRICES:
                codes = np.frombuffer(data, np.uint8, n, at)
                absmax = np.frombuffer(data, np.float32, -(-n // 256), at + n)
                of[slot], at = (dynamic_map(signed)[codes] * np.repeat(absmax, 256)[:n], absmax, codes), at + n + 4 * len(absmax)
            else:
                of[slot], at = (np.frombuffer(data, np.float32, n, at).astype(np.float64), None, None), at + 4 * n
    return found

def ours(shape, found):
    """{slot: values} of arrays by Hugging Face's names."""
    tensors = {name: Tensor("F32", x.shape, pack("F32", x.reshape(-1))) for name, x in found.items()}
    return {slot: np.array(x, np.float64) for slot, x in from_hf(shape, tensors).items()}

def nearest(values, absmax, signed):
    """How far the nearest that 8 bits can say is from each."""
    table, scale = dynamic_map(signed), np.repeat(absmax, 256)[:len(values)].astype(np.float64)
    return np.abs(values[:, None] - table * scale[:, None]).min(1), scale

def test_adamw8(lab):
    """The step, from m and v as the state before has them, and what the state after has."""
    shape, moments = Shape(), None
    assert len(dynamic_map(True)) == len(dynamic_map(False)) == 256
    for step, tensors in enumerate(steps(lab, "train_gpt2", GPT2, 3, "--optimizer", "adamw8", "-l", 1e-3, "-c", 0.1, "--grad-clip", 0), 1):
        before, gradients, after = (ours(shape, of) for of in tensors)
        m_after, v_after = read_moments(lab.path(f"out/step_{step:08d}/state_00000.bin"), shape)
        for slot, g in gradients.items():
            m, v = ((x[slot][0] for x in moments) if moments else (0 * g, 0 * g))
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            decay = 0.1 if m_after[slot][1] is not None else 0
            expected = before[slot] - 1e-3 * ((m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8) + decay * before[slot])
            assert np.abs(after[slot] - expected).max() < 2e-5, (slot, step)   # of a step of 1e-3
            for x, (found, absmax, codes), signed in ((m, m_after[slot], True), (v, v_after[slot], False)):
                if absmax is None:
                    assert np.allclose(found, x, rtol=1e-3, atol=1e-5 * np.abs(x).max()), (slot, step)
                    continue
                largest = np.array([np.abs(x[i:i + 256]).max() for i in range(0, len(x), 256)])
                assert np.allclose(absmax, largest, rtol=1e-3, atol=1e-9 * largest.max()), (slot, step)
                distance, scale = nearest(x, absmax, signed)
                apart = np.abs(found - x) - distance
                raised = (codes == 1) if not signed else np.zeros(len(x), bool)   # a v that would have become 0
                assert (apart[~raised] <= 1e-3 * np.abs(x[~raised]) + 1e-6 * scale[~raised]).all(), (slot, step, signed)
                assert signed or ((codes > 0) | (x <= 1e-30)).all(), slot
        moments = m_after, v_after

# ---- what is kept: on the device and in checkpoints ----------------------------------------------------

def estimate(lab, *given, variant="cpu-bf16", trainer="train_llama"):
    return json.loads(lab.run(*given, "--estimate=json", variant=variant, trainer=trainer).out)

@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("trainer, size", TRAINERS)
@pytest.mark.parametrize("variant, mode", [("cpu-bf16", "-w 1"), ("cpu-bf16", "-w 0 -r 4 --row-chunks 2 --offload 1"), ("cpu-approxbp-fp32", "-r 2")])
def test_resume_is_exact_and_memory_is_as_announced(lab, optimizer, trainer, size, variant, mode):
    mode, how = ["-e", size, "--optimizer", optimizer, "-l", 1e-2, "-c", 0.1, *mode.split()], {"variant": variant, "trainer": trainer}
    straight = lab.train(*mode, "-x", 6, "-n", 3, "-o", "straight", **how)
    lab.train(*mode, "-x", 3, "-u", 0, "-k", "cosine", "-o", "x", **how)
    lab.path("resumed").mkdir()
    lab.path("straight/step_00000003").rename(lab.path("resumed/step_00000003"))
    resumed = lab.train(*mode, "-x", 6, "-n", 3, "-o", "resumed", "-y", 1, **how)
    assert len(resumed.steps) == 3 and [line for line in learned(resumed)[:-1] if line not in learned(straight)] == []
    ours, theirs = lab.files("resumed"), lab.files("straight")
    assert all(ours[name] == theirs[name] for name in names(6)) and ours[names(3)[2]] != ours[names(6)[2]]
    for run in (straight, resumed):
        assert run.done["peak_bytes"] == run.done["estimate_bytes"] == estimate(lab, *options(*mode), **how)["total_bytes"]
    assert straight.losses[-1] < straight.losses[0]

def test_what_each_keeps(lab):
    """Bytes of state and of gradients for each parameter, of a matrix, of the embedding, of a vector."""
    kept = {}
    for optimizer in ("adamw", *OPTIMIZERS):
        rows = estimate(lab, "-e", "llama3.2-1b", "-w", 0, "-b", 1, "-t", 64, "--optimizer", optimizer)["rows"]
        kept[optimizer] = {row["name"]: row["bytes"] for row in rows if row["kind"] in ("optimizer", "grad")}
    n, C = 16 * 2048 * 8192, 2048
    assert [kept[o]["m_downw"] for o in ("adamw", "adamw8")] == [4 * n, n]
    assert kept["adamw8"]["m_downw_absmax"] == kept["adamw8"]["v_downw_absmax"] == n // 256 * 4 and kept["adamw8"]["v_ln1w"] == 16 * C * 4
    assert kept["adalomo"]["v_downw"] + kept["adalomo"]["v_downw_cols"] == 16 * (2048 + 8192) * 4 and "m_downw" not in kept["adalomo"]
    assert [kept[o]["d_downw"] for o in ("adamw", "adamw8", "adalomo")] == [2 * n, 2 * n, 2 * n // 16]
    assert kept["adalomo"]["d_wte"] == kept["adamw"]["d_wte"]   # which is the head
    rows = {row["name"] for row in estimate(lab, "-e", "llama3.1-8b", "-w", 0, "-b", 1, "-t", 64, "--optimizer", "adalomo")["rows"]}
    assert "d_headw" in rows and "d_wte" not in rows

def test_8b_on_a_card_of_24_gb(lab):
    """All parameters trained."""
    found = estimate(lab, "-e", "llama3.1-8b", "--optimizer", "adalomo", "--master-weights", 0, "-b", 1, "-t", 32768, "-r", 4, "--offload", 1)
    assert found["total_bytes"] < (24 - 0.75) * 2**30
    trained = {row["name"] for row in found["rows"] if row["kind"] == "optimizer"}
    assert {f"v_{p}" for p in ("wte", "ln1w", "qkvw", "attprojw", "ln2w", "gateupw", "downw", "lnfw", "headw")} <= trained

# ---- adapters, several GPUs ------------------------------------------------------------------------------

def test_adapters_in_8_bits(lab):
    """As with AdamW, but for rounding."""
    losses = {}
    for optimizer in ("adamw", "adamw8"):
        run = lab.train(*ALL, "--lora", 8, "-l", 1e-2, "-x", 8, "--optimizer", optimizer, variant="cpu-fp32", trainer="train_llama")
        losses[optimizer] = run.losses
        assert run.done["peak_bytes"] == run.done["estimate_bytes"]
    assert losses["adamw8"] == pytest.approx(losses["adamw"], rel=5e-3) and losses["adamw8"] != losses["adamw"]
    assert losses["adamw8"][-1] < losses["adamw8"][0] - 0.1

def ranks(lab, count, trainer, *given):
    done = execute(*mpirun(count), program("cpu-multi-fp32", trainer), *options("-f", 0, *given), cwd=lab.folder, timeout=300)
    assert done.status == 0, done.err
    return done.out

@pytest.mark.parametrize("trainer, size", TRAINERS)
def test_several_ranks(lab, trainer, size):
    """adamw8: shares are quantized as they are without --zero 1. AdaLomo: the sum over ranks is made of a layer, and of some rows of the
    embedding, at a time."""
    run = lambda name, n, *given: ranks(lab, n, trainer, "-e", size, "-x", 3, "-o", name, "-l", 1e-2, *given)
    for zero in (0, 1):
        run(f"zero{zero}", 2, "--optimizer", "adamw8", "--zero", zero, "-b", 1)
    assert lab.files("zero0")[names(3)[0]] == lab.files("zero1")[names(3)[0]]
    size_of = lambda name: sum(len(lab.files(name)[file]) for file in names(3, 2)[2:])
    assert size_of("zero1") < 0.7 * size_of("zero0")
    run("two", 2, "--optimizer", "adalomo", "-b", 1), run("one", 1, "--optimizer", "adalomo", "-b", 2)
    one, two = (settled(arrays(lab.path(f"{name}/step_00000003/model.safetensors"))) for name in ("one", "two"))
    for name, x in one.items():
        assert np.abs(two[name] - x).max() < 1e-3 * 1e-2 * 3, name

# ---- what is refused -------------------------------------------------------------------------------------

@pytest.mark.parametrize("given, said", [
    (["--grad-clip", 1], ["--grad-clip 1", "norm of all gradients", "expected 0"]),
    (["--skip-loss-z", 3], ["--skip-loss-z 3", "cannot be taken back"]),
    (["--skip-grad-z", 3], ["--skip-grad-z 3", "cannot be taken back"]),
    (["-z", 1], ["-z 1", "a few vectors", "expected 0"]),
    (["-d", 128], ["-d 128", "a step is one micro-batch", "expected batch * seq-len * GPUs = 64"]),
    (["--lora", 8], ["--optimizer adalomo", "adapters", "adamw8"]),
    (["--dump-gradients", "g.safetensors"], ["--dump-gradients", "another --optimizer"]),
], ids=lambda x: x[0] if isinstance(x[0], str) and x[0].startswith("-") else "")
@pytest.mark.parametrize("trainer, size", TRAINERS)
def test_what_adalomo_cannot_have(lab, trainer, size, given, said):
    done = lab.run(*options("-e", size, "--optimizer", "adalomo", *given), trainer=trainer, status=2)
    says(done.err, *said)
    lab.run(*options("-e", size, "--optimizer", "adamw8", *given), trainer=trainer)

def test_a_limit_of_0_is_no_limit(lab):
    run = lab.train("--optimizer", "adalomo", "--grad-clip", 0)
    assert run.losses == lab.train("--optimizer", "adalomo").losses
    says(run.out, "optimizer adalomo, within backward, a layer at a time; no --grad-clip")

def test_another_optimizer_s_state_is_refused(lab):
    for wrote in ("adamw", *OPTIMIZERS):
        lab.train("--optimizer", wrote, "-x", 1, "-o", wrote)
        for reads in {"adamw", *OPTIMIZERS} - {wrote}:
            done = lab.train("--optimizer", reads, "-x", 2, "-o", wrote, "-y", 1, status=1)
            says(done.err, f"its run had --optimizer {wrote}, this one has {reads}", "resume with the same")
    says(lab.run(*options("--optimizer", "sgd"), status=2).err, "--optimizer sgd: expected one of: adamw, adamw8, adalomo")

# ---- they learn --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer, rate", [("adamw", 3e-3), ("adamw8", 3e-3), ("adalomo", 3e-2)])
@pytest.mark.parametrize("trainer, size", TRAINERS)
def test_the_loss_falls(lab, trainer, size, optimizer, rate):
    run = lab.train("-e", size, "--optimizer", optimizer, "-l", rate, "-b", 8, "-x", 40, "-u", 4, "-w", 0, trainer=trainer)
    assert run.losses[-1] < 0.75 * run.losses[0], run.losses
