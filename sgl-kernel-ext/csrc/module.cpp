// The Python face of the kernels: converts, checks, lets go of the GIL, calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <vector>

#include "memserve/cpu.h"
#include "memserve/rows.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr unsigned most_threads = 256;

memserve::RowTable table_of(const Vector<std::uint64_t> &pointers,
                            const Vector<std::int64_t> &strides,
                            const Vector<std::int64_t> &row_bytes,
                            const Vector<std::int64_t> &rows) {
    const std::size_t tensors = pointers.shape(0);
    if (strides.shape(0) != tensors || row_bytes.shape(0) != tensors || rows.shape(0) != tensors) {
        throw std::invalid_argument("a row table's columns differ in length");
    }
    return {tensors, pointers.data(), strides.data(), row_bytes.data(), rows.data()};
}

memserve::Store store_of(int store) {
    if (store < 0 || store > 2) throw std::invalid_argument("no such way to store");
    return static_cast<memserve::Store>(store);
}

void copy_rows(const Vector<std::uint64_t> &to_pointers, const Vector<std::int64_t> &to_strides,
               const Vector<std::uint64_t> &from_pointers,
               const Vector<std::int64_t> &from_strides, const Vector<std::int64_t> &to_row_bytes,
               const Vector<std::int64_t> &from_row_bytes, const Vector<std::int64_t> &to_limits, const Vector<std::int64_t> &from_limits,
               const Vector<std::int64_t> &rows_to, const Vector<std::int64_t> &rows_from,
               unsigned threads, int store) {
    if (rows_to.shape(0) != rows_from.shape(0)) {
        throw std::invalid_argument("destination and source rows differ in number");
    }
    if (threads == 0 || threads > most_threads) {
        throw std::invalid_argument("threads must be in 1..256");
    }
    const memserve::RowTable to = table_of(to_pointers, to_strides, to_row_bytes, to_limits);
    const memserve::RowTable from = table_of(from_pointers, from_strides, from_row_bytes, from_limits);
    // Copied: they must not change between the check and the copy, and others have the GIL then.
    const std::size_t count = rows_to.shape(0);
    const std::vector<std::int64_t> own_to(rows_to.data(), rows_to.data() + count);
    const std::vector<std::int64_t> own_from(rows_from.data(), rows_from.data() + count);
    const memserve::RowPairs pairs{count, own_to.data(), own_from.data()};
    const memserve::Store how = store_of(store);
    nb::gil_scoped_release unlocked;
    memserve::check_copy(to, from, pairs);
    memserve::copy_rows(to, from, pairs, threads, how);
}

nb::dict cpu_features() {
    const memserve::CpuFeatures &found = memserve::cpu_features();
    nb::dict features;
    features["avx2"] = found.avx2;
    features["avx512"] = found.avx512;
    features["sha"] = found.sha;
    return features;
}

}  // namespace

NB_MODULE(_native, module) {
    module.def("cpu_features", &cpu_features);
    module.def("copy_rows", &copy_rows, "to_pointers"_a.noconvert(), "to_strides"_a.noconvert(),
               "from_pointers"_a.noconvert(), "from_strides"_a.noconvert(),
               "to_row_bytes"_a.noconvert(), "from_row_bytes"_a.noconvert(), "to_limits"_a.noconvert(), "from_limits"_a.noconvert(),
               "rows_to"_a.noconvert(), "rows_from"_a.noconvert(), "threads"_a, "store"_a);
}
