// The part of NCCL that the trainers use, over MPI: `mpirun -np 2` works without a GPU.
//
// Every rank contributes in rank order, in fp32 (integers and doubles in their own type), rounded once: the
// result has the same bits on every rank and in every run, and a share of ncclReduceScatter's has those of ncclAllReduce's (the
// real library's rings begin at other ranks there, which shows from three ranks on). Before each collective the ranks compare what they
// were asked to do; where NCCL would hang or mix up data, this says who called what, and ends the job.
// A call works at once: a group only has to be balanced.
#pragma once
#include <mpi.h>

#include "cuda_bf16.h"

#define NCCL_MAJOR 2
#define NCCL_UNIQUE_ID_BYTES 128
typedef enum {
    ncclSuccess = 0, ncclUnhandledCudaError = 1, ncclSystemError = 2, ncclInternalError = 3, ncclInvalidArgument = 4,
    ncclInvalidUsage = 5, ncclRemoteError = 6, ncclInProgress = 7,
} ncclResult_t;
typedef enum {
    ncclInt8 = 0, ncclChar = 0, ncclUint8 = 1, ncclInt32 = 2, ncclInt = 2, ncclUint32 = 3, ncclInt64 = 4, ncclUint64 = 5,
    ncclFloat16 = 6, ncclHalf = 6, ncclFloat32 = 7, ncclFloat = 7, ncclFloat64 = 8, ncclDouble = 8, ncclBfloat16 = 9,
} ncclDataType_t;
typedef enum { ncclSum = 0, ncclProd = 1, ncclMax = 2, ncclMin = 3, ncclAvg = 4 } ncclRedOp_t;
typedef struct { char internal[NCCL_UNIQUE_ID_BYTES]; } ncclUniqueId;

struct ncclComm { MPI_Comm mpi; int rank, ranks, device; uint64_t calls; };
typedef struct ncclComm* ncclComm_t;

inline const char* ncclGetErrorString(ncclResult_t r) {
    switch (r) {
    case ncclSuccess: return "no error";
    case ncclUnhandledCudaError: return "unhandled cuda error";
    case ncclSystemError: return "unhandled system error";
    case ncclInternalError: return "internal error";
    case ncclInvalidArgument: return "invalid argument";
    case ncclInvalidUsage: return "invalid usage";
    case ncclRemoteError: return "remote process exited or there was a network error";
    case ncclInProgress: return "NCCL operation in progress";
    }
    return "unknown result code";
}
inline const char* ncclGetLastError(ncclComm_t) { return ""; }

namespace simt {

inline int nccl_groups_open = 0;

inline ncclResult_t nccl_refuse(const char* function, const char* why) {
    fprintf(stderr, "simt: %s: %s\n", function, why);
    return ncclInvalidArgument;
}

inline size_t nccl_size(ncclDataType_t t) {
    switch (t) {
    case ncclFloat: case ncclInt32: return 4;
    case ncclInt64: case ncclDouble: return 8;
    case ncclBfloat16: return 2;
    default: return 0;
    }
}

// What a rank was asked to do. The same bytes on every rank, or the job ends.
struct NcclCall {
    char function[24];
    uint64_t number, count;
    int type, op, root;
};
inline std::string describe(const NcclCall& c) {
    const char* types[] = {"int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float", "double", "bfloat16"};
    const char* ops[] = {"sum", "prod", "max", "min", "avg"};
    std::string s = std::string(c.function) + " number " + std::to_string(c.number) + " of " + std::to_string(c.count) + " ";
    s += types[c.type];
    if (c.op >= 0) s += std::string(", ") + ops[c.op];
    if (c.root >= 0) s += ", root " + std::to_string(c.root);
    return s;
}
inline ncclResult_t nccl_agree(ncclComm_t comm, const char* function, size_t count, ncclDataType_t type, int op, int root) {
    if (!comm) return nccl_refuse(function, "the communicator is NULL");
    if (!nccl_size(type)) return nccl_refuse(function, "a data type that the CPU backend does not have");
    if (op == ncclProd || op > ncclAvg) return nccl_refuse(function, "a reduction that the CPU backend does not have");
    if (op == ncclAvg && (type == ncclInt32 || type == ncclInt64))
        return nccl_refuse(function, "the CPU backend averages floating point alone");
    if (root >= comm->ranks) return nccl_refuse(function, "the root is no rank of the communicator");
    NcclCall mine = {};
    strncpy(mine.function, function, sizeof mine.function - 1);
    mine.number = comm->calls++, mine.count = count, mine.type = type, mine.op = op, mine.root = root;
    std::vector<NcclCall> all(comm->ranks);
    MPI_Allgather(&mine, sizeof mine, MPI_BYTE, all.data(), sizeof mine, MPI_BYTE, comm->mpi);
    for (int r = 0; r < comm->ranks; r++)
        if (memcmp(&all[r], &mine, sizeof mine)) {
            fflush(stdout);
            fprintf(stderr, "simt error: ranks disagree about a collective: rank %d calls %s, rank %d calls %s\n", comm->rank,
                    describe(mine).c_str(), r, describe(all[r]).c_str());
            fflush(stderr);
            MPI_Barrier(comm->mpi);              // every rank gets to print its line
            MPI_Abort(comm->mpi, 1);
        }
    return ncclSuccess;
}

template <class T, class Sum> void reduce_ranks(char* out, const char* in, size_t stride, int ranks, size_t n, int op) {
    T* to = (T*)out;
    const T* from = (const T*)in;
    for (size_t i = 0; i < n; i++) {
        Sum s = (Sum)from[i];
        for (int r = 1; r < ranks; r++) {
            Sum v = (Sum)from[r * stride + i];
            s = op == ncclMax ? (v > s || v != v ? v : s) : op == ncclMin ? (v < s || v != v ? v : s) : s + v;
        }
        to[i] = (T)(op == ncclAvg ? s / (Sum)ranks : s);
    }
}

// Elements [begin, end) of the reduction of everybody's `send`, to `receive`, through a buffer of bounded size.
inline void nccl_reduce(ncclComm_t comm, const char* send, char* receive, size_t total, size_t begin, size_t end,
                        ncclDataType_t type, int op) {
    size_t element = nccl_size(type), chunk = (4 << 20) / element;
    std::vector<char> all(comm->ranks * std::min(chunk, total) * element);
    for (size_t first = 0; first < total; first += chunk) {
        size_t n = std::min(chunk, total - first);
        MPI_Allgather(send + first * element, n * element, MPI_BYTE, all.data(), n * element, MPI_BYTE, comm->mpi);
        size_t from = std::max(first, begin), to = std::min(first + n, end);
        if (from >= to) continue;
        char* out = receive + (from - begin) * element;
        const char* in = all.data() + (from - first) * element;
        switch (type) {
        case ncclFloat: reduce_ranks<float, float>(out, in, n, comm->ranks, to - from, op); break;
        case ncclBfloat16: reduce_ranks<__nv_bfloat16, float>(out, in, n, comm->ranks, to - from, op); break;
        case ncclDouble: reduce_ranks<double, double>(out, in, n, comm->ranks, to - from, op); break;
        case ncclInt32: reduce_ranks<int32_t, int64_t>(out, in, n, comm->ranks, to - from, op); break;
        default: reduce_ranks<int64_t, int64_t>(out, in, n, comm->ranks, to - from, op); break;
        }
    }
}

}  // namespace simt

// ---- communicators ---------------------------------------------------------------------------------

inline ncclResult_t ncclGetVersion(int* version) { *version = 22000; return ncclSuccess; }
inline ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "simt %d %.9f", (int)getpid(), simt::seconds());
    return ncclSuccess;
}
inline ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
    int running = 0;
    MPI_Initialized(&running);
    if (!running) return simt::nccl_refuse("ncclCommInitRank", "MPI_Init has to come first: the CPU backend's NCCL is MPI");
    int world_rank, world;
    MPI_Comm_rank(MPI_COMM_WORLD, &world_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world);
    if (ranks != world || rank != world_rank)
        return simt::nccl_refuse("ncclCommInitRank", "rank and number of ranks must be those of MPI_COMM_WORLD");
    ncclUniqueId first = id;
    MPI_Bcast(&first, sizeof first, MPI_BYTE, 0, MPI_COMM_WORLD);
    int differs = memcmp(&first, &id, sizeof id) != 0, any;
    MPI_Allreduce(&differs, &any, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    if (any) return simt::nccl_refuse("ncclCommInitRank", "not every rank has the id that rank 0 has: broadcast it");
    *comm = new ncclComm{MPI_COMM_NULL, rank, ranks, simt::device, 0};
    MPI_Comm_dup(MPI_COMM_WORLD, &(*comm)->mpi);
    return ncclSuccess;
}
inline ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    if (!comm) return simt::nccl_refuse("ncclCommDestroy", "the communicator is NULL");
    MPI_Comm_free(&comm->mpi);
    delete comm;
    return ncclSuccess;
}
inline ncclResult_t ncclCommCount(ncclComm_t comm, int* n) { *n = comm->ranks; return ncclSuccess; }
inline ncclResult_t ncclCommUserRank(ncclComm_t comm, int* rank) { *rank = comm->rank; return ncclSuccess; }
inline ncclResult_t ncclCommCuDevice(ncclComm_t comm, int* device) { *device = comm->device; return ncclSuccess; }
inline ncclResult_t ncclGroupStart() { simt::nccl_groups_open++; return ncclSuccess; }
inline ncclResult_t ncclGroupEnd() {
    if (simt::nccl_groups_open == 0) { simt::nccl_refuse("ncclGroupEnd", "no group is open"); return ncclInvalidUsage; }
    simt::nccl_groups_open--;
    return ncclSuccess;
}

// ---- collectives -----------------------------------------------------------------------------------

namespace simt {
inline ncclResult_t nccl_ranges(const char* function, const void* send, size_t send_count, void* receive, size_t receive_count,
                                ncclDataType_t type, Site site) {
    bool good = range_is_good(send, send_count * nccl_size(type), true, function, "send buffer", site) &&
                range_is_good(receive, receive_count * nccl_size(type), true, function, "receive buffer", site);
    return good ? ncclSuccess : ncclInvalidArgument;
}
}  // namespace simt

inline ncclResult_t ncclAllReduce(const void* send, void* receive, size_t count, ncclDataType_t type, ncclRedOp_t op,
                                  ncclComm_t comm, cudaStream_t, SIMT_SITE) {
    if (ncclResult_t e = simt::nccl_agree(comm, "ncclAllReduce", count, type, op, -1)) return e;
    if (ncclResult_t e = simt::nccl_ranges("ncclAllReduce", send, count, receive, count, type, {file, line})) return e;
    simt::nccl_reduce(comm, (const char*)send, (char*)receive, count, 0, count, type, op);
    return ncclSuccess;
}
// `count` elements to each rank, of ranks * count that each sends
inline ncclResult_t ncclReduceScatter(const void* send, void* receive, size_t count, ncclDataType_t type, ncclRedOp_t op,
                                      ncclComm_t comm, cudaStream_t, SIMT_SITE) {
    if (ncclResult_t e = simt::nccl_agree(comm, "ncclReduceScatter", count, type, op, -1)) return e;
    size_t all = count * comm->ranks, mine = count * comm->rank;
    if (ncclResult_t e = simt::nccl_ranges("ncclReduceScatter", send, all, receive, count, type, {file, line})) return e;
    // receive may lie within send, of which chunks are still to be sent
    std::vector<char> part(count * simt::nccl_size(type));
    simt::nccl_reduce(comm, (const char*)send, part.data(), all, mine, mine + count, type, op);
    memcpy(receive, part.data(), part.size());
    return ncclSuccess;
}
// `count` elements from each rank
inline ncclResult_t ncclAllGather(const void* send, void* receive, size_t count, ncclDataType_t type, ncclComm_t comm,
                                  cudaStream_t, SIMT_SITE) {
    if (ncclResult_t e = simt::nccl_agree(comm, "ncclAllGather", count, type, -1, -1)) return e;
    if (ncclResult_t e = simt::nccl_ranges("ncclAllGather", send, count, receive, count * comm->ranks, type, {file, line})) return e;
    size_t bytes = count * simt::nccl_size(type), chunk = 4 << 20;
    std::vector<char> all(comm->ranks * std::min(chunk, bytes));
    std::vector<char> mine((const char*)send, (const char*)send + bytes);     // send may lie within receive
    for (size_t first = 0; first < bytes; first += chunk) {
        size_t n = std::min(chunk, bytes - first);
        MPI_Allgather(mine.data() + first, n, MPI_BYTE, all.data(), n, MPI_BYTE, comm->mpi);
        for (int r = 0; r < comm->ranks; r++) memcpy((char*)receive + r * bytes + first, all.data() + r * n, n);
    }
    return ncclSuccess;
}
inline ncclResult_t ncclBroadcast(const void* send, void* receive, size_t count, ncclDataType_t type, int root,
                                  ncclComm_t comm, cudaStream_t, SIMT_SITE) {
    if (ncclResult_t e = simt::nccl_agree(comm, "ncclBroadcast", count, type, -1, root)) return e;
    const void* read = comm->rank == root ? send : receive;      // send is looked at on the root alone
    if (ncclResult_t e = simt::nccl_ranges("ncclBroadcast", read, count, receive, count, type, {file, line})) return e;
    size_t bytes = count * simt::nccl_size(type), chunk = 1 << 30;
    if (comm->rank == root && send != receive) memmove(receive, send, bytes);
    for (size_t first = 0; first < bytes; first += chunk)
        MPI_Bcast((char*)receive + first, std::min(chunk, bytes - first), MPI_BYTE, root, comm->mpi);
    return ncclSuccess;
}
inline ncclResult_t ncclBcast(void* buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream,
                              SIMT_SITE) {
    return ncclBroadcast(buffer, buffer, count, type, root, comm, stream, file, line);
}
