// The invariants of the radix tree, spelled out.
#include <set>

#include "memserve/radix_tree.h"

namespace memserve {

namespace {

std::string at(const char *what, std::int64_t where) {
    return std::string(what) + " at " + std::to_string(where);
}

}  // namespace

std::optional<std::string> RadixTree::check() const {
    std::size_t live = 0, pages = 0, linked = 0;
    std::vector<Counts> counted(counts_.size(), Counts{});
    for (NodeId id = 0; id < nodes_.size(); ++id) {
        if (node(id) == nullptr) continue;
        if (auto wrong = check_node(id)) return wrong;
        ++live;
        pages += nodes_[id].keys.size();
        linked += nodes_[id].has_parent;
        for (std::uint32_t instance = 0; instance < counted.size(); ++instance) {
            const unsigned tiers = tiers_of(holders_of(nodes_[id]), instance);
            const auto held = static_cast<std::int64_t>(nodes_[id].keys.size());
            counted[instance][0] += (tiers & tier_hbm) != 0 ? held : 0;
            counted[instance][1] += (tiers & tier_dram) != 0 ? held : 0;
        }
    }
    if (live != node_count_ || live + free_.size() != nodes_.size()) return "nodes are miscounted";
    if (pages != where_.size()) return "entries of pages that are in no node";
    if (counted != counts_) return "an instance's pages are miscounted";
    std::size_t orphans = 0, below = 0;
    children_.each([&](const PageMap::Entry &entry) {
        orphans += !where_.contains(entry.key);
        NodeId before = no_node;
        for (NodeId id = entry.node; id != no_node; id = nodes_[id].next_sibling) {
            const Node &child = nodes_[id];
            if (!child.has_parent || child.parent != entry.key || child.before_sibling != before) {
                break;
            }
            before = id;
            ++below;
        }
    });
    if (below != linked) return "children and parents disagree";
    if (orphans != orphans_) return "waiting chains are miscounted";
    return check_lists();
}

std::optional<std::string> RadixTree::check_node(NodeId id) const {
    const Node &one = nodes_[id];
    for (std::size_t i = 0; i < one.keys.size(); ++i) {
        const PageMap::Entry *entry = where_.find(one.keys[i]);
        if (entry == nullptr || entry->node != id || index_of(*entry) != i) {
            return at("a page's entry is wrong", one.keys[i]);
        }
        if (i + 1 < one.keys.size() && children_.contains(one.keys[i])) {
            return at("a branch inside a run", one.keys[i]);
        }
    }
    if (one.holders >= sets_.capacity() || !sets_.alive(one.holders)) {
        return at("a node without holders", one.keys[0]);
    }
    const NodeId over = one.has_parent ? node_of(one.parent) : no_node;
    if (over == no_node) return std::nullopt;
    const Node &above = nodes_[over];
    if (over == id) return at("a run below itself", one.keys[0]);
    if (above.keys.back() != one.parent) return at("a run below the middle of one", one.keys[0]);
    if (rings_ == 0 && above.holders == one.holders && only_child(one.parent) == id) {
        return at("two nodes that are one run", one.keys[0]);
    }
    return std::nullopt;
}

std::optional<std::string> RadixTree::check_lists() const {
    std::size_t listed = 0;
    std::set<HolderWords> distinct;
    for (HoldersId id = 0; id < sets_.capacity(); ++id) {
        if (!sets_.alive(id)) continue;
        if (!distinct.insert(sets_[id].words).second) return "a set of holders is kept twice";
        NodeId before = no_node;
        for (NodeId one = sets_[id].first; one != no_node; one = nodes_[one].next_same) {
            if (nodes_[one].holders != id || nodes_[one].before_same != before) {
                return "a list of nodes is broken";
            }
            before = one;
            ++listed;
        }
        if (before == no_node || before != sets_[id].last) return "a set of holders without nodes";
    }
    if (listed != node_count_) return "a node is in no list";
    if (distinct.size() != sets_.size()) return "sets of holders are miscounted";
    return std::nullopt;
}

}  // namespace memserve
