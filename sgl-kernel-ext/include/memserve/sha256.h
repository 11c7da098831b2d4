// SHA-256 (FIPS 180-4) and the chain of page keys that is made of it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace memserve {

constexpr std::size_t digest_bytes = 32;

// How blocks are compressed.
enum class Sha {
    automatic,  // the processor's instructions where it has them
    plain,
    instructions,  // throws std::invalid_argument where the processor has none
};

// Digest of each whole page of `tokens`: SHA-256(parent || the page's tokens as little-endian
// uint32), the parent being the digest before. The first page's parent is `seed`, 32 bytes, or
// nothing where it is null. Writes `count / page_size` digests to `out`. `page_size` is positive.
void page_keys(const std::uint32_t *tokens, std::size_t count, std::size_t page_size,
               const std::uint8_t *seed, std::uint8_t *out, Sha sha);

}  // namespace memserve
