# TensorRT plugins on top of the kernels. The top-level CMakeLists.txt includes this behind its targets.
#
# stiv_add_plugin_library(<target> <folder with NvInferRuntime.h> <kernels: objects or a library>)
set(STIV_PLUGIN_FOLDER ${CMAKE_CURRENT_LIST_DIR})
set(STIV_PLUGIN_SOURCES
  ${STIV_PLUGIN_FOLDER}/attention_plugin.cpp
  ${STIV_PLUGIN_FOLDER}/plugin_attributes.cpp
  ${STIV_PLUGIN_FOLDER}/plugin_library.cpp
  ${STIV_PLUGIN_FOLDER}/plugin_log.cpp
  ${STIV_PLUGIN_FOLDER}/plugin_shapes.cpp
  ${STIV_PLUGIN_FOLDER}/spatial_qkv_plugin.cpp
  ${STIV_PLUGIN_FOLDER}/temporal_attention_plugin.cpp)

function(stiv_add_plugin_library target headers kernels)
  add_library(${target} SHARED ${STIV_PLUGIN_SOURCES})
  # SYSTEM: warnings are about our own code.
  target_include_directories(${target} SYSTEM PRIVATE ${headers} ${CUDAToolkit_INCLUDE_DIRS})
  target_compile_options(${target} PRIVATE -O2 -Wall -Wextra)
  target_link_libraries(${target} PRIVATE ${kernels})
  # Everything the library needs is in it or named: a symbol of TensorRT that is not would only show when it is loaded.
  target_link_options(${target} PRIVATE -Wl,--exclude-libs,ALL -Wl,-z,defs)
  set_target_properties(${target} PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
endfunction()

if(NOT TARGET stiv_kernel_objects)
  return()
endif()

find_package(TensorRT-Enterprise CONFIG QUIET HINTS ${TENSORRT_ROOT})
find_path(TENSORRT_INCLUDE NvInferRuntime.h
  HINTS ${TENSORRT_ROOT}/include ${TENSORRT_ROOT} ${TensorRT-Enterprise_DIR}/../../../include
  PATH_SUFFIXES x86_64-linux-gnu aarch64-linux-gnu)
if(NOT TENSORRT_INCLUDE)
  message(NOTICE "TensorRT's headers were not found: the plugin library is not built, the kernels are. "
    "For the plugins give -DTENSORRT_ROOT=<folder with include/NvInferRuntime.h>.")
  return()
endif()

stiv_add_plugin_library(stiv_plugins ${TENSORRT_INCLUDE} CUDA::cudart_static)
target_sources(stiv_plugins PRIVATE $<TARGET_OBJECTS:stiv_kernel_objects>)
set_target_properties(stiv_plugins PROPERTIES LINKER_LANGUAGE CXX)
install(TARGETS stiv_plugins LIBRARY DESTINATION ${STIV_LIBRARY_FOLDER})

# Walks the built library through everything TensorRT asks of it; `enqueue` needs a GPU. Not installed:
#   cmake --build build/plugins --target stiv_plugin_harness
#   build/plugins/stiv_plugin_harness runtime/plugins/_lib/libstiv_plugins.so enqueue
file(GLOB STIV_HARNESS_SOURCES CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/cpp/harness/*.cpp)
if(STIV_HARNESS_SOURCES)
  add_executable(stiv_plugin_harness EXCLUDE_FROM_ALL ${STIV_HARNESS_SOURCES})
  target_include_directories(stiv_plugin_harness SYSTEM PRIVATE ${TENSORRT_INCLUDE} ${CUDAToolkit_INCLUDE_DIRS})
  target_compile_definitions(stiv_plugin_harness PRIVATE STIV_HARNESS_CUDA)
  target_link_libraries(stiv_plugin_harness PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS})
endif()
