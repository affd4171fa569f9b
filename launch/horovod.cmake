# The toolchain file for building Horovod 0.28.1 with a current torch. CMake reads it before
# Horovod's project and, through CMAKE_PROJECT_INCLUDE, after it.
set(CMAKE_PROJECT_INCLUDE ${CMAKE_CURRENT_LIST_FILE})

# Horovod asks for C++14, but torch's headers need C++20.
set(CMAKE_CXX14_STANDARD_COMPILE_OPTION -std=c++20)

# The wheel must work in any environment. So these paths are relative to site-packages/horovod/torch:
# the environment's lib (the wheel of Open MPI), torch, and pip's NCCL.
set(CMAKE_BUILD_RPATH "\$ORIGIN/../../../..;\$ORIGIN/../../torch/lib;\$ORIGIN/../../nvidia/nccl/lib")

# Horovod builds its CUDA parts wherever torch is a CUDA build and finds a toolkit, with or without a
# GPU, and has no switch for it. A build for the CPU hides the toolkit and sets Horovod's condition
# to False, in the copy of its source that pip made.
if(NOT DEFINED ENV{HOROVOD_GPU_OPERATIONS})
    set(CMAKE_CUDA_COMPILER "")
    set(CMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit TRUE)
    set(aadl_module ${CMAKE_SOURCE_DIR}/cmake/Modules/FindPytorch.cmake)
    set(aadl_condition "(torch.version.cuda is not None) and (CUDA_HOME is not None)")
    if(EXISTS ${aadl_module})
        file(READ ${aadl_module} aadl_text)
        string(REPLACE "${aadl_condition}" "False" aadl_text "${aadl_text}")
        file(WRITE ${aadl_module} "${aadl_text}")
        if(NOT aadl_text MATCHES "if \\(False\\)")
            message(FATAL_ERROR "FindPytorch.cmake is not that of Horovod 0.28.1: adapt ${CMAKE_CURRENT_LIST_FILE}")
        endif()
    endif()
endif()
