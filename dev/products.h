// Products that may be done in any order, because none of them needs another one's result.
// Gives: begin_products, end_products. Needs: nothing.
//
// Each product ends with a wait of all threads for the slowest one. The fast functions of dev/cpu/matmul.h do all products
// between the two calls together, when the second one comes, so that the threads wait only once. Until then no result may
// be read, no operand changed or freed, and no two products may write one array. Pairs may be nested: the outermost counts.
// The lesson's plain loops do one product after the other, and need nothing of the kind.
#pragma once

void begin_products(void) {
}

void end_products(void) {
}
