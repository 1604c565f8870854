"""Training: it learns, and each option does to the numbers what it says."""
import math

import pytest

from helpers import MATRICES, SLOTS, Shape, close, names, random_model, read_model, write_model, write_tokenizer, write_tokens, words

EXACT = {"cpu-fp32": 1e-5, "cpu-bf16": 1e-2}  # relative rounding of a loss after a few steps

@pytest.mark.parametrize("variant, w", [("cpu-fp32", 1), ("cpu-bf16", 1), ("cpu-bf16", 0)])
def test_it_learns(lab, variant, w):
    result = lab.train("-x", 60, "-l", 3e-3, "-u", 5, "-q", 0.1, "-b", 4, "-v", 30, "-w", w, variant=variant)
    assert result.losses[0] == pytest.approx(math.log(257), rel=0.05)  # it starts by knowing nothing
    assert result.losses[-1] < 0.6 * result.losses[0]
    assert result.vals[0] == pytest.approx(math.log(257), rel=0.05)
    assert result.vals[0] > result.vals[1] > result.vals[2] and result.vals[2] < 0.65 * result.vals[0]

def test_sampling_prints_what_was_learnt(lab):
    """And a line ends once, however a tokenizer cuts its end: in one token or in two."""
    write_tokens(lab.path("ab.bin"), list(b"abcd" * 1000))
    given = ["-i", "ab.bin", "-s", 60, "-g", 24, "--top-k", 1]
    assert "abcdabcdabcd" in lab.train(*given, "-x", 60, "-l", 3e-3, "-q", 1, "-b", 4, "-o", "out").out
    for c, d in ((b"c", b"\n"), (b"c", b"\r"), (b"c", b"\r\n"), (b"\r", b"\n")):
        write_tokenizer(lab.path("tokenizer.bin"), [{ord("c"): c, ord("d"): d}.get(i, bytes([i])) for i in range(256)] + [b"<|endoftext|>"], 256)
        out = lab.train(*given, "-e", "out/step_00000060", "-x", 0).out
        assert 3 * ("ab\n" if c == b"\r" else "abc\n") in out and "\r" not in out, (c, d)

def test_sampling_options(lab):
    def sample(*given):
        out = lab.train("-x", 0, "-s", 1, "-g", 30, *given).out
        return "".join(line for line in out.splitlines(True) if "log" not in line and not line.startswith("device"))
    assert sample("--top-k", 1) == sample("--top-k", 1, "--temperature", 5)
    assert sample("--top-k", 200) == sample("--top-k", 200)
    assert sample("--top-k", 200) != sample("--top-k", 1)

def test_samples_and_validations_change_no_loss(lab):
    assert lab.train("-s", 1).losses == lab.train("-v", 1).losses == lab.train().losses

def test_overfit_repeats_one_batch(lab):
    assert [len(set(lab.train("-a", a, "-l", 0, "-x", 5).losses)) for a in (1, 0)] == [1, 5]

# ---- the same mathematics by another way ---------------------------------------------------------

def start(lab, **shape):
    """A model with large enough weights that everything in it matters."""
    shape = Shape(**shape)
    write_model(lab.path("start.bin"), shape, random_model(shape, std=0.1))
    return shape

def norms(result):
    return [line["grad_norm"] for line in result.steps]

@pytest.mark.parametrize("variant", EXACT)
@pytest.mark.parametrize("usual, others", [
    ("-b 8", [f"-b {micro} -d 256" for micro in (1, 2, 4)]),
    ("--loss-chunks 1", [f"--loss-chunks {chunks}" for chunks in (2, 3, 7, 64, "auto")]),
    ("-ge 0", ["-ge 1", "-ge 2"]),
    ("-r 0", ["-r 1", "-r 2"])], ids=["micro-batches", "loss-chunks", "gelu-fusion", "recompute"])
def test_another_way(lab, variant, usual, others):
    start(lab)
    results = [lab.train("-e", "start.bin", "-v", 5, "-x", 5, "-o", f"out{i}", *way.split(), variant=variant) for i, way in enumerate([usual, *others])]
    for i, result in enumerate(results[1:]):
        assert close(result.losses, results[0].losses, EXACT[variant]), others[i]
        if not usual.startswith("-b"):   # a validation's batches are as large as a step's
            assert close(result.vals, results[0].vals, EXACT[variant]), others[i]
        assert close(norms(result), norms(results[0]), 10 * EXACT[variant]), others[i]
        if usual == "-r 0":   # the same kernels from the same bits: no rounding is different
            assert result.losses == results[0].losses and norms(result) == norms(results[0])
            assert lab.files(f"out{i + 1}")[names(5)[0]] == lab.files("out0")[names(5)[0]]

@pytest.mark.parametrize("size", [dict(H=1, C=16, T=7), dict(H=3, C=96, T=40, V=301), dict(H=1, C=64, T=130), dict(H=2, C=16, T=16, V=5), dict(L=1, H=2, C=256, T=16)])
def test_sizes(lab, size):
    """Shapes that are no powers of two, in bf16 as in fp32."""
    shape = start(lab, **size)
    write_tokens(lab.path("fit.bin"), [x % shape.V for x in words(2000)])
    given = ["-e", "start.bin", "-i", "fit.bin", "-t", shape.T, "-b", 2, "-x", 3]
    fp32, bf16 = lab.train(*given, variant="cpu-fp32"), lab.train(*given, variant="cpu-bf16")
    assert close(bf16.losses, fp32.losses, 2e-2)
    assert close(norms(bf16), norms(fp32), 8e-2)

# ---- the optimizer -------------------------------------------------------------------------------

def rate(schedule, step, steps, peak, warmup, final):
    """The rate of a step, counted from 0: up linearly, then by the schedule down to peak * final."""
    if step < warmup:
        return peak * (step + 1) / warmup
    low = peak * final
    if schedule == "wsd":  # constant, then linear over the last fifth
        start = 0.8 * steps
        return peak if step < start else peak - (peak - low) * (step - start) / (steps - start)
    progress = (step - warmup) / (steps - warmup)
    return {"constant": peak,
            "linear": peak - (peak - low) * progress,
            "cosine": low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))}[schedule]

@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup, final", [(0, 0.1), (5, 0.0), (5, 1.0), (20, 0.1)])
def test_schedules(shared_lab, schedule, warmup, final):
    result = shared_lab.train("-x", 20, "-b", 1, "-t", 8, "-k", schedule, "-l", 2e-3, "-u", warmup, "-q", final)
    expected = [rate(schedule, step, 20, 2e-3, warmup, final) for step in range(20)]
    assert [line["lr"] for line in result.steps] == pytest.approx(expected, rel=1e-3, abs=1e-9)

def after_one_step(lab, shape, *given):
    lab.train("-e", "start.bin", "-x", 1, *given, "--write-bin", "after.bin", variant="cpu-fp32")
    return read_model(lab.path("after.bin"), shape)

def test_weight_decay_is_for_matrices(lab):
    """Decoupled: w shrinks by rate * decay * w, and biases and gammas by nothing."""
    shape = start(lab)
    before = read_model(lab.path("start.bin"), shape)
    lr, decay = 1e-2, 0.5
    plain, decayed = (after_one_step(lab, shape, "-l", lr, "-c", c) for c in (0, decay))
    for name in SLOTS:
        if name in MATRICES:
            expected = [-lr * decay * x for x in before[name]]
            assert [a - b for a, b in zip(decayed[name], plain[name])] == pytest.approx(expected, rel=1e-3, abs=1e-7), name
            assert any(expected)
        else:
            assert decayed[name] == plain[name], name
    assert not any(decayed["wte"][shape.V * shape.C:]), "rows of the padding stay 0"

def test_first_step_of_adam(lab):
    """m / sqrt(v) of the first step is the gradient's sign: each weight with a gradient moves by the rate."""
    shape = start(lab)
    lr = 1e-3
    before, after = read_model(lab.path("start.bin"), shape), after_one_step(lab, shape, "-l", lr, "--grad-clip", 1e9)
    moves = [abs(a - b) for name in ("qkvw", "fcw", "fcprojw", "ln1w", "lnfb") for a, b in zip(after[name], before[name])]
    assert sum(x == pytest.approx(lr, rel=0.02) for x in moves) > 0.9 * len(moves)
    assert max(moves) < 1.01 * lr

def test_gradient_clipping(lab):
    """AdamW divides by the gradient's own size, unless clipping takes it far below epsilon: then nothing moves."""
    shape = start(lab)
    before = read_model(lab.path("start.bin"), shape)
    clipped = after_one_step(lab, shape, "-l", 1e-2, "--grad-clip", 1e-12)
    assert max(abs(a - b) for name in SLOTS for a, b in zip(clipped[name], before[name])) < 1e-5
    loose = [lab.train("-e", "start.bin", "-x", 3, "--grad-clip", clip, variant="cpu-fp32") for clip in (1e6, 2e6)]
    assert loose[0].losses == loose[1].losses
    tight = lab.train("-e", "start.bin", "-x", 3, "--grad-clip", 1e-3, variant="cpu-fp32")
    assert norms(tight)[0] == norms(loose[0])[0] > 1e-3  # the norm in the log is the one before clipping

def test_master_weights_keep_small_steps(lab):
    """Steps far below a bf16 weight's resolution: lost without a master copy but for stochastic rounding, kept with one."""
    start(lab)
    exact, kept, rounded = (lab.train("-e", "start.bin", "-x", 40, "-l", 2e-5, "-a", 1, "-w", w, variant=variant).losses
                            for variant, w in (("cpu-fp32", 1), ("cpu-bf16", 1), ("cpu-bf16", 0)))
    gains = [losses[0] - losses[-1] for losses in (exact, kept, rounded)]
    assert gains[0] > 0 and gains[1:] == pytest.approx(2 * gains[:1], rel=0.5)
