# Finds the engine libraries, in pip packages too, as targets ztp::onnxruntime, ztp::openvino, ztp::tensorrt,
# ztp::tensorrt_rtx and ztp::aotinductor. Used when the runtime is built and, for a static one, when it is used.
#
# Each macro defines its target where everything was found, else sets ZTP_MISSING to what to do about it.

# A relative path on the command line is relative to where it was typed; typed like this, CMake makes it absolute.
if(DEFINED CACHE{Python3_EXECUTABLE})
  set(Python3_EXECUTABLE "" CACHE FILEPATH "Python whose packages are looked into")
endif()

# What a line of Python prints; empty where it fails.
function(ztp_python script result)
  find_package(Python3 QUIET COMPONENTS Interpreter)
  set(found "")
  if(Python3_Interpreter_FOUND)
    execute_process(COMMAND ${Python3_EXECUTABLE} -c "${script}" OUTPUT_VARIABLE found ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  endif()
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

# The folder of an installed Python package, found without importing it; empty where there is none.
macro(ztp_python_package name result)
  ztp_python("import importlib.util as u; s = u.find_spec('${name}'); print(list(s.submodule_search_locations)[0] if s else '')" ${result})
endmacro()

macro(ztp_find_openvino)
  if(NOT OpenVINO_DIR)
    ztp_python_package(openvino ztp_package)
    if(ztp_package)
      set(OpenVINO_DIR "${ztp_package}/cmake" CACHE PATH "Folder of OpenVINOConfig.cmake" FORCE)
    endif()
  endif()
  find_package(OpenVINO QUIET COMPONENTS Runtime)
  if(TARGET openvino::runtime AND NOT TARGET ztp::openvino)
    add_library(ztp::openvino INTERFACE IMPORTED)
    set_target_properties(ztp::openvino PROPERTIES INTERFACE_LINK_LIBRARIES openvino::runtime)
  endif()
  set(ZTP_MISSING "no OpenVINO: pip install openvino, or set OpenVINO_DIR")
endmacro()

# Headers only: the library is opened at run time, from ZTP_ONNXRUNTIME_LIBRARY or where the loader looks. Neither is
# cached, so that an ORT_ROOT given later still counts; both can be given.
macro(ztp_find_onnxruntime)
  ztp_python_package(onnxruntime ztp_package)
  ztp_python("import sys; print(sys.prefix)" ztp_prefix)
  set(ztp_roots ${ORT_ROOT} $ENV{ORT_ROOT})
  file(GLOB_RECURSE ztp_header ${ztp_prefix}/onnxruntime-headers/onnxruntime_c_api.h)  # where `make setup` puts it
  list(TRANSFORM ztp_header REPLACE "/[^/]*$" "")
  find_path(ONNXRUNTIME_INCLUDE onnxruntime_c_api.h NO_CACHE
    HINTS ${ztp_roots} ${ztp_header}
    PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session onnxruntime)
  set(ztp_library "")
  foreach(ztp_folder IN LISTS ztp_roots ztp_package)
    file(GLOB ztp_found ${ztp_folder}/lib/libonnxruntime.so.1 ${ztp_folder}/lib/libonnxruntime.so.1.*
      ${ztp_folder}/capi/libonnxruntime.so.1 ${ztp_folder}/capi/libonnxruntime.so.1.*)
    list(APPEND ztp_library ${ztp_found})
  endforeach()
  list(APPEND ztp_library libonnxruntime.so.1)
  list(GET ztp_library 0 ztp_library)
  if(ZTP_ONNXRUNTIME_LIBRARY)
    set(ztp_library "${ZTP_ONNXRUNTIME_LIBRARY}")
  endif()
  if(ONNXRUNTIME_INCLUDE AND NOT TARGET ztp::onnxruntime)
    add_library(ztp::onnxruntime INTERFACE IMPORTED)
    set_target_properties(ztp::onnxruntime PROPERTIES
      INTERFACE_INCLUDE_DIRECTORIES "${ONNXRUNTIME_INCLUDE}"
      INTERFACE_COMPILE_DEFINITIONS "ZTP_ONNXRUNTIME_LIBRARY=\"${ztp_library}\"")
  endif()
  set(ZTP_MISSING "no onnxruntime_c_api.h: unpack a release of ONNX Runtime and set ORT_ROOT")
endmacro()

macro(ztp_find_cudart)
  ztp_python_package(nvidia.cu13 ztp_cuda)
  find_path(CUDART_INCLUDE cuda_runtime_api.h
    HINTS ${CUDA_ROOT} ENV CUDA_ROOT ${ztp_was_CUDART_INCLUDE} /usr/local/cuda ${ztp_cuda} PATH_SUFFIXES include)
  find_library(CUDART_LIBRARY NAMES cudart libcudart.so.13 libcudart.so.12
    HINTS ${CUDA_ROOT} ENV CUDA_ROOT ${ztp_was_CUDART_LIBRARY} /usr/local/cuda ${ztp_cuda} PATH_SUFFIXES lib64 lib)
endmacro()

macro(ztp_add_tensorrt name include library)
  if(${include} AND ${library} AND CUDART_INCLUDE AND CUDART_LIBRARY AND NOT TARGET ztp::${name})
    add_library(ztp::${name} INTERFACE IMPORTED)
    set_target_properties(ztp::${name} PROPERTIES
      INTERFACE_INCLUDE_DIRECTORIES "${${include}};${CUDART_INCLUDE}"
      INTERFACE_LINK_LIBRARIES "${${library}};${CUDART_LIBRARY}")
  endif()
endmacro()

macro(ztp_find_tensorrt)
  ztp_find_cudart()
  ztp_python_package(tensorrt_libs ztp_package)
  find_path(TENSORRT_INCLUDE NvInfer.h
    HINTS ${TENSORRT_ROOT} ENV TENSORRT_ROOT ${ztp_was_TENSORRT_INCLUDE} PATH_SUFFIXES include)
  find_library(TENSORRT_LIBRARY NAMES nvinfer libnvinfer.so.11 libnvinfer.so.10
    HINTS ${TENSORRT_ROOT} ENV TENSORRT_ROOT ${ztp_was_TENSORRT_LIBRARY} ${ztp_package}
    PATH_SUFFIXES lib targets/x86_64-linux-gnu/lib .)
  ztp_add_tensorrt(tensorrt TENSORRT_INCLUDE TENSORRT_LIBRARY)
  set(ZTP_MISSING "no NvInfer.h, libnvinfer, cuda_runtime_api.h or libcudart: set TENSORRT_ROOT and CUDA_ROOT")
endmacro()

# Its headers have the names of TensorRT's, which may be the system's: only the given folder is looked into.
macro(ztp_find_tensorrt_rtx)
  ztp_find_cudart()
  ztp_python_package(tensorrt_rtx_libs ztp_package)
  find_path(TENSORRT_RTX_INCLUDE NvInfer.h
    HINTS ${TENSORRT_RTX_ROOT} ENV TENSORRT_RTX_ROOT ${ztp_was_TENSORRT_RTX_INCLUDE} PATH_SUFFIXES include NO_DEFAULT_PATH)
  find_library(TENSORRT_RTX_LIBRARY NAMES tensorrt_rtx libtensorrt_rtx.so.1
    HINTS ${TENSORRT_RTX_ROOT} ENV TENSORRT_RTX_ROOT ${ztp_was_TENSORRT_RTX_LIBRARY} ${ztp_package} PATH_SUFFIXES lib .)
  if(TARGET ztp::tensorrt)
    set(ZTP_MISSING "TensorRT in this build, whose functions have the same names: set ZTP_WITH_TENSORRT=OFF")
  else()
    ztp_add_tensorrt(tensorrt_rtx TENSORRT_RTX_INCLUDE TENSORRT_RTX_LIBRARY)
    set(ZTP_MISSING "no NvInfer.h of TensorRT-RTX, libtensorrt_rtx, cuda_runtime_api.h or libcudart: set TENSORRT_RTX_ROOT and CUDA_ROOT")
  endif()
endmacro()

# Torch's own CMake package insists on a CUDA compiler where torch has CUDA, so its files are named here.
macro(ztp_find_aotinductor)
  if(NOT TORCH_ROOT)
    ztp_python_package(torch ztp_package)
    if(ztp_package)
      set(TORCH_ROOT "${ztp_package}" CACHE PATH "libtorch, or the folder of the pip package torch")
    endif()
  endif()
  find_path(TORCH_INCLUDE torch/csrc/inductor/aoti_package/model_package_loader.h
    HINTS ${TORCH_ROOT} PATH_SUFFIXES include)
  find_library(TORCH_CPU_LIBRARY torch_cpu HINTS ${TORCH_ROOT} PATH_SUFFIXES lib)
  find_library(C10_LIBRARY c10 HINTS ${TORCH_ROOT} PATH_SUFFIXES lib)
  if(TORCH_INCLUDE AND TORCH_CPU_LIBRARY AND C10_LIBRARY AND NOT TARGET ztp::aotinductor)
    add_library(ztp::aotinductor INTERFACE IMPORTED)
    set_target_properties(ztp::aotinductor PROPERTIES
      INTERFACE_INCLUDE_DIRECTORIES "${TORCH_INCLUDE}"
      INTERFACE_LINK_LIBRARIES "${TORCH_CPU_LIBRARY};${C10_LIBRARY}")
  endif()
  set(ZTP_MISSING "no libtorch: pip install torch, or set TORCH_ROOT")
endmacro()
