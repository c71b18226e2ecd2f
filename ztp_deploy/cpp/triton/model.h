/// A model in Triton's repository: an engine folder that was verified, opened and proved on this machine.
#pragma once

#include "triton/core/tritonbackend.h"
#include "ztp/session.h"

namespace ztp::triton {

/// One version of a model; its instances share the session.
class Model {
 public:
  /// Opens the engine folder `<repository>/<version>`, runs it once, repeats the run that was recorded with it, and
  /// completes Triton's configuration. What the session warns of is in the server's log. Throws what Session throws, and TritonError.
  explicit Model(TRITONBACKEND_Model* model);

  const Session& session() const noexcept { return session_; }

  /// Throws BadRequest where Triton puts an instance on another GPU than the one the engine was opened on.
  void check_place(TRITONBACKEND_ModelInstance* instance) const;

 private:
  Session session_;
};

}  // namespace ztp::triton
