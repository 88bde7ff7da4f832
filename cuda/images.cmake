# The kernels: each file of kernels/ becomes an image of cubins and PTX, which is data in the library. Only nvcc is
# needed of the toolkit; without it the library has no kernels, and says so when one is asked for.
#
# The library's own folder includes this: it adds the sources `cuda_sources`.
find_program(NARROWGAUGE_NVCC nvcc PATHS /usr/local/cuda/bin
  DOC "CUDA's compiler, 12.8 or later; OFF: build no kernels")
option(NARROWGAUGE_PTX_ONLY "Build kernels as PTX only, for a quick turn in development" OFF)

# No contraction, as on the CPU: fused multiply-adds are written where they are meant. Constant functions that both
# sides need are called as they are.
set(include_folders ${PROJECT_SOURCE_DIR}/cpp/src ${PROJECT_SOURCE_DIR}/cuda)
set(nvcc_options -std=c++20 -O3 -fmad=false --expt-relaxed-constexpr)
list(TRANSFORM include_folders PREPEND -I OUTPUT_VARIABLE folders)
list(APPEND nvcc_options ${folders})
set(cubins 80 90 100 120)
set(ptx 80)

set(NARROWGAUGE_CUDA_ARCHITECTURES "")
if(NARROWGAUGE_NVCC)
  execute_process(COMMAND ${NARROWGAUGE_NVCC} --list-gpu-code OUTPUT_VARIABLE known RESULT_VARIABLE failed ERROR_QUIET)
  if(failed OR NOT known MATCHES "sm_120")
    message(WARNING "${NARROWGAUGE_NVCC} does not know sm_120, expected CUDA 12.8 or later: no kernels are built")
    set(NARROWGAUGE_NVCC OFF)
  endif()
endif()
if(NARROWGAUGE_NVCC)
  if(NARROWGAUGE_PTX_ONLY)
    set(cubins "")
  endif()
  list(TRANSFORM cubins PREPEND sm_ OUTPUT_VARIABLE names)
  list(JOIN names " " names)
  string(STRIP "${names} compute_${ptx}" NARROWGAUGE_CUDA_ARCHITECTURES)
endif()

# What a kernel's source includes of ours, found by reading it. nvcc's own list would be a file that ninja reads from
# CMakeFiles/, which pip's isolated builds clear: they would make every image again.
function(find_included file)
  file(STRINGS ${file} lines REGEX "^#include \"")
  list(TRANSFORM lines REPLACE "^#include \"(.*)\".*" "\\1")
  foreach(header IN LISTS lines)
    unset(found)
    find_file(found ${header} PATHS ${include_folders} NO_DEFAULT_PATH NO_CACHE REQUIRED)
    if(NOT found IN_LIST included)
      list(APPEND included ${found})
      find_included(${found})
    endif()
  endforeach()
  set(included ${included} PARENT_SCOPE)
endfunction()

# A source that has the image of kernels/NAME.cu as narrowgauge's images::NAME, or an empty one.
#
# NAME.lines.ptx tells the simulated GPU the lines of the .cu. They are half of it: NAME.ptx, which ships, is without.
function(add_image name)
  set(out ${CMAKE_CURRENT_BINARY_DIR}/images/${name})
  set(source ${PROJECT_SOURCE_DIR}/cuda/kernels/${name}.cu)
  set(parts "")
  set(IMAGE_PTX "")
  set(IMAGE_CUBINS "")
  if(NARROWGAUGE_NVCC)
    set(included "")
    find_included(${source})
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${source} ${included})
    add_custom_command(OUTPUT ${out}.lines.ptx
      COMMAND ${NARROWGAUGE_NVCC} ${nvcc_options} -lineinfo -ptx -arch=compute_${ptx} -o ${out}.lines.ptx ${source}
      DEPENDS ${source} ${included} VERBATIM COMMENT "Compiling ${name} to PTX")
    set(shipped ${out}.lines.ptx)
    if(cubins)
      set(shipped ${out}.ptx)
      add_custom_command(OUTPUT ${out}.ptx
        COMMAND sed -e "/^.\\.section.\\.debug/,$d" -e "/^.\\.loc./d" -e "/^.\\.file./d" ${out}.lines.ptx > ${out}.ptx
        DEPENDS ${out}.lines.ptx VERBATIM)
      # The kernels use nothing newer than that PTX, so all code is made from it: the compiler's first half runs once.
      # Two of the second halves at a time.
      list(TRANSFORM cubins PREPEND sm_ OUTPUT_VARIABLE codes)
      list(JOIN codes "," codes)
      add_custom_command(OUTPUT ${out}.fatbin
        COMMAND ${NARROWGAUGE_NVCC} --threads 2 --compress-mode=size -fatbin
                -gencode=arch=compute_${ptx},code=[${codes}] -o ${out}.fatbin ${out}.ptx
        DEPENDS ${out}.ptx VERBATIM COMMENT "Assembling ${name}")
      list(APPEND parts ${out}.fatbin)
      set(IMAGE_CUBINS ".incbin \"${out}.fatbin\"")
    endif()
    list(APPEND parts ${shipped})
    set(IMAGE_PTX ".incbin \"${shipped}\"")
  endif()
  set(IMAGE_NAME ${name})
  configure_file(${PROJECT_SOURCE_DIR}/cuda/driver/image.cpp.in ${out}.cpp @ONLY)
  set_source_files_properties(${out}.cpp PROPERTIES OBJECT_DEPENDS "${parts}")
  set(cuda_sources ${cuda_sources} ${out}.cpp PARENT_SCOPE)
endfunction()

file(GLOB cuda_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/cuda/driver/*.cpp
     ${PROJECT_SOURCE_DIR}/cuda/kernels/*.cpp)
file(GLOB images CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/cuda/kernels/*.cu)
foreach(image IN LISTS images)
  get_filename_component(image ${image} NAME_WE)
  add_image(${image})
endforeach()
