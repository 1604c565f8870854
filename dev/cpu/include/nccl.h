// The part of NCCL that the trainers use, over MPI: `mpirun -np 2` works without a GPU.
//
// Sums are taken in rank order, in fp32, and rounded once: the result has the same bits on every rank and in every run, and a
// share of ncclReduceScatter's has those of ncclAllReduce's (the real library's rings begin at other ranks there, which shows
// from three ranks on). Before each collective the ranks compare what they were asked to do; where NCCL would hang or mix up
// data, this says who called what, and ends the job.
// A call works at once: a group only has to be balanced. With SIMT_STREAMS it works when its stream gets there. All ranks come to
// their collectives, and to their own calls of MPI, in the order in which they made them: a rank that waits here waits for nothing
// that another one does not come to.
#pragma once
#include <mpi.h>

#include "cuda_bf16.h"

#define NCCL_MAJOR 2
#define NCCL_UNIQUE_ID_BYTES 128
typedef enum { ncclSuccess = 0, ncclInvalidArgument = 4, ncclInvalidUsage = 5 } ncclResult_t;
typedef enum { ncclFloat = 7, ncclBfloat16 = 9 } ncclDataType_t;
typedef enum { ncclSum = 0 } ncclRedOp_t;
typedef struct { char internal[NCCL_UNIQUE_ID_BYTES]; } ncclUniqueId;

struct ncclComm { MPI_Comm mpi; int rank, ranks, number; uint64_t calls; };
typedef struct ncclComm* ncclComm_t;

inline const char* ncclGetErrorString(ncclResult_t r) {
    return r == ncclSuccess ? "no error" : r == ncclInvalidArgument ? "invalid argument" : "invalid usage";
}

namespace simt {

inline int nccl_groups_open = 0, nccl_communicators = 0;
inline MPI_Comm nccl_world = MPI_COMM_NULL;            // where ranks compare their calls, of whatever communicator
inline std::vector<std::function<void()>> nccl_group;  // what enters its stream when the group ends

// Each waits for the one before.
inline void finish_collectives() {
    if (streams_queue()) synchronize(streams().last_collective);
}

inline ncclResult_t nccl_refuse(const char* function, const char* why) {
    fprintf(stderr, "simt: %s: %s\n", function, why);
    return ncclInvalidArgument;
}

inline size_t nccl_size(ncclDataType_t t) { return t == ncclFloat ? 4 : 2; }

// What a rank was asked to do. The same bytes on every rank, or the job ends.
struct NcclCall { char function[24]; uint64_t number, count; int type, communicator; };
inline std::string describe(const NcclCall& c) {
    return std::string(c.function) + " number " + std::to_string(c.number) + " of " + std::to_string(c.count) +
           (c.type == ncclFloat ? " float" : " bfloat16") +
           (c.communicator ? " in communicator " + std::to_string(c.communicator) : "");
}
inline void nccl_agree(ncclComm_t comm, const char* function, size_t count, ncclDataType_t type) {
    NcclCall mine = {};
    strncpy(mine.function, function, sizeof mine.function - 1);
    mine.number = comm->calls++, mine.count = count, mine.type = type, mine.communicator = comm->number;
    std::vector<NcclCall> all(comm->ranks);
    PMPI_Allgather(&mine, sizeof mine, MPI_BYTE, all.data(), sizeof mine, MPI_BYTE, nccl_world);
    for (int r = 0; r < comm->ranks; r++)
        if (memcmp(&all[r], &mine, sizeof mine)) {
            fflush(stdout);
            fprintf(stderr, "simt error: ranks disagree about a collective: rank %d calls %s, rank %d calls %s\n", comm->rank,
                    describe(mine).c_str(), r, describe(all[r]).c_str());
            fflush(stderr);
            PMPI_Barrier(nccl_world);            // every rank gets to print its line
            MPI_Abort(nccl_world, 1);
        }
}

template <class T> void sum_ranks(char* out, const char* in, size_t stride, int ranks, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float sum = (float)((const T*)in)[i];
        for (int r = 1; r < ranks; r++) sum += (float)((const T*)in)[r * stride + i];
        ((T*)out)[i] = (T)sum;
    }
}

// Elements [begin, end) of the sum of everybody's `send`, to `receive`, through a buffer of bounded size.
inline void nccl_sum(ncclComm_t comm, const char* send, char* receive, size_t total, size_t begin, size_t end,
                     ncclDataType_t type) {
    size_t element = nccl_size(type), chunk = (4 << 20) / element;
    std::vector<char> all(comm->ranks * std::min(chunk, total) * element);
    for (size_t first = 0; first < total; first += chunk) {
        size_t n = std::min(chunk, total - first);
        PMPI_Allgather(send + first * element, n * element, MPI_BYTE, all.data(), n * element, MPI_BYTE, comm->mpi);
        size_t from = std::max(first, begin), to = std::min(first + n, end);
        if (from >= to) continue;
        char* out = receive + (from - begin) * element;
        const char* in = all.data() + (from - first) * element;
        if (type == ncclFloat) sum_ranks<float>(out, in, n, comm->ranks, to - from);
        else sum_ranks<__nv_bfloat16>(out, in, n, comm->ranks, to - from);
    }
}

}  // namespace simt

// ---- MPI -------------------------------------------------------------------------------------------

// A rank that waits for others in MPI has its collectives done first, as a GPU does them meanwhile: the others may wait for those.
// MPI lets a program put a function of its own in front of each of the library's.
#define SIMT_MPI(name, parameters, arguments) \
    inline int MPI_##name parameters { simt::finish_collectives(); return PMPI_##name arguments; }
extern "C" {
SIMT_MPI(Barrier, (MPI_Comm comm), (comm))
SIMT_MPI(Bcast, (void* p, int n, MPI_Datatype t, int root, MPI_Comm comm), (p, n, t, root, comm))
SIMT_MPI(Reduce, (const void* in, void* out, int n, MPI_Datatype t, MPI_Op op, int root, MPI_Comm comm), (in, out, n, t, op, root, comm))
SIMT_MPI(Allreduce, (const void* in, void* out, int n, MPI_Datatype t, MPI_Op op, MPI_Comm comm), (in, out, n, t, op, comm))
SIMT_MPI(Gather, (const void* in, int n, MPI_Datatype t, void* out, int m, MPI_Datatype u, int root, MPI_Comm comm),
         (in, n, t, out, m, u, root, comm))
SIMT_MPI(Allgather, (const void* in, int n, MPI_Datatype t, void* out, int m, MPI_Datatype u, MPI_Comm comm), (in, n, t, out, m, u, comm))
SIMT_MPI(Comm_dup, (MPI_Comm comm, MPI_Comm* made), (comm, made))
SIMT_MPI(Comm_split_type, (MPI_Comm comm, int type, int key, MPI_Info info, MPI_Comm* made), (comm, type, key, info, made))
SIMT_MPI(Send, (const void* p, int n, MPI_Datatype t, int rank, int tag, MPI_Comm comm), (p, n, t, rank, tag, comm))
SIMT_MPI(Recv, (void* p, int n, MPI_Datatype t, int rank, int tag, MPI_Comm comm, MPI_Status* status), (p, n, t, rank, tag, comm, status))
SIMT_MPI(Finalize, (), ())
}
#undef SIMT_MPI

// ---- communicators ---------------------------------------------------------------------------------

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
    if (simt::nccl_world == MPI_COMM_NULL) MPI_Comm_dup(MPI_COMM_WORLD, &simt::nccl_world);
    *comm = new ncclComm{MPI_COMM_NULL, rank, ranks, simt::nccl_communicators++, 0};
    MPI_Comm_dup(MPI_COMM_WORLD, &(*comm)->mpi);
    return ncclSuccess;
}
inline ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    if (!comm) return simt::nccl_refuse("ncclCommDestroy", "the communicator is NULL");
    simt::finish_collectives();
    MPI_Comm_free(&comm->mpi);
    delete comm;
    return ncclSuccess;
}
inline ncclResult_t ncclGroupStart() { simt::nccl_groups_open++; return ncclSuccess; }
inline ncclResult_t ncclGroupEnd() {
    if (simt::nccl_groups_open == 0) { simt::nccl_refuse("ncclGroupEnd", "no group is open"); return ncclInvalidUsage; }
    if (--simt::nccl_groups_open == 0)
        for (auto& issue : std::exchange(simt::nccl_group, {})) issue();
    return ncclSuccess;
}

// ---- collectives -----------------------------------------------------------------------------------

namespace simt {
// `work` runs in the stream. Each rank sends and receives so many elements.
template <class F>
ncclResult_t nccl_collective(const char* function, const void* send, size_t send_count, void* receive, size_t receive_count,
                             size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream, Site site, const F& work) {
    bool good = range_is_good(send, send_count * nccl_size(type), true, function, "send buffer", site) &&
                range_is_good(receive, receive_count * nccl_size(type), true, function, "receive buffer", site);
    if (!good) return ncclInvalidArgument;
    auto run = [=] { nccl_agree(comm, function, count, type); work(); };
    if (streams_queue() && nccl_groups_open > 0) {
        nccl_group.push_back([=] { submit(stream, function, site, run, true); });
        return ncclSuccess;
    }
    return submit(stream, function, site, run, true) == cudaSuccess ? ncclSuccess : ncclInvalidArgument;
}
inline ncclResult_t nccl_check(const char* function, ncclComm_t comm, ncclDataType_t type) {
    if (!comm) return nccl_refuse(function, "the communicator is NULL");
    if (type != ncclFloat && type != ncclBfloat16) return nccl_refuse(function, "a data type that the CPU backend does not have");
    return ncclSuccess;
}
}  // namespace simt

inline ncclResult_t ncclAllReduce(const void* send, void* receive, size_t count, ncclDataType_t type, ncclRedOp_t,
                                  ncclComm_t comm, cudaStream_t stream, SIMT_SITE) {
    if (ncclResult_t e = simt::nccl_check("ncclAllReduce", comm, type)) return e;
    return simt::nccl_collective("ncclAllReduce", send, count, receive, count, count, type, comm, stream, {file, line},
                                 [=] { simt::nccl_sum(comm, (const char*)send, (char*)receive, count, 0, count, type); });
}
// `count` elements to each rank, of ranks * count that each sends
inline ncclResult_t ncclReduceScatter(const void* send, void* receive, size_t count, ncclDataType_t type, ncclRedOp_t,
                                      ncclComm_t comm, cudaStream_t stream, SIMT_SITE) {
    if (ncclResult_t e = simt::nccl_check("ncclReduceScatter", comm, type)) return e;
    size_t all = count * comm->ranks, mine = count * comm->rank;
    return simt::nccl_collective("ncclReduceScatter", send, all, receive, count, count, type, comm, stream, {file, line}, [=] {
        // receive may lie within send, of which chunks are still to be sent
        std::vector<char> part(count * simt::nccl_size(type));
        simt::nccl_sum(comm, (const char*)send, part.data(), all, mine, mine + count, type);
        memcpy(receive, part.data(), part.size());
    });
}
// `count` elements from each rank
inline ncclResult_t ncclAllGather(const void* send, void* receive, size_t count, ncclDataType_t type, ncclComm_t comm,
                                  cudaStream_t stream, SIMT_SITE) {
    if (ncclResult_t e = simt::nccl_check("ncclAllGather", comm, type)) return e;
    return simt::nccl_collective("ncclAllGather", send, count, receive, count * comm->ranks, count, type, comm, stream, {file, line}, [=] {
        size_t bytes = count * simt::nccl_size(type), chunk = 4 << 20;
        std::vector<char> all(comm->ranks * std::min(chunk, bytes));
        std::vector<char> mine((const char*)send, (const char*)send + bytes);     // send may lie within receive
        for (size_t first = 0; first < bytes; first += chunk) {
            size_t n = std::min(chunk, bytes - first);
            PMPI_Allgather(mine.data() + first, n, MPI_BYTE, all.data(), n, MPI_BYTE, comm->mpi);
            for (int r = 0; r < comm->ranks; r++) memcpy((char*)receive + r * bytes + first, all.data() + r * n, n);
        }
    });
}
