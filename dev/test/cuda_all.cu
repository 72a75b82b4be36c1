// All tests of the CUDA twin on one device in one program, since compiling the twin is slow. The models come first: their
// first two tests fork, which a process that has used a GPU cannot.

#define main main_of_cuda_model
#include "dev/test/cuda_model.cu"
#undef main
#define main main_of_cuda_layers
#include "dev/test/cuda_layers.cu"
#undef main
#define main main_of_cuda_routers
#include "dev/test/cuda_routers.cu"
#undef main
#define main main_of_cuda_offload
#include "dev/test/cuda_offload.cu"
#undef main

int main(void) {
    int failed = main_of_cuda_model() != 0;
    failed += main_of_cuda_layers() != 0;
    failed += main_of_cuda_routers() != 0;
    failed += main_of_cuda_offload() != 0;
    return failed;
}
