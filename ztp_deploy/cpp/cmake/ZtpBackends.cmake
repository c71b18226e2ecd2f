# Chooses the back ends: ZTP_WITH_<NAME> is AUTO (where found), ON (found or refused) or OFF.
include(ZtpFind)

set(ZTP_SUMMARY "")
set(ZTP_BACKENDS "")

macro(ztp_add_backend name)
  string(TOUPPER ${name} ztp_upper)
  set(ZTP_WITH_${ztp_upper} AUTO CACHE STRING "AUTO, ON or OFF")
  set_property(CACHE ZTP_WITH_${ztp_upper} PROPERTY STRINGS AUTO ON OFF)
  set(ztp_state "off")
  if(ZTP_WITH_${ztp_upper})
    cmake_language(CALL ztp_find_${name})
    if(TARGET ztp::${name})
      list(APPEND ZTP_BACKENDS ${name})
      set(ztp_state "yes")
      string(REPLACE tensorrt_rtx tensorrt ztp_source ${name})  # one source for both libraries
      target_sources(ztp_runtime PRIVATE src/backend_${ztp_source}.cpp)
      if(${ztp_source} STREQUAL "tensorrt")
        target_sources(ztp_runtime PRIVATE src/tensorrt_home.cpp)
      endif()
      target_compile_definitions(ztp_runtime PRIVATE ZTP_${ztp_upper})
      if(${name} STREQUAL "onnxruntime")
        # Headers only: a user of a static runtime links to nothing of it.
        target_link_libraries(ztp_runtime PRIVATE $<BUILD_INTERFACE:ztp::onnxruntime>)
      else()
        target_link_libraries(ztp_runtime PRIVATE ztp::${name})
      endif()
    elseif(ZTP_WITH_${ztp_upper} STREQUAL "AUTO")
      set(ztp_state "no (${ZTP_MISSING})")
    else()
      message(FATAL_ERROR "ZTP_WITH_${ztp_upper}=ON was asked for, but there is ${ZTP_MISSING}.")
    endif()
  endif()
  list(APPEND ZTP_SUMMARY "${name}: ${ztp_state}")
endmacro()

# libtorch's headers are C++20; the last -std on a command line holds.
set_source_files_properties(src/backend_aotinductor.cpp PROPERTIES COMPILE_OPTIONS -std=c++20)
