/// Things that one thread may use at a time, lent to as many threads as ask: as many as Session lets run at once.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace ztp {

/// Makes a new T where all others are lent; what comes back is lent again.
template <class T>
class Pool {
 public:
  explicit Pool(std::function<std::unique_ptr<T>()> make) : make_(std::move(make)) {}

  /// Runs `use` with a T of its own. One whose use threw is not lent again.
  template <class Use>
  auto with(Use use) {
    std::unique_ptr<T> lent = take();
    auto result = use(*lent);
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(lent));
    return result;
  }

  /// Destroys all that are not lent.
  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.clear();
  }

 private:
  std::unique_ptr<T> take() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!idle_.empty()) {
        std::unique_ptr<T> last = std::move(idle_.back());
        idle_.pop_back();
        return last;
      }
    }
    return make_();
  }

  std::function<std::unique_ptr<T>()> make_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<T>> idle_;
};

}  // namespace ztp
