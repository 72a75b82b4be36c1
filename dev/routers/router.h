// What a router is to the rest of the program: a struct of functions, of which the lesson has one, topk_router.
// Gives: Router, run_parts. Needs: Model, Tensor, Option, Effect and Recipe of train_moe.c, which includes it.
#ifndef ROUTER_H
#define ROUTER_H

// A router, or a part of one; each stands in a file of dev/routers with its paper. A function is NULL where a part has nothing
// to do.
enum {
    INPUT,    // changes what the router reads, and calls the next INPUT or the CHOICE
    CHOICE,   // chooses the experts: each model has one such part
    DECLINE,  // declines some choices by chance
    LOSS,     // adds a balance loss
    CAPACITY, // limits what an expert takes, in another way than drop_overflow()
    ELSEWHERE // has its own line in train_moe.c (--subtokens), or is called by another part
};
typedef struct Router {
    int place;                                 // one of the above
    int (*wanted)(const Config *c);            // do the options ask for it?
    const char *(*refuses)(const Config *c);   // why it cannot do what the options ask for; NULL: it can
    int (*outputs)(const Config *c);           // CHOICE: rows of the router's matrix, if they are not E
    int (*choices)(const Config *c);           // CHOICE: most experts of a token, if they are not K
    void (*tensors)(const Config *c, int l, Tensor *list, int *count); // adds its own weights of layer l, -1: of all
    // Changes the first values w of tensor i, if they are not to be random numbers.
    void (*init)(const Model *m, int i, real *w, const double *frequency);
    void (*allocate)(Model *m, int l, int n);  // its own activations, for n tokens
    void (*forward)(Model *m, int l, const real *x);
    void (*backward)(Model *m, int l, real *dx, real *dweight, const real *x);
    void (*update)(Model *m, int l);           // after a step: what changes without a gradient
    const Option *options;
    int option_count;
    const Effect *effects;                     // what its options need to have an effect
    int effect_count;
    const Recipe *recipes;
    int recipe_count;
} Router;

// Runs the parts that work at this place; returns how many there are.
int run_parts(Model *m, int l, const real *x, int place) {
    int count = 0;
    for (int i = 0; m->parts[i]; i++) {
        if (m->parts[i]->place == place) {
            m->parts[i]->forward(m, l, x);
            count++;
        }
    }
    return count;
}

#endif
