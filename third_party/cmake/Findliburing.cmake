# Finds liburing as a static library: liburing::liburing, liburing_LIBRARY, liburing_VERSION (where pkg-config tells).
#
# 2.2 is the first with io_uring_register_buffers_sparse, by which this module knows it: the headers of those versions
# do not state their number. CMAKE_DISABLE_FIND_PACKAGE_liburing=ON builds without.
find_path(liburing_INCLUDE_DIR liburing.h)
find_library(liburing_LIBRARY NAMES liburing.a)
mark_as_advanced(liburing_INCLUDE_DIR liburing_LIBRARY)

if(liburing_INCLUDE_DIR)
  file(STRINGS ${liburing_INCLUDE_DIR}/liburing.h liburing_RECENT REGEX "io_uring_register_buffers_sparse\\(")
endif()
find_package(PkgConfig QUIET)
if(PkgConfig_FOUND)
  pkg_get_variable(liburing_VERSION liburing version)
  if(NOT liburing_VERSION)
    pkg_check_modules(liburing_pc QUIET liburing)
    set(liburing_VERSION ${liburing_pc_VERSION})
  endif()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(liburing
  REQUIRED_VARS liburing_LIBRARY liburing_INCLUDE_DIR liburing_RECENT
  VERSION_VAR liburing_VERSION)

if(liburing_FOUND AND NOT TARGET liburing::liburing)
  add_library(liburing::liburing STATIC IMPORTED)
  set_target_properties(liburing::liburing PROPERTIES
    IMPORTED_LOCATION ${liburing_LIBRARY}
    INTERFACE_INCLUDE_DIRECTORIES ${liburing_INCLUDE_DIR})
endif()
