// Kernels whose outcome is known, right ones and wrong ones; tests/cuda/test_emulator.py runs one by name and checks what it prints.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;

// ---- right

__device__ float warp_sum(float x) {
  for (int d = warpSize / 2; d; d /= 2) x += __shfl_down_sync(kAll, x, unsigned(d));
  return x;
}

__device__ float block_sum(float x) {
  __shared__ float of_warp[32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x < 32) x = warp_sum(threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : 0.0f);
  __syncthreads();
  return x;
}

// The grid's sum: whichever block is last adds up the others'.
__global__ void __launch_bounds__(256) sum(const float* x, int n, float* partial, unsigned* ticket, float* out) {
  __shared__ bool last;
  float mine = 0;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < unsigned(n); i += gridDim.x * blockDim.x) mine += __ldg(x + i);
  mine = block_sum(mine);
  if (threadIdx.x == 0) {
    __stcg(partial + blockIdx.x, mine);
    __threadfence();
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  mine = block_sum(threadIdx.x < gridDim.x ? __ldcg(partial + threadIdx.x) : 0.0f);
  if (threadIdx.x == 0) *out = mine;
}

struct Pair {
  const int* from;
  int* to;
};

__global__ void turn_around(const __grid_constant__ Pair pair) {
  GRADFUSED_DYNAMIC_SHARED(raw);
  int* const kept = reinterpret_cast<int*>(raw);
  kept[threadIdx.x] = pair.from[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  pair.to[blockIdx.x * blockDim.x + threadIdx.x] = kept[blockDim.x - 1 - threadIdx.x];
}

__global__ void poison(int* out) {
  GRADFUSED_DYNAMIC_SHARED(raw);
  if (threadIdx.x == 0) out[blockIdx.x] = raw[3];
  __syncthreads();
  raw[3] = 1;
}

__global__ void shuffles(int* out) {
  const int lane = int(threadIdx.x);
  int* mine = out + 7 * lane;
  mine[0] = __shfl_sync(kAll, lane, 5);
  mine[1] = __shfl_sync(kAll, lane, 13, 8);  // lane 5 of each eighth
  mine[2] = __shfl_up_sync(kAll, lane, 3u, 8);
  mine[3] = __shfl_down_sync(kAll, lane, 3u, 8);
  mine[4] = __shfl_xor_sync(kAll, lane, 5, 8);
  mine[5] = __shfl_xor_sync(kAll, lane, 8, 8);  // an eighth to the right keeps its own, one to the left does not
  mine[6] = int(__shfl_xor_sync(kAll, double(lane) * 0x1p40, 1) / 0x1p40);
  mine[6] += int(__shfl_xor_sync(kAll, (long long)lane << 40, 1) >> 40);
}

__global__ void votes(int* out) {
  const int t = int(threadIdx.x);
  const unsigned half = t % 32 < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  const unsigned odd = __ballot_sync(kAll, t & 1);
  const unsigned low = t % 32 < 16 ? __ballot_sync(half, t % 4 == 0) : __ballot_sync(half, t % 8 == 0);
  const int any = __any_sync(half, t == 17), all = __all_sync(half, t % 32 < 16);
  __syncwarp();
  const int count = __syncthreads_count(t < 7), every = __syncthreads_and(t < 63), some = __syncthreads_or(t == 63);
  int* mine = out + 7 * t;
  mine[0] = int(odd), mine[1] = int(low), mine[2] = any, mine[3] = all, mine[4] = count, mine[5] = every, mine[6] = some;
}

// A warp of 16 threads, a full mask for it, and lanes that exit where nobody waits for them.
__global__ void partial_warp(int* out) {
  out[threadIdx.x] = __shfl_down_sync(kAll, int(threadIdx.x), 1u, 16);
  if (threadIdx.x % 32 < 8) return;
  out[threadIdx.x] += __shfl_xor_sync(0xFFFFFF00u, 100, 1);
}

__global__ void atomics(int* out, unsigned* u, unsigned long long* wide, float* f) {
  atomicAdd(out, 2);
  atomicMax(out + 1, int(threadIdx.x));
  atomicMin(out + 2, -int(threadIdx.x));
  atomicInc(u, 9);
  atomicAdd(wide, 1ull << 40);
  atomicAdd(f, 0.5f);
  atomicCAS(out + 3, 0, 42);
  if (threadIdx.x == 7) atomicExch(out + 4, 7);
}

__global__ void numbers(unsigned* out) {
  const uint4 v = make_uint4(1, 2, 3, 4);
  out[0] = __umulhi(0xFFFFFFFFu, 0xFFFFFFFFu);
  out[1] = unsigned(__popc(0xF0F0u) + __ffs(8) * 100 + __clz(1) * 10000);
  out[2] = __float_as_uint(1.0f);
  out[3] = unsigned(max(3, 5) + int(min(2.5f, NAN) * 10));
  __stcs(reinterpret_cast<uint4*>(out + 4), v);
}

// ---- wrong

__global__ void race(int* out) {
  __shared__ int kept[64];
  kept[threadIdx.x] = -1;
  __syncthreads();
  kept[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = kept[(threadIdx.x + 1) % 64];  // no barrier before
}

__global__ void block_race(int* out) {
  if (threadIdx.x == 0) *out = 10 * *out + int(blockIdx.x);
}

__global__ void exit_before_barrier() {
  if (threadIdx.x >= 40) return;
  __syncthreads();
}

__global__ void different_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void different_kinds(int* out) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    *out = __shfl_sync(kAll, 1, 0);
  }
}

__global__ void exited_lane(int* out) {
  if (threadIdx.x == 33) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 2);
}

__global__ void own_lane_missing(int* out) { out[threadIdx.x] = __shfl_sync(0xFFFFFFF7u, 1, 0); }

__global__ void outside_mask(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0x0000FFFFu, 1, 4u);
}

__global__ void outside_warp(int* out) { out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 16); }

__global__ void odd_width(int* out) { out[threadIdx.x] = __shfl_sync(kAll, 1, 0, 12); }

__global__ void different_masks(int* out) {
  out[threadIdx.x] = int(threadIdx.x < 16 ? __ballot_sync(kAll, 1) : __ballot_sync(0xFFFF0001u, 1));
}

__global__ void different_shuffles(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 2);
  }
}

__global__ void trap() {
  if (threadIdx.x == 9) __trap();
  __syncthreads();
}

__global__ void misaligned(const char* p, float* out) { *out = __ldg(reinterpret_cast<const float4*>(p + 4)).x; }

#ifdef GRADFUSED_EMULATED
__global__ void throws(int*) {
  if (threadIdx.x == 3) throw 1;
  __syncthreads();
}
#endif

__global__ void beyond_shared(int*) {
  GRADFUSED_DYNAMIC_SHARED(raw);
  raw[threadIdx.x] = 0;
}

// ---- running them

// Memory that the kernels and this program see, of zeros.
template <class T> struct Memory {
  explicit Memory(size_t n) : size(n) {
    cudaMalloc(&data, n * sizeof(T));
    cudaMemset(data, 0, n * sizeof(T));
  }
  ~Memory() { cudaFree(data); }
  Memory(const Memory&) = delete;
  std::vector<T> read() const {
    std::vector<T> values(size);
    cudaMemcpy(values.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost);
    return values;
  }
  void print() const {
    for (const T x : read()) printf("%.17g ", double(x));
    printf("\n");
  }
  T* data = nullptr;
  size_t size;
};

// Twice, since the ticket has to come back to 0.
std::vector<float> two_sums() {
  constexpr int n = 10000, blocks = 3;
  std::vector<float> x(n), sums;
  for (int i = 0; i < n; ++i) x[size_t(i)] = float(i % 97);
  Memory<float> in(n), partial(blocks), out(1);
  Memory<unsigned> ticket(1);
  cudaMemcpy(in.data, x.data(), n * sizeof(float), cudaMemcpyHostToDevice);
  while (sums.size() < 2) {
    GRADFUSED_LAUNCH(sum, blocks, 128, 0, nullptr, in.data, n, partial.data, ticket.data, out.data);
    sums.push_back(out.read()[0]);
  }
  return sums;
}

void run_sum() {
  const std::vector<float> sums = two_sums();
  printf("%.9g %.9g\n", double(sums[0]), double(sums[1]));
}

// Two OS threads that launch at the same time.
void run_sums_beside_each_other() {
  std::vector<float> sums[2];
  std::thread other([&] { sums[1] = two_sums(); });
  sums[0] = two_sums();
  other.join();
  printf("%.9g %.9g\n", double(sums[0][0] + sums[0][1]), double(sums[1][0] + sums[1][1]));
}

void run_turn_around() {
  std::vector<int> x(96);
  for (int i = 0; i < 96; ++i) x[size_t(i)] = i;
  Memory<int> from(96), to(96);
  cudaMemcpy(from.data, x.data(), 96 * sizeof(int), cudaMemcpyHostToDevice);
  GRADFUSED_LAUNCH(turn_around, 3, 32, 32 * sizeof(int), nullptr, Pair{from.data, to.data});
  to.print();
}

void run_atomics() {
  Memory<int> out(5);
  Memory<unsigned> u(1);
  Memory<unsigned long long> wide(1);
  Memory<float> f(1);
  GRADFUSED_LAUNCH(atomics, 4, 64, 0, nullptr, out.data, u.data, wide.data, f.data);
  out.print(), u.print(), wide.print(), f.print();
}

// More than the default limit of dynamic shared memory, first without asking for it.
void run_shared_limit() {
  Memory<int> out(1);
  GRADFUSED_LAUNCH(poison, 1, 32, 100 << 10, nullptr, out.data);
  printf("%s\n", cudaGetErrorName(cudaGetLastError()));
  printf("%s\n", cudaGetErrorName(cudaFuncSetAttribute(poison, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20)));
  cudaGetLastError();
  cudaFuncSetAttribute(poison, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10);
  GRADFUSED_LAUNCH(poison, 1, 32, 100 << 10, nullptr, out.data);
  out.print();
}

void run_numbers() {
  Memory<unsigned> out(8);
  GRADFUSED_LAUNCH(numbers, 1, 1, 0, nullptr, out.data);
  out.print();
}

void run_misaligned() {
  Memory<float> x(16);
  GRADFUSED_LAUNCH(misaligned, 1, 1, 0, nullptr, reinterpret_cast<const char*>(x.data), x.data);
}

// Prints the array of ints that a kernel fills.
template <void (*kernel)(int*)> void fill(unsigned blocks, unsigned threads, size_t ints, size_t shared = 0) {
  Memory<int> out(ints);
  GRADFUSED_LAUNCH(kernel, blocks, threads, shared, nullptr, out.data);
  out.print();
}

struct Case {
  const char* name;
  void (*run)();
};

const Case kCases[] = {
    {"sum", run_sum},
    {"sums_beside_each_other", run_sums_beside_each_other},
    {"turn_around", run_turn_around},
    {"poison", [] { fill<poison>(3, 32, 3, 16); }},
    {"shuffles", [] { fill<shuffles>(1, 32, 7 * 32); }},
    {"votes", [] { fill<votes>(1, 64, 7 * 64); }},
    {"partial_warp", [] { fill<partial_warp>(1, 48, 48); }},
    {"atomics", run_atomics},
    {"numbers", run_numbers},
    {"shared_limit", run_shared_limit},
    {"race", [] { fill<race>(1, 64, 64); }},
    {"block_race", [] { fill<block_race>(4, 32, 1); }},
    {"exit_before_barrier", [] { GRADFUSED_LAUNCH(exit_before_barrier, 2, 64, 0, nullptr); }},
    {"different_barriers", [] { GRADFUSED_LAUNCH(different_barriers, 1, 64, 0, nullptr); }},
    {"different_kinds", [] { fill<different_kinds>(1, 32, 1); }},
    {"exited_lane", [] { fill<exited_lane>(1, 64, 64); }},
    {"own_lane_missing", [] { fill<own_lane_missing>(1, 32, 32); }},
    {"outside_mask", [] { fill<outside_mask>(1, 32, 32); }},
    {"outside_warp", [] { fill<outside_warp>(1, 48, 48); }},
    {"different_masks", [] { fill<different_masks>(1, 32, 32); }},
    {"different_shuffles", [] { fill<different_shuffles>(1, 32, 32); }},
    {"odd_width", [] { fill<odd_width>(1, 32, 32); }},
    {"throws", [] { fill<throws>(1, 64, 1); }},
    {"beyond_shared", [] { fill<beyond_shared>(1, 32, 1, 31); }},
    {"trap", [] { GRADFUSED_LAUNCH(trap, 1, 64, 0, nullptr); }},
    {"too_many_threads", [] { GRADFUSED_LAUNCH(trap, 1, 1025, 0, nullptr); }},
    {"misaligned", run_misaligned},
};

}  // namespace

int main(int argc, char** argv) {
  for (const Case& c : kCases) {
    if (argc != 2 || strcmp(argv[1], c.name)) continue;
    c.run();
    printf("%s\n%s\n", cudaGetErrorName(cudaGetLastError()), gradfused_emulator::emulator_report().c_str());
    run_sum();
    printf("%s\n", cudaGetErrorName(cudaGetLastError()));
    return 0;
  }
  return 2;
}
