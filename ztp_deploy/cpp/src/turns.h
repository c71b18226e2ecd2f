/// How many may do something at once; whoever comes later waits, and first come is first served.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>

namespace ztp {

class Turns {
 public:
  explicit Turns(std::size_t most) : free_(most) {}

  /// A turn, waited for and given back with its scope, however that is left.
  class Turn {
   public:
    explicit Turn(Turns& turns) : turns_(turns) { turns_.begin(); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() { turns_.end(); }

   private:
    Turns& turns_;
  };

 private:
  struct Waiting {
    std::condition_variable called;
    bool turn = false;
  };

  void begin() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (free_ > 0) {  // then nobody waits: who ends hands over to the first that does
      --free_;
      return;
    }
    Waiting mine;
    waiting_.push_back(&mine);
    mine.called.wait(lock, [&] { return mine.turn; });
  }

  void end() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (waiting_.empty()) {
      ++free_;
      return;
    }
    Waiting* const first = waiting_.front();
    waiting_.pop_front();
    first->turn = true;
    first->called.notify_one();  // under the lock: once it is free, what was waiting may be gone
  }

  std::mutex mutex_;
  std::size_t free_;
  std::deque<Waiting*> waiting_;
};

}  // namespace ztp
