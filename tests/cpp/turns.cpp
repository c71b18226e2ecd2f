// turns: what turns.h promises, counted in threads; each line says what was seen.
#include "turns.h"

#include <atomic>
#include <chrono>
#include <iostream>
#include <stdexcept>
#include <thread>
#include <vector>

using std::chrono::milliseconds;
using ztp::Turns;

namespace {

/// The most threads, of sixteen, that had a turn at once; every third of them leaves by an exception.
int most_at_once(Turns& turns) {
  std::atomic<int> inside{0};
  std::atomic<int> most{0};
  std::vector<std::thread> running;
  for (int i = 0; i < 16; ++i) {
    running.emplace_back([&, i] {
      for (int repeat = 0; repeat < 50; ++repeat) {
        try {
          const Turns::Turn turn(turns);
          const int seen = ++inside;
          for (int known = most; known < seen && !most.compare_exchange_weak(known, seen);) continue;
          std::this_thread::sleep_for(std::chrono::microseconds(200));
          --inside;
          if (i % 3 == 0) throw std::runtime_error("a run that failed");
        } catch (const std::runtime_error&) {
          continue;
        }
      }
    });
  }
  for (std::thread& thread : running) thread.join();
  return most;
}

/// The order in which threads that came one after the other had the only turn, and the one that gave it back last.
std::vector<int> order() {
  Turns turns(1);
  std::vector<int> had;  // guarded by the turn
  std::vector<std::thread> waiting;
  {
    const Turns::Turn turn(turns);
    for (int i = 0; i < 4; ++i) {
      std::atomic<bool> coming{false};
      waiting.emplace_back([&turns, &had, &coming, i] {
        coming = true;
        const Turns::Turn mine(turns);
        had.push_back(i);
      });
      while (!coming) std::this_thread::yield();
      std::this_thread::sleep_for(milliseconds(100));  // until it waits, which does not show
    }
  }
  {
    const Turns::Turn again(turns);
    had.push_back(9);
  }
  for (std::thread& thread : waiting) thread.join();
  return had;
}

}  // namespace

int main() {
  Turns turns(3);
  std::cout << "most: " << most_at_once(turns) << ", then " << most_at_once(turns) << "\norder:";
  for (const int one : order()) std::cout << ' ' << one;
  std::cout << '\n';
}
