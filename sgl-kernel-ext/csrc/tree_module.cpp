// The Python face of the radix tree. Its calls keep the GIL: that is what makes a tree which several
// threads reach one thread's at a time.
#include "tree_module.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "integers.h"
#include "memserve/radix_tree.h"

namespace nb = nanobind;
using namespace nb::literals;
using memserve::PageKey;
using memserve::RadixTree;

namespace {

// Bounds the bit sets of holders; a cluster is far smaller.
constexpr std::uint32_t most_instances = 1u << 16;
constexpr std::int64_t most_pages = std::int64_t{1} << 30;

std::uint32_t instance_of(std::int64_t instance) {
    if (instance < 0 || instance >= most_instances) {
        throw std::invalid_argument("instances are numbered from 0 to 65535");
    }
    return static_cast<std::uint32_t>(instance);
}

unsigned tier_of(int tier) {
    if (tier != memserve::tier_hbm && tier != memserve::tier_dram) {
        throw std::invalid_argument("a tier is 1 (HBM) or 2 (DRAM)");
    }
    return static_cast<unsigned>(tier);
}

nb::object integers(const std::vector<PageKey> &keys) { return nb::cast(keys); }

nb::object parent_of(const RadixTree::Node &node) {
    return node.has_parent ? nb::object(nb::int_(node.parent)) : nb::none();
}

// [(instance, tiers)]
nb::list holders_list(const memserve::HolderWords &words) {
    nb::list holders;
    for (std::uint32_t instance = 0; instance < 32 * words.size(); ++instance) {
        const unsigned tiers = memserve::tiers_of(words, instance);
        if (tiers != 0) holders.append(nb::make_tuple(instance, tiers));
    }
    return holders;
}

RadixTree *made(std::int64_t max_pages, std::int32_t position_limit) {
    if (max_pages < 0 || max_pages > most_pages || position_limit < 1 ||
        position_limit > most_pages) {
        throw std::invalid_argument("a tree of so many pages cannot be");
    }
    return new RadixTree(static_cast<std::size_t>(max_pages), position_limit);
}

nb::list match_tiers(RadixTree &tree, nb::handle keys) {
    const std::vector<PageKey> prompt = page_keys_of(keys);
    std::vector<RadixTree::Match> found;
    tree.match(prompt.data(), prompt.size(), found);
    nb::list result;
    for (const RadixTree::Match &one : found) {
        result.append(nb::make_tuple(one.instance, one.pages, one.hbm_pages, one.dram_pages));
    }
    return result;
}

int store_chain(RadixTree &tree, std::int64_t instance, nb::handle keys, std::optional<PageKey> parent,
                int tier) {
    const std::vector<PageKey> chain = page_keys_of(keys);
    return static_cast<int>(
        tree.store(instance_of(instance), chain.data(), chain.size(), parent, tier_of(tier)));
}

void remove_pages(RadixTree &tree, std::int64_t instance, nb::handle keys, int tier) {
    const std::vector<PageKey> pages = page_keys_of(keys);
    tree.remove(instance_of(instance), pages.data(), pages.size(), tier_of(tier));
}

// [(keys, parent, tiers)]
nb::list dump(const RadixTree &tree, std::int64_t instance) {
    nb::list nodes;
    for (const memserve::NodeId id : tree.parents_first(instance_of(instance))) {
        const RadixTree::Node &node = *tree.node(id);
        const unsigned tiers = memserve::tiers_of(tree.holders_of(node), instance_of(instance));
        nodes.append(nb::make_tuple(integers(node.keys), parent_of(node), tiers));
    }
    return nodes;
}

// (keys, parent, [(instance, tiers)]), or None for a place that is free
nb::object node_at(const RadixTree &tree, std::size_t place) {
    const RadixTree::Node *node =
        place < tree.capacity() ? tree.node(static_cast<memserve::NodeId>(place)) : nullptr;
    if (node == nullptr) return nb::none();
    return nb::make_tuple(integers(node->keys), parent_of(*node),
                          holders_list(tree.holders_of(*node)));
}

nb::list holders(const RadixTree &tree, PageKey key) {
    const memserve::NodeId id = tree.node_of(key);
    if (id == memserve::no_node) return nb::list();
    return holders_list(tree.holders_of(*tree.node(id)));
}

nb::tuple counts(const RadixTree &tree, std::int64_t instance) {
    const RadixTree::Counts pages = tree.counts(instance_of(instance));
    return nb::make_tuple(pages[0], pages[1]);
}

}  // namespace

void bind_radix_tree(nb::module_ &module) {
    nb::class_<RadixTree>(module, "RadixTree")
        .def(nb::new_(&made), "max_pages"_a, "position_limit"_a = 1 << 30)
        .def("match_tiers", &match_tiers, "keys"_a.none())
        .def("store", &store_chain, "instance"_a, "keys"_a.none(), "parent"_a.none(), "tier"_a)
        .def("remove", &remove_pages, "instance"_a, "keys"_a.none(), "tier"_a)
        .def("clear",
             [](RadixTree &tree, std::int64_t instance) { tree.clear(instance_of(instance)); },
             "instance"_a)
        .def("dump", &dump, "instance"_a)
        .def("node_at", &node_at, "place"_a)
        .def("holders", &holders, "key"_a)
        .def("counts", &counts, "instance"_a)
        .def("check", &RadixTree::check)
        .def_prop_ro("capacity", &RadixTree::capacity)
        .def_prop_ro("nodes", &RadixTree::node_count)
        .def_prop_ro("pages", &RadixTree::pages)
        .def_prop_ro("rings", &RadixTree::rings)
        .def_prop_ro("nbytes", &RadixTree::bytes);
}
