// The slow functions of the lesson's chapter 2 once more, near the processor's limit, under the same names.
// Gives: fast_matmul for matmul, and so on for each name below. Needs: chapters 1 and 2 of train_moe.c, which
// includes it.
//
// Names: from here on a call of matmul() means fast_matmul(), which has the same arguments and computes the
// same, except for the last digits of sums, which are added in another order. The plain functions are still
// there: test_moe.c undefines these names, to hold both against each other in one program. With -DPLAIN this
// file is not included, and the plain functions train the model.
#pragma once
#include "matmul.h"    // products of matrices, and grouped ones of experts
#include "bf16.h"      // products of rounded numbers
#include "attention.h" // attention in tiles
#include "rows.h"      // softmax, RMSNorm, activation, sum of squares

#define matmul              fast_matmul
#define matmul_dx           fast_matmul_dx
#define matmul_dw           fast_matmul_dw
#define matmul_backward     fast_matmul_backward
#define grouped_matmul      fast_grouped_matmul
#define grouped_matmul_dx   fast_grouped_matmul_dx
#define grouped_matmul_dw   fast_grouped_matmul_dw
#define begin_products      fast_begin_products
#define end_products        fast_end_products
#define softmax             fast_softmax
#define rmsnorm_forward     fast_rmsnorm_forward
#define rmsnorm_backward    fast_rmsnorm_backward
#define attention_forward   fast_attention_forward
#define attention_backward  fast_attention_backward
#define activation_forward  fast_activation_forward
#define activation_backward fast_activation_backward
#define sum_of_squares      fast_sum_of_squares
