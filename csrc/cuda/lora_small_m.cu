// The adapters of few rows on CUDA: binding of lora_small_m.cuh.
#include <torch/csrc/stable/library.h>

#include "cuda/lora_small_m.cuh"
#include "cuda/torch_call.h"

namespace {

using cuda_rows::LoraEntry;
using cuda_rows::LoraOutput;
using cuda_rows::LoraSmallM;
using torch::headeronly::ScalarType;
using torch_call::data;
using torch_call::OnDeviceOf;
using torch_call::Tensor;

void expect(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("lora_small_m: ") + what);
}

int to_int(int64_t value) {
  expect(value >= 0 && value <= std::numeric_limits<int>::max() / 2, "a size or stride of 2^30 or more");
  return int(value);
}

bool rows_contiguous(const Tensor& t) { return t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1); }

std::vector<LoraEntry> entries_of(const Tensor& x, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                                  const std::vector<double>& scaling, const std::vector<Tensor>& y) {
  const size_t n = scaling.size();
  expect(a.size() == y.size() * n && b.size() == a.size(),
         "a and b must have an adapter for every scaling and every y");
  std::vector<LoraEntry> out;
  for (size_t i = 0; i < a.size(); ++i) {
    const bool shaped = rows_contiguous(a[i]) && rows_contiguous(b[i]) && a[i].size(1) == x.size(1) &&
                        b[i].size(0) == y[i / n].size(1) && b[i].size(1) == a[i].size(0);
    expect(shaped, "an adapter must be [r, K] and [N, r], its rows without gaps");
    expect(a[i].scalar_type() == a[0].scalar_type() && b[i].scalar_type() == a[0].scalar_type(),
           "adapters of several dtypes");
    out.push_back({a[i].data_ptr(), b[i].data_ptr(), to_int(a[i].stride(0)), to_int(b[i].stride(0)),
                   to_int(a[i].size(0)), float(scaling[i % n])});
  }
  return out;
}

// y of each projection, and the columns of s that hold its S.
std::vector<LoraOutput> outputs_of(const Tensor& x, const std::vector<LoraEntry>& entries, size_t n,
                                   const std::vector<Tensor>& y, const Tensor& s) {
  std::vector<LoraOutput> out;
  int s_column = 0;
  for (size_t p = 0; p < y.size(); ++p) {
    expect(rows_contiguous(y[p]) && y[p].size(0) == x.size(0) && y[p].scalar_type() == x.scalar_type(),
           "y must be [rows, N] of x's dtype");
    out.push_back({y[p].data_ptr(), y[p].stride(0), to_int(y[p].size(1)), s_column});
    int widest = 0;
    for (size_t e = 0; e < n; ++e) widest = std::max(widest, entries[p * n + e].rank);
    s_column += widest;
  }
  expect(rows_contiguous(s) && s.size(0) <= x.size(0) && (s.size(0) == 0 || s.size(1) == s_column) &&
             s.scalar_type() == x.scalar_type(),
         "s must have a row or fewer for each of x's, of its dtype, and the columns of all projections' largest ranks");
  return out;
}

// Whether any row has an adapter, as far as the host knows.
bool route(LoraSmallM& call, const std::optional<Tensor>& index, const std::vector<int64_t>& runs) {
  if (index.has_value()) {
    call.wide = index->scalar_type() == ScalarType::Long;
    expect(call.wide || index->scalar_type() == ScalarType::Int, "index must be int64 or int32");
    expect(index->dim() == 1 && index->size(0) == call.rows && index->is_contiguous(), "index must be [rows]");
    call.index = index->data_ptr();
    return true;
  }
  std::fill_n(call.adapter, cuda_rows::kMostRows, int16_t(-1));
  bool any = false;
  for (size_t i = 0; i + 2 < runs.size(); i += 3) {
    expect(runs[i] >= 0 && runs[i + 1] <= call.rows && runs[i + 2] < std::min(call.all, 1 << 15),
           "runs beyond the rows");
    for (int64_t row = runs[i]; row < runs[i + 1]; ++row) call.adapter[row] = int16_t(runs[i + 2]);
    any |= runs[i] < runs[i + 1] && runs[i + 2] >= 0;
  }
  return any;
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

template <typename T>
void launch(const LoraSmallM& call, const std::vector<LoraEntry>& entries, const std::vector<LoraOutput>& outputs,
            bool in_fp32, int device, cudaStream_t stream) {
  const bool clusters = attribute(cudaDevAttrComputeCapabilityMajor, device) == 9;  // what sm_90a code runs on
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  const auto run = in_fp32 ? cuda_rows::lora_small_m<T, float> : cuda_rows::lora_small_m<T, T>;
  run(call, entries, outputs, clusters, multiprocessors, stream);
}

void lora_small_m(Tensor x, std::vector<Tensor> a, std::vector<Tensor> b, std::optional<Tensor> index,
                  std::vector<int64_t> runs, std::vector<double> scaling, std::optional<Tensor> scaling_tensor,
                  std::vector<Tensor> y, Tensor s) {
  expect(rows_contiguous(x) && x.size(0) <= cuda_rows::kMostRows, "x must be [rows, K] with at most 64 rows");
  LoraSmallM call{};
  call.x = x.data_ptr(), call.x_stride = x.stride(0), call.rows = int(x.size(0)), call.k = to_int(x.size(1));
  call.all = to_int(int64_t(scaling.size()));
  if (scaling_tensor.has_value()) {
    expect(scaling_tensor->scalar_type() == ScalarType::Float && scaling_tensor->dim() == 1 &&
               scaling_tensor->size(0) == call.all && scaling_tensor->is_contiguous(),
           "scaling_tensor must be fp32 [n]");
  }
  call.scaling = data<const float>(scaling_tensor);
  call.s = s.data_ptr(), call.s_stride = s.stride(0), call.kept_rows = int(s.size(0));
  const std::vector<LoraEntry> entries = entries_of(x, a, b, scaling, y);
  const std::vector<LoraOutput> outputs = outputs_of(x, entries, scaling.size(), y, s);
  if (!route(call, index, runs)) return;
  const ScalarType type = x.scalar_type(), adapters = a.empty() ? type : a[0].scalar_type();
  expect(adapters == type || adapters == ScalarType::Float, "adapters must have x's dtype or be fp32");
  const OnDeviceOf device(x);
  const auto run = [&](auto launch) {
    launch(call, entries, outputs, adapters == ScalarType::Float, int(x.get_device_index()), device.stream);
  };
  if (type == ScalarType::Float) run(launch<float>);
  if (type == ScalarType::BFloat16) run(launch<__nv_bfloat16>);
  if (type == ScalarType::Half) run(launch<__half>);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CUDA, m) { m.impl("lora_small_m", TORCH_BOX(&lora_small_m)); }
