/// Commands that a sentence names, for a shell.
#pragma once

#include <string>

namespace ztp {

/// A path as a shell takes it, in the form of Python's shlex.quote.
inline std::string quoted(const std::string& path) {
  constexpr const char* kPlain = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_@%+=:,./-";
  if (!path.empty() && path.find_first_not_of(kPlain) == std::string::npos) return path;
  std::string text = "'";
  for (const char letter : path) {
    if (letter == '\'') {
      text += "'\"'\"'";
    } else {
      text += letter;
    }
  }
  return text + "'";
}

}  // namespace ztp
