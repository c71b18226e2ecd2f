// prepare ENGINE PICTURE…: writes what ztp-run would give a uint8 engine, raw, to stdout.
#include <iostream>

#include "images.h"

int main(int count, char** words) {
  const ztp::Session session(words[1]);
  for (int i = 2; i < count; ++i) {
    const std::vector<std::uint8_t> pixels = ztp::run::prepare(ztp::run::read_picture(words[i]), session.manifest());
    std::cout.write(reinterpret_cast<const char*>(pixels.data()), static_cast<std::streamsize>(pixels.size()));
  }
}
