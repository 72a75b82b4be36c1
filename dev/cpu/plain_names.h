// The names of dev/cpu/fast.h, choice.h and lstm.h mean the plain functions of train_moe.c again, for what is compiled after this
// #include. For the CUDA twin, which has functions of the same names, and for tests, which compare both. Gives and needs
// nothing else.
#undef matmul
#undef matmul_dx
#undef matmul_dw
#undef matmul_backward
#undef grouped_matmul
#undef grouped_matmul_dx
#undef grouped_matmul_dw
#undef begin_products
#undef end_products
#undef softmax
#undef scores_forward
#undef select_topk
#undef rmsnorm_forward
#undef rmsnorm_backward
#undef attention_forward
#undef attention_backward
#undef activation_forward
#undef activation_backward
#undef sum_of_squares
#undef lstm_recur
#undef lstm_recur_backward
