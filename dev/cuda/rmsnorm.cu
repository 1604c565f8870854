/*
RMSNorm with the residual addition before it, forward and backward, and the form in which it and the matmul after it share one
tensor: the norm of train_llama.cu. Both trainers have the same kernels, in which kRMSNorm leaves the mean and beta out;
layernorm.cu has the simpler versions, the tests and the benchmark of both, and says what each version wastes.

    make dev/cuda/rmsnorm && ./dev/cuda/rmsnorm [--bench]

Forward: x = inp + add, z = x * rstd, rstd = 1 / sqrt(mean(x^2) + eps), out = gamma * z. Backward: with dz = dout * gamma, what
comes through the norm is rstd * (dz - z * mean(dz * z)), and dgamma is the sum of dout * z over the rows.

What it saves against LayerNorm is little where memory is the limit: the trainer's kernel reads and writes what it did, and keeps
one float fewer for a row. Version 1, a kernel for each step, reads one tensor less each way.

Shared with its matmul (MS_NORM) it saves most where it is used: exact, a norm keeps its input and its output, 2 units of B*T*C
elements twice a layer; shared, z alone. gamma is folded into the weight, W' = W * gamma, and unfolded once a step.
*/
#define TESTING
#include "../../train_llama.cu"

#include "layernorm.cu"
