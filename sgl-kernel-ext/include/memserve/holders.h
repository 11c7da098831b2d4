// Sets of (instance, tier), each kept once however many nodes have it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "memserve/page_map.h"

namespace memserve {

using HoldersId = std::uint32_t;

// Tiers as bits.
constexpr unsigned tier_hbm = 1;
constexpr unsigned tier_dram = 2;
constexpr unsigned all_tiers = 3;

// Words in pairs: 64 instances in HBM, the same 64 in DRAM, the next 64 in HBM, ... No pair of zeros
// at the end, so equal sets are equal words.
using HolderWords = std::vector<std::uint64_t>;

unsigned tiers_of(const HolderWords &words, std::uint32_t instance);

// One set, and the list of nodes that have it: what an instance holds is found through the sets it
// is in.
struct HolderSet {
    HolderWords words;
    NodeId first = no_node;
    NodeId last = no_node;
};

class HolderSets {
  public:
    const HolderSet &operator[](HoldersId id) const { return sets_[id]; }
    HolderSet &operator[](HoldersId id) { return sets_[id]; }
    std::size_t size() const { return ids_.size(); }
    std::size_t capacity() const { return sets_.size(); }
    bool alive(HoldersId id) const { return !sets_[id].words.empty(); }

    // The set `id` with the tiers of one instance as given; may be new, then without nodes.
    HoldersId changed(HoldersId id, std::uint32_t instance, unsigned tiers);
    HoldersId only(std::uint32_t instance, unsigned tiers);

    // Forget a set that no node has.
    void release(HoldersId id);

  private:
    struct Hash {
        std::size_t operator()(const HolderWords &words) const;
    };

    HoldersId intern(HolderWords words);

    std::vector<HolderSet> sets_;
    std::vector<HoldersId> free_;
    std::unordered_map<HolderWords, HoldersId, Hash> ids_;
};

}  // namespace memserve
