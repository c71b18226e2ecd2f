/// An engine folder, read and verified: nothing of it is opened before every recorded hash was found right.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "gpu.h"
#include "ztp/session.h"

namespace ztp {

/// Size and sha256 of one file a build wrote.
struct FileRecord {
  std::uintmax_t bytes = 0;
  std::string sha256;
};

/// A folder's manifest, and what of it concerns back ends alone.
struct EngineFolder {
  std::filesystem::path directory;
  Manifest manifest;
  std::string input;                 ///< name of the image input
  std::vector<std::string> outputs;  ///< logits, then kept_1, kept_2 …, then merged_1 … of methods that merge
  std::map<std::string, FileRecord> files;
  // Settings of back ends, as they were asked for; those of another back end keep their defaults.
  int threads = 0;  ///< 0: the library's own choice
  bool spin_between_runs = false;
  bool strip_plan = false;
  bool version_compatible = false;
  bool cuda_graph = false;  ///< read for a warning alone: runs are launched kernel by kernel
  std::string hardware_compatible = "none";
  std::string float_precision = "fp32";  ///< of an int8 engine, where it does not compute in int8
  Gpu home;                              ///< the GPU it was built on; without a name where it is not bound to one
  /// What the build decided, as the library's own names and texts.
  std::map<std::string, std::string> properties;
  /// Instruction sets that compiled code may use.
  std::vector<std::string> cpu_flags;

  /// Path of a file the back end opens; throws DamagedFiles unless the manifest vouches for it.
  std::filesystem::path file(const std::string& name) const;
};

/// Reads `manifest.json`, then checks size and sha256 of every file it names. Throws BadRequest and DamagedFiles.
EngineFolder open_folder(const std::string& directory);

/// A whole file; throws DamagedFiles where it cannot be read.
std::string read_file(const std::filesystem::path& path);

}  // namespace ztp
