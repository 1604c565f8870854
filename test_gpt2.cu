/*
Checks train_gpt2.cu, whole, against numbers that a PyTorch program written from the paper made (prepro/reference.py).

    make test_gpt2 && ./test_gpt2                     the fixtures of dev/test/fixtures
    ./test_gpt2 MODEL.bin STATE.bin                   any other pair
The exit status is 0 if everything is within its bar.
A build with USE_APPROXBP=1 is compared with a PyTorch that has the same derivative; MS_NORM=1 alone with the exact one.

For each pair: logits, loss, the gradient of every parameter tensor, and the losses of AdamW steps; the same gradients again
in every way in which the trainer can be told to compute them (micro-batches, recompute levels, chunks of the loss, GELU in
cuBLASLt's epilogue, if it has one); and what is left alone if some parameters are not trained.

The measure is ||ours - reference|| / ||reference|| over a whole tensor, and for gradients the cosine between the two.
*/
#define TESTING
#include "train_gpt2.cu"

// bf16 keeps 8 bits of mantissa, so one rounding is off by up to 2^-8 = 0.004; a few dozen of them lie between the input and
// the gradient of the first layer. fp32 rounds at 6e-8; its bars leave room for sums of a few thousand terms.
constexpr float LOGITS_BAR = kFP32 ? 1e-5f : 2e-2f;
constexpr float LOSS_BAR = kFP32 ? 1e-4f : 2e-2f;
// With codes a pre-activation that bf16 rounds across the threshold at 0 gets the other slope, off by 1: in bf16 their gradients
// are compared more loosely. In fp32 the fixtures keep clear of the thresholds, and the bar stays.
constexpr float GRAD_BAR = kFP32 ? 1e-4f : kActBits ? 0.2f : 8e-2f;
constexpr float COSINE_BAR = kFP32 ? 0.999999f : kActBits ? 0.98f : 0.997f;

// The same gradients in another way. In fp32 that is another order. In bf16 other places are rounded: with GELU in cuBLASLt's
// epilogue its input is not, and nor is the gradient that its derivative multiplies, and from there on all roundings differ. A
// rounding is off by 0.42 * 2^-8 in the mean of squares; about 4 for each block, and 4 at the ends, lie on the way to a gradient
// and add up as squares; and two ways are off by the root of 2 of one: 1.2 * 2^-8 sqrt(L + 1). That is what models of 1 to 12
// layers show, and tensors of a few dozen numbers scatter up to 2.4 times as far. Roundings have no direction, where a factor
// that is wrong has one: the scale of a large tensor stays within a sixth of the bar, and a GELU' that is 1 % off does not.
float same_bar(int L) { return kFP32 ? 1e-5f : 3 * 0x1p-8f * sqrtf(L + 1.0f); }
constexpr size_t LARGE = 4096;
// cuBLASLt does not say how its epilogues compute GELU. A GPU's tanh is off by 2^-11, which bf16 does not see.
float fused_room(int L) { return kFP32 ? 0x1p-10f * sqrtf(L + 1.0f) : 0.0f; }

int checks = 0, failures = 0;

void report(bool fine, const char* format, ...) {
    va_list args;
    va_start(args, format);
    printf("  %s ", fine ? "ok  " : "FAIL");
    vprintf(format, args);
    va_end(args);
    printf("\n");
    checks++;
    failures += !fine;
}

struct Difference {
    double relative, cosine, scale;   // scale: by how much ours is the reference, 1 if it is
};
Difference difference(const float* ours, const float* reference, size_t n) {
    double diff = 0, ref = 0, own = 0, dot = 0;
    for (size_t i = 0; i < n; i++) {
        double a = ours[i], b = reference[i];
        diff += (a - b) * (a - b);
        ref += b * b;
        own += a * a;
        dot += a * b;
    }
    // a NaN anywhere ends here as NaN, and no comparison with a bar is true of it
    return {ref > 0 ? sqrt(diff / ref) : sqrt(diff), ref > 0 && own > 0 ? dot / sqrt(ref * own) : (ref == own ? 1.0 : 0.0),
            ref > 0 ? dot / ref : 1.0};
}

// What reference.py knows about one batch.
struct Reference {
    int B, T;
    std::vector<int> x, y;        // (B, T)
    std::vector<float> logits;    // (B, T, V)
    std::vector<float> loss;      // one
    std::vector<float> grads;     // all parameters, in the model's layout
    std::vector<float> losses;    // of AdamW steps on this batch, each before its update
};
template <class T>
void read_values(FILE* f, std::vector<T>& out, size_t n) {
    out.resize(n);
    if (fread(out.data(), sizeof(T), n, f) != n) fail("the debug state could not be read to its end");
}
Reference read_reference(const char* path, const Config& c) {
    const char* remedy = "make one with: python3 prepro/reference.py";
    int32_t h[HEADER_INTS];
    FILE* f = open_with_header(path, h, 20240327, "a debug state", remedy);
    Reference r = {h[2], h[3]};
    if (h[1] != 2 || r.B < 1 || r.T < 1 || r.T > c.maxT || h[4] < 0 || (int64_t)r.B * r.T > 1 << 24)
        fail("%s: expected a debug state of version 2 with T up to %d, found version %d, B %d, T %d, %d losses; %s", path,
             c.maxT, h[1], r.B, r.T, h[4], remedy);
    const size_t BT = (size_t)r.B * r.T, n = param_count(c), expected = HEADER_BYTES + 4 * (2 * BT + BT * c.V + 1 + n + h[4]);
    if (file_size(f) != expected)
        fail("%s: expected %zu bytes for this model, found %zu; is it another model's? %s", path, expected, file_size(f), remedy);
    read_values(f, r.x, BT);
    read_values(f, r.y, BT);
    for (const std::vector<int>* ids : {&r.x, &r.y})
        for (int id : *ids)
            if (id < 0 || id >= c.V) fail("%s: token %d is not in the vocabulary of %d", path, id, c.V);
    read_values(f, r.logits, BT * c.V);
    read_values(f, r.loss, 1);
    read_values(f, r.grads, n);
    read_values(f, r.losses, h[4]);
    fclose(f);
    return r;
}

// A model on the device, with the host's side of its token buffer.
struct Bench {
    Model model = {};
    int* host = nullptr;

    Bench(const char* file, const Plan& plan) {
        model.config = model_read_config(file);
        model.plan = plan;
        model.seed = 1337;
        cudaCheck(cudaStreamCreate(&model.stream));
        model_allocate(model);
        model_load(model, file);
        cudaCheck(cudaMallocHost((void**)&host, token_ints((size_t)plan.B * plan.T, model.config.V, false) * sizeof(int)));
    }
    ~Bench() {
        cudaCheck(cudaFreeHost(host));
        table_free(model.table);
        cudaCheck(cudaStreamDestroy(model.stream));
    }
    int upload(const Reference& r, int micro) {   // micro-batch `micro` of the reference's batch
        int BT = model.plan.B * model.plan.T;
        cudaCheck(cudaStreamSynchronize(model.stream));   // host is written to again
        std::copy_n(r.x.begin() + (size_t)micro * BT, BT, host);
        std::copy_n(r.y.begin() + (size_t)micro * BT, BT, host + BT);
        return tokens_upload(model.tokens, host, BT, model.config.V, model.stream);
    }
    // forward, loss and backward over all micro-batches; returns the mean loss
    float gradients(const Reference& r) {
        for (int micro = 0; micro < model.plan.micro_batches; micro++) {
            int buckets = upload(r, micro);
            model_forward(model, model.plan.B, model.plan.T);
            model_loss(model, model.plan.B, model.plan.T, true, micro == 0, (double)r.B * r.T);
            model_backward(model, model.plan.B, model.plan.T, buckets, micro);
        }
        float sum;
        cudaCheck(cudaMemcpyAsync(&sum, &model.state->loss_sum, sizeof sum, cudaMemcpyDeviceToHost, model.stream));
        cudaCheck(cudaStreamSynchronize(model.stream));
        return sum / ((float)r.B * r.T);
    }
    std::vector<float> read(bool gradients) {   // gradients or parameters: all, as floats, in the model's layout
        std::vector<float> all;
        for (int p = 0; p < LORA_A; p++) {
            const Grad from = gradients ? model.grad[p] : Grad{model.param[p], FLOATX};
            const size_t n = param_shape(model.config, p).elements();
            std::vector<char> raw(n * dtype_size(from.type));
            if (from.p) cudaCheck(cudaMemcpy(raw.data(), from.p, raw.size(), cudaMemcpyDeviceToHost));
            for (size_t i = 0; i < n; i++)
                all.push_back(from.type == F32 ? ((float*)raw.data())[i] : (float)((__nv_bfloat16*)raw.data())[i]);
        }
        return all;
    }
};

// Compares every tensor's gradient, and with scale_bar the scale of large ones. In a long list only the worst is printed, unless
// it fails.
void check_gradients(const std::string& title, const Config& c, const std::vector<float>& ours, const std::vector<float>& reference,
                     float bar, float cosine_bar, bool list, float scale_bar = INFINITY) {
    size_t at = 0;
    double worst = 0, worst_cosine = 1;
    const char *what = title.c_str(), *worst_name = "";
    bool fine = true;
    for (int p = 0; p < LORA_A; p++) {
        ParamShape s = param_shape(c, p);
        Difference d = difference(ours.data() + at, reference.data() + at, s.elements());
        at += s.elements();
        bool ok = d.relative <= bar && d.cosine >= cosine_bar && (s.elements() < LARGE || fabs(d.scale - 1) <= scale_bar);
        if (list || !ok)
            report(ok, "%s d_%s relative %.2e (bar %.0e) cosine %.6f scale %.5f", what, s.name, d.relative, bar, d.cosine, d.scale);
        fine = fine && ok;
        if (!(d.relative <= worst)) worst = d.relative, worst_name = s.name;
        worst_cosine = std::min(worst_cosine, d.cosine);
    }
    if (!list)
        report(fine, "%s: worst relative %.2e (bar %.0e, %s), worst cosine %.6f", what, worst, bar, worst_name, worst_cosine);
}

void check_against_reference(const char* file, const Reference& r) {
    const Plan plain = {r.B, r.T, 1, true, 0, true};
    std::vector<float> base;
    {
        Bench t(file, plain);
        const Config& c = t.model.config;
        t.upload(r, 0);
        model_forward(t.model, r.B, r.T);
        model_loss(t.model, r.B, r.T, false, true, r.B * r.T);
        std::vector<floatX> raw((size_t)r.B * r.T * c.Vp);
        cudaCheck(cudaStreamSynchronize(t.model.stream));
        cudaCheck(cudaMemcpy(raw.data(), t.model.logits, raw.size() * sizeof(floatX), cudaMemcpyDeviceToHost));
        std::vector<float> logits;
        for (size_t row = 0; row < (size_t)r.B * r.T; row++)
            for (int v = 0; v < c.V; v++) logits.push_back((float)raw[row * c.Vp + v]);
        Difference d = difference(logits.data(), r.logits.data(), logits.size());
        report(d.relative <= LOGITS_BAR, "logits relative %.2e (bar %.0e)", d.relative, LOGITS_BAR);
        float loss = t.gradients(r);
        report(fabsf(loss - r.loss[0]) <= LOSS_BAR * r.loss[0], "loss %.6f, reference %.6f (bar %.0e)", loss, r.loss[0], LOSS_BAR);
        base = t.read(true);
        check_gradients("gradient", c, base, r.grads, GRAD_BAR, COSINE_BAR, true);
    }

    struct Way {
        const char* name;
        Plan plan;
        int gelu_fusion;
    };
    std::vector<Way> ways = {
        {"--recompute 1", {r.B, r.T, 1, true, 1, true}, 0},
        {"--recompute 2", {r.B, r.T, 1, true, 2, true}, 0},
        {"--recompute 3", {r.B, r.T, 1, true, 3, true}, 0},
        {"--recompute 4, --row-chunks 3", {r.B, r.T, 1, true, 4, true, 0, loss_chunk_rows(r.B * r.T, 3)}, 0},
        {"--loss-chunks 3", {r.B, r.T, 1, true, 0, true, loss_chunk_rows(r.B * r.T, 3)}, 0},
    };
    if (kActBits == 0) {
        ways.push_back({"--gelu-fusion 1", {r.B, r.T, 1, true, 0, true}, 1});
        ways.push_back({"--gelu-fusion 2, --recompute 1", {r.B, r.T, 1, true, 1, true}, 2});
    }
    if (r.B > 1) {
        ways.push_back({"a micro-batch for each sequence", {1, r.T, r.B, true, 0, true}, 0});
        ways.push_back({"micro-batches, --recompute 2, --loss-chunks 2", {1, r.T, r.B, true, 2, true, loss_chunk_rows(r.T, 2)}, 0});
    }
    for (const Way& way : ways) {
        matmul_state.gelu_fusion = way.gelu_fusion;
        int missing = 0;
        matmul_state.missing = &missing;
        Bench t(file, way.plan);
        float loss = t.gradients(r);
        std::vector<float> grads = t.read(true);
        matmul_state.missing = nullptr;
        if (missing > 0) {
            printf("  skip %s: cuBLASLt has no algorithm for it here\n", way.name);
            continue;
        }
        const int L = t.model.config.L;
        const float room = way.gelu_fusion ? fused_room(L) : 0.0f, same = same_bar(L) + room;
        const float cosine = std::min(COSINE_BAR, 1 - same * same);
        report(fabsf(loss - r.loss[0]) <= (LOSS_BAR + room) * r.loss[0], "%s: loss %.6f", way.name, loss);
        const std::string name = way.name;
        const Config& c = t.model.config;
        check_gradients(name + " against the plain way", c, grads, base, same, cosine, false, kFP32 ? INFINITY : same / 6);
        check_gradients(name + " against the reference", c, grads, r.grads, GRAD_BAR + room, cosine, false);
        // a second time into the same gradients: what is left from a step before must not show
        t.gradients(r);
        report(t.read(true) == grads, "%s: again, bit-equal", way.name);
    }
    matmul_state.gelu_fusion = 0;

    {   // what is not trained has no tensors of training and stays as it is, and the other gradients are what they were
        Plan plan = plain;
        for (int p : {WPE, LN2W, LN2B, FCW, FCB, FCPROJB}) plan.frozen |= 1u << p;
        Bench t(file, plan);
        t.gradients(r);
        const std::vector<float> grads = t.read(true);
        const std::vector<float> before = t.read(false);
        model_update(t.model, Hyper{1e-2f}, 0, r.B * r.T);
        const std::vector<float> after = t.read(false);
        size_t at = 0;
        int wrong = 0, tensors = 0;
        for (int p = 0; p < LORA_A; p++) {
            const size_t n = param_shape(t.model.config, p).elements();
            const bool kept = std::equal(&before[at], &before[at] + n, &after[at]);
            const bool same = !plan.trains(p) || std::equal(&base[at], &base[at] + n, &grads[at]);
            wrong += kept == plan.trains(p) || !same;
            at += n;
        }
        for (const Row& row : t.model.table) tensors += row.kind == GRAD || row.name.compare(0, 2, "v_") == 0;
        report(wrong == 0 && tensors == 2 * (LORA_A - 6), "6 frozen parameters: %d of %d wrong, %d tensors of training", wrong,
               (int)LORA_A, tensors);
    }

    Bench t(file, plain);
    Hyper h;
    h.lr = 1e-4f;
    h.beta2 = 0.999f;
    h.weight_decay = 0.01f;
    std::vector<float> losses;
    for (size_t step = 0; step < r.losses.size(); step++) {
        losses.push_back(t.gradients(r));
        model_update(t.model, h, step, r.B * r.T);
    }
    for (size_t step = 0; step < losses.size(); step++)
        report(fabsf(losses[step] - r.losses[step]) <= LOSS_BAR * r.losses[step], "AdamW step %2zu: loss %.6f, reference %.6f",
               step, losses[step], r.losses[step]);
    // Losses on one batch fall a little in any case; what the steps gained must agree too.
    if (losses.size() > 1) {
        double ours = losses.front() - losses.back(), theirs = r.losses.front() - r.losses.back();
        double room = (kFP32 ? 1e-3 : 0.1) * fabs(theirs) + (kFP32 ? 1e-5 : 1e-2) * fabs(r.losses.front());
        report(fabs(ours - theirs) <= room, "%zu steps gain %.6f, reference %.6f", losses.size() - 1, ours, theirs);
    }
}

int main(int argc, char** argv) {
    program_name = "test_gpt2";
    world_init(&argc, &argv);
    matmul_state.tf32 = false;   // it keeps 10 bits of mantissa, which is not what an fp32 build is compared for
    std::vector<std::string> files;
    for (int i = 1; i < argc; i++) {
        std::string arg = argv[i];
        if (arg == "-h" || arg == "--help") return puts("usage: test_gpt2 [MODEL.bin STATE.bin]  (default: dev/test/fixtures)") < 0;
        if (arg[0] == '-') fail_usage("%s: no such option; usage: test_gpt2 [MODEL.bin STATE.bin]", arg.c_str());
        files.push_back(arg);
    }
    if (files.empty()) {   // the reference knows exact derivatives and those of 2 bits; a shared norm is exact, too
        if (kActBits != 0 && kActBits != 2)
            fail_usage("this build keeps %d bits of an activation, and the fixtures are for 2: name MODEL.bin STATE.bin "
                       "(prepro/reference.py --approxbp --act-bits %d)", kActBits, kActBits);
        std::vector<std::string> names = {"c96", "hs64", "hs80"};
        if (kActBits) names = {"approx_c96", "approx_hs64"};
        for (const std::string& name : names) {
            files.push_back("dev/test/fixtures/gpt2_" + name + ".bin");
            files.push_back("dev/test/fixtures/gpt2_" + name + "_state.bin");
        }
    }
    if (files.size() % 2) fail_usage("%s: expected pairs, MODEL.bin and then its STATE.bin", files.back().c_str());
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || !devices) fail("no GPU is visible; make test_gpt2 CPU=1 builds for the CPU");
    cublasCheck(cublasLtCreate(&matmul_state.handle));

    for (size_t i = 0; i < files.size(); i += 2) {
        Config c = model_read_config(files[i].c_str());
        Reference r = read_reference(files[i + 1].c_str(), c);
        printf("%s: L %d, NH %d, C %d, V %d; B %d, T %d\n", files[i].c_str(), c.L, c.NH, c.C, c.V, r.B, r.T);
        check_against_reference(files[i].c_str(), r);
    }
    printf("%d passed, %d failed\n", checks - failures, failures);
    return failures ? 1 : 0;
}
