/*
Fuzzes the readers of a model's files: JSON and the header of safetensors, as they stand in the trainers (a twin).

An input is the header of a file of tensors. Whatever it is, nothing may be read beyond its end or written anywhere; what is accepted has
tensors that lie in the file without gap or overlap; and JSON that is read, is read again to the same from what we write of it.

    make dev/test/fuzz_readers CPU=1 SAN=1 && dev/test/fuzz_readers 1000000 7        so many inputs, a seed; or files to try
    make fuzz RUNS=10000000        by clang's libFuzzer, which looks for inputs that take new ways through the code
*/
#define TESTING
#include "../../train_llama.cu"

#define expect(condition) ((condition) ? (void)0 : (fprintf(stderr, "not so: %s\n", #condition), abort()))

bool same(const Json& a, const Json& b) {
    return a.type == b.type && a.text == b.text && a.names == b.names &&
           std::equal(a.values.begin(), a.values.end(), b.values.begin(), b.values.end(), same);
}
// Returns whether it is JSON, and whether it is a header.
std::pair<bool, bool> try_input(const uint8_t* data, size_t size) {
    // The first byte says how many bytes of elements the file has. A copy of just the right size, so that sanitizers see its end.
    const size_t data_bytes = size ? data[0] : 0, length = size ? size - 1 : 0;
    std::vector<char> text(data + !!size, data + !!size + length);
    text.shrink_to_fit();
    Json j;
    std::string error;
    const bool json = json_read(j, text.data(), length, error);
    expect(json == error.empty());
    if (json) {
        for (int indent : {-1, 0}) {
            std::string written;
            Json again;
            json_append(written, j, indent);
            expect(json_read(again, written.data(), written.size(), error) && same(j, again));
        }
    }
    std::vector<SafeTensor> tensors;
    const bool header = safetensors_parse(tensors, text.data(), length, data_bytes).empty();
    expect(json || !header);
    size_t at = 8 + length;
    for (const SafeTensor& t : tensors) {
        if (!header) break;
        expect(t.begin == at && t.end <= 8 + length + data_bytes);
        at = t.end;
        size_t elements = 1;
        for (size_t n : t.shape) elements *= n;
        expect(t.dtype == BYTE || elements * dtype_size(t.dtype) == t.end - t.begin);
    }
    return {json, header};
}

#ifdef LIBFUZZER
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) { return try_input(data, size), 0; }
#else
int main(int argc, char** argv) {
    if (argc < 2) fail_usage("expected a number of inputs and a seed, or files");
    if (!isdigit((unsigned char)argv[1][0])) {
        for (int i = 1; i < argc; i++) {
            const std::string text = read_text(argv[i], 1 << 20);
            try_input((const uint8_t*)text.data(), text.size());
        }
        return 0;
    }
    const char* seeds[] = {R"( {"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}})",
                           R"( {"__metadata__":{"format":"pt"},"e":{"dtype":"F16","shape":[],"data_offsets":[0,2]}})",
                           R"( [1,2.5e-3,-0,true,null,"x\u00e9\ud83d\ude00\n"])"};
    const char* words[] = {"{", "}", "[", "]", ",", ":", "\"", "\\u", "d800", "9007199254740993", "1e999", "-", "0", "18446744073709551615",
                           "[0,0]", "\"shape\"", "\"dtype\"", "null", "\\", "__metadata__", "[4294967296,4294967296]", "F64"};
    const long inputs = atol(argv[1]), seed = argc > 2 ? atol(argv[2]) : 0;
    uint64_t drawn = 0;
    auto random = [&](size_t n) { return n ? (size_t)(hash64(seed, 0, drawn++) % n) : 0; };
    long json = 0, headers = 0;
    for (long i = 0; i < inputs; i++) {
        std::string s = seeds[random(3)];
        s[0] = (char)(random(2) ? 32 : random(64));
        for (size_t n = 1 + random(6); n > 0; n--) {
            const size_t at = random(s.size());
            switch (random(6)) {
                case 0: if (!s.empty()) s[at] = (char)random(256); break;
                case 1: s.insert(at, words[random(std::size(words))]); break;
                case 2: s.erase(at, random(8)); break;
                case 3: if (random(4) == 0) s.resize(at); break;
                case 4: s.insert(at, s.substr(random(s.size()), random(40))); break;
                case 5: if (!s.empty()) s[at] = "0123456789,:[]{}"[random(16)]; break;
            }
        }
        const auto [is_json, is_header] = try_input((const uint8_t*)s.data(), s.size());
        json += is_json, headers += is_header;
    }
    printf("%ld inputs: %ld were JSON, %ld of them headers of safetensors\n", inputs, json, headers);
    return json > inputs / 100 && headers > inputs / 1000 ? 0 : 1;   // or they would have tried too little
}
#endif
