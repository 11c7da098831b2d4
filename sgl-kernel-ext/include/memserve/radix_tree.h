// The merged radix tree: which instance holds which page, in which tier.
//
// Structure and rules are those of the router's `global_tree.py`, whose theory of operation says why.
// A node is a run of pages with equal holders; two neighbours are one node exactly when the lower one
// is the only child of the upper one and both have the same holders. A parent is recorded by its key,
// whether or not anybody holds it.
//
// What differs is how it is kept. A page's entry in `where_` names its node and a position; its index
// in the run is that position less the node's `base`. So neither cutting pages off the front of a run
// nor putting some there touches the entries of those that stay, and a split or merge costs as much
// as its smaller half. Holders are bit sets, each kept once (`holders.h`): equal holders are equal
// ids.
//
// Owned by one thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "memserve/holders.h"
#include "memserve/page_map.h"

namespace memserve {

enum class Stored {
    done,
    page_twice,    // the chain contains a page twice
    below_itself,  // the chain's parent is one of its pages
    full,
};

class RadixTree {
  public:
    struct Match {
        std::uint32_t instance;
        std::size_t pages;
        std::size_t hbm_pages;
        std::size_t dram_pages;
    };

    struct Node {
        std::vector<PageKey> keys;  // empty: the place is free
        PageKey parent = 0;
        bool has_parent = false;
        std::int32_t base = 0;
        HoldersId holders = 0;
        // Among the nodes with the same holders, and among the children of one page.
        NodeId next_same = no_node, before_same = no_node;
        NodeId next_sibling = no_node, before_sibling = no_node;
    };

    using Counts = std::array<std::int64_t, 2>;  // HBM, DRAM

    // Positions beyond `position_limit` are numbered anew; tests make it small.
    RadixTree(std::size_t max_pages, std::int32_t position_limit);

    // Leading pages of `keys` that each instance holds: in any tier, in HBM, in DRAM. Instances
    // without the first page are left out. Appends to `found`.
    void match(const PageKey *keys, std::size_t count, std::vector<Match> &found);

    // Nothing is changed unless it answers `done`. `tier` is one tier's bit.
    Stored store(std::uint32_t instance, const PageKey *keys, std::size_t count,
                 std::optional<PageKey> parent, unsigned tier);
    void remove(std::uint32_t instance, const PageKey *keys, std::size_t count, unsigned tier);
    // Costs as much as the instance holds, and a look at each distinct set of holders.
    void clear(std::uint32_t instance);

    // Nodes an instance holds; each after the one above it, unless they form a ring.
    std::vector<NodeId> parents_first(std::uint32_t instance) const;
    // The node of a page, or no_node.
    NodeId node_of(PageKey key) const;
    // nullptr for a place that is free; ids run below `capacity`.
    const Node *node(NodeId id) const;
    const HolderWords &holders_of(const Node &node) const { return sets_[node.holders].words; }
    std::size_t capacity() const { return nodes_.size(); }
    std::size_t node_count() const { return node_count_; }
    std::size_t pages() const { return where_.size(); }
    // Times two runs were found to hang below each other: a faulty sender's doing. What is left of
    // such runs may stay two nodes.
    std::size_t rings() const { return rings_; }
    Counts counts(std::uint32_t instance) const;
    std::size_t bytes() const;

    // What is wrong, in words; nothing when every invariant holds. Costs as much as the tree holds.
    std::optional<std::string> check() const;

  private:
    using Halves = std::pair<NodeId, NodeId>;

    Stored refusal(const PageKey *keys, std::size_t count, std::optional<PageKey> parent);
    bool has_twice(const PageKey *keys, std::size_t count);
    void set_tiers(NodeId id, std::size_t start, std::size_t count, std::uint32_t instance,
                   unsigned add, unsigned remove);
    void count_pages(std::uint32_t instance, std::size_t pages, unsigned before, unsigned after);

    NodeId create(const PageKey *keys, std::size_t count, std::optional<PageKey> parent,
                  std::uint32_t instance, unsigned tier);
    void adopt_orphans(NodeId id);
    Halves split(NodeId id, std::size_t at);
    NodeId merge_up(NodeId id);
    void merge_down(NodeId id);
    void destroy(NodeId id);

    NodeId take_place();
    void free_place(NodeId id);
    void attach(NodeId id, HoldersId holders);
    void detach(NodeId id);
    void add_child(PageKey parent, NodeId id);
    void remove_child(PageKey parent, NodeId id);
    NodeId only_child(PageKey parent) const;
    void make_room(Node &node, std::int64_t lowest, std::int64_t highest);
    void point_at(NodeId id, std::size_t start, std::size_t stop);
    std::size_t index_of(const PageMap::Entry &entry) const;

    std::optional<std::string> check_node(NodeId id) const;
    std::optional<std::string> check_lists() const;

    std::size_t max_pages_;
    std::int64_t position_limit_;
    PageMap where_;     // page -> its node
    PageMap children_;  // page -> the first of the nodes right below it
    std::size_t orphans_ = 0;  // entries of `children_` whose page nobody holds
    std::vector<Node> nodes_;
    std::vector<NodeId> free_;
    std::size_t node_count_ = 0;
    std::size_t rings_ = 0;
    HolderSets sets_;
    std::vector<Counts> counts_;
    std::vector<Match> scratch_;
    std::vector<std::pair<PageKey, std::uint32_t>> seen_;  // key and the round it was seen in
    std::uint32_t round_ = 0;
};

}  // namespace memserve
