// The mixers of dev/mixers on a GPU, one a file, and which kernels belong to which of them.
// Gives: kernels_of(mixer). Needs: train_moe.cu, which includes it behind what these files need.
//
// A mixer that has no kernels trains on the CPU. To give it some, write a file here, and add its #include and its name below.
#ifndef CUDA_MIXERS_CUH
#define CUDA_MIXERS_CUH
#include "mixer.cuh"

#include "attention_experts.cuh"
#include "switchhead.cuh"
#include "moa.cuh"
#include "lstm.cuh"

const MixerKernels *const all_mixer_kernels[] = {
    &switchhead_kernels,
    &moa_kernels,
    &lstm_kernels,
};

const MixerKernels *kernels_of(const ::Mixer *mixer) {
    for (const MixerKernels *k : all_mixer_kernels) {
        if (k->of == mixer) {
            return k;
        }
    }
    return NULL;
}

#endif
