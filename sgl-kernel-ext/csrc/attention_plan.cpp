#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "memserve/attention.h"

namespace memserve {

namespace {

constexpr std::size_t most_ranges = 8;
constexpr std::size_t most_slots = std::size_t{1} << 31;

std::int32_t slot_of(std::int64_t slot) {
    if (slot > std::numeric_limits<std::int32_t>::max() ||
        slot < std::numeric_limits<std::int32_t>::min()) {
        throw std::out_of_range("slot " + std::to_string(slot) + " is beyond any pool");
    }
    return static_cast<std::int32_t>(slot);
}

void widen(AttentionPlan::Range &range, const std::int32_t *slots, std::size_t count) {
    if (count == 0) return;
    const auto [least, most] = std::minmax_element(slots, slots + count);
    if (range.least > range.most) range = {*least, *most};
    range = {std::min<std::int64_t>(range.least, *least),
             std::max<std::int64_t>(range.most, *most)};
}

void append(std::vector<std::int32_t> &to, const Integers &from) {
    if (from.count == 0) return;
    if (from.itemsize == sizeof(std::int32_t)) {
        const auto *values = reinterpret_cast<const std::int32_t *>(from.address);
        to.insert(to.end(), values, values + from.count);
        return;
    }
    for (std::size_t i = 0; i < from.count; ++i) to.push_back(slot_of(from.at(i)));
}

std::int32_t mapped(const Integers &map, std::int32_t slot) {
    if (slot < 0) return -1;
    if (static_cast<std::size_t>(slot) >= map.count) {
        throw std::out_of_range("slot " + std::to_string(slot) + " is not in 0.." +
                                std::to_string(map.count) + " - 1, which are translated");
    }
    return slot_of(map.at(static_cast<std::size_t>(slot)));
}

}  // namespace

void Integers::check() const {
    if (itemsize != 4 && itemsize != 8) {
        throw std::invalid_argument("integers have 4 or 8 bytes, not " + std::to_string(itemsize));
    }
    if (count >= most_slots) throw std::invalid_argument("so many integers cannot be");
    if (count > 0 && (address == 0 || address % itemsize != 0)) {
        throw std::invalid_argument("integers cannot lie at this address");
    }
}

std::int64_t Integers::at(std::size_t index) const {
    if (itemsize == 4) return reinterpret_cast<const std::int32_t *>(address)[index];
    return reinterpret_cast<const std::int64_t *>(address)[index];
}

AttentionPlan::AttentionPlan(const SlotTable &table, const std::vector<std::int64_t> &requests,
                             const std::vector<std::int64_t> &lengths,
                             const std::vector<std::int64_t> &rows, const Integers &written) {
    if (lengths.size() != requests.size() || rows.size() != requests.size()) {
        throw std::invalid_argument("requests, lengths and rows differ in number");
    }
    if (table.stride < table.columns || table.rows >= most_slots || table.columns >= most_slots) {
        throw std::invalid_argument("such a table of slots cannot be");
    }
    Integers{table.address, table.itemsize, std::min(table.rows, table.columns)}.check();
    written.check();
    for (std::size_t i = 0; i < requests.size(); ++i) {
        if (requests[i] < 0 || static_cast<std::size_t>(requests[i]) >= table.rows) {
            throw std::out_of_range("request " + std::to_string(requests[i]) + " is not in 0.." +
                                    std::to_string(table.rows) + " - 1");
        }
        if (lengths[i] < 0 || static_cast<std::size_t>(lengths[i]) > table.columns) {
            throw std::out_of_range("a request of " + std::to_string(lengths[i]) +
                                    " tokens is beyond the table's " +
                                    std::to_string(table.columns));
        }
        if (rows[i] < 0 || static_cast<std::size_t>(rows[i]) >= most_slots) {
            throw std::invalid_argument("a request has no " + std::to_string(rows[i]) + " rows");
        }
        const auto length = static_cast<std::size_t>(lengths[i]);
        const auto new_rows = static_cast<std::size_t>(rows[i]);
        requests_.push_back({rows_, new_rows, slots_.size(), length});
        const std::size_t first = static_cast<std::size_t>(requests[i]) * table.stride;
        append(slots_, {table.address + first * table.itemsize, table.itemsize, length});
        rows_ += new_rows;
        rows_are_tokens_ &= new_rows <= length;
        if (rows_ >= most_slots || slots_.size() >= most_slots) {
            throw std::invalid_argument("a batch of so many tokens cannot be");
        }
    }
    if (written.count != 0 && written.count != rows_) {
        throw std::invalid_argument(std::to_string(rows_) + " new tokens are written to " +
                                    std::to_string(written.count) + " slots");
    }
    append(written_, written);
    widen(written_range_, written_.data(), written_.size());
}

AttentionPlan AttentionPlan::translated(const Integers &map) const {
    map.check();
    AttentionPlan plan(*this);
    plan.ranges_.clear();
    for (std::int32_t &slot : plan.slots_) slot = mapped(map, slot);
    for (std::int32_t &slot : plan.written_) slot = mapped(map, slot);
    plan.written_range_ = {0, -1};
    widen(plan.written_range_, plan.written_.data(), plan.written_.size());
    return plan;
}

AttentionPlan::Range AttentionPlan::read(bool causal, std::size_t window) {
    if (!causal) window = no_window;
    for (const auto &[known, range] : ranges_) {
        if (known == window) return range;
    }
    Range range{0, -1};
    for (const Request &request : requests_) {
        if (request.rows == 0) continue;
        // Whoever has no window may have more rows than tokens.
        const std::size_t before =
            window == no_window || window >= request.length - request.rows
                ? 0
                : request.length - request.rows - window;
        widen(range, slots_.data() + request.first_slot + before, request.length - before);
    }
    if (ranges_.size() == most_ranges) ranges_.clear();
    ranges_.emplace_back(window, range);
    return range;
}

}  // namespace memserve
