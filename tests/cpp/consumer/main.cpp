// consumer ENGINE FILE BATCH [THREADS]: runs raw images (.f32 or .u8) and prints what came out as JSON.
// With THREADS, that many threads first run one image each, again and again, and must get what a lone run gave.
#include <ztp/session.h>

#include <atomic>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <thread>

namespace {

template <class T>
std::vector<T> read(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  const T* begin = reinterpret_cast<const T*>(bytes.data());
  return {begin, begin + bytes.size() / sizeof(T)};
}

template <class T>
std::size_t runs_that_differ(const ztp::Session& session, const std::vector<T>& images, std::size_t threads) {
  const std::size_t image = 3 * session.manifest().size * session.manifest().size;
  std::vector<ztp::Outputs> alone;
  for (std::size_t i = 0; i < threads; ++i) alone.push_back(session.run(images.data() + i * image, 1));
  std::atomic<std::size_t> different{0};
  std::vector<std::thread> running;
  for (std::size_t i = 0; i < threads; ++i) {
    running.emplace_back([&, i] {
      for (int repeat = 0; repeat < 20; ++repeat) {
        const ztp::Outputs found = session.run(images.data() + i * image, 1);
        different +=
            found.logits != alone[i].logits || found.kept != alone[i].kept || found.assignment != alone[i].assignment;
      }
    });
  }
  for (std::thread& thread : running) thread.join();
  return different;
}

template <class T>
void print(const char* name, const std::vector<T>& values) {
  std::cout << name << '[';
  for (std::size_t i = 0; i < values.size(); ++i) std::cout << (i == 0 ? "" : ", ") << values[i];
  std::cout << ']';
}

void print(const char* name, const std::vector<std::vector<std::int32_t>>& stages) {
  std::cout << name << '[';
  for (std::size_t i = 0; i < stages.size(); ++i) print(i == 0 ? "" : ", ", stages[i]);
  std::cout << ']';
}

template <class T>
void run(const ztp::Session& session, const std::string& file, std::size_t batch, std::size_t threads) {
  const std::vector<T> images = read<T>(file);
  const std::size_t different = threads == 0 ? 0 : runs_that_differ(session, images, threads);
  const ztp::Outputs outputs = session.run(images.data(), batch);
  std::cout.precision(9);
  std::cout << "{\"model\": \"" << session.manifest().model << "\", \"classes\": " << outputs.classes
            << ", \"different\": " << different << ", \"warnings\": " << session.warnings().size();
  print(", \"logits\": ", outputs.logits);
  print(", \"kept\": ", outputs.kept);
  print(", \"assignment\": ", outputs.assignment);
  std::cout << "}\n";
}

}  // namespace

int main(int count, char** words) {
  if (count < 4) return 64;
  const std::string file = words[2];
  try {
    ztp::Session opened(words[1]);
    const ztp::Session session = std::move(opened);
    const std::size_t batch = std::stoul(words[3]);
    const std::size_t threads = count > 4 ? std::stoul(words[4]) : 0;
    if (file.substr(file.rfind('.')) == ".u8") {
      run<std::uint8_t>(session, file, batch, threads);
    } else {
      run<float>(session, file, batch, threads);
    }
    return 0;
  } catch (const ztp::Error& error) {
    std::cerr << error.problem() << '\n' << error.fix() << '\n';
    return error.exit_code();
  }
}
