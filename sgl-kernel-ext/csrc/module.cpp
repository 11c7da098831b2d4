// The Python face of the kernels: converts, checks, lets go of the GIL, calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "engine_module.h"
#include "attention_module.h"
#include "integers.h"
#include "memserve/cpu.h"
#include "memserve/rows.h"
#include "memserve/sha256.h"
#include "tree_module.h"

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

// Of the three ways that each of these kernels knows, the first being to choose itself.
template <typename Way>
Way way_of(int way) {
    if (way < 0 || way > 2) throw std::invalid_argument("no such way");
    return static_cast<Way>(way);
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
    const memserve::Store how = way_of<memserve::Store>(store);
    nb::gil_scoped_release unlocked;
    memserve::check_copy(to, from, pairs);
    memserve::copy_rows(to, from, pairs, threads, how);
}

nb::list page_keys(nb::handle tokens, std::int64_t page_size, nb::bytes seed, int sha) {
    if (page_size <= 0) throw std::invalid_argument("page size must be positive");
    if (seed.size() != 0 && seed.size() != memserve::digest_bytes) {
        throw std::invalid_argument("a parent digest has 32 bytes, not " +
                                    std::to_string(seed.size()));
    }
    const memserve::Sha how = way_of<memserve::Sha>(sha);
    const std::vector<std::uint32_t> ids = token_ids(tokens);
    const auto *parent = seed.size() == 0 ? nullptr : static_cast<const std::uint8_t *>(seed.data());
    const std::size_t pages = ids.size() / static_cast<std::size_t>(page_size);
    std::vector<std::uint8_t> digests(pages * memserve::digest_bytes);
    {
        nb::gil_scoped_release unlocked;
        memserve::page_keys(ids.data(), ids.size(), static_cast<std::size_t>(page_size), parent,
                            digests.data(), how);
    }
    nb::list keys;
    for (std::size_t page = 0; page < pages; ++page) {
        keys.append(nb::bytes(digests.data() + page * memserve::digest_bytes,
                              memserve::digest_bytes));
    }
    return keys;
}

nb::dict cpu_features() {
    const memserve::CpuFeatures &found = memserve::cpu_features();
    nb::dict features;
    features["avx2"] = found.avx2;
    features["fma"] = found.fma;
    features["avx512"] = found.avx512;
    features["avx512_bf16"] = found.avx512_bf16;
    features["amx_bf16"] = found.amx_bf16;
    features["sha"] = found.sha;
    return features;
}

}  // namespace

NB_MODULE(_native, module) {
    module.def("cpu_features", &cpu_features);
    bind_radix_tree(module);
    bind_engine(module);
    bind_attention(module);
    module.def("page_keys", &page_keys, "tokens"_a.none(), "page_size"_a, "seed"_a, "sha"_a);
    module.def("copy_rows", &copy_rows, "to_pointers"_a.noconvert(), "to_strides"_a.noconvert(),
               "from_pointers"_a.noconvert(), "from_strides"_a.noconvert(),
               "to_row_bytes"_a.noconvert(), "from_row_bytes"_a.noconvert(), "to_limits"_a.noconvert(), "from_limits"_a.noconvert(),
               "rows_to"_a.noconvert(), "rows_from"_a.noconvert(), "threads"_a, "store"_a);
}
