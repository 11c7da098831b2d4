#include "memserve/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "attention_tile.h"
#include "memserve/team.h"

namespace memserve {

namespace {

// Fewer tiles than this for each thread, and long sequences are shared out by segments.
constexpr std::size_t tiles_worth_a_thread = 8;
constexpr std::size_t shares_worth_a_thread = 4;
// Beyond this, states of segments are not kept for that.
constexpr std::size_t most_state_bytes = std::size_t{64} << 20;
constexpr std::size_t head_dim_step = 16;
constexpr std::size_t most_heads = 4096;
constexpr std::int64_t most_stride = std::int64_t{1} << 40;

const AttentionKernel &kernel_for(Dtype dtype) {
    const Isa level = isa();
    const AttentionKernel *kernel = nullptr;
    if (level >= Isa::avx512_bf16) kernel = attention_avx512_bf16(dtype);
    if (kernel == nullptr && level >= Isa::avx512) kernel = attention_avx512(dtype);
    if (kernel == nullptr && level >= Isa::avx2) kernel = attention_avx2(dtype);
    return kernel == nullptr ? *attention_plain(dtype) : *kernel;
}

// Memory aligned to cache lines, kept by its thread and made larger when it must be.
class Scratch {
  public:
    void *get(std::size_t bytes) {
        if (bytes > bytes_) {
            // Not more of it than is needed: the sizes that occur are few.
            memory_.reset();
            bytes_ = 0;
            memory_.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
            if (memory_ == nullptr) throw std::bad_alloc();
            bytes_ = bytes;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(void *memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> memory_;
    std::size_t bytes_ = 0;
};

// Tokens `first .. first + positions - 1` of a request's new rows, for some K/V heads.
struct Piece {
    const AttentionPlan::Request *request;
    std::size_t first, positions, head, heads;
    std::size_t cost;
};

Tile tile_of(const PagedAttention &layer, const AttentionPlan &plan, const AttentionCall &call,
             const Piece &piece) {
    const auto bytes = static_cast<std::ptrdiff_t>(bytes_of(layer.dtype));
    const auto qk_bytes = static_cast<std::ptrdiff_t>(layer.qk_dim) * bytes;
    const auto v_bytes = static_cast<std::ptrdiff_t>(layer.v_dim) * bytes;
    const std::size_t group = layer.q_heads / layer.kv_heads;
    const auto row = static_cast<std::ptrdiff_t>(piece.request->first_row + piece.first);
    const auto head = static_cast<std::ptrdiff_t>(piece.head);
    const auto first_q_head = static_cast<std::ptrdiff_t>(piece.head * group);
    const auto at = [](std::uint64_t address, std::ptrdiff_t offset) {
        return reinterpret_cast<std::uint8_t *>(address) + offset;
    };
    Tile tile{};
    tile.query_token = call.query_stride * bytes;
    tile.query_head = qk_bytes;
    tile.query = at(call.query, row * tile.query_token + first_q_head * qk_bytes);
    tile.key_slot = layer.key.slot_stride * bytes;
    tile.key_head = layer.key.head_stride * bytes;
    tile.key = at(layer.key.address, head * tile.key_head);
    tile.value_slot = layer.value.slot_stride * bytes;
    tile.value_head = layer.value.head_stride * bytes;
    tile.value = at(layer.value.address, head * tile.value_head);
    tile.slots = plan.slots().data() + piece.request->first_slot;
    tile.out_token = call.out_stride * bytes;
    tile.out_head = v_bytes;
    tile.out = at(call.out, row * tile.out_token + first_q_head * v_bytes);
    tile.lse_token = static_cast<std::ptrdiff_t>(layer.q_heads);
    tile.lse = call.lse == 0 ? nullptr
                             : reinterpret_cast<float *>(call.lse) + row * tile.lse_token +
                                   first_q_head;
    tile.positions = piece.positions;
    tile.heads = piece.heads;
    tile.group = group;
    tile.length = piece.request->length;
    tile.causal = layer.causal;
    tile.first_position =
        layer.causal ? piece.request->length - piece.request->rows + piece.first : 0;
    tile.window = layer.causal ? layer.window : no_window;
    tile.qk_dim = layer.qk_dim;
    tile.v_dim = layer.v_dim;
    tile.scale = layer.scale;
    tile.softcap = layer.softcap;
    return tile;
}

// The keys that a tile's rows see.
KeyRange keys_of(const Tile &tile) {
    if (!tile.causal) return {0, tile.length};
    const std::size_t first = tile.first_position;
    return {first > tile.window ? first - tile.window : 0, first + tile.positions};
}

// K/V heads in one tile: as many as there is room for, because they lie side by side in memory; or one,
// where threads would have nothing to share otherwise.
std::size_t heads_together(const PagedAttention &layer, const AttentionPlan &plan,
                           std::size_t rows_of_head, unsigned threads) {
    const std::size_t room = std::max<std::size_t>(1, most_tile_rows / rows_of_head);
    std::size_t shares = 0;
    for (const AttentionPlan::Request &request : plan.requests()) {
        if (request.rows > 0) shares += request.length / segment_keys + 1;
    }
    const bool enough = threads == 1 || shares >= shares_worth_a_thread * threads;
    return enough ? std::min(room, layer.kv_heads) : 1;
}

std::vector<Piece> pieces_of(const PagedAttention &layer, const AttentionPlan &plan,
                             unsigned threads) {
    const std::size_t group = layer.q_heads / layer.kv_heads;
    const std::size_t step = std::max<std::size_t>(1, most_tile_rows / group);
    std::vector<Piece> pieces;
    for (const AttentionPlan::Request &request : plan.requests()) {
        for (std::size_t first = 0; first < request.rows; first += step) {
            const std::size_t positions = std::min(step, request.rows - first);
            const std::size_t seen =
                layer.causal ? request.length - request.rows + first + positions : request.length;
            const std::size_t together = heads_together(layer, plan, positions * group, threads);
            for (std::size_t head = 0; head < layer.kv_heads; head += together) {
                const std::size_t heads = std::min(together, layer.kv_heads - head);
                const std::size_t cost = heads * positions * std::min(seen, layer.window);
                pieces.push_back({&request, first, positions, head, heads, cost});
            }
        }
    }
    // The longest first: what is left at the end is short, so no thread waits long.
    if (threads > 1) {
        std::stable_sort(pieces.begin(), pieces.end(),
                         [](const Piece &a, const Piece &b) { return a.cost > b.cost; });
    }
    return pieces;
}

// One call: its tiles, and what its threads share.
class Work {
  public:
    Work(const PagedAttention &layer, const AttentionPlan &plan, const AttentionCall &call)
        : layer_(layer), plan_(plan), call_(call), kernel_(kernel_for(layer.dtype)),
          floats_(kernel_.state_floats(layer.v_dim)),
          pieces_(pieces_of(layer, plan, call.threads)) {}

    void run_all() {
        if (call_.threads > 1 && pieces_.size() < tiles_worth_a_thread * call_.threads &&
            share_segments()) {
            run(call_.threads, parts_.size(), [this](std::size_t part) { do_part(part); });
        } else {
            run(call_.threads, pieces_.size(), [this](std::size_t piece) { do_piece(piece); });
        }
    }

  private:
    struct Part {
        std::size_t piece;
        KeyRange keys;
        std::size_t state;  // of its first row, in rows
    };

    std::size_t rows_of(const Piece &piece) const {
        return piece.heads * piece.positions * (layer_.q_heads / layer_.kv_heads);
    }

    void *scratch_for(const Piece &piece) const {
        static thread_local Scratch scratch;
        return scratch.get(kernel_.scratch_bytes(rows_of(piece), layer_.qk_dim, layer_.v_dim));
    }

    void do_piece(std::size_t number) const {
        static thread_local Scratch states;
        const Piece &piece = pieces_[number];
        const Tile tile = tile_of(layer_, plan_, call_, piece);
        auto *state = static_cast<float *>(states.get(rows_of(piece) * floats_ * sizeof(float)));
        kernel_.attend(tile, keys_of(tile), scratch_for(piece), state);
        kernel_.finish(tile, state);
    }

    // False where it is not worth it, or takes too much memory.
    bool share_segments() {
        std::size_t rows = 0;
        for (std::size_t number = 0; number < pieces_.size(); ++number) {
            const KeyRange keys = keys_of(tile_of(layer_, plan_, call_, pieces_[number]));
            std::size_t begin = keys.begin;
            do {
                const std::size_t end =
                    std::min(keys.end, (begin / segment_keys + 1) * segment_keys);
                parts_.push_back({number, {begin, end}, rows});
                rows += rows_of(pieces_[number]);
                begin = end;
            } while (begin < keys.end);
        }
        const std::size_t bytes = rows * floats_ * sizeof(float);
        if (parts_.size() == pieces_.size() || bytes > most_state_bytes) return false;
        states_.get(bytes);
        left_ = std::make_unique<std::atomic<std::size_t>[]>(pieces_.size());
        for (const Part &part : parts_) left_[part.piece].fetch_add(1);
        return true;
    }

    float *state_of(const Part &part) {
        return static_cast<float *>(states_.get(0)) + part.state * floats_;
    }

    void do_part(std::size_t number) {
        const Part &part = parts_[number];
        const Piece &piece = pieces_[part.piece];
        const Tile tile = tile_of(layer_, plan_, call_, piece);
        kernel_.attend(tile, part.keys, scratch_for(piece), state_of(part));
        if (left_[part.piece].fetch_sub(1) > 1) return;
        // The last one to end folds all of them, in order: it matters to the bits.
        const auto first =
            std::lower_bound(parts_.begin(), parts_.end(), part.piece,
                             [](const Part &a, std::size_t value) { return a.piece < value; });
        for (auto later = first + 1; later != parts_.end() && later->piece == part.piece; ++later) {
            kernel_.fold(tile, state_of(*first), state_of(*later));
        }
        kernel_.finish(tile, state_of(*first));
    }

    const PagedAttention &layer_;
    const AttentionPlan &plan_;
    const AttentionCall &call_;
    const AttentionKernel &kernel_;
    const std::size_t floats_;
    const std::vector<Piece> pieces_;
    std::vector<Part> parts_;
    std::unique_ptr<std::atomic<std::size_t>[]> left_;
    Scratch states_;
};

void check_head_dim(const char *what, std::size_t dim) {
    if (dim == 0 || dim % head_dim_step != 0 || dim > most_head_dim) {
        throw std::invalid_argument(std::string(what) + " of " + std::to_string(dim) +
                                    ": a multiple of 16 up to 512 is wanted");
    }
}

void check_pool(const char *what, const Pool &pool, std::size_t slots, std::size_t heads,
                std::size_t dim, Dtype dtype) {
    const auto wide = static_cast<std::int64_t>(dim);
    const auto others = static_cast<std::int64_t>(heads - 1);
    if (pool.head_stride < wide || pool.head_stride > most_stride ||
        pool.slot_stride < others * pool.head_stride + wide || pool.slot_stride > most_stride) {
        throw std::invalid_argument(std::string(what) + " pool: heads " +
                                    std::to_string(pool.head_stride) + " and slots " +
                                    std::to_string(pool.slot_stride) + " elements apart overlap");
    }
    std::int64_t span = 0;
    std::uint64_t end = 0;
    if (pool.address == 0 || pool.address % bytes_of(dtype) != 0 ||
        __builtin_mul_overflow(static_cast<std::int64_t>(slots),
                               pool.slot_stride * static_cast<std::int64_t>(bytes_of(dtype)),
                               &span) ||
        __builtin_add_overflow(pool.address, static_cast<std::uint64_t>(span), &end)) {
        throw std::invalid_argument(std::string(what) + " pool: it cannot lie at this address");
    }
}

void check_rows(const char *what, std::uint64_t address, std::int64_t stride, std::size_t least,
                std::size_t bytes) {
    if (address == 0 || address % bytes != 0) {
        throw std::invalid_argument(std::string(what) + " cannot lie at this address");
    }
    if (stride < static_cast<std::int64_t>(least) || stride > most_stride) {
        throw std::invalid_argument(std::string(what) + ": rows of " + std::to_string(least) +
                                    " elements, " + std::to_string(stride) + " apart");
    }
}

void check_slots(const char *what, const AttentionPlan::Range &range, std::size_t slots) {
    if (range.least > range.most) return;
    const std::int64_t worst = range.least < 0 ? range.least : range.most;
    if (worst < 0 || worst >= static_cast<std::int64_t>(slots)) {
        throw std::out_of_range(std::string(what) + " slot " + std::to_string(worst) +
                                " is not in 0.." + std::to_string(slots) + " - 1");
    }
}

void write_rows(const Pool &pool, const std::vector<std::int32_t> &slots, std::uint64_t rows,
                std::int64_t stride, std::size_t heads, std::size_t dim, Dtype dtype) {
    const std::size_t bytes = bytes_of(dtype);
    const auto unit = static_cast<std::int64_t>(bytes);
    // Heads side by side are copied at once.
    const bool together = pool.head_stride == static_cast<std::int64_t>(dim);
    const std::size_t pieces = together ? 1 : heads;
    const std::size_t size = (together ? heads * dim : dim) * bytes;
    for (std::size_t row = 0; row < slots.size(); ++row) {
        auto *to = reinterpret_cast<std::uint8_t *>(pool.address) +
                   slots[row] * pool.slot_stride * unit;
        const auto *from = reinterpret_cast<const std::uint8_t *>(rows) +
                           static_cast<std::int64_t>(row) * stride * unit;
        for (std::size_t i = 0; i < pieces; ++i) {
            std::memcpy(to + static_cast<std::int64_t>(i) * pool.head_stride * unit,
                        from + i * size, size);
        }
    }
}

}  // namespace

void PagedAttention::check() const {
    if (kv_heads == 0 || q_heads == 0 || q_heads > most_heads || q_heads % kv_heads != 0 ||
        q_heads / kv_heads > most_group) {
        throw std::invalid_argument(std::to_string(q_heads) + " query heads cannot share " +
                                    std::to_string(kv_heads) + " heads of keys and values");
    }
    check_head_dim("qk_dim", qk_dim);
    check_head_dim("v_dim", v_dim);
    if (slots > std::size_t{1} << 31) throw std::invalid_argument("so many slots cannot be");
    check_pool("key", key, slots, kv_heads, qk_dim, dtype);
    check_pool("value", value, slots, kv_heads, v_dim, dtype);
    if (!std::isfinite(scale) || !std::isfinite(softcap) || scale < 0.0f || softcap < 0.0f) {
        throw std::invalid_argument("scale and softcap must be finite and not below 0");
    }
}

void PagedAttention::check_call(AttentionPlan &plan, const AttentionCall &call) const {
    if (call.threads == 0 || call.threads > 256) {
        throw std::invalid_argument("threads must be in 1..256");
    }
    if (causal && !plan.rows_are_tokens()) {
        throw std::invalid_argument("a request has more rows than tokens");
    }
    if (plan.rows() == 0) return;
    const std::size_t bytes = bytes_of(dtype);
    check_rows("query", call.query, call.query_stride, q_heads * qk_dim, bytes);
    check_rows("out", call.out, call.out_stride, q_heads * v_dim, bytes);
    if (call.lse % alignof(float) != 0) throw std::invalid_argument("lse cannot lie there");
    if ((call.key == 0) != (call.value == 0)) {
        throw std::invalid_argument("keys and values are written together or not at all");
    }
    if (call.key != 0) {
        if (plan.written().size() != plan.rows()) {
            throw std::invalid_argument("the plan does not say where new rows are written");
        }
        check_rows("key", call.key, call.key_stride, kv_heads * qk_dim, bytes);
        check_rows("value", call.value, call.value_stride, kv_heads * v_dim, bytes);
        check_slots("written", plan.written_range(), slots);
    }
    check_slots("read", plan.read(causal, window), slots);
}

void PagedAttention::attend(const AttentionPlan &plan, const AttentionCall &call) const {
    if (plan.rows() == 0) return;
    if (call.key != 0) {
        write_rows(key, plan.written(), call.key, call.key_stride, kv_heads, qk_dim, dtype);
        write_rows(value, plan.written(), call.value, call.value_stride, kv_heads, v_dim, dtype);
    }
    Work(*this, plan, call).run_all();
}

}  // namespace memserve
