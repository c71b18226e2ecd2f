// devices ENGINE: opens an engine on CUDA device 1, then runs and closes it in threads whose current device is 0.
#include <cuda_runtime_api.h>
#include <ztp/session.h>

#include <iostream>
#include <memory>
#include <thread>

namespace {

int current() {
  int device = -1;
  cudaGetDevice(&device);
  return device;
}

}  // namespace

int main(int, char** words) {
  cudaSetDevice(1);
  auto session = std::make_unique<ztp::Session>(words[1]);
  std::cout << "opened on " << current();
  const std::vector<float> images(3 * session->manifest().size * session->manifest().size);
  std::thread([&] {
    session->run(images.data(), 1);
    std::cout << ", run on " << current();
  }).join();
  session->run(images.data(), 1);
  std::thread([&] {
    session.reset();
    std::cout << ", closed on " << current();
  }).join();
  std::cout << '\n';
}
