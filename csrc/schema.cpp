// Every native op's schema, and the Python module that carries them: importing rlhf_kernels._C registers the ops under
// torch.ops.rlhf_kernels. The implementations live in cpu/ and cuda/, one file an op family, each with its own IMPL
// block.
#include <Python.h>
#include <torch/csrc/stable/library.h>

// Rises with every change of a schema or of its meaning, here and in rlhf_kernels/ops/registry.py, which compares them.
constexpr long kAbi = 5;

STABLE_TORCH_LIBRARY(rlhf_kernels, m) {
  // logprob: row passes of the head over a block of logits, and the whole op for logits that are already there
  m.def(
      "head_stats(Tensor(a!) z, Tensor(b!)? zr, Tensor target, Tensor? bias, Tensor temperature, float softcap, "
      "float scale, bool raw, bool kl, bool rkl, Tensor(c!) state) -> ()");
  m.def(
      "head_exp(Tensor(a!) z, Tensor target, Tensor? bias, Tensor temperature, float softcap, float scale, bool raw, "
      "bool first, Tensor(b!) shift, Tensor(c!) mass, Tensor(d!) factor, Tensor(e!) target_z) -> ()");
  m.def(
      "head_js(Tensor(a!) z, Tensor(b!) zr, Tensor? bias, Tensor temperature, float softcap, float scale, bool raw, "
      "Tensor lse, Tensor ratio, Tensor(c!) sums) -> ()");
  m.def(
      "head_grad(Tensor(a!) z, Tensor(b!)? zr, Tensor target, Tensor? bias, Tensor temperature, float softcap, "
      "float scale, bool raw, Tensor coefficients, Tensor(c!)? scratch) -> ()");
  m.def(
      "head_tiles(Tensor x, Tensor? xr, Tensor w, Tensor? wr, Tensor target, Tensor? bias, Tensor temperature, "
      "float softcap, float scale, bool kl, bool rkl, Tensor(a!)? state, Tensor(b!)? far, Tensor(c!)? shift, "
      "Tensor(d!)? mass, Tensor(e!)? target_z, Tensor(f!)? pulled) -> int");
  m.def("bf16_isa() -> int");
  m.def("bf16_logits(Tensor x, Tensor w, Tensor(a!) out) -> ()");
  m.def("bf16_pull(Tensor dz, Tensor w, Tensor(a!) total) -> ()");
  m.def("bf16_outer(Tensor dz, Tensor x, Tensor(a!) out) -> ()");
  m.def(
      "logprob_rows(Tensor logits, Tensor target, Tensor temperature, int ignore_index, Tensor(a!) out) "
      "-> ()");
  m.def(
      "logprob_rows_backward(Tensor logits, Tensor target, Tensor temperature, int ignore_index, Tensor coefficients, "
      "Tensor(a!) out) -> ()");

  // lora: P projections that share x, n adapter slots each (a, b: entry p * n + e)
  m.def(
      "lora_tiles(Tensor x, Tensor[] w, Tensor[] bias, Tensor[] a, Tensor[] b, Tensor? index, int[] runs, "
      "float[] scaling, Tensor(a!)[] y, Tensor(b!)? s) -> ()");
  m.def(
      "lora_tiles_backward(Tensor[] grad, Tensor[] w, Tensor[] a, Tensor[] b, Tensor? index, int[] runs, "
      "float[] scaling, Tensor x, Tensor s, int grad_rows, Tensor(a!) dx, Tensor(b!)[] da, Tensor(c!)[] db) -> ()");
  m.def("float_isa() -> int");
  // the adapters of few rows, onto base products that are already in y
  m.def(
      "lora_small_m(Tensor x, Tensor[] a, Tensor[] b, Tensor? index, int[] runs, float[] scaling, "
      "Tensor? scaling_tensor, Tensor(a!)[] y, Tensor(b!)? s) -> ()");

  // sampling
  m.def(
      "sample_rows(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p_cut, Tensor seed, "
      "Tensor stream, Tensor sample_index, Tensor position, Tensor greedy) -> (Tensor, Tensor)");

  // attention
  m.def(
      "varlen_attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale, int window, "
      "float softcap) -> (Tensor, Tensor)");
  m.def(
      "varlen_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, "
      "float scale, int window, float softcap) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sliced_attention_forward(Tensor q, Tensor keys, Tensor values, Tensor slice_table, Tensor context_lens, "
      "Tensor cu_q, float scale, int window, float softcap) -> Tensor");
  m.def(
      "sliced_step(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor slice_table, "
      "Tensor context_lens, Tensor cu_q, float scale, int window, float softcap) -> Tensor");
  m.def("arena_write(Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor k, Tensor v) -> ()");

  // between a decoder's matrix products, in a generation step
  m.def("rms_norm_rows(Tensor x, Tensor weight, float eps, float offset, bool round_first) -> Tensor");
  m.def("silu_mul(Tensor(a!) gate, Tensor up) -> ()");
  m.def(
      "rotate_write(Tensor(a!) q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(b!) keys, Tensor(c!) values, "
      "Tensor slots) -> ()");

  m.def(
      "decoder_step(Tensor ids, Tensor positions, Tensor wanted, Tensor embedding, Tensor[] weights, Tensor[] biases, "
      "Tensor[] vectors, Tensor[] adapters, float scaling, Tensor norm, Tensor head, float[] norms, Tensor cos, "
      "Tensor sin, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor slots, Tensor slice_table, Tensor context_lens, "
      "Tensor cu_q, float[] scales, int[] windows, float[] softcaps) -> Tensor");

  // advantage
  m.def(
      "gae_rows(Tensor rewards, Tensor values, Tensor? mask, Tensor starts, Tensor last_value, float gamma, float lam) "
      "-> (Tensor, Tensor)");
  m.def(
      "gae_rows_backward(Tensor grad, Tensor? mask, Tensor starts, float gamma, float lam) -> (Tensor, Tensor, "
      "Tensor)");
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static struct PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* made = PyModule_Create(&module);
  if (made != nullptr && PyModule_AddIntConstant(made, "ABI", kAbi) != 0) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}
