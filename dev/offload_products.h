// Grouped products of experts that are in a file (--offload): group by group, while the next group is on its way.
// Gives: under their own names the grouped products of train_moe.c, which from here on look whether their experts are in a file;
// plan_experts, experts_at_a_time.
// Needs: dev/offload.h; chapters 1 and 2 of train_moe.c, which includes it behind dev/lora.h.
//
// The plan of a layer says which experts have rows. Those that are in memory come first, then the others; an expert without rows
// is not fetched. Of the N experts that may be in memory, one half is multiplied by, while the system reads the other half
// (with N = 1 each has to wait). When the last group's turn has come, the first one of the next product is on its way: that of
// w_out after w_in, and on the way back from the weights of w_out to the gradients of w_out, to those of w_in, and to the
// weights of w_in.
//
// Each expert's product is what it is without --offload, by the same function, so its bits are the same.
#pragma once
#include "offload.h"

enum { PRODUCT, PRODUCT_DX, PRODUCT_DW };

// The arguments of a grouped product of any of the three kinds. a and b are what is read by rows: x, or dout, or for the gradient
// of weights first dout and then x. result (rows,..) is NULL for the gradient, which goes into the experts' numbers.
typedef struct GroupedProduct {
    int kind;
    Pool *pool;
    real *result;
    const real *a, *b;
    const int *a_token, *b_token;
    const int *offset, *I, *O;
} GroupedProduct;

// The pool whose experts are needed after this product; NULL: it is not looked up.
Pool *next_pool(const GroupedProduct *g) {
    const Pool *p = g->pool;
    const Model *m = p->owner;
    int is_in = !strcmp(m->tensors[p->tensor].kind, "w_in");
    if (g->kind == PRODUCT) {
        return is_in ? find_pool(m, WEIGHTS, p->tensor + 1) : NULL; // w_out is the row behind w_in
    }
    if (g->kind == PRODUCT_DX) {
        return is_in ? NULL : find_pool(m, GRADS, p->tensor);
    }
    return is_in ? find_pool(m, WEIGHTS, p->tensor) : find_pool(m, GRADS, p->tensor - 1);
}

// Lists the experts that have rows, those that are in memory first. Returns how many they are.
int plan_experts(const Pool *p, const int *offset, int *plan) {
    int count = 0;
    for (int held = 1; held >= 0; held--) {
        for (int e = 0; e < p->E; e++) {
            if (offset[e + 1] > offset[e] && is_held(p, e) == held) {
                plan[count++] = e;
            }
        }
    }
    return count;
}

// The experts of a group: half of those that may be in memory.
int experts_at_a_time(const Pool *p) {
    return max_int(1, p->most / 2);
}

// Takes in those at from .. from+each of the plan.
void take_in_group(Pool *p, const int *plan, int count, int from) {
    for (int i = from; i < min_int(count, from + experts_at_a_time(p)); i++) {
        take_in(p, plan[i]);
    }
}

// Takes in the first experts of the product that comes next.
void look_ahead(const GroupedProduct *g) {
    Pool *next = next_pool(g);
    if (next) {
        int *plan = (int *)allocate(next->E, sizeof(int));
        take_in_group(next, plan, plan_experts(next, g->offset, plan), 0);
        free(plan);
    }
}

// The product of expert e, whose first row is at number at_in of rows that are I wide, and at number at_out of rows that are O
// wide, where these are sorted.
void product_of_expert(const GroupedProduct *g, int e, size_t at_in, size_t at_out) {
    real *w = g->pool->base + g->pool->from[e];
    if (g->kind == PRODUCT) {
        grouped_matmul(g->result + at_out, g->a + (g->a_token ? 0 : at_in), g->a_token, w, g->offset + e, 1, g->I + e, g->O + e);
    } else if (g->kind == PRODUCT_DX) {
        grouped_matmul_dx(g->result + at_in, g->a + (g->a_token ? 0 : at_out), g->a_token, w, g->offset + e, 1, g->I + e, g->O + e);
    } else {
        grouped_matmul_dw(w, g->a + (g->a_token ? 0 : at_out), g->a_token, g->b + (g->b_token ? 0 : at_in), g->b_token,
                          g->offset + e, 1, g->I + e, g->O + e);
    }
}

void product_of_offloaded(const GroupedProduct *g) {
    Pool *p = g->pool;
    int *plan = (int *)allocate(p->E, sizeof(int));
    int count = plan_experts(p, g->offset, plan);
    int each = experts_at_a_time(p);
    size_t *at_in = (size_t *)allocate(2 * (size_t)p->E, sizeof(size_t));
    size_t *at_out = at_in + p->E;
    for (int e = 1; e < p->E; e++) {
        size_t rows = (size_t)(g->offset[e] - g->offset[e - 1]);
        at_in[e] = at_in[e - 1] + rows * (size_t)g->I[e - 1];
        at_out[e] = at_out[e - 1] + rows * (size_t)g->O[e - 1];
    }
    offloaded.asked += count;
    take_in_group(p, plan, count, 0);
    for (int from = 0; from < count; from += each) {
        // The next group sets out. Where only one expert may be in memory, it has to wait.
        if (p->most > 1) {
            take_in_group(p, plan, count, from + each);
        } else if (from > 0) {
            take_in_group(p, plan, count, from);
        }
        if (from + each >= count) {
            look_ahead(g);
        }
        begin_products();
        for (int i = from; i < min_int(count, from + each); i++) {
            product_of_expert(g, plan[i], at_in[plan[i]], at_out[plan[i]]);
        }
        end_products();
    }
    free(plan);
    free(at_in);
}

// ---- the products, with the arguments of those of train_moe.c

void offloaded_grouped_matmul(real *out, const real *x, const int *token, const real *w, const int *offset, int E, const int *I,
                              const int *O) {
    GroupedProduct g = {PRODUCT, pool_of(w), out, x, NULL, token, NULL, offset, I, O};
    if (g.pool) {
        product_of_offloaded(&g);
    } else {
        grouped_matmul(out, x, token, w, offset, E, I, O);
    }
}

void offloaded_grouped_matmul_dx(real *dx, const real *dout, const int *token, const real *w, const int *offset, int E,
                                 const int *I, const int *O) {
    GroupedProduct g = {PRODUCT_DX, pool_of(w), dx, dout, NULL, token, NULL, offset, I, O};
    if (g.pool) {
        product_of_offloaded(&g);
    } else {
        grouped_matmul_dx(dx, dout, token, w, offset, E, I, O);
    }
}

void offloaded_grouped_matmul_dw(real *dw, const real *dout, const int *dout_token, const real *x, const int *x_token,
                                 const int *offset, int E, const int *I, const int *O) {
    GroupedProduct g = {PRODUCT_DW, pool_of(dw), NULL, dout, x, dout_token, x_token, offset, I, O};
    if (g.pool) {
        product_of_offloaded(&g);
    } else {
        grouped_matmul_dw(dw, dout, dout_token, x, x_token, offset, E, I, O);
    }
}

// While experts are in a file, each product is done when it is asked for, since later its experts may be gone.
void offloaded_begin_products(void) {
    if (!offloaded.pool_count) {
        begin_products();
    }
}

void offloaded_end_products(void) {
    if (!offloaded.pool_count) {
        end_products();
    }
}

#undef grouped_matmul
#undef grouped_matmul_dx
#undef grouped_matmul_dw
#undef begin_products
#undef end_products
#define grouped_matmul    offloaded_grouped_matmul
#define grouped_matmul_dx offloaded_grouped_matmul_dx
#define grouped_matmul_dw offloaded_grouped_matmul_dw
#define begin_products    offloaded_begin_products
#define end_products      offloaded_end_products
