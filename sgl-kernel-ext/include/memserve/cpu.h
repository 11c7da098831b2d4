// What the processor at hand can do, asked once.
#pragma once

namespace memserve {

struct CpuFeatures {
    bool avx2 = false;
    bool fma = false;
    bool avx512 = false;       // F, usable under this operating system
    bool avx512_bf16 = false;  // BF16 instructions, with F, BW, DQ and VL
    bool amx_bf16 = false;     // not used here; other libraries' sums differ where it is
    bool sha = false;          // the SHA-256 instructions
};

const CpuFeatures &cpu_features();

// What the engine's ops are compiled for. Each level contains those before it.
enum class Isa {
    plain = 0,        // plain C++
    avx2 = 1,         // AVX2 and FMA
    avx512 = 2,       // F, BW, DQ and VL
    avx512_bf16 = 3,  // and BF16
};

// The best that the processor has and `limit_isa` allows.
Isa isa();

// For tests and comparisons: no better than this from now on, in the whole process.
void limit_isa(Isa best);

}  // namespace memserve

// For functions that are chosen by `isa()`.
#if defined(__x86_64__)
#define MEMSERVE_AVX2 __attribute__((target("avx2,fma")))
#define MEMSERVE_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#define MEMSERVE_AVX512_BF16 \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#endif
#define MEMSERVE_INLINE inline __attribute__((always_inline))

// Compiles `name_body`, an inline function, for every level that compilers vectorise differently;
// `name_for(isa())` is then the one to call.
#if defined(__x86_64__)
#define MEMSERVE_LEVELS(name, parameters, arguments)                              \
    void name##_plain parameters { name##_body arguments; }                       \
    MEMSERVE_AVX2 void name##_avx2 parameters { name##_body arguments; }          \
    MEMSERVE_AVX512 void name##_avx512 parameters { name##_body arguments; }      \
    decltype(&name##_plain) name##_for(Isa level) {                               \
        if (level >= Isa::avx512) return name##_avx512;                           \
        return level == Isa::avx2 ? name##_avx2 : name##_plain;                   \
    }
#else
#define MEMSERVE_LEVELS(name, parameters, arguments)        \
    void name##_plain parameters { name##_body arguments; } \
    decltype(&name##_plain) name##_for(Isa) { return name##_plain; }
#endif
