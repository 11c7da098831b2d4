// The product that serves scores and values alike, for a handful of rows in registers.
#pragma once

#include <cstddef>

namespace memserve {
namespace {

constexpr std::size_t rounded_up(std::size_t count, std::size_t step) {
    return (count + step - 1) / step * step;
}

inline std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }
inline std::size_t most(std::size_t a, std::size_t b) { return a > b ? a : b; }

template <class Simd>
struct Products {
    using Vec = typename Simd::Vec;
    using Unit = typename Simd::Unit;
    static constexpr std::size_t lanes = Simd::lanes;

    // to[row] = (keep == null ? 0 : to[row] * keep[row]) + sum over steps of a[row][step] * b[step],
    // for `rows` rows and `vectors` vectors of columns.
    template <int rows, int vectors>
    static void product_of(const Unit *a, std::size_t a_row, const Unit *b, std::size_t b_step,
                           float *to, std::size_t to_row, std::size_t steps, const float *keep) {
        Vec sums[rows][vectors];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) {
                sums[r][v] = keep == nullptr
                                 ? Simd::zero()
                                 : Simd::mul(Simd::load(to + r * to_row + v * lanes),
                                             Simd::set1(keep[r]));
            }
        }
        for (std::size_t step = 0; step < steps; ++step) {
            typename Simd::Units of_b[vectors];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) {
                of_b[v] = Simd::load_units(b + step * b_step + v * lanes);
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const typename Simd::Units of_a = Simd::broadcast(a + r * a_row + step);
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) {
                    sums[r][v] = Simd::dot(sums[r][v], of_a, of_b[v]);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) Simd::store(to + r * to_row + v * lanes, sums[r][v]);
        }
    }

    using Product = void (*)(const Unit *, std::size_t, const Unit *, std::size_t, float *,
                             std::size_t, std::size_t, const float *);

    template <int rows>
    static Product product_for(std::size_t vectors) {
        switch (vectors) {
            case 1: return product_of<rows, 1>;
            case 2: return product_of<rows, 2>;
            case 3: return product_of<rows, Simd::most_vectors < 3 ? 1 : 3>;
            default: return product_of<rows, Simd::most_vectors < 4 ? 1 : 4>;
        }
    }

    static Product product_for(std::size_t rows, std::size_t vectors) {
        static_assert(Simd::most_rows <= 6 && Simd::most_vectors <= 4, "as the switches know");
        switch (rows) {
            case 1: return product_for<1>(vectors);
            case 2: return product_for<2>(vectors);
            case 3: return product_for<3>(vectors);
            case 4: return product_for<4>(vectors);
            case 5: return product_for<5>(vectors);
            default: return product_for<6>(vectors);
        }
    }

    static void product(std::size_t rows, std::size_t vectors, const Unit *a, std::size_t a_row,
                        const Unit *b, std::size_t b_step, float *to, std::size_t to_row,
                        std::size_t steps, const float *keep) {
        while (vectors > 0) {
            const std::size_t now = least(vectors, Simd::most_vectors);
            product_for(rows, now)(a, a_row, b, b_step, to, to_row, steps, keep);
            b += now * lanes;
            to += now * lanes;
            vectors -= now;
        }
    }
};

}  // namespace
}  // namespace memserve
