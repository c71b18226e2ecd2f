/* Stands in for TensorRT's libraries so that their Python bindings load where no GPU and no TensorRT is.
 *
 * Built three times, under the three library names the bindings ask for. Every entry point they use is passed on to
 * TensorRT-RTX, which the test process has loaded before, and which is found by its own name. Both products check that
 * caller and library are of one version, so each call is given the version of the library it reaches.
 *
 * For tests only: nothing promises that the two products' C++ classes stay alike. Never ship what it builds.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static const char CORE[] = "libtensorrt_rtx.so.1";
static const char PARSER[] = "libtensorrt_onnxparser_rtx.so.1";

typedef int32_t Version(void);
typedef void *Getter(void);
typedef void *GetterFor(int32_t);
typedef void *MakerOfOne(void *, int32_t);
typedef void *MakerOfTwo(void *, void *, int32_t);

static void *entry(const char *library, const char *name) {
    void *handle = dlopen(library, RTLD_NOW);
    void *address = handle ? dlsym(handle, name) : NULL;
    if (address == NULL) {
        fprintf(stderr, "TensorRT test harness: %s in %s: %s\n", name, library, dlerror());
        exit(70);
    }
    return address;
}

int32_t getInferLibVersion(void) {
    return ((Version *)entry(CORE, "getInferLibVersion"))();
}

int32_t getNvOnnxParserVersion(void) {
    return ((Version *)entry(PARSER, "getNvOnnxParserVersion"))();
}

void *createInferBuilder_INTERNAL(void *logger, int32_t asked) {
    (void)asked;
    return ((MakerOfOne *)entry(CORE, "createInferBuilder_INTERNAL"))(logger, getInferLibVersion());
}

void *createInferRuntime_INTERNAL(void *logger, int32_t asked) {
    (void)asked;
    return ((MakerOfOne *)entry(CORE, "createInferRuntime_INTERNAL"))(logger, getInferLibVersion());
}

void *createInferRefitter_INTERNAL(void *engine, void *logger, int32_t asked) {
    (void)asked;
    return ((MakerOfTwo *)entry(CORE, "createInferRefitter_INTERNAL"))(engine, logger, getInferLibVersion());
}

void *getPluginRegistry(void) {
    return ((Getter *)entry(CORE, "getPluginRegistry"))();
}

void *getBuilderPluginRegistry(int32_t capability) {
    return ((GetterFor *)entry(CORE, "getBuilderPluginRegistry"))(capability);
}

void *createNvOnnxParser_INTERNAL(void *network, void *logger, int32_t asked) {
    (void)asked;
    return ((MakerOfTwo *)entry(PARSER, "createNvOnnxParser_INTERNAL"))(network, logger, getNvOnnxParserVersion());
}

void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int32_t asked) {
    (void)asked;
    return ((MakerOfTwo *)entry(PARSER, "createNvOnnxParserRefitter_INTERNAL"))(refitter, logger, getNvOnnxParserVersion());
}

int initLibNvInferPlugins(void *logger, const char *name_space) {
    (void)logger, (void)name_space;
    return 1;
}
