// The Python module rlhf_kernels._engine: the scheduler's core, and its two parts by themselves for their tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "scheduler.h"

namespace py = pybind11;
using namespace rlhf_engine;

namespace {

template <typename T>
py::array_t<T> array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::array_t<int> table_array(const Step& step) {
  return py::array_t<int>({static_cast<py::ssize_t>(step.rows.size()), static_cast<py::ssize_t>(step.width)},
                          step.tables.data());
}

using Tokens = py::array_t<int, py::array::c_style | py::array::forcecast>;

std::vector<int> vector(const Tokens& tokens) { return {tokens.data(), tokens.data() + tokens.size()}; }

std::vector<int> commit(Scheduler& scheduler, const py::array_t<int64_t, py::array::c_style>& tokens,
                        const py::array_t<float, py::array::c_style>& logprobs) {
  if (tokens.size() != logprobs.size()) throw std::invalid_argument("tokens and logprobs differ in length");
  return scheduler.commit(tokens.data(), logprobs.data(), static_cast<int>(tokens.size()));
}

py::tuple outcome(const Scheduler& scheduler, int number) {
  const Sequence& s = scheduler.sequence(number);
  return py::make_tuple(s.completion, s.logprobs, s.reason);
}

py::tuple take(Scheduler& scheduler, int number) {
  const Sequence s = scheduler.take(number);
  return py::make_tuple(s.completion, s.logprobs, s.reason);
}

template <typename T>
using Column = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <typename T>
std::vector<T> column(const Column<T>& values) {
  return {values.data(), values.data() + values.size()};
}

StepSizes sizes(int tokens, int rows, int width, int logits, int draws) { return {tokens, rows, width, logits, draws}; }

void pack_step(const Scheduler& scheduler, py::array_t<uint8_t, py::array::c_style>& buffer, int tokens, int rows,
               int width, int logits, int draws) {
  scheduler.pack(sizes(tokens, rows, width, logits, draws), buffer.mutable_data(), buffer.nbytes());
}

}  // namespace

PYBIND11_MODULE(_engine, m) {
  m.doc() = "Which sequences run in a step, and where their keys and values lie (host side; no torch in it)";

  py::class_<BlockPool>(m, "BlockPool", "Reference counts and free list of the arena's slices")
      .def(py::init<int>(), py::arg("num_slices"))
      .def("acquire", &BlockPool::acquire, "A free slice with one reference; RuntimeError when there is none")
      .def("retain", &BlockPool::retain, py::arg("slice"))
      .def("release", &BlockPool::release, py::arg("slice"), "True when that was the last reference")
      .def("refs", &BlockPool::refs, py::arg("slice"))
      .def_property_readonly("size", &BlockPool::size)
      .def_property_readonly("used", &BlockPool::used)
      .def_property_readonly("free", &BlockPool::free_count)
      .def_property_readonly("peak_used", &BlockPool::peak_used);

  py::class_<PrefixTree>(m, "PrefixTree", "Prompts as a tree of slices")
      .def(py::init<BlockPool&, int>(), py::arg("pool"), py::arg("slice_tokens"), py::keep_alive<1, 2>())
      .def("insert", [](PrefixTree& tree, const Tokens& prompt) { return tree.insert(vector(prompt)); })
      .def("expect", &PrefixTree::expect, py::arg("node"))
      .def("forget", &PrefixTree::forget, py::arg("node"))
      .def("assign", &PrefixTree::assign, py::arg("node"), py::arg("slice"), py::arg("sequence"))
      .def("publish", &PrefixTree::publish, py::arg("node"), py::arg("step") = 0)
      .def("lease", &PrefixTree::lease, py::arg("node"))
      .def("leave", &PrefixTree::leave, py::arg("node"))
      .def("evict", &PrefixTree::evict)
      .def("slice", [](const PrefixTree& tree, int node) { return tree[node].slice; })
      .def("ready", [](const PrefixTree& tree, int node) { return tree[node].ready; })
      .def("held", [](const PrefixTree& tree, int node) { return tree[node].held; })
      .def_property_readonly("idle", &PrefixTree::idle)
      .def("__len__", &PrefixTree::size);

  py::class_<Step>(m, "Step", "One step as flat arrays; valid until the next plan or commit")
      .def_property_readonly("input_ids", [](const Step& s) { return array(s.input_ids); })
      .def_property_readonly("position_ids", [](const Step& s) { return array(s.position_ids); })
      .def_property_readonly("slots", [](const Step& s) { return array(s.slots); })
      .def_property_readonly("slice_table", table_array)
      .def_property_readonly("context_lens", [](const Step& s) { return array(s.context_lens); })
      .def_property_readonly("cu_q", [](const Step& s) { return array(s.cu_q); })
      .def_property_readonly("rows", [](const Step& s) { return array(s.rows); })
      .def_property_readonly("logit_rows", [](const Step& s) { return array(s.logit_rows); })
      .def_property_readonly("draw_rows", [](const Step& s) { return array(s.draw_rows); })
      .def_property_readonly("draw_sequences", [](const Step& s) { return array(s.draw_sequences); })
      .def_property_readonly("draw_positions", [](const Step& s) { return array(s.draw_positions); })
      .def_readonly("copies", &Step::copies)
      .def_property_readonly(
          "sizes",
          [](const Step& s) {
            return std::make_tuple(s.input_ids.size(), s.rows.size(), s.width, s.logit_rows.size(), s.draw_rows.size());
          },
          "(tokens, rows, width of the table, logits, draws)")
      .def_property_readonly("one_token_a_row", &Step::one_token_a_row)
      .def_readonly("scratch", &Step::scratch);

  m.def(
      "layout",
      [](int tokens, int rows, int width, int logits, int draws) {
        return layout(sizes(tokens, rows, width, logits, draws));
      },
      "Where each array of a packed step begins, and at last the bytes of them all (csrc/engine/step.h)");

  py::class_<Scheduler>(m, "Scheduler", "Admission, prefix sharing, preemption and refill of one generate call")
      .def(py::init<int, int, int, int>(), py::arg("num_slices"), py::arg("slice_tokens"), py::arg("max_active"),
           py::arg("step_tokens"))
      .def(
          "add_rule",
          [](Scheduler& s, std::vector<int> eos, std::vector<int> stop) {
            return s.add_rule({std::move(eos), std::move(stop)});
          },
          py::arg("eos"), py::arg("stop"))
      .def(
          "add",
          [](Scheduler& s, const Tokens& prompt, int max_new_tokens, int rule, int samples) {
            return s.add(vector(prompt), max_new_tokens, rule, samples);
          },
          py::arg("prompt"), py::arg("max_new_tokens"), py::arg("rule"), py::arg("samples") = 1,
          "The number of the first of `samples` sequences")
      .def(
          "set_draws",
          [](Scheduler& s, const Column<double>& temperature, const Column<int64_t>& top_k, const Column<double>& top_p,
             const Column<double>& min_p, const Column<int64_t>& seed, const Column<int64_t>& stream,
             const Column<int64_t>& sample_index, const Column<uint8_t>& greedy) {
            s.set_draws({column(temperature), column(top_p), column(min_p), column(top_k), column(seed), column(stream),
                         column(sample_index), column(greedy)});
          },
          py::kw_only(), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("seed"),
          py::arg("stream"), py::arg("sample_index"), py::arg("greedy"), "How tokens are drawn, one entry a sequence")
      .def("plan", &Scheduler::plan, py::return_value_policy::reference_internal)
      .def("commit", commit, py::arg("tokens"), py::arg("logprobs"), "The numbers of the sequences that finished")
      .def("pack", pack_step, py::arg("buffer").noconvert(), py::arg("tokens"), py::arg("rows"), py::arg("width"),
           py::arg("logits"), py::arg("draws"), "The planned step, with its draws' parameters, in one buffer")
      .def("outcome", outcome, py::arg("number"), "(generated tokens, their logprobs, finish reason)")
      .def("take", take, py::arg("number"), "The same of a finished sequence, which is forgotten here")
      .def("check", &Scheduler::check)
      .def_property_readonly("unfinished", &Scheduler::unfinished)
      .def_property_readonly("running", &Scheduler::running)
      .def_property_readonly("used_slices", [](const Scheduler& s) { return s.pool().used(); })
      .def_property_readonly("peak_slices", [](const Scheduler& s) { return s.pool().peak_used(); })
      .def_property_readonly("steps", [](const Scheduler& s) { return s.counters().steps; })
      .def_property_readonly("rows", [](const Scheduler& s) { return s.counters().rows; })
      .def_property_readonly("preemptions", [](const Scheduler& s) { return s.counters().preemptions; })
      .def_property_readonly("prefix_tokens_shared",
                             [](const Scheduler& s) { return s.counters().prefix_tokens_shared; })
      .def_property_readonly("prompt_tokens_computed",
                             [](const Scheduler& s) { return s.counters().prompt_tokens_computed; })
      .def_property_readonly("recomputed_tokens", [](const Scheduler& s) { return s.counters().recomputed_tokens; })
      .def_property_readonly("generated_tokens", [](const Scheduler& s) { return s.counters().generated_tokens; });
}
