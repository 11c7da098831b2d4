#include "memserve/radix_tree.h"

#include <algorithm>
#include <cstring>

namespace memserve {

namespace {

constexpr std::size_t prefetch_ahead = 8;

// How many of the first `limit` keys are equal.
std::size_t common(const PageKey *one, const PageKey *other, std::size_t limit) {
    if (std::memcmp(one, other, limit * sizeof(PageKey)) == 0) return limit;
    return static_cast<std::size_t>(std::mismatch(one, one + limit, other).first - one);
}

// How many of `keys` are `run[position]`, `run[position - 1]`, ... The first one is.
std::size_t common_backward(const std::vector<PageKey> &run, std::size_t position,
                            const PageKey *keys, std::size_t count) {
    const std::size_t limit = std::min(position + 1, count);
    std::size_t same = 1;
    while (same < limit && run[position - same] == keys[same]) ++same;
    return same;
}

}  // namespace

RadixTree::RadixTree(std::size_t max_pages, std::int32_t position_limit)
    : max_pages_(max_pages), position_limit_(position_limit) {}

// -- find, store, remove --

namespace {

template <typename Report>
void each_bit(std::uint64_t bits, std::size_t word, Report report) {
    for (; bits != 0; bits &= bits - 1) {
        report(64 * word + static_cast<std::size_t>(__builtin_ctzll(bits)));
    }
}

// Instances by word: those that hold every page so far, and those that do in one tier.
struct Alive {
    std::vector<std::uint64_t> any, hbm, dram;

    void begin(const HolderWords &words) {
        any.resize(words.size() / 2);
        hbm.resize(words.size() / 2);
        dram.resize(words.size() / 2);
        for (std::size_t word = 0; word < any.size(); ++word) {
            hbm[word] = words[2 * word];
            dram[word] = words[2 * word + 1];
            any[word] = hbm[word] | dram[word];
        }
    }

    // Leaves the instances that `words` has too; reports the others, and whether any is left.
    template <typename Report, typename ReportHbm, typename ReportDram>
    bool keep(const HolderWords &words, Report gone, ReportHbm gone_hbm, ReportDram gone_dram) {
        std::uint64_t left = 0;
        for (std::size_t word = 0; word < any.size(); ++word) {
            const bool there = 2 * word < words.size();
            const std::uint64_t in_hbm = there ? words[2 * word] : 0;
            const std::uint64_t in_dram = there ? words[2 * word + 1] : 0;
            const std::uint64_t in_any = in_hbm | in_dram;
            each_bit(hbm[word] & ~in_hbm, word, gone_hbm);
            each_bit(dram[word] & ~in_dram, word, gone_dram);
            each_bit(any[word] & ~in_any, word, gone);
            hbm[word] &= in_hbm;
            dram[word] &= in_dram;
            any[word] &= in_any;
            left |= any[word];
        }
        return left != 0;
    }
};

}  // namespace

void RadixTree::match(const PageKey *keys, std::size_t count, std::vector<Match> &found) {
    const PageMap::Entry *entry = count > 0 ? where_.find(keys[0]) : nullptr;
    if (entry == nullptr) return;
    const HoldersId first_holders = nodes_[entry->node].holders;
    Alive alive;
    alive.begin(sets_[first_holders].words);
    scratch_.resize(64 * alive.any.size());
    std::size_t start = 0;
    const auto gone = [&](std::size_t instance) { scratch_[instance].pages = start; };
    const auto gone_hbm = [&](std::size_t instance) { scratch_[instance].hbm_pages = start; };
    const auto gone_dram = [&](std::size_t instance) { scratch_[instance].dram_pages = start; };
    for (std::size_t word = 0; word < alive.any.size(); ++word) {
        each_bit(alive.any[word], word, gone);
        each_bit(alive.any[word], word, gone_hbm);
        each_bit(alive.any[word], word, gone_dram);
    }
    const Alive all = alive;
    HoldersId holders = first_holders;
    while (entry != nullptr) {
        const Node &node = nodes_[entry->node];
        if (node.holders != holders &&
            !alive.keep(sets_[node.holders].words, gone, gone_hbm, gone_dram)) {
            break;
        }
        holders = node.holders;
        const std::size_t index = index_of(*entry);
        start += common(node.keys.data() + index, keys + start,
                        std::min(node.keys.size() - index, count - start));
        entry = start < count ? where_.find(keys[start]) : nullptr;
    }
    alive.keep({}, gone, gone_hbm, gone_dram);
    for (std::size_t word = 0; word < all.any.size(); ++word) {
        each_bit(all.any[word], word, [&](std::size_t instance) {
            const Match &one = scratch_[instance];
            found.push_back({static_cast<std::uint32_t>(instance), one.pages, one.hbm_pages,
                             one.dram_pages});
        });
    }
}

Stored RadixTree::store(std::uint32_t instance, const PageKey *keys, std::size_t count,
                        std::optional<PageKey> parent, unsigned tier) {
    const Stored refused = refusal(keys, count, parent);
    if (refused != Stored::done) return refused;
    if (counts_.size() <= instance) counts_.resize(instance + 1, Counts{});
    for (std::size_t i = 0; i < std::min(prefetch_ahead, count); ++i) where_.prefetch(keys[i]);
    for (std::size_t at = 0; at < count;) {
        std::size_t end = at + 1;
        if (const PageMap::Entry *entry = where_.find(keys[at])) {
            const NodeId id = entry->node;
            const std::size_t index = index_of(*entry);
            const std::vector<PageKey> &run = nodes_[id].keys;
            end = at + common(run.data() + index, keys + at,
                              std::min(run.size() - index, count - at));
            set_tiers(id, index, end - at, instance, tier, 0);
        } else {
            for (; end < count; ++end) {
                if (end + prefetch_ahead < count) where_.prefetch(keys[end + prefetch_ahead]);
                if (where_.contains(keys[end])) break;
            }
            create(keys + at, end - at, parent, instance, tier);
        }
        parent = keys[end - 1];
        at = end;
    }
    return Stored::done;
}

Stored RadixTree::refusal(const PageKey *keys, std::size_t count, std::optional<PageKey> parent) {
    if (has_twice(keys, count)) return Stored::page_twice;
    if (parent && std::find(keys, keys + count, *parent) != keys + count) {
        return Stored::below_itself;
    }
    return where_.size() + count > max_pages_ ? Stored::full : Stored::done;
}

// A table of its own that is never cleared: what an older round left counts as free.
bool RadixTree::has_twice(const PageKey *keys, std::size_t count) {
    std::size_t places = std::max<std::size_t>(64, seen_.size());
    while (places < 2 * count) places *= 2;
    if (places != seen_.size() || ++round_ == 0) {
        seen_.assign(places, {0, 0});
        round_ = 1;
    }
    const unsigned shift = 64 - static_cast<unsigned>(__builtin_ctzll(places));
    for (std::size_t i = 0; i < count; ++i) {
        std::size_t at = (static_cast<std::uint64_t>(keys[i]) * 0x9e3779b97f4a7c15u) >> shift;
        for (; seen_[at].second == round_; at = (at + 1) & (places - 1)) {
            if (seen_[at].first == keys[i]) return true;
        }
        seen_[at] = {keys[i], round_};
    }
    return false;
}

// Neighbouring pages of a node go together, in whichever order they are named: eviction that begins
// with the leaves names them from the last to the first.
void RadixTree::remove(std::uint32_t instance, const PageKey *keys, std::size_t count,
                       unsigned tier) {
    for (std::size_t at = 0; at < count;) {
        const PageMap::Entry *entry = where_.find(keys[at]);
        if (entry == nullptr ||
            (tiers_of(holders_of(nodes_[entry->node]), instance) & tier) == 0) {
            ++at;
            continue;
        }
        const NodeId id = entry->node;
        const std::vector<PageKey> &run = nodes_[id].keys;
        std::size_t index = index_of(*entry);
        std::size_t same =
            common(run.data() + index, keys + at, std::min(run.size() - index, count - at));
        if (same == 1) {
            same = common_backward(run, index, keys + at, count - at);
            index -= same - 1;
        }
        set_tiers(id, index, same, instance, 0, tier);
        at += same;
    }
}

void RadixTree::clear(std::uint32_t instance) {
    std::vector<PageKey> firsts;
    for (HoldersId id = 0; id < sets_.capacity(); ++id) {
        if (!sets_.alive(id) || tiers_of(sets_[id].words, instance) == 0) continue;
        for (NodeId node = sets_[id].first; node != no_node; node = nodes_[node].next_same) {
            firsts.push_back(nodes_[node].keys[0]);
        }
    }
    // Nodes merge as their holders become equal, so each is looked up anew.
    for (const PageKey key : firsts) {
        const PageMap::Entry *entry = where_.find(key);
        if (entry == nullptr) continue;
        const NodeId id = entry->node;
        if (tiers_of(holders_of(nodes_[id]), instance) == 0) continue;
        set_tiers(id, 0, nodes_[id].keys.size(), instance, 0, all_tiers);
    }
}

void RadixTree::set_tiers(NodeId id, std::size_t start, std::size_t count, std::uint32_t instance,
                          unsigned add, unsigned remove) {
    const unsigned before = tiers_of(holders_of(nodes_[id]), instance);
    const unsigned after = (before | add) & ~remove;
    if (after == before) return;
    if (start > 0) id = split(id, start).second;
    if (count < nodes_[id].keys.size()) id = split(id, count).first;
    count_pages(instance, count, before, after);
    const HoldersId holders = sets_.changed(nodes_[id].holders, instance, after);
    detach(id);
    if (!sets_.alive(holders)) {
        sets_.release(holders);  // nobody holds the pages now
        destroy(id);
        return;
    }
    attach(id, holders);
    merge_down(merge_up(id));
}

void RadixTree::count_pages(std::uint32_t instance, std::size_t pages, unsigned before,
                            unsigned after) {
    for (unsigned tier = 0; tier < 2; ++tier) {
        const std::int64_t change = static_cast<std::int64_t>((after >> tier) & 1) -
                                    static_cast<std::int64_t>((before >> tier) & 1);
        counts_[instance][tier] += change * static_cast<std::int64_t>(pages);
    }
}

// -- the shape --

NodeId RadixTree::create(const PageKey *keys, std::size_t count, std::optional<PageKey> parent,
                         std::uint32_t instance, unsigned tier) {
    const NodeId id = take_place();
    nodes_[id].keys.assign(keys, keys + count);
    if (parent) {
        nodes_[id].parent = *parent;
        nodes_[id].has_parent = true;
        const PageMap::Entry *above = where_.find(*parent);
        if (above != nullptr && nodes_[above->node].keys.back() != *parent) {
            split(above->node, index_of(*above) + 1);
        }
        add_child(*parent, id);
    }
    point_at(id, 0, count);
    attach(id, sets_.only(instance, tier));
    count_pages(instance, count, 0, tier);
    const PageKey first = keys[0], last = keys[count - 1];
    if (orphans_ > 0) adopt_orphans(id);
    merge_down(where_.find(last)->node);
    return merge_up(where_.find(first)->node);
}

// Chains that waited for a page inside the run of a new node make that page a branch.
void RadixTree::adopt_orphans(NodeId id) {
    const std::vector<PageKey> keys = nodes_[id].keys;
    for (std::size_t i = keys.size(); i-- > 0;) {
        if (!children_.contains(keys[i])) continue;
        --orphans_;
        if (i + 1 < keys.size()) id = split(id, i + 1).first;
    }
}

// Cuts a run before its page `at`; a new node gets the smaller half.
RadixTree::Halves RadixTree::split(NodeId id, std::size_t at) {
    const NodeId fresh = take_place();
    Node &old = nodes_[id], &part = nodes_[fresh];
    const auto border_at = old.keys.begin() + static_cast<std::ptrdiff_t>(at);
    const PageKey border = old.keys[at - 1];
    const bool tail_is_new = 2 * at > old.keys.size();
    const auto cut = static_cast<std::int32_t>(at);
    if (tail_is_new) {
        part.keys.assign(border_at, old.keys.end());
        part.base = old.base + cut;
        old.keys.resize(at);
    } else {
        part.keys.assign(old.keys.begin(), border_at);
        part.base = old.base;
        old.keys.erase(old.keys.begin(), border_at);
        old.base += cut;
        part.parent = old.parent;
        part.has_parent = old.has_parent;
        if (old.has_parent) {
            remove_child(old.parent, id);
            add_child(old.parent, fresh);
        }
    }
    const NodeId head = tail_is_new ? id : fresh, tail = tail_is_new ? fresh : id;
    nodes_[tail].parent = border;
    nodes_[tail].has_parent = true;
    point_at(fresh, 0, part.keys.size());
    add_child(border, tail);
    attach(fresh, old.holders);
    return {head, tail};
}

// Joins a node with the one above where they are one run now.
NodeId RadixTree::merge_up(NodeId id) {
    if (!nodes_[id].has_parent) return id;
    const PageMap::Entry *entry = where_.find(nodes_[id].parent);
    if (entry == nullptr) return id;
    const NodeId over = entry->node;
    Node &node = nodes_[id], &above = nodes_[over];
    if (above.holders != node.holders) return id;
    // Two runs that hang below each other (a faulty sender): one run cannot hang below itself.
    if (above.has_parent && above.parent == node.keys.back()) {
        ++rings_;
        return id;
    }
    if (only_child(node.parent) != id) return id;
    remove_child(node.parent, id);
    const auto up = static_cast<std::int64_t>(above.keys.size());
    const auto low = static_cast<std::int64_t>(node.keys.size());
    if (up >= low) {
        make_room(above, 0, up + low);
        above.keys.insert(above.keys.end(), node.keys.begin(), node.keys.end());
        point_at(over, static_cast<std::size_t>(up), above.keys.size());
        detach(id);
        free_place(id);
        return over;
    }
    make_room(node, -up, low);
    if (above.has_parent) {
        remove_child(above.parent, over);
        add_child(above.parent, id);
    }
    node.parent = above.parent;
    node.has_parent = above.has_parent;
    node.keys.insert(node.keys.begin(), above.keys.begin(), above.keys.end());
    node.base -= static_cast<std::int32_t>(up);
    point_at(id, 0, static_cast<std::size_t>(up));
    detach(over);
    free_place(over);
    return id;
}

void RadixTree::merge_down(NodeId id) {
    const NodeId below = only_child(nodes_[id].keys.back());
    if (below != no_node) merge_up(below);
}

// Takes out a node that nobody holds and that has no holders any more. Its children stay, waiting
// for its last page.
void RadixTree::destroy(NodeId id) {
    for (const PageKey key : nodes_[id].keys) where_.erase(key);
    orphans_ += children_.contains(nodes_[id].keys.back());
    const bool has_parent = nodes_[id].has_parent;
    const PageKey parent = nodes_[id].parent;
    if (has_parent) remove_child(parent, id);
    free_place(id);
    if (!has_parent) return;
    const NodeId sibling = only_child(parent);
    if (sibling != no_node) merge_up(sibling);
}

// -- the lists and maps --

NodeId RadixTree::take_place() {
    ++node_count_;
    if (!free_.empty()) {
        const NodeId id = free_.back();
        free_.pop_back();
        return id;
    }
    nodes_.emplace_back();
    return static_cast<NodeId>(nodes_.size() - 1);
}

void RadixTree::free_place(NodeId id) {
    nodes_[id] = Node{};
    free_.push_back(id);
    --node_count_;
}

void RadixTree::attach(NodeId id, HoldersId holders) {
    HolderSet &set = sets_[holders];
    nodes_[id].holders = holders;
    nodes_[id].before_same = set.last;
    nodes_[id].next_same = no_node;
    (set.last == no_node ? set.first : nodes_[set.last].next_same) = id;
    set.last = id;
}

void RadixTree::detach(NodeId id) {
    const Node &node = nodes_[id];
    HolderSet &set = sets_[node.holders];
    (node.before_same == no_node ? set.first : nodes_[node.before_same].next_same) =
        node.next_same;
    (node.next_same == no_node ? set.last : nodes_[node.next_same].before_same) =
        node.before_same;
    if (set.first == no_node) sets_.release(node.holders);
}

void RadixTree::add_child(PageKey parent, NodeId id) {
    const PageMap::Entry *entry = children_.find(parent);
    const NodeId next = entry == nullptr ? no_node : entry->node;
    if (entry == nullptr && !where_.contains(parent)) ++orphans_;
    nodes_[id].next_sibling = next;
    nodes_[id].before_sibling = no_node;
    if (next != no_node) nodes_[next].before_sibling = id;
    children_.put(parent, id, 0);
}

void RadixTree::remove_child(PageKey parent, NodeId id) {
    const NodeId next = nodes_[id].next_sibling, before = nodes_[id].before_sibling;
    if (next != no_node) nodes_[next].before_sibling = before;
    if (before != no_node) {
        nodes_[before].next_sibling = next;
    } else if (next != no_node) {
        children_.put(parent, next, 0);
    } else {
        children_.erase(parent);
        if (!where_.contains(parent)) --orphans_;
    }
}

NodeId RadixTree::only_child(PageKey parent) const {
    const PageMap::Entry *entry = children_.find(parent);
    if (entry == nullptr || nodes_[entry->node].next_sibling != no_node) return no_node;
    return entry->node;
}

// Numbers a run's positions from 0 again where those from `lowest` to `highest`, counted from its
// first page, would be beyond the limit.
void RadixTree::make_room(Node &node, std::int64_t lowest, std::int64_t highest) {
    if (node.base + lowest >= -position_limit_ && node.base + highest <= position_limit_) return;
    node.base = 0;
    point_at(static_cast<NodeId>(&node - nodes_.data()), 0, node.keys.size());
}

// Makes the entries of a part of a run say where it is.
void RadixTree::point_at(NodeId id, std::size_t start, std::size_t stop) {
    const Node &node = nodes_[id];
    for (std::size_t i = start; i < stop; ++i) {
        if (i + prefetch_ahead < stop) where_.prefetch(node.keys[i + prefetch_ahead]);
        where_.put(node.keys[i], id, node.base + static_cast<std::int32_t>(i));
    }
}

std::size_t RadixTree::index_of(const PageMap::Entry &entry) const {
    return static_cast<std::size_t>(entry.position - nodes_[entry.node].base);
}

// -- looking at it --

NodeId RadixTree::node_of(PageKey key) const {
    const PageMap::Entry *entry = where_.find(key);
    return entry == nullptr ? no_node : entry->node;
}

const RadixTree::Node *RadixTree::node(NodeId id) const {
    return id < nodes_.size() && !nodes_[id].keys.empty() ? &nodes_[id] : nullptr;
}

RadixTree::Counts RadixTree::counts(std::uint32_t instance) const {
    return instance < counts_.size() ? counts_[instance] : Counts{};
}

std::vector<NodeId> RadixTree::parents_first(std::uint32_t instance) const {
    std::vector<NodeId> held, ordered, path;
    std::vector<bool> waiting(nodes_.size(), false);
    for (HoldersId id = 0; id < sets_.capacity(); ++id) {
        if (!sets_.alive(id) || tiers_of(sets_[id].words, instance) == 0) continue;
        for (NodeId node = sets_[id].first; node != no_node; node = nodes_[node].next_same) {
            held.push_back(node);
            waiting[node] = true;
        }
    }
    for (const NodeId start : held) {
        path.clear();
        for (NodeId node = start; node != no_node && waiting[node];) {
            waiting[node] = false;
            path.push_back(node);
            node = nodes_[node].has_parent ? node_of(nodes_[node].parent) : no_node;
        }
        ordered.insert(ordered.end(), path.rbegin(), path.rend());
    }
    return ordered;
}

std::size_t RadixTree::bytes() const {
    std::size_t total = where_.bytes() + children_.bytes() + nodes_.capacity() * sizeof(Node) +
                        free_.capacity() * sizeof(NodeId) + seen_.capacity() * sizeof(seen_[0]) +
                        sets_.capacity() * sizeof(HolderSet);
    for (const Node &one : nodes_) total += one.keys.capacity() * sizeof(PageKey);
    return total;
}

}  // namespace memserve
