// A crash within a kernel is reported like any other error: with the kernel, the block and the thread.
#pragma once
#include <signal.h>

#include "block.h"

namespace simt {

inline void on_fault(int number, siginfo_t* info, void*) {
    signal(number, SIG_DFL);                   // whatever happens in here, once is enough
    if (!worker || !worker->current) {         // not in a kernel: as if we had never been here
        raise(number);
        return;
    }
    const char* address = (const char*)info->si_addr;
    const char* stack = worker->current->fiber->stack;
    if (number == SIGSEGV && address >= stack - kGuardBytes && address < stack)
        die_in_kernel("stack overflow: a thread has %zu KB here for its local variables and calls", kStackBytes / 1024);
    if (number == SIGSEGV || number == SIGBUS)
        die_in_kernel("segmentation fault at address %p, which is no memory (SAN=1 names the line)", (const void*)address);
    die_in_kernel(number == SIGFPE ? "integer division by zero" : "abort() was called, or an assert failed");
}

// With ASan only aborts: it has its own, better, reports of the others.
inline void catch_faults() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int number : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE}) {
        if (SIMT_ASAN && number != SIGABRT) continue;
        struct sigaction old;
        sigaction(number, nullptr, &old);
        if (old.sa_handler == SIG_DFL) sigaction(number, &action, nullptr);      // a program's own handlers stay
    }
}

// Each OS thread needs a stack to report the overflow of another on.
inline void prepare_worker() {
    if (worker) return;
    worker = new Worker;
    static bool caught = (catch_faults(), true);
    (void)caught;
    if (SIMT_ASAN) return;
    stack_t stack = {};
    stack.ss_size = 64 * 1024;
    stack.ss_sp = malloc(stack.ss_size);
    if (stack.ss_sp) sigaltstack(&stack, nullptr);
}

}  // namespace simt
