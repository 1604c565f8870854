// NCCL's collectives between two processes: mpirun -np 2 ./nccl_test [MISTAKE]
#include <cuda_bf16.h>
#include <mpi.h>
#include <nccl.h>

#include "expect.h"

#define ncclCheck(call) EXPECT((call) == ncclSuccess)

int main(int argc, char** argv) {
    MPI_Init(&argc, &argv);
    int rank, ranks;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    cudaCheck(cudaSetDevice(rank));
    ncclUniqueId id;
    if (rank == 0) ncclCheck(ncclGetUniqueId(&id));
    MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    ncclComm_t comm;
    ncclCheck(ncclCommInitRank(&comm, ranks, id, rank));

    const int n = 3000000;                                     // more than one chunk of the implementation
    float* host = (float*)malloc(n * sizeof(float));
    auto value = [](int rank, int i) { return (float)(((unsigned)i * 2654435761u + (unsigned)rank * 40503u) >> 8) * 0x1p-20f; };     // exact
    for (int i = 0; i < n; i++) host[i] = value(rank, i);
    float *in = to_device(host, n), *out = device_array<float>(n);
    if (argc > 1) {                                            // mistakes that NCCL answers by hanging, or not at all
        if (!strcmp(argv[1], "count")) ncclAllReduce(in, out, n - rank, ncclFloat, ncclSum, comm, 0);
        if (!strcmp(argv[1], "kind") && rank) ncclAllGather(in, out, 100, ncclFloat, comm, 0);
        if (!strcmp(argv[1], "kind") && !rank) ncclAllReduce(in, out, 100, ncclFloat, ncclSum, comm, 0);
        if (!strcmp(argv[1], "order")) {                       // communicators that wait for one another
            ncclComm_t other;
            ncclCheck(ncclCommInitRank(&other, ranks, id, rank));
            for (ncclComm_t c : {rank ? other : comm, rank ? comm : other}) ncclAllReduce(in, out, 100, ncclFloat, ncclSum, c, 0);
        }
        cudaCheck(cudaDeviceSynchronize());
        printf("nothing reported\n");
        MPI_Finalize();
        return 0;
    }

    ncclCheck(ncclGroupStart());
    ncclCheck(ncclAllReduce(in, out, n, ncclFloat, ncclSum, comm, 0));
    ncclCheck(ncclGroupEnd());
    to_host(host, out, n);
    for (int i = 0; i < n; i += 997) {
        float sum = value(0, i);                               // in the order of the ranks, to the bit
        for (int r = 1; r < ranks; r++) sum += value(r, i);
        EXPECT(host[i] == sum);
    }

    int part = n / ranks;
    ncclCheck(ncclReduceScatter(in, out, part, ncclFloat, ncclSum, comm, 0));
    to_host(host, out, part);
    for (int i = 0; i < part; i += 997) EXPECT(fabs(host[i] - (value(0, rank * part + i) + value(1, rank * part + i))) < 1e-3);
    ncclCheck(ncclReduceScatter(in, in + rank * part, part, ncclFloat, ncclSum, comm, 0));      // in place
    to_host(host, in + rank * part, part);
    for (int i = 0; i < part; i += 997) EXPECT(fabs(host[i] - (value(0, rank * part + i) + value(1, rank * part + i))) < 1e-3);
    ncclCheck(ncclAllGather(in + rank * part, in, part, ncclFloat, comm, 0));                   // in place
    to_host(host, in, n);
    for (int i = 0; i < part * ranks; i += 997) EXPECT(fabs(host[i] - (value(0, i) + value(1, i))) < 1e-3);

    __nv_bfloat16 narrow[4], *device;
    for (int i = 0; i < 4; i++) narrow[i] = __float2bfloat16(1.0f + (float)rank * 0.0078125f);
    device = to_device(narrow, 4);
    ncclCheck(ncclAllReduce(device, device, 4, ncclBfloat16, ncclSum, comm, 0));
    to_host(narrow, device, 4);
    EXPECT(__bfloat162float(narrow[3]) == 2.0f);               // 2.0078125 is half way between two: to even

    // Ranks that wait for their streams in different orders, and for each other in MPI: each stream gets what it asked for.
    cudaStream_t streams[2];
    float *sums[2], *pinned;
    cudaCheck(cudaMallocHost(&pinned, 2 * sizeof(float)));
    for (int i = 0; i < 2; i++) {
        float mine = (float)(10 * i + rank + 1);
        cudaCheck(cudaStreamCreate(&streams[i]));
        sums[i] = to_device(&mine, 1);
    }
    for (int i : {1, 0}) {
        ncclCheck(ncclGroupStart());
        ncclCheck(ncclAllReduce(sums[i], sums[i], 1, ncclFloat, ncclSum, comm, streams[i]));
        ncclCheck(ncclGroupEnd());
        cudaCheck(cudaMemcpyAsync(pinned + i, sums[i], sizeof(float), cudaMemcpyDeviceToHost, streams[i]));
    }
    if (rank == 0) cudaCheck(cudaStreamSynchronize(streams[0]));
    MPI_Barrier(MPI_COMM_WORLD);
    if (rank == 1) cudaCheck(cudaStreamSynchronize(streams[0]));
    cudaCheck(cudaStreamSynchronize(streams[1]));
    EXPECT(pinned[0] == 3 && pinned[1] == 23);
    ncclCheck(ncclAllReduce(sums[0], sums[0], 1, ncclFloat, ncclSum, comm, streams[0]));     // left to ncclCommDestroy
    ncclCheck(ncclCommDestroy(comm));
    int status = finish();
    MPI_Finalize();
    return status;
}
