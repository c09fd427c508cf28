// What every library of CUDA kernels for ctypes has beside its kernels: included once, after the kernels' own headers.
#pragma once
#include <exception>
#include <string>

#include "testing/cuda_on_host.h"

namespace {

template <typename F>
const char* guarded(const F& run) {
  static std::string message;
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

// 0 fp32, 1 bf16, 2 fp16.
template <typename F>
void with_type(int64_t type, const F& run) {
  if (type == 0) run(float());
  if (type == 1) run(__nv_bfloat16());
  if (type == 2) run(__half());
}

}  // namespace

extern "C" const char* run_backwards(bool backwards) {
  return guarded([&] { cuda_on_host::block.backwards = backwards; });
}
