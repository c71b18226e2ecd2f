#include "folder.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <system_error>

#include "json.h"
#include "sha256.h"
#include "shell.h"

namespace ztp {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr const char* kManifest = "manifest.json";
constexpr const char* kSchema = "ztp.engine/2";
constexpr std::size_t kChunk = std::size_t{1} << 20U;
// Far above any engine's, and so low that the bytes of a batch, three channels of float32, are countable.
constexpr std::size_t kLargestBatch = std::size_t{1} << 16U;
constexpr std::size_t kLargestSide = std::size_t{1} << 14U;
constexpr int kMostThreads = 1024;

/// What is wrong with a manifest is said in the words of the Python side.
[[noreturn]] void refuse(const fs::path& path, const std::string& where, const std::string& what) {
  throw DamagedFiles(path.string() + " is not a valid engine manifest: " + where + ": " + what + ".",
                     "Run `ztp engine …` again.");
}

/// Reads fields of a manifest by dotted paths.
class Fields {
 public:
  Fields(const json& root, fs::path path) : root_(root), path_(std::move(path)) {}

  [[noreturn]] void invalid(const std::string& where, const std::string& what) const { refuse(path_, where, what); }

  const json& at(const std::string& where) const {
    const json* found = &root_;
    std::istringstream keys(where);
    for (std::string key; std::getline(keys, key, '.');) {
      if (!found->is_object()) invalid(where, "Input should be an object");
      const auto entry = found->find(key);
      if (entry == found->end()) invalid(where, "Field required");
      found = &*entry;
    }
    return *found;
  }

  std::string text(const std::string& where) const {
    const json& value = at(where);
    if (!value.is_string()) invalid(where, "Input should be a valid string");
    return value.get<std::string>();
  }

  /// A whole number from 1 to `most`.
  std::size_t count(const std::string& where, std::size_t most) const {
    const json& value = at(where);
    if (!value.is_number_integer()) invalid(where, "Input should be a valid integer");
    const std::size_t found = value.is_number_unsigned() ? value.get<std::size_t>() : 0;  // else it is negative
    if (found < 1) invalid(where, "Input should be greater than or equal to 1");
    if (found > most) invalid(where, "Input should be less than or equal to " + std::to_string(most));
    return found;
  }

  BatchRange batch() const {
    const BatchRange span{count("batch.min", kLargestBatch), count("batch.opt", kLargestBatch),
                          count("batch.max", kLargestBatch)};
    if (span.min > span.opt || span.opt > span.max) invalid("batch", "Input should be min ≤ opt ≤ max");
    return span;
  }

  double number(const std::string& where) const {
    const json& value = at(where);
    if (!value.is_number()) invalid(where, "Input should be a valid number");
    return value.get<double>();
  }

  std::array<float, 3> channels(const std::string& where) const {
    const json& value = at(where);
    const auto numeric = [](const json& entry) { return entry.is_number(); };
    if (!value.is_array() || value.size() != 3 || !std::all_of(value.begin(), value.end(), numeric)) {
      invalid(where, "Input should be three numbers");
    }
    return value.get<std::array<float, 3>>();
  }

  std::vector<std::string> texts(const std::string& where) const {
    const json& value = at(where);
    const auto textual = [](const json& entry) { return entry.is_string(); };
    if (!value.is_array() || !std::all_of(value.begin(), value.end(), textual)) {
      invalid(where, "Input should be a list of strings");
    }
    return value.get<std::vector<std::string>>();
  }

 private:
  const json& root_;
  fs::path path_;
};

json parse(const std::string& text, const fs::path& path) {
  try {
    json root = parse_json(text);
    if (!root.is_object()) refuse(path, "the file", "Input should be an object");
    return root;
  } catch (const JsonError& error) {
    refuse(path, "the file", error.what());
  }
}

void check_schema(const Fields& fields, const fs::path& path) {
  const std::string schema = fields.text("schema");
  if (schema == kSchema) return;
  if (schema.rfind("ztp.artifact/", 0) == 0) {
    const std::string folder = path.parent_path().string();
    throw BadRequest(folder + " is an exported artifact, no engine.",
                     "Build one from it: `ztp build --artifact " + quoted(folder) + "`.");
  }
  if (schema.rfind("ztp.engine/", 0) != 0) fields.invalid("schema", std::string("Input should be '") + kSchema + "'");
  throw DamagedFiles(path.string() + " was made by another version of ztp_deploy: its schema is " + schema + ", not " +
                         kSchema + ".",
                     "Make it again: `ztp engine …`.");
}

/// The seal, the sha256 of the file with an empty seal, shows an edit made after it was written; it is not a signature.
void check_seal(std::string text, const Fields& fields, const fs::path& path) {
  const std::string seal = fields.text("seal");
  const std::string stated = "\"seal\": \"" + seal + "\"";
  const std::size_t at = text.find(stated);
  const bool once = at != std::string::npos && text.find(stated, at + 1) == std::string::npos;
  if (once) text.replace(at, stated.size(), R"("seal": "")");
  if (!once || sha256_of_text(text) != seal) {
    throw DamagedFiles(path.string() + " was edited after it was written: its seal does not match.",
                       "Run `ztp engine …` again with what you want to change.");
  }
}

Manifest read_public(const Fields& fields) {
  Manifest manifest;
  manifest.model = fields.text("source.name");
  manifest.precision = fields.text("precision");
  manifest.backend = fields.text("backend");
  manifest.backend_version = fields.text("backend_version");
  manifest.device = fields.text("device");
  manifest.provider = fields.text("provider");
  manifest.batch = fields.batch();
  manifest.dtype = fields.text("input.dtype");
  if (manifest.dtype != "float32" && manifest.dtype != "uint8") {
    fields.invalid("input.dtype", "Input should be 'float32' or 'uint8'");
  }
  manifest.size = fields.count("input.size", kLargestSide);
  manifest.patches = fields.count("plan.patch_tokens", kLargestSide * kLargestSide);
  manifest.random_weights = fields.text("source.weights.kind") == "random";
  manifest.preprocessing.mean = fields.channels("source.preprocessing.mean");
  manifest.preprocessing.std = fields.channels("source.preprocessing.std");
  manifest.preprocessing.crop_pct = fields.number("source.preprocessing.crop_pct");
  manifest.preprocessing.interpolation = fields.text("source.preprocessing.interpolation");
  manifest.preprocessing.crop_mode = fields.text("source.preprocessing.crop_mode");
  if (!fields.at("source.labels").is_null()) manifest.labels = fields.texts("source.labels");
  return manifest;
}

std::map<std::string, FileRecord> read_files(const Fields& fields) {
  const json& listed = fields.at("files");
  if (!listed.is_object()) fields.invalid("files", "Input should be an object");
  std::map<std::string, FileRecord> files;
  for (const auto& [name, record] : listed.items()) {
    // File names hold dots, which Fields reads as levels.
    const auto bytes = record.is_object() ? record.find("bytes") : record.end();
    const auto sha256 = record.is_object() ? record.find("sha256") : record.end();
    const bool whole =
        bytes != record.end() && bytes->is_number_unsigned() && sha256 != record.end() && sha256->is_string();
    if (!whole) fields.invalid("files." + name, "Input should have bytes and sha256");
    files[name] = {bytes->get<std::uintmax_t>(), sha256->get<std::string>()};
  }
  return files;
}

void read_settings(const json& root, const Fields& fields, EngineFolder& folder) {
  const json settings = root.value("settings", json::object());
  const json built = root.value("built", json::object());
  try {
    const json threads = settings.value("threads", json(0));
    if (!threads.is_number_integer() || threads < 0 || threads > kMostThreads) {
      fields.invalid("settings.threads", "Input should be a whole number from 0 to " + std::to_string(kMostThreads));
    }
    folder.threads = threads.get<int>();
    folder.spin_between_runs = settings.value("spin_between_runs", false);
    folder.strip_plan = settings.value("strip_plan", false);
    folder.version_compatible = settings.value("version_compatible", false);
    folder.cuda_graph = settings.value("cuda_graph", false);
    folder.hardware_compatible = settings.value("hardware_compatible", "none");
    folder.float_precision = settings.value("float_precision", "fp32");
    folder.properties = built.value("properties", std::map<std::string, std::string>());
    folder.cpu_flags = built.value("cpu_flags", std::vector<std::string>());
    if (const auto gpu = built.find("gpu"); gpu != built.end()) {
      folder.home = {gpu->at("name").get<std::string>(), gpu->at("compute_capability").get<std::string>()};
    }
  } catch (const json::exception&) {
    fields.invalid("settings or built", "A value is missing or has another type than its back end reads");
  }
}

std::string hash_of(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw DamagedFiles(path.string() + " cannot be read.", "Check its permissions.");
  Sha256 hash;
  std::vector<char> chunk(kChunk);
  while (stream) {
    stream.read(chunk.data(), static_cast<std::streamsize>(chunk.size()));
    hash.update(chunk.data(), static_cast<std::size_t>(stream.gcount()));
  }
  return hash.hex();
}

void verify_file(const fs::path& directory, const std::string& name, const FileRecord& record) {
  if (name.find_first_of("/\\") != std::string::npos || name == "." || name == "..") {
    throw DamagedFiles((directory / kManifest).string() + " names '" + name + "', outside its folder.",
                       "Load only what you built.");
  }
  const fs::path path = directory / name;
  std::error_code ignored;
  if (!fs::is_regular_file(path, ignored)) throw DamagedFiles(path.string() + " is missing.", "Build it again.");
  const std::uintmax_t size = fs::file_size(path, ignored);
  if (size != record.bytes) {
    throw DamagedFiles(path.string() + " has " + std::to_string(size) + " bytes, the manifest says " +
                           std::to_string(record.bytes) + ".",
                       "Build it again.");
  }
  if (hash_of(path) != record.sha256) {
    throw DamagedFiles(path.string() + " is not what was built: its sha256 differs from the manifest's.",
                       "Build it again, and load only what you built.");
  }
}

/// The path as Python shows it in messages. Its `..` stay: after a symbolic link they lead elsewhere than the text says.
fs::path tidy(const std::string& directory) {
  fs::path path;
  for (const fs::path& part : fs::path(directory)) {
    if (!part.empty() && part != ".") path /= part;
  }
  return path.empty() ? fs::path(".") : path;
}

}  // namespace

fs::path EngineFolder::file(const std::string& name) const {
  if (files.count(name) == 0) {
    throw DamagedFiles((directory / kManifest).string() + " does not list " + name + ", which " + manifest.backend +
                           " engines consist of.",
                       "Build it again.");
  }
  return directory / name;
}

EngineFolder open_folder(const std::string& directory) {
  EngineFolder folder;
  folder.directory = tidy(directory);
  const fs::path path = folder.directory / kManifest;
  std::error_code ignored;
  if (!fs::is_regular_file(path, ignored)) {
    const bool exists = fs::exists(folder.directory, ignored);
    throw BadRequest(folder.directory.string() + " is not an engine folder: it " +
                         (exists ? std::string("has no ") + kManifest : std::string("does not exist")) + ".",
                     "Make one with `ztp engine …`.");
  }
  const std::string text = read_file(path);
  const json root = parse(text, path);
  const Fields fields(root, path);
  check_schema(fields, path);
  folder.manifest = read_public(fields);
  folder.manifest.sha256 = sha256_of_text(text);
  folder.input = fields.text("input.name");
  folder.outputs = fields.texts("outputs");
  if (folder.outputs.empty() || folder.outputs.front() != "logits") {
    fields.invalid("outputs", "The first should be 'logits'");
  }
  folder.manifest.stages =
      static_cast<std::size_t>(std::count_if(folder.outputs.begin(), folder.outputs.end(),
                                             [](const std::string& name) { return name.rfind("kept_", 0) == 0; }));
  const std::size_t tokens = folder.outputs.size() - 1;
  if (tokens != folder.manifest.stages && tokens != 2 * folder.manifest.stages) {
    fields.invalid("outputs", "After the logits, every stage should have one kept_, and one merged_ or none");
  }
  folder.files = read_files(fields);
  read_settings(root, fields, folder);
  check_seal(text, fields, path);
  for (const auto& [name, record] : folder.files) verify_file(folder.directory, name, record);
  return folder;
}

std::string read_file(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary | std::ios::ate);
  std::string text(stream ? static_cast<std::size_t>(stream.tellg()) : 0, '\0');
  stream.seekg(0).read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!stream) throw DamagedFiles(path.string() + " cannot be read.", "Check its permissions.");
  return text;
}

}  // namespace ztp
