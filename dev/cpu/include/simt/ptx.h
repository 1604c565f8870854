// Tensor-core and asynchronous-copy instructions, emulated: what a wrapper of a PTX instruction calls where
// there is no PTX (#ifndef __CUDACC__), as in train_gpt2.cu. dev/cpu/test/ptx_test.cu checks them.
//
// mma and ldmatrix are warp collectives: each lane leaves its registers in its slot, and the lane that comes
// last computes for all. Shared addresses are those of __cvta_generic_to_shared.
#pragma once
#include "device.h"

namespace simt {

// ---- mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 -------------------------------------------
// With g = lane / 4 and t = lane % 4, a lane holds (two bf16 to a register, the lower column in the lower half)
//     A, 16 x 16: a[0] = (g, 2t..)  a[1] = (g + 8, 2t..)  a[2] = (g, 2t + 8..)  a[3] = (g + 8, 2t + 8..)
//     B, 16 x 8:  b[0] = (2t.., g)  b[1] = (2t + 8.., g)      two rows of one column
//     C, 16 x 8:  c[0], c[1] = (g, 2t..)   c[2], c[3] = (g + 8, 2t..)          D likewise

struct MmaSlot { uint32_t a[4], b[2]; float c[4]; };

inline void mma_finish(void* slots, uint32_t participants) {
    if (participants != kAllLanes) die_in_kernel("mma.sync with lanes missing (those that took part: 0x%08x)", participants);
    MmaSlot* s = (MmaSlot*)slots;
    float a[16][16], b[16][8], d[16][8];
    auto low = [](uint32_t pair) { return bits<float>(pair << 16); };
    auto high = [](uint32_t pair) { return bits<float>(pair & 0xffff0000u); };
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; r++) {
            int row = g + r % 2 * 8, col = 2 * t + r / 2 * 8;
            a[row][col] = low(s[lane].a[r]), a[row][col + 1] = high(s[lane].a[r]);
            d[g + r / 2 * 8][2 * t + r % 2] = s[lane].c[r];
        }
        for (int r = 0; r < 2; r++) b[2 * t + r * 8][g] = low(s[lane].b[r]), b[2 * t + r * 8 + 1][g] = high(s[lane].b[r]);
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < 32; lane++)
        for (int r = 0; r < 4; r++) s[lane].c[r] = d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], SIMT_SITE) {
    MmaSlot mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
    Gathered<MmaSlot> g = gather(kAllLanes, mine, "mma.sync", {file, line}, mma_finish);
    memcpy(d, g.slots[g.lane].c, sizeof d);
}

// ---- ldmatrix.sync.aligned.m8n8.x1|x2|x4[.trans].shared.b16 ----------------------------------------
// Lane 8i + r gives the address of row r (8 bf16, 16 bytes) of matrix i. Every lane gets, of each matrix, the
// pair (row lane / 4, columns 2 (lane % 4)..); transposed, (rows 2 (lane % 4).., column lane / 4).

struct LdmatrixSlot { uint32_t address, result[4]; };

inline char* shared_memory(uint32_t address, int bytes, const char* what) {
    const Arena& arena = worker->arena;
    if (address % bytes) die_in_kernel("%s: shared address %u is no multiple of %d", what, address, bytes);
    if (address + bytes > arena.used) die_in_kernel("%s: %u is no shared address of this block", what, address);
    return arena.memory + address;
}

template <int N, bool transposed> void ldmatrix_finish(void* slots, uint32_t participants) {
    if (participants != kAllLanes) die_in_kernel("ldmatrix with lanes missing (those that took part: 0x%08x)", participants);
    LdmatrixSlot* s = (LdmatrixSlot*)slots;
    for (int i = 0; i < N; i++) {
        uint16_t m[8][8];
        for (int row = 0; row < 8; row++) memcpy(m[row], shared_memory(s[8 * i + row].address, 16, "ldmatrix"), 16);
        for (int lane = 0; lane < 32; lane++) {
            int g = lane / 4, t = lane % 4 * 2;
            s[lane].result[i] = transposed ? m[t][g] | (uint32_t)m[t + 1][g] << 16 : m[g][t] | (uint32_t)m[g][t + 1] << 16;
        }
    }
}

template <int N, bool transposed> void ldmatrix(uint32_t (&r)[N], uint32_t shared_address, SIMT_SITE) {
    LdmatrixSlot mine = {shared_address, {}};
    const char* what = transposed ? "ldmatrix.trans" : "ldmatrix";
    Gathered<LdmatrixSlot> g = gather(kAllLanes, mine, what, {file, line}, ldmatrix_finish<N, transposed>);
    memcpy(r, g.slots[g.lane].result, sizeof r);
}

// ---- cp.async --------------------------------------------------------------------------------------
// The data arrives when the thread waits for the group that the copy was committed to, and no sooner: until
// then the destination is NaN. So a missing wait, a wait for the wrong group and a buffer that is filled again
// while others still read it all show. Bytes past source_bytes are zero.

inline AsyncCopies& async_copies() {
    Worker& w = *worker;
    if (w.async.empty()) w.async.resize(kMaxThreads);
    return w.async[current_id(w)];
}
template <int bytes> void cp_async(uint32_t shared_address, const void* global, int source_bytes = bytes) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
    char* to = shared_memory(shared_address, bytes, "cp.async");
    if ((uintptr_t)global % bytes) die_in_kernel("cp.async: global address %p is no multiple of %d", global, bytes);
    if (source_bytes < 0 || source_bytes > bytes)
        die_in_kernel("cp.async: a source of %d bytes for a copy of %d", source_bytes, bytes);
    if (options.poison) memset(to, 0xff, bytes);
    AsyncCopies& mine = async_copies();
    mine.pending.push_back({to, (const char*)global, bytes, source_bytes, mine.committed});
}
inline void cp_async_commit() { async_copies().committed++; }
// Wait until at most `left` of the groups committed last are still under way.
inline void cp_async_wait(unsigned left) {
    AsyncCopies& mine = async_copies();
    size_t done = 0;
    for (; done < mine.pending.size() && mine.pending[done].group + left < mine.committed; done++) {
        const AsyncCopy& c = mine.pending[done];
        memcpy(c.to, c.from, c.source_bytes);
        memset(c.to + c.source_bytes, 0, c.bytes - c.source_bytes);
    }
    mine.pending.erase(mine.pending.begin(), mine.pending.begin() + done);
}

}  // namespace simt
