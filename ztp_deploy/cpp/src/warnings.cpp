#include "warnings.h"

#include <optional>
#include <system_error>

#include "json.h"
#include "shell.h"

namespace ztp {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

/// The release in a version: without what builds and Python's wheels add (`+cu132`, `.post1`, `-22982-e213a`).
std::string release(const std::string& version) {
  const std::string digits = version.substr(0, version.find_first_not_of("0123456789."));
  return digits.substr(0, digits.find_last_not_of('.') + 1);
}

/// Where the parity check of this very manifest failed, as " between … and …"; nothing unless it did.
std::optional<std::string> failed_check(const EngineFolder& folder) {
  const fs::path path = folder.directory / "evidence" / "parity.json";
  std::error_code ignored;
  if (!fs::is_regular_file(path, ignored)) return std::nullopt;
  try {
    const json report = parse_json(read_file(path));
    if (report.at("passed").get<bool>() || report.at("manifest_sha256") != folder.manifest.sha256) return std::nullopt;
    std::optional<std::string> where;
    for (const json& edge : report.at("edges").get_ref<const json::array_t&>()) {
      if (edge.at("faults").empty()) continue;
      const auto reference = edge.at("reference").get<std::string>();
      const auto candidate = edge.at("candidate").get<std::string>();
      if (!where) where = " between " + reference + " and " + candidate;
    }
    return where.value_or("");
  } catch (const std::exception&) {  // not evidence: a report that cannot be read says nothing
    return std::nullopt;
  }
}

}  // namespace

std::vector<Warning> warnings_of(const EngineFolder& folder, const std::string& version) {
  const Manifest& manifest = folder.manifest;
  const std::string directory = folder.directory.string();
  const std::string engine = " --engine " + quoted(directory) + "`";
  std::vector<Warning> warnings;
  if (!version.empty() && release(version) != release(manifest.backend_version)) {
    warnings.push_back({Warning::Kind::version, directory + " was built and checked with " + manifest.backend + " " +
                                                    manifest.backend_version + "; this is " + version +
                                                    ". Run `ztp selftest" + engine + "."});
  }
  if (const std::optional<std::string> failed = failed_check(folder)) {
    warnings.push_back({Warning::Kind::parity, directory + " (" + manifest.precision +
                                                   ") failed its last parity check" + *failed +
                                                   ": do not rely on its answers. Run `ztp check" + engine +
                                                   ", and build it again."});
  }
  if (folder.cuda_graph) {
    warnings.push_back({Warning::Kind::cuda_graph,
                        directory + " was built with cuda_graph; this runtime launches kernel by kernel, with the same "
                                    "results. Serve it from Python where that time counts."});
  }
  return warnings;
}

}  // namespace ztp
