#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#define NM_DECLARE(Isa)                            \
  extern const nm::LinearKernels kLinear##Isa;     \
  extern const nm::LinearFloatKernels kLinearFloat##Isa; \
  extern const nm::AttentionKernels kAttention##Isa; \
  extern const nm::RowsKernels kRows##Isa;       \
  extern const nm::IoKernels kIo##Isa;
#define NM_ROW(name, supported, Isa) \
  { name, supported, &kLinear##Isa, &kLinearFloat##Isa, &kAttention##Isa, &kRows##Isa, &kIo##Isa }

NM_DECLARE(Scalar)
#if defined(__x86_64__)
NM_DECLARE(Avx2)
NM_DECLARE(Avxvnni)
NM_DECLARE(Avx512vnni)
#elif defined(__aarch64__)
NM_DECLARE(Dotprod)
NM_DECLARE(I8mm)
#endif

namespace nm {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avxvnni_bit() {  // leaf 7, subleaf 1, eax bit 4
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
bool has_f16c_bit() {  // leaf 1, ecx bit 29; __builtin_cpu_supports knows the name in few compilers
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c_bit(); }
bool has_avxvnni() { return has_avx2() && has_avxvnni_bit(); }
bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__) && defined(__linux__)
bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }              // HWCAP_ASIMDDP
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1); }  // HWCAP2_I8MM
#elif defined(__aarch64__)
bool has(const char* name) {
#if defined(__APPLE__)
  int found = 0;
  size_t size = sizeof found;
  return sysctlbyname(name, &found, &size, nullptr, 0) == 0 && found;
#else
  return false;  // no way to ask that we know
#endif
}
bool has_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_dotprod() && has("hw.optional.arm.FEAT_I8MM"); }
#endif

const Kernels kTable[] = {
#if defined(__x86_64__)
    NM_ROW("avx512vnni", has_avx512vnni, Avx512vnni),
    NM_ROW("avxvnni", has_avxvnni, Avxvnni),
    NM_ROW("avx2", has_avx2, Avx2),
#elif defined(__aarch64__)
    NM_ROW("i8mm", has_i8mm, I8mm),
    NM_ROW("dotprod", has_dotprod, Dotprod),
#endif
    NM_ROW("scalar", always, Scalar),
};

}  // namespace

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
#define NM_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.emplace_back(name);
  NM_FEATURE("avx2")
  NM_FEATURE("fma")
  if (has_avxvnni()) found.emplace_back("avxvnni");
  NM_FEATURE("avx512f")
  NM_FEATURE("avx512bw")
  NM_FEATURE("avx512vl")
  NM_FEATURE("avx512dq")
  NM_FEATURE("avx512vnni")
#elif defined(__aarch64__)
  if (has_dotprod()) found.emplace_back("dotprod");
  if (has_i8mm()) found.emplace_back("i8mm");
#endif
  return found;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels& k : kTable)
    if (k.supported()) names.emplace_back(k.isa);
  return names;
}

const Kernels& choose_kernels(const std::string& isa) {
  std::string wanted = isa, from = "isa";
  if (const char* forced = isa.empty() ? std::getenv("NMCOMPILE_ISA") : nullptr) {
    wanted = forced;
    from = "environment variable NMCOMPILE_ISA";
  }
  std::string known;
  for (const Kernels& k : kTable) {
    if (wanted.empty() ? k.supported() : wanted == k.isa) {
      if (k.supported()) return k;
      throw std::invalid_argument(from + ": this CPU cannot run '" + wanted +
                                  "'; leave it empty to use the best it can");
    }
    known += known.empty() ? k.isa : std::string(", ") + k.isa;
  }
  throw std::invalid_argument(from + ": '" + wanted + "' is unknown; choose one of " + known);
}

}  // namespace nm
