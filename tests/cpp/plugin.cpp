// plugin LIBRARY ENGINE…: opens each engine in a plug-in, this file compiled with PLUGIN, that is unloaded in between.
#ifdef PLUGIN

#include <ztp/session.h>

#include <iostream>

extern "C" __attribute__((visibility("default"))) void open_engine(const char* engine) {
  try {
    const ztp::Session session(engine);
  } catch (const ztp::Error& error) {
    std::cerr << error.problem() << '\n';
  }
}

#else

#include <dlfcn.h>

#include <cstdio>

extern "C" int fake_contexts();

int main(int count, char** words) {
  fake_contexts();  // the stand-in for TensorRT is the program's own and stays
  for (int i = 2; i < count; ++i) {
    void* library = dlopen(words[1], RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
    reinterpret_cast<void (*)(const char*)>(dlsym(library, "open_engine"))(words[i]);
    dlclose(library);
  }
}

#endif
