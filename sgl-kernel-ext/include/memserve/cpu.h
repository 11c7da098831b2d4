// What the processor at hand can do, asked once.
#pragma once

namespace memserve {

struct CpuFeatures {
    bool avx2 = false;
    bool avx512 = false;  // F, usable under this operating system
    bool sha = false;     // the SHA-256 instructions
};

const CpuFeatures &cpu_features();

}  // namespace memserve
