// Fibers: a thread of a block is a function with a stack of its own that can be left and resumed.
//
// On x86-64 a switch is nine instructions: the compiler is told that it destroys every register, so it spills just those that are
// live (often few), and only rsp, rbp and the address to go on at are saved here. There is no call or return in it, which keeps the
// processor's return prediction right. Other processors use the C library's contexts, each switch of which is a system call.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include "options.h"

// -DSIMT_ASSEMBLY_FIBERS=0 takes the C library's on x86-64 too, to test that path.
#ifndef SIMT_ASSEMBLY_FIBERS
#ifdef __x86_64__
#define SIMT_ASSEMBLY_FIBERS 1
#else
#define SIMT_ASSEMBLY_FIBERS 0
#endif
#endif

namespace simt {

// ASan puts red zones around every local variable, which makes stacks grow.
constexpr size_t kStackBytes = (SIMT_ASAN ? 512 : 128) * 1024;
constexpr size_t kGuardBytes = 4096;      // below each stack, not accessible: an overflow stops there

struct Fiber {
#if SIMT_ASSEMBLY_FIBERS
    void *sp = nullptr, *bp = nullptr, *pc = nullptr;    // where to go on; the assembly below knows this order
#else
    ucontext_t context;
#endif
    char* stack = nullptr;                // lowest usable address
    size_t stack_bytes = 0;
    void* asan_frames = nullptr;          // ASan's own state of a fiber that is not running
};

inline __thread Fiber* switched_from;     // the fiber that the running one was switched to from

// Every arrival on a stack, the first as well as a resumption, comes by here.
inline void arrive(Fiber* self) {
#if SIMT_ASAN
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(self->asan_frames, &bottom, &bytes);
    if (!switched_from->stack) {          // the OS thread's own stack: we learn its bounds when we leave it
        switched_from->stack = (char*)bottom;
        switched_from->stack_bytes = bytes;
    }
#else
    (void)self;
#endif
}

inline void switch_fiber(Fiber* from, Fiber* to) {
#if SIMT_ASAN
    switched_from = from;
    __sanitizer_start_switch_fiber(&from->asan_frames, to->stack, to->stack_bytes);
#endif
#if SIMT_ASSEMBLY_FIBERS
    Fiber *f = from, *t = to;
    asm volatile("leaq 1f(%%rip), %%rax\n\t  movq %%rsp, 0(%0)\n\t  movq %%rbp, 8(%0)\n\t  movq %%rax, 16(%0)\n\t"
        "movq 0(%1), %%rsp\n\t  movq 8(%1), %%rbp\n\t  jmp *16(%1)\n"
        "1:" : "+D"(f), "+S"(t) :
        : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3",
          "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
#ifdef __AVX512F__
          , "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29",
          "xmm30", "xmm31", "k1", "k2", "k3", "k4", "k5", "k6", "k7"
#endif
    );
#else
    swapcontext(&from->context, &to->context);
#endif
    arrive(from);
}

// Set a fiber up so that the first switch to it calls entry(), which must not return.
template <void (*entry)()> void prepare_fiber(Fiber* f) {
#if SIMT_ASSEMBLY_FIBERS
    void** top = (void**)(f->stack + f->stack_bytes) - 2;   // 16-byte aligned
    *--top = nullptr;                                       // the return address a call would have left
    f->sp = top;
    f->bp = nullptr;                                        // ends a debugger's walk up the stack
    f->pc = (void*)entry;
#else
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack, f->context.uc_stack.ss_size = f->stack_bytes;
    makecontext(&f->context, entry, 0);
#endif
}

// Stacks are never freed: each OS thread keeps its own for the next block. `count` is how many it has.
template <void (*entry)()> Fiber* new_fiber(int count) {
    char* memory = (char*)mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE))
        out_of_host_memory("cannot map the stack of one more thread of a block (%d have one, of %zu KiB)", count, kStackBytes >> 10);
    Fiber* f = new Fiber;
    f->stack = memory + kGuardBytes;
    // Stacks that all end at the same offset in a page would compete for the same few lines of the cache; stagger them.
    f->stack_bytes = kStackBytes - (count % 61) * 64;
    prepare_fiber<entry>(f);
    return f;
}

}  // namespace simt
