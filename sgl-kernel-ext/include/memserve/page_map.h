// Page keys to nodes: one flat table, open addressing with linear probing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace memserve {

using PageKey = std::int64_t;
using NodeId = std::uint32_t;

constexpr NodeId no_node = UINT32_MAX;

// 16 bytes an entry, at most three quarters full: 21 to 43 bytes a page.
class PageMap {
  public:
    struct Entry {
        PageKey key = 0;
        NodeId node = no_node;  // no_node: the place is free
        std::int32_t position = 0;
    };

    PageMap() : entries_(smallest), shift_(64 - smallest_bits) {}

    std::size_t size() const { return size_; }
    std::size_t bytes() const { return entries_.capacity() * sizeof(Entry); }

    // Valid until the next change.
    const Entry *find(PageKey key) const {
        for (std::size_t at = home(key);; at = next(at)) {
            const Entry &entry = entries_[at];
            if (entry.node == no_node) return nullptr;
            if (entry.key == key) return &entry;
        }
    }

    bool contains(PageKey key) const { return find(key) != nullptr; }

    // Has the place looked at soon brought into the caches.
    void prefetch(PageKey key) const { __builtin_prefetch(&entries_[home(key)]); }

    // Inserts or overwrites.
    void put(PageKey key, NodeId node, std::int32_t position) {
        std::size_t at = home(key);
        while (entries_[at].node != no_node && entries_[at].key != key) at = next(at);
        if (entries_[at].node == no_node) {
            if (4 * (size_ + 1) > 3 * entries_.size()) {
                grow();
                put(key, node, position);
                return;
            }
            ++size_;
        }
        entries_[at] = {key, node, position};
    }

    // The key must be there. Entries behind it move up, so that no probe stops too early.
    void erase(PageKey key) {
        std::size_t hole = home(key);
        while (entries_[hole].key != key || entries_[hole].node == no_node) hole = next(hole);
        for (std::size_t at = next(hole); entries_[at].node != no_node; at = next(at)) {
            const std::size_t from_home = (at - home(entries_[at].key)) & mask();
            if (from_home >= ((at - hole) & mask())) {
                entries_[hole] = entries_[at];
                hole = at;
            }
        }
        entries_[hole].node = no_node;
        --size_;
    }

    // Every entry, in no particular order.
    template <typename Visit>
    void each(Visit visit) const {
        for (const Entry &entry : entries_) {
            if (entry.node != no_node) visit(entry);
        }
    }

  private:
    static constexpr unsigned smallest_bits = 6;
    static constexpr std::size_t smallest = std::size_t{1} << smallest_bits;

    std::size_t mask() const { return entries_.size() - 1; }
    std::size_t next(std::size_t at) const { return (at + 1) & mask(); }
    // Keys are digests already; the multiplication spreads those that are not.
    std::size_t home(PageKey key) const {
        return (static_cast<std::uint64_t>(key) * 0x9e3779b97f4a7c15u) >> shift_;
    }

    void grow() {
        std::vector<Entry> old(entries_.size() * 2);
        old.swap(entries_);
        --shift_;
        for (const Entry &entry : old) {
            if (entry.node == no_node) continue;
            std::size_t at = home(entry.key);
            while (entries_[at].node != no_node) at = next(at);
            entries_[at] = entry;
        }
    }

    std::vector<Entry> entries_;
    std::size_t size_ = 0;
    unsigned shift_;
};

}  // namespace memserve
