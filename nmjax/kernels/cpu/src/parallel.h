// Loops over XLA's own thread pool, and memory that a thread keeps for its next call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <thread>

namespace nmjax {

enum class Outcome : int { kGood, kIndexOutOfRange, kOutOfMemory, kTooLarge };

using Task = std::function<Outcome(int64_t)>;

// Runs task(0) ... task(tasks - 1) in any order; the worst of their outcomes.
using ParallelFor = std::function<Outcome(int64_t tasks, const Task& task)>;

inline Outcome run(const Task& task, int64_t i) {
  try {
    return task(i);
  } catch (const std::bad_alloc&) {
    return Outcome::kOutOfMemory;
  }
}

inline Outcome one_by_one(int64_t tasks, const Task& task) {
  Outcome worst = Outcome::kGood;
  for (int64_t i = 0; i < tasks; ++i) worst = std::max(worst, run(task, i));
  return worst;
}

inline const ParallelFor kOneByOne = one_by_one;

// The caller works too and waits only for tasks that others have begun, so that a pool whose
// threads are all busy, perhaps with callers of this very function, cannot dead-lock.
template <typename Pool>
Outcome parallel_for(Pool& pool, int64_t threads, int64_t tasks, const Task& task) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<int> worst{0};
    int64_t tasks;
    const Task* task;  // alive until all tasks are done

    void work() {
      for (int64_t i; (i = next.fetch_add(1)) < tasks;) {
        const int outcome = static_cast<int>(run(*task, i));
        if (outcome) worst.store(outcome, std::memory_order_relaxed);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  const auto shared = std::make_shared<Shared>();
  shared->tasks = tasks;
  shared->task = &task;
  const int64_t helpers = std::min(threads, tasks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->work(); });
  shared->work();
  while (shared->done.load(std::memory_order_acquire) < tasks) std::this_thread::yield();
  return static_cast<Outcome>(shared->worst.load());
}

// Aligned memory, kept and grown; its content is not.
class Scratch {
 public:
  template <typename T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return static_cast<T*>(data_);
  }
  ~Scratch() { std::free(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace nmjax
