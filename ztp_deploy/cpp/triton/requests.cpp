#include "requests.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <vector>

#include "answer.h"
#include "tensors.h"

namespace ztp::triton {
namespace {

std::uint64_t now() {
  using std::chrono::nanoseconds;
  const auto since_start = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<std::uint64_t>(std::chrono::duration_cast<nanoseconds>(since_start).count());
}

/// A piece of a request's images, in Triton's memory.
struct Piece {
  const void* data;
  std::size_t bytes;
};

/// One request on its way to an answer.
struct Asked {
  TRITONBACKEND_Request* request = nullptr;
  TRITONBACKEND_Response* response = nullptr;  ///< null once it was sent
  std::size_t images = 0;
  std::vector<Piece> pieces;
  bool answered = false;
};

/// Sends the response, or the error in its place.
void send(Asked& asked, TRITONSERVER_Error* error) noexcept {
  asked.answered = error == nullptr;
  if (TRITONSERVER_Error* failed =
          TRITONBACKEND_ResponseSend(asked.response, TRITONSERVER_RESPONSE_COMPLETE_FINAL, error)) {
    log(TRITONSERVER_LOG_ERROR, std::string("An answer could not be sent: ") + TRITONSERVER_ErrorMessage(failed));
    TRITONSERVER_ErrorDelete(failed);
  }
  TRITONSERVER_ErrorDelete(error);
  asked.response = nullptr;
}

/// Does `work`; where it throws, that is the request's answer.
template <class Work>
void on_behalf_of(Asked& asked, Work work) noexcept {
  if (TRITONSERVER_Error* error = answer(work)) send(asked, error);
}

void read_images(Asked& asked, const Manifest& manifest) {
  TRITONBACKEND_Input* input = nullptr;
  require(TRITONBACKEND_RequestInput(asked.request, kInput, &input));
  TRITONSERVER_DataType type{};
  const std::int64_t* shape = nullptr;
  std::uint32_t dims = 0;
  std::uint64_t bytes = 0;
  std::uint32_t pieces = 0;
  require(TRITONBACKEND_InputProperties(input, nullptr, &type, &shape, &dims, &bytes, &pieces));
  const auto side = static_cast<std::int64_t>(manifest.size);
  const bool images = dims == 4 && shape[0] > 0 && shape[1] == 3 && shape[2] == side && shape[3] == side;
  if (type != pixel_type(manifest) || !images) {
    throw BadRequest("This engine takes " + manifest.dtype + " images [B, 3, " + std::to_string(side) + ", " +
                         std::to_string(side) + "]; got something else.",
                     "Ask the server for the model's metadata.");
  }
  asked.images = static_cast<std::size_t>(shape[0]);
  if (bytes != asked.images * image_bytes(manifest)) {
    throw BadRequest(std::to_string(asked.images) + " images are " +
                         std::to_string(asked.images * image_bytes(manifest)) + " bytes; got " + std::to_string(bytes) +
                         ".",
                     "Check how the client packs them.");
  }
  for (std::uint32_t i = 0; i < pieces; ++i) {
    TRITONSERVER_MemoryType memory = TRITONSERVER_MEMORY_CPU;
    std::int64_t device = 0;
    Piece piece{nullptr, 0};
    std::uint64_t length = 0;
    require(TRITONBACKEND_InputBuffer(input, i, &piece.data, &length, &memory, &device));
    if (memory == TRITONSERVER_MEMORY_GPU) {
      throw BadRequest("The images are in GPU memory, which this back end does not read.",
                       "Send them in the request or in system shared memory.");
    }
    piece.bytes = length;
    asked.pieces.push_back(piece);
  }
}

/// The images of some requests on end; no copy is made where they lie so already.
class Images {
 public:
  explicit Images(const std::vector<Asked*>& part) {
    const Asked& first = *part.front();
    const bool alone = part.size() == 1 && first.pieces.size() == 1;
    if (alone && reinterpret_cast<std::uintptr_t>(first.pieces[0].data) % alignof(float) == 0) {
      data_ = first.pieces[0].data;
      return;
    }
    std::size_t bytes = 0;
    for (const Asked* asked : part) {
      for (const Piece& piece : asked->pieces) bytes += piece.bytes;
    }
    copied_.resize(bytes);
    std::uint8_t* end = copied_.data();
    for (const Asked* asked : part) {
      for (const Piece& piece : asked->pieces) {
        std::memcpy(end, piece.data, piece.bytes);
        end += piece.bytes;
      }
    }
    data_ = copied_.data();
  }

  const void* data() const noexcept { return data_; }

 private:
  std::vector<std::uint8_t> copied_;
  const void* data_ = nullptr;
};

Outputs run_together(const Model& model, const std::vector<Asked*>& part) {
  std::size_t batch = 0;
  for (const Asked* asked : part) batch += asked->images;
  return run(model.session(), Images(part).data(), batch);
}

/// Copies what a request wants to see of a run, whose rows from `first` on are its own.
void write_outputs(const Asked& asked, const std::vector<Rows>& rows, std::size_t first) {
  std::uint32_t count = 0;
  require(TRITONBACKEND_RequestOutputCount(asked.request, &count));
  for (std::uint32_t i = 0; i < count; ++i) {
    const char* name = nullptr;
    require(TRITONBACKEND_RequestOutputName(asked.request, i, &name));
    const auto found = std::find_if(rows.begin(), rows.end(), [&](const Rows& known) { return known.name == name; });
    if (found == rows.end()) throw BadRequest("This engine has no output " + std::string(name) + ".");
    const std::int64_t shape[] = {static_cast<std::int64_t>(asked.images), static_cast<std::int64_t>(found->columns)};
    TRITONBACKEND_Output* output = nullptr;
    require(TRITONBACKEND_ResponseOutput(asked.response, &output, name, found->type, shape, 2));
    const std::size_t row = found->columns * kValueBytes;
    TRITONSERVER_MemoryType memory = TRITONSERVER_MEMORY_CPU;
    std::int64_t device = 0;
    void* place = nullptr;
    require(TRITONBACKEND_OutputBuffer(output, &place, asked.images * row, &memory, &device));
    if (memory == TRITONSERVER_MEMORY_GPU) {
      throw BadRequest("Outputs are asked for in GPU memory, which this back end does not write.",
                       "Ask for them in the answer or in system shared memory.");
    }
    std::memcpy(place, static_cast<const std::uint8_t*>(found->data) + first * row, asked.images * row);
  }
}

void answer_from(const Outputs& outputs, const std::vector<Asked*>& part) noexcept {
  std::size_t first = 0;
  for (Asked* asked : part) {
    on_behalf_of(*asked, [&] {
      write_outputs(*asked, rows_of(outputs), first);
      send(*asked, nullptr);
    });
    first += asked->images;
  }
}

/// Runs some requests as one batch; where it is refused, each of them alone.
void run_and_answer(const Model& model, const std::vector<Asked*>& part) noexcept {
  TRITONSERVER_Error* refused = answer([&] { answer_from(run_together(model, part), part); });
  if (refused == nullptr) return;
  if (part.size() == 1) return send(*part.front(), refused);
  TRITONSERVER_ErrorDelete(refused);
  for (Asked* asked : part) {
    on_behalf_of(*asked, [&] { answer_from(run_together(model, {asked}), {asked}); });
  }
}

}  // namespace

void answer_requests(const Model& model, TRITONBACKEND_ModelInstance* instance, TRITONBACKEND_Request** requests,
                     std::uint32_t count) noexcept {
  const std::uint64_t began = now();
  std::vector<Asked> all(count);
  std::vector<Asked*> whole;  // those whose images could be read
  for (std::uint32_t i = 0; i < count; ++i) {
    Asked& asked = all[i];
    asked.request = requests[i];
    if (TRITONSERVER_Error* error = TRITONBACKEND_ResponseNew(&asked.response, asked.request)) {
      log(TRITONSERVER_LOG_ERROR, std::string("No answer could be begun: ") + TRITONSERVER_ErrorMessage(error));
      TRITONSERVER_ErrorDelete(error);
      continue;
    }
    on_behalf_of(asked, [&] { read_images(asked, model.session().manifest()); });
    if (asked.response != nullptr) whole.push_back(&asked);
  }
  const std::uint64_t started = now();
  if (!whole.empty()) run_and_answer(model, whole);
  const std::uint64_t finished = now();
  std::size_t images = 0;
  for (Asked& asked : all) {
    images += asked.answered ? asked.images : 0;
    TRITONSERVER_ErrorDelete(TRITONBACKEND_ModelInstanceReportStatistics(instance, asked.request, asked.answered, began,
                                                                         started, finished, now()));
    TRITONSERVER_ErrorDelete(TRITONBACKEND_RequestRelease(asked.request, TRITONSERVER_REQUEST_RELEASE_ALL));
  }
  if (images > 0) {
    TRITONSERVER_ErrorDelete(
        TRITONBACKEND_ModelInstanceReportBatchStatistics(instance, images, began, started, finished, now()));
  }
}

}  // namespace ztp::triton
