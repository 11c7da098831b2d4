// The Python face of paged attention. Tensors come as addresses and strides.
#include "attention_module.h"

#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "memserve/attention.h"

namespace nb = nanobind;
using namespace nb::literals;
using memserve::AttentionCall;
using memserve::AttentionPlan;
using memserve::PagedAttention;

namespace {

memserve::Dtype dtype_of(int dtype) {
    if (dtype < 0 || dtype > 2) throw std::invalid_argument("no such dtype");
    return static_cast<memserve::Dtype>(dtype);
}

AttentionPlan plan_of(std::uint64_t table, std::size_t itemsize, std::size_t rows,
                      std::size_t columns, std::size_t stride,
                      const std::vector<std::int64_t> &requests,
                      const std::vector<std::int64_t> &lengths,
                      const std::vector<std::int64_t> &new_rows, std::uint64_t written,
                      std::size_t written_itemsize, std::size_t written_count) {
    return AttentionPlan({table, itemsize, rows, columns, stride}, requests, lengths, new_rows,
                         {written, written_itemsize, written_count});
}

PagedAttention layer_of(std::uint64_t key, std::int64_t key_slot, std::int64_t key_head,
                         std::uint64_t value, std::int64_t value_slot, std::int64_t value_head,
                         std::size_t slots, std::size_t q_heads, std::size_t kv_heads,
                         std::size_t qk_dim, std::size_t v_dim, int dtype, float scale,
                         float softcap, std::int64_t window, bool causal) {
    PagedAttention layer{{key, key_slot, key_head},
                         {value, value_slot, value_head},
                         slots,
                         q_heads,
                         kv_heads,
                         qk_dim,
                         v_dim,
                         dtype_of(dtype),
                         scale,
                         softcap,
                         window < 0 ? memserve::no_window : static_cast<std::size_t>(window),
                         causal};
    layer.check();
    return layer;
}

void attend(const PagedAttention &layer, AttentionPlan &plan, std::uint64_t query,
            std::int64_t query_stride, std::uint64_t key, std::int64_t key_stride,
            std::uint64_t value, std::int64_t value_stride, std::uint64_t out,
            std::int64_t out_stride, std::uint64_t lse, unsigned threads) {
    const AttentionCall call{query,        query_stride, key, value, key_stride,
                             value_stride, out,          out_stride, lse, threads};
    // The plan remembers what it has found, so it is looked at with the GIL.
    layer.check_call(plan, call);
    const nb::gil_scoped_release unlocked;
    layer.attend(plan, call);
}

void merge_state(std::uint64_t out_a, std::uint64_t lse_a, std::uint64_t out_b,
                 std::uint64_t lse_b, std::uint64_t out, std::uint64_t lse, std::size_t rows,
                 std::size_t dim, int dtype) {
    const memserve::MergeCall call{out_a, lse_a, out_b, lse_b, out, lse, rows, dim, dtype_of(dtype)};
    memserve::check_merge(call);
    const nb::gil_scoped_release unlocked;
    memserve::merge_state(call);
}

}  // namespace

void bind_attention(nb::module_ &module) {
    nb::class_<AttentionPlan>(module, "AttentionPlan")
        .def(nb::new_(&plan_of))
        .def("translated",
             [](const AttentionPlan &plan, std::uint64_t address, std::size_t itemsize,
                std::size_t count) { return plan.translated({address, itemsize, count}); })
        .def_prop_ro("rows", &AttentionPlan::rows);
    nb::class_<PagedAttention>(module, "PagedAttention")
        .def(nb::new_(&layer_of))
        .def("attend", &attend);
    module.def("merge_state", &merge_state);
}
