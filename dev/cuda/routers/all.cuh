// The routers of dev/routers on a GPU, one paper a file, and which kernels belong to which of them.
// Gives: kernels_of. Needs: train_moe.cu, which includes it behind what these files need.
//
// A router that has no kernels (quantile) trains on the CPU. To give it some, write a file here, and add its
// #include and its name below.
#ifndef CUDA_ROUTERS_CUH
#define CUDA_ROUTERS_CUH
#include "pieces.cuh"

#include "balanced.cuh"
#include "capacity.cuh"
#include "expert_choice.cuh"
#include "groups.cuh"
#include "gshard.cuh"
#include "hash.cuh"
#include "hierarchical.cuh"
#include "history.cuh"
#include "importance.cuh"
#include "jitter.cuh"
#include "mixed.cuh"
#include "multirouter.cuh"
#include "noisy.cuh"
#include "recurrent.cuh"
#include "subtokens.cuh"
#include "threshold.cuh"

const Kernels *const all_kernels[] = {
    &jitter_kernels,        &recurrent_kernels,     &subtokens_kernels,         &noisy_kernels,
    &noisy_load_kernels,    &hierarchical_kernels,  &hierarchical_load_kernels, &history_matrix_kernels,
    &groups_kernels,        &multirouter_kernels,   &multirouter_loss_kernels,  &history_kernels,
    &threshold_kernels,     &expert_choice_kernels, &balanced_kernels,          &hash_kernels,
    &topk_kernels,          &gshard_kernels,        &gshard_loss_kernels,       &group_loss_kernels,
    &communication_kernels, &mixed_kernels,         &sparsity_kernels,          &importance_kernels,
    &capacity_kernels,
};

// The kernels of a part; NULL: it has none.
const Kernels *kernels_of(const ::Router *r) {
    for (const Kernels *k : all_kernels) {
        if (k->of == r) {
            return k;
        }
    }
    return NULL;
}

#endif
