#include "memserve/holders.h"

#include <utility>

namespace memserve {

namespace {

void set_tiers(HolderWords &words, std::uint32_t instance, unsigned tiers) {
    const std::size_t pair = 2 * std::size_t{instance / 64};
    const std::uint64_t bit = std::uint64_t{1} << (instance % 64);
    if (words.size() < pair + 2) words.resize(pair + 2, 0);
    words[pair] = (tiers & tier_hbm) != 0 ? words[pair] | bit : words[pair] & ~bit;
    words[pair + 1] = (tiers & tier_dram) != 0 ? words[pair + 1] | bit : words[pair + 1] & ~bit;
    while (!words.empty() && words[words.size() - 1] == 0 && words[words.size() - 2] == 0) {
        words.resize(words.size() - 2);
    }
}

}  // namespace

unsigned tiers_of(const HolderWords &words, std::uint32_t instance) {
    const std::size_t pair = 2 * std::size_t{instance / 64};
    if (words.size() < pair + 2) return 0;
    const unsigned hbm = (words[pair] >> (instance % 64)) & 1;
    const unsigned dram = (words[pair + 1] >> (instance % 64)) & 1;
    return hbm * tier_hbm | dram * tier_dram;
}

std::size_t HolderSets::Hash::operator()(const HolderWords &words) const {
    std::uint64_t hash = words.size();
    for (const std::uint64_t word : words) {
        hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 32;
    }
    return hash;
}

HoldersId HolderSets::changed(HoldersId id, std::uint32_t instance, unsigned tiers) {
    HolderWords words = sets_[id].words;
    set_tiers(words, instance, tiers);
    return intern(std::move(words));
}

HoldersId HolderSets::only(std::uint32_t instance, unsigned tiers) {
    HolderWords words;
    set_tiers(words, instance, tiers);
    return intern(std::move(words));
}

HoldersId HolderSets::intern(HolderWords words) {
    const auto found = ids_.find(words);
    if (found != ids_.end()) return found->second;
    HoldersId id = static_cast<HoldersId>(sets_.size());
    if (free_.empty()) {
        sets_.emplace_back();
    } else {
        id = free_.back();
        free_.pop_back();
    }
    sets_[id].words = words;
    ids_.emplace(std::move(words), id);
    return id;
}

void HolderSets::release(HoldersId id) {
    ids_.erase(sets_[id].words);
    sets_[id] = HolderSet{};
    free_.push_back(id);
}

}  // namespace memserve
