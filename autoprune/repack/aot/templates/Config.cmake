# A model that autoprune built: find_package(@NAME@ CONFIG REQUIRED), then link @NAME@::@NAME@.
if(NOT TARGET @NAME@::@NAME@)
  add_library(@NAME@::@NAME@ INTERFACE IMPORTED)
  set_target_properties(@NAME@::@NAME@ PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${CMAKE_CURRENT_LIST_DIR}"
    INTERFACE_LINK_LIBRARIES "${CMAKE_CURRENT_LIST_DIR}/@NAME@.o")
endif()
