// embedded ENGINE FILE BATCH LIMIT [THREADS]: as a program with a log of its own, which lets LIMIT runs of .f32 images be
// under way at once. Prints what it is warned of, what libraries say and what each of three runs came to; then how many
// runs of THREADS threads, of twenty each, differed, and how many contexts a stand-in for TensorRT has made.
#include <ztp/session.h>

#include <atomic>
#include <fstream>
#include <iostream>
#include <iterator>
#include <mutex>
#include <thread>

extern "C" int fake_contexts() __attribute__((weak));

namespace {

std::mutex printing;

void print(const std::string& line) {
  const std::lock_guard<std::mutex> lock(printing);
  std::cout << line << std::endl;
}

std::vector<float> read(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  const auto* begin = reinterpret_cast<const float*>(bytes.data());
  return {begin, begin + bytes.size() / sizeof(float)};
}

const char* name(ztp::Warning::Kind kind) {
  switch (kind) {
    case ztp::Warning::Kind::version:
      return "version";
    case ztp::Warning::Kind::parity:
      return "parity";
    case ztp::Warning::Kind::cuda_graph:
      return "cuda_graph";
  }
  return "another";
}

std::string told(const ztp::Session& session, const std::vector<float>& images, std::size_t batch) {
  try {
    return "ran: " + std::to_string(session.run(images.data(), batch).batch);
  } catch (const ztp::Error& error) {
    return "refused: " + error.problem();
  }
}

}  // namespace

int main(int count, char** words) {
  ztp::set_log([](ztp::Severity severity, const std::string& message) {
    print((severity == ztp::Severity::error ? "error: " : "warning: ") + message);
    throw 1;  // which must not reach the library
  });
  ztp::Options options;
  options.concurrent_runs = std::stoul(words[4]);
  const ztp::Session session(words[1], options);
  for (const ztp::Warning& warning : session.warnings()) print(std::string(name(warning.kind)) + ": " + warning.text);
  const std::vector<float> images = read(words[2]);
  const std::size_t batch = std::stoul(words[3]);
  for (int i = 0; i < 3; ++i) print(told(session, images, batch));
  ztp::set_log({});
  if (count < 6) {
    told(session, images, batch);
    return 0;
  }
  const ztp::Outputs alone = session.run(images.data(), batch);
  std::atomic<int> different{0};
  std::vector<std::thread> running;
  for (std::size_t i = 0; i < std::stoul(words[5]); ++i) {
    running.emplace_back([&] {
      for (int repeat = 0; repeat < 20; ++repeat) {
        const ztp::Outputs found = session.run(images.data(), batch);
        different += found.logits != alone.logits || found.kept != alone.kept;
      }
    });
  }
  for (std::thread& thread : running) thread.join();
  print("different: " + std::to_string(different));
  if (fake_contexts != nullptr) print("contexts: " + std::to_string(fake_contexts()));
}
