// A pool of threads shared by the process: static parts, a short spin, then sleep; made anew after fork.
#pragma once
#include <cstddef>
#include <mutex>

namespace nm {

void relax(int spins);  // between two looks at what another thread will write: a pause, after some 30 us a yield
size_t default_threads();  // CPUs this process may run on
// Guards what programs share between their runs; one for all, as fork waits for it: a child never finds it locked by
// a thread that it does not have. Hold it shortly.
std::mutex& fork_safe_mutex();

// Holds the pool for the time of one run; when another run holds it, the caller computes alone.
class PoolLease {
 public:
  explicit PoolLease(size_t threads);
  ~PoolLease();
  PoolLease(const PoolLease&) = delete;
  PoolLease& operator=(const PoolLease&) = delete;
  size_t threads() const { return threads_; }

  // Calls body(context, part) for each part in [0, parts), parts <= threads(), one thread each; body must not throw.
  void run(size_t parts, void (*body)(void*, size_t), void* context) const;

 private:
  void* pool_ = nullptr;
  size_t threads_ = 1;
};

}  // namespace nm
