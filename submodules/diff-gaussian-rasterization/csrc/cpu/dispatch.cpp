// dispatch.cpp: which of the instruction sets we were built for is used.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "stages.h"

namespace gs::cpu {

#define GS_DECLARE(isa)                \
    namespace isa {                    \
    extern const Kernels<float> table; \
    }
#ifdef TILESPLAT_HAS_AVX512
GS_DECLARE(avx512)
#endif
#ifdef TILESPLAT_HAS_AVX2
GS_DECLARE(avx2)
#endif
#ifdef TILESPLAT_HAS_SSE
GS_DECLARE(sse)
#endif
#ifdef TILESPLAT_HAS_NEON
GS_DECLARE(neon)
#endif
#ifdef TILESPLAT_HAS_SCALAR
GS_DECLARE(scalar)
#endif
namespace in_double {
extern const Kernels<double> table;
}

namespace {

std::vector<const Kernels<float>*> available() {
    std::vector<const Kernels<float>*> list;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#ifdef TILESPLAT_HAS_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
        list.push_back(&avx512::table);
#endif
#ifdef TILESPLAT_HAS_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        list.push_back(&avx2::table);
#endif
#ifdef TILESPLAT_HAS_SSE
    list.push_back(&sse::table);
#endif
#ifdef TILESPLAT_HAS_NEON
    list.push_back(&neon::table);
#endif
#ifdef TILESPLAT_HAS_SCALAR
    list.push_back(&scalar::table);
#endif
    return list;
}

const Kernels<float>* find(const std::string& name) {
    for (const Kernels<float>* k : available())
        if (name.empty() || name == k->name) return k;
    return nullptr;
}

const Kernels<float>* first_choice() {
    const char* wish = std::getenv("TILESPLAT_ISA");
    if (const Kernels<float>* k = find(wish ? wish : "")) return k;
    std::string names;
    for (const std::string& n : available_isas()) names += (names.empty() ? "" : ", ") + n;
    throw std::runtime_error("TILESPLAT_ISA must be one of " + names + ", got " + wish);
}

std::atomic<const Kernels<float>*> chosen{nullptr};

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
    const Kernels<float>* k = chosen.load();
    if (!k) chosen.store(k = first_choice());
    return *k;
}
template <>
const Kernels<double>& kernels<double>() {
    return in_double::table;
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels<float>* k : available()) names.push_back(k->name);
    return names;
}

bool set_isa(const std::string& name) {
    const Kernels<float>* k = find(name);
    if (k) chosen.store(k);
    return k != nullptr;
}

}  // namespace gs::cpu
