// Products that may be done in any order, because none of them needs another one's result.
// Gives: begin_products, end_products. Needs: nothing.
//
// Each product ends with a wait of all threads for the slowest one. dev/cpu/matmul.h has functions of the same names that
// do all products between the two calls together, so that the threads wait only once. The lesson's plain loops do one
// product after the other, and need nothing of the kind.
#pragma once

void begin_products(void) {
}

void end_products(void) {
}
