// The part of the CUDA driver that the TensorRT worker calls, over malloc; a clock that fakeAdvance moves.
// FAKE_CUDA_FAIL="cuInit=100,cuMemAlloc_v2=2" makes functions fail. Copies to the host happen when their stream is
// waited for, so that reading too early shows.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {
struct Copy { void* to; const void* from; size_t bytes; void* stream; };
std::mutex guard;
std::map<void*, size_t> memory;
std::set<void*> streams;
std::map<void*, double> events;
std::vector<Copy> pending;
double now = 0;
int retained = 0;
thread_local void* current = nullptr;

int failure(const char* name, bool context) {
  const char* asked = std::getenv("FAKE_CUDA_FAIL");
  const std::string list = std::string(",") + (asked ? asked : "");
  const auto at = list.find(std::string(",") + name + "=");
  if (at != std::string::npos) return std::atoi(list.c_str() + at + std::strlen(name) + 2);
  return context && !current ? 201 : 0;
}
bool inside(const void* address, size_t bytes) {
  for (const auto& [start, size] : memory) {
    const char* first = static_cast<char*>(start);
    const char* from = static_cast<const char*>(address);
    if (from >= first && from + bytes <= first + size) return true;
  }
  return false;
}
void finish(void* stream) {
  std::vector<Copy> rest;
  for (const auto& copy : pending) {
    if (stream && copy.stream != stream) { rest.push_back(copy); continue; }
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  pending.swap(rest);
}
}  // namespace

#define BEGIN(name, context)                                 \
  std::lock_guard<std::mutex> lock(guard);                   \
  if (const int code = failure(name, context)) return code;

extern "C" {
int cuInit(unsigned) { BEGIN("cuInit", false) return 0; }
int cuDriverGetVersion(int* out) { BEGIN("cuDriverGetVersion", false) *out = 13000; return 0; }
int cuDeviceGetCount(int* out) {
  BEGIN("cuDeviceGetCount", false)
  const char* asked = std::getenv("FAKE_CUDA_DEVICES");
  *out = asked ? std::atoi(asked) : 1;
  return 0;
}
int cuDeviceGet(int* out, int index) { BEGIN("cuDeviceGet", false) *out = index; return 0; }
int cuDeviceGetName(char* out, int size, int) { BEGIN("cuDeviceGetName", false) std::strncpy(out, "Fake GPU", size); return 0; }
int cuDeviceGetAttribute(int* out, int attribute, int) { BEGIN("cuDeviceGetAttribute", false) *out = attribute == 75 ? 9 : 0; return 0; }
int cuDeviceTotalMem_v2(size_t* out, int) { BEGIN("cuDeviceTotalMem_v2", false) *out = size_t{64} << 30; return 0; }
int cuDevicePrimaryCtxRetain(void** out, int) { BEGIN("cuDevicePrimaryCtxRetain", false) ++retained; *out = &retained; return 0; }
int cuDevicePrimaryCtxRelease_v2(int) { BEGIN("cuDevicePrimaryCtxRelease_v2", false) --retained; return 0; }
int cuCtxSetCurrent(void* context) { BEGIN("cuCtxSetCurrent", false) current = context; return 0; }
int cuGetErrorName(int code, const char** out) {
  *out = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 100 ? "CUDA_ERROR_NO_DEVICE" : code == 201 ? "CUDA_ERROR_INVALID_CONTEXT" : nullptr;
  return *out ? 0 : 1;
}
int cuMemAlloc_v2(void** out, size_t bytes) {
  BEGIN("cuMemAlloc_v2", true)
  if (!bytes) return 1;
  *out = std::malloc(bytes);
  std::memset(*out, 0xAA, bytes);
  memory[*out] = bytes;
  return 0;
}
int cuMemFree_v2(void* address) {
  BEGIN("cuMemFree_v2", true)
  if (!memory.erase(address)) return 1;
  std::free(address);
  return 0;
}
int cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
  BEGIN("cuMemcpyHtoDAsync_v2", true)
  if (!inside(to, bytes) || (stream && !streams.count(stream))) return 1;
  std::memcpy(to, from, bytes);
  return 0;
}
int cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
  BEGIN("cuMemcpyDtoHAsync_v2", true)
  if (!inside(from, bytes) || (stream && !streams.count(stream))) return 1;
  pending.push_back({to, from, bytes, stream});
  return 0;
}
int cuMemsetD8_v2(void* to, unsigned char value, size_t bytes) {
  BEGIN("cuMemsetD8_v2", true)
  if (!inside(to, bytes)) return 1;
  std::memset(to, value, bytes);
  return 0;
}
int cuStreamCreate(void** out, unsigned) { BEGIN("cuStreamCreate", true) streams.insert(*out = std::malloc(1)); return 0; }
int cuStreamDestroy_v2(void* stream) { BEGIN("cuStreamDestroy_v2", true) return streams.erase(stream) ? 0 : 400; }
int cuStreamSynchronize(void* stream) { BEGIN("cuStreamSynchronize", true) finish(stream); return 0; }
int cuEventCreate(void** out, unsigned) { BEGIN("cuEventCreate", true) events[*out = std::malloc(1)] = -1; return 0; }
int cuEventDestroy_v2(void* event) { BEGIN("cuEventDestroy_v2", true) return events.erase(event) ? 0 : 400; }
int cuEventRecord(void* event, void* stream) {
  BEGIN("cuEventRecord", true)
  if (!events.count(event) || (stream && !streams.count(stream))) return 400;
  events[event] = now;
  return 0;
}
int cuEventSynchronize(void*) { BEGIN("cuEventSynchronize", true) finish(nullptr); return 0; }
int cuEventElapsedTime(float* out, void* start, void* end) {
  BEGIN("cuEventElapsedTime", true)
  if (events[start] < 0 || events[end] < 0) return 400;
  *out = static_cast<float>(events[end] - events[start]);
  return 0;
}

// for tests
void fakeAdvance(double milliseconds) { now += milliseconds; }
int fakeHolds(const void* address, size_t bytes) { return inside(address, bytes); }
int fakeIsStream(void* stream) { return streams.count(stream) != 0; }
int fakeLeft() { return static_cast<int>(memory.size() + streams.size() + events.size()) + retained; }
}
