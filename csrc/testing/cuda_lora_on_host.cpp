// The CUDA kernel of lora_small_m as a plain function for ctypes, run on the CPU. It returns null, or an error's
// message.
#define RLHF_CUDA_ON_HOST
#include "cuda/lora_small_m.cuh"
#include "testing/host_entry.h"

extern "C" {

// types: 0 fp32, 1 bf16, 2 fp16. entries: [projections * n][a, b, a's stride, b's stride, rank]; outputs:
// [projections][y, stride, columns, first column in s]; index (int64 or int32) or adapter (of each row) is null.
const char* host_lora_small_m(int64_t type, int64_t adapter_type, const void* x, int64_t x_stride, int64_t rows,
                              int64_t k, const int64_t* entries, const float* scaling, int64_t n,
                              const int64_t* outputs, int64_t projections, const void* index, bool wide,
                              const int64_t* adapter, const float* scaling_tensor, void* s, int64_t s_stride,
                              int64_t kept_rows, bool clusters, int64_t multiprocessors) {
  cuda_rows::LoraSmallM call{};
  call.x = x, call.x_stride = x_stride, call.rows = int(rows), call.k = int(k);
  call.index = index, call.wide = wide, call.scaling = scaling_tensor, call.all = int(n);
  call.s = s, call.s_stride = s_stride, call.kept_rows = int(kept_rows);
  for (int64_t row = 0; adapter != nullptr && row < rows; ++row) call.adapter[row] = int16_t(adapter[row]);
  std::vector<cuda_rows::LoraEntry> list;
  for (int64_t i = 0; i < projections * n; ++i) {
    const int64_t* e = entries + 5 * i;
    list.push_back({reinterpret_cast<const void*>(e[0]), reinterpret_cast<const void*>(e[1]), int(e[2]), int(e[3]),
                    int(e[4]), scaling[i % n]});
  }
  std::vector<cuda_rows::LoraOutput> ys;
  for (int64_t p = 0; p < projections; ++p) {
    const int64_t* o = outputs + 4 * p;
    ys.push_back({reinterpret_cast<void*>(o[0]), o[1], int(o[2]), int(o[3])});
  }
  return guarded([&] {
    with_type(type, [&](auto t) {
      using T = decltype(t);
      if (adapter_type == type) {
        cuda_rows::lora_small_m<T, T>(call, list, ys, clusters, int(multiprocessors), nullptr);
      } else {
        cuda_rows::lora_small_m<T, float>(call, list, ys, clusters, int(multiprocessors), nullptr);
      }
    });
  });
}

}  // extern "C"
