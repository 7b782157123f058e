#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace nm {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

constexpr int kSpins = 3000;       // about 30 us, then others may have the core
constexpr int kIdleSpins = 20000;  // about 250 us: the next run of a busy session comes before, and waking costs some 50

enum State : int { kIdle, kAsleep, kWork };

struct alignas(64) Worker {
  std::atomic<int> state{kIdle};
  std::mutex mutex;
  std::condition_variable wake;
  size_t part = 0;
};

struct Pool {
  std::mutex busy;
  std::vector<std::unique_ptr<Worker>> workers;
  void (*body)(void*, size_t) = nullptr;
  void* context = nullptr;
  alignas(64) std::atomic<size_t> unfinished{0};

  void serve(Worker& worker) {
    for (;;) {
      int spins = 0;
      while (worker.state.load(std::memory_order_acquire) != kWork) {
        if (++spins < kIdleSpins) {
          pause();
          continue;
        }
        int idle = kIdle;
        if (worker.state.compare_exchange_strong(idle, kAsleep)) {
          std::unique_lock<std::mutex> lock(worker.mutex);
          worker.wake.wait(lock, [&] { return worker.state.load() == kWork; });
        }
      }
      body(context, worker.part);
      worker.state.store(kIdle, std::memory_order_relaxed);
      unfinished.fetch_sub(1, std::memory_order_release);
    }
  }

  void grow(size_t count) {
    workers.reserve(count);
    while (workers.size() < count) {
      auto worker = std::make_unique<Worker>();
      worker->part = workers.size() + 1;
      Worker* raw = worker.get();
      std::thread([this, raw] { serve(*raw); }).detach();  // throws when the system has no thread left
      workers.push_back(std::move(worker));
    }
  }

  void run(size_t parts, void (*what)(void*, size_t), void* with) {
    body = what;
    context = with;
    unfinished.store(parts - 1, std::memory_order_relaxed);
    for (size_t i = 0; i + 1 < parts; ++i) {
      Worker& worker = *workers[i];
      if (worker.state.exchange(kWork) == kAsleep) {
        std::lock_guard<std::mutex> lock(worker.mutex);
        worker.wake.notify_one();
      }
    }
    what(with, 0);
    for (int spins = 0; unfinished.load(std::memory_order_acquire); ++spins) relax(spins);
  }
};

std::atomic<Pool*> g_pool{nullptr};

std::mutex g_mutex;

// The child of a fork has none of the threads: it forgets the pool (and leaks it, its locks may be held).
[[maybe_unused]] const int kRegistered = pthread_atfork([] { g_mutex.lock(); }, [] { g_mutex.unlock(); }, [] {
  g_mutex.unlock();
  g_pool.store(nullptr);
});

Pool& shared_pool() {
  Pool* pool = g_pool.load();
  if (!pool) {
    Pool* made = new Pool;  // never deleted: its threads may outlive static destruction
    if (g_pool.compare_exchange_strong(pool, made)) return *made;
    delete made;
  }
  return *pool;
}

}  // namespace

std::mutex& fork_safe_mutex() { return g_mutex; }

void relax(int spins) {
  if (spins < kSpins) pause();
  else sched_yield();
}

size_t default_threads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    const int count = CPU_COUNT(&set);
    if (count > 0) return static_cast<size_t>(count);
  }
  const unsigned count = std::thread::hardware_concurrency();
  return count ? count : 1;
}

PoolLease::PoolLease(size_t threads) {
  if (threads < 2) return;
  Pool& pool = shared_pool();
  if (!pool.busy.try_lock()) return;
  pool_ = &pool;
  try {
    pool.grow(threads - 1);
  } catch (const std::exception&) {
  }
  threads_ = pool.workers.size() + 1 < threads ? pool.workers.size() + 1 : threads;
}

PoolLease::~PoolLease() {
  if (pool_) static_cast<Pool*>(pool_)->busy.unlock();
}

void PoolLease::run(size_t parts, void (*body)(void*, size_t), void* context) const {
  if (parts < 2) {
    if (parts) body(context, 0);
    return;
  }
  static_cast<Pool*>(pool_)->run(parts, body, context);
}

}  // namespace nm
