// The whole trainer but its main, for the tests of it.

#pragma once
#define TRAIN_MOE_NO_MAIN
#include "train_moe.c"
