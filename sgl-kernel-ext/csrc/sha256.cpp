#include "memserve/sha256.h"

#include <cstring>
#include <stdexcept>
#include <vector>

#include "memserve/cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace memserve {

namespace {

constexpr std::size_t block_bytes = 64;

alignas(64) constexpr std::uint32_t round_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

constexpr std::uint32_t initial_state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                            0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

using Compress = void (*)(std::uint32_t state[8], const std::uint8_t *data, std::size_t blocks);

std::uint32_t rotated(std::uint32_t value, int by) { return (value >> by) | (value << (32 - by)); }

std::uint32_t big_endian(const std::uint8_t *at) {
    return std::uint32_t{at[0]} << 24 | std::uint32_t{at[1]} << 16 | std::uint32_t{at[2]} << 8 |
           std::uint32_t{at[3]};
}

void compress_plain(std::uint32_t state[8], const std::uint8_t *data, std::size_t blocks) {
    for (; blocks > 0; --blocks, data += block_bytes) {
        std::uint32_t w[64];
        for (int i = 0; i < 16; ++i) w[i] = big_endian(data + 4 * i);
        for (int i = 16; i < 64; ++i) {
            const std::uint32_t x = w[i - 15], y = w[i - 2];
            w[i] = w[i - 16] + w[i - 7] + (rotated(x, 7) ^ rotated(x, 18) ^ (x >> 3)) +
                   (rotated(y, 17) ^ rotated(y, 19) ^ (y >> 10));
        }
        std::uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        std::uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        for (int i = 0; i < 64; ++i) {
            const std::uint32_t first = h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) +
                                        ((e & f) ^ (~e & g)) + round_constants[i] + w[i];
            const std::uint32_t second = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) +
                                         ((a & b) ^ (a & c) ^ (b & c));
            h = g, g = f, f = e, e = d + first;
            d = c, c = b, b = a, a = first + second;
        }
        state[0] += a, state[1] += b, state[2] += c, state[3] += d;
        state[4] += e, state[5] += f, state[6] += g, state[7] += h;
    }
}

#if defined(__x86_64__)

// The instructions want the state as (a b e f) and (c d g h), high word first, and do two rounds at
// a time: one turn of the loop is four rounds and the next four words of the schedule.
__attribute__((target("sha,sse4.1"))) void compress_instructions(std::uint32_t state[8],
                                                                 const std::uint8_t *data,
                                                                 std::size_t blocks) {
    const __m128i to_big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    auto *words = reinterpret_cast<__m128i *>(state);
    const __m128i dcba = _mm_loadu_si128(words), hgfe = _mm_loadu_si128(words + 1);
    const __m128i cdab = _mm_shuffle_epi32(dcba, 0xb1), efgh = _mm_shuffle_epi32(hgfe, 0x1b);
    __m128i abef = _mm_alignr_epi8(cdab, efgh, 8);
    __m128i cdgh = _mm_blend_epi16(efgh, cdab, 0xf0);
    for (; blocks > 0; --blocks, data += block_bytes) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];
        for (int i = 0; i < 4; ++i) {
            const auto *at = reinterpret_cast<const __m128i *>(data) + i;
            w[i] = _mm_shuffle_epi8(_mm_loadu_si128(at), to_big_endian);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            const __m128i now = w[i % 4];
            const auto *constants = reinterpret_cast<const __m128i *>(round_constants) + i;
            __m128i sum = _mm_add_epi32(now, _mm_load_si128(constants));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
            sum = _mm_shuffle_epi32(sum, 0x0e);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, sum);
            if (i < 12) {
                const __m128i last = w[(i + 3) % 4];
                const __m128i seven_back = _mm_alignr_epi8(last, w[(i + 2) % 4], 4);
                const __m128i part = _mm_sha256msg1_epu32(now, w[(i + 1) % 4]);
                w[i % 4] = _mm_sha256msg2_epu32(_mm_add_epi32(part, seven_back), last);
            }
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    const __m128i feba = _mm_shuffle_epi32(abef, 0x1b), dchg = _mm_shuffle_epi32(cdgh, 0xb1);
    _mm_storeu_si128(words, _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128(words + 1, _mm_alignr_epi8(dchg, feba, 8));
}

#endif

Compress compress_for(Sha sha) {
#if defined(__x86_64__)
    if (sha != Sha::plain && cpu_features().sha) return compress_instructions;
#endif
    if (sha == Sha::instructions) {
        throw std::invalid_argument("this processor has no SHA-256 instructions we know");
    }
    return compress_plain;
}

// A message of one length, padded once: only what is before the padding changes.
class Message {
  public:
    explicit Message(std::size_t length)
        : bytes_((length + 1 + 8 + block_bytes - 1) / block_bytes * block_bytes, 0) {
        bytes_[length] = 0x80;
        const std::uint64_t bits = std::uint64_t{length} * 8;
        for (int i = 0; i < 8; ++i) {
            bytes_[bytes_.size() - 1 - static_cast<std::size_t>(i)] =
                static_cast<std::uint8_t>(bits >> (8 * i));
        }
    }

    std::uint8_t *data() { return bytes_.data(); }

    void digest(Compress compress, std::uint8_t *out) const {
        std::uint32_t state[8];
        std::memcpy(state, initial_state, sizeof state);
        compress(state, bytes_.data(), bytes_.size() / block_bytes);
        for (int i = 0; i < 8; ++i) {
            for (int byte = 0; byte < 4; ++byte) {
                out[4 * i + byte] = static_cast<std::uint8_t>(state[i] >> (24 - 8 * byte));
            }
        }
    }

  private:
    std::vector<std::uint8_t> bytes_;
};

void put_tokens(std::uint8_t *to, const std::uint32_t *tokens, std::size_t count) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    std::memcpy(to, tokens, 4 * count);
#else
    for (std::size_t i = 0; i < count; ++i) {
        for (int byte = 0; byte < 4; ++byte) {
            to[4 * i + static_cast<std::size_t>(byte)] =
                static_cast<std::uint8_t>(tokens[i] >> (8 * byte));
        }
    }
#endif
}

}  // namespace

void page_keys(const std::uint32_t *tokens, std::size_t count, std::size_t page_size,
               const std::uint8_t *seed, std::uint8_t *out, Sha sha) {
    const Compress compress = compress_for(sha);
    const std::size_t pages = count / page_size;
    if (pages == 0) return;
    std::size_t page = 0;
    const std::uint8_t *parent = seed;
    if (parent == nullptr) {
        Message first(4 * page_size);
        put_tokens(first.data(), tokens, page_size);
        first.digest(compress, out);
        parent = out;
        page = 1;
    }
    Message message(digest_bytes + 4 * page_size);
    for (; page < pages; ++page) {
        std::memcpy(message.data(), parent, digest_bytes);
        put_tokens(message.data() + digest_bytes, tokens + page * page_size, page_size);
        message.digest(compress, out + page * digest_bytes);
        parent = out + page * digest_bytes;
    }
}

}  // namespace memserve
