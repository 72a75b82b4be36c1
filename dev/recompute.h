// With --recompute a layer's activations are not kept: the backward pass works them out once more.
// Gives: recompute_layer. Needs: the layers of train_moe.c, which includes it. Only a layer's input and its routes, with --moe-sigmoid also what it feeds forward, are kept
// for each layer; all layers share the memory of the other activations (dev/activations.h).
#ifndef RECOMPUTE_H
#define RECOMPUTE_H

// The activations of layer l once more, from a->x and from the route as it was.
void recompute_layer(Model *m, int l) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layer[l];
    LayerActs *a = &m->acts.layer[l];
    int N = m->batch.B * m->batch.T, E = m->experts.E;
    m->again = 1; // a mixer's own choices, too, stay as they were
    mix_forward(m, l);
    m->again = 0;
    if (w->dense_in) {
        int hidden = dense_width(c, l) * (1 + is_gated(dense_activation(c, l)));
        matmul(a->dense_hidden, a->h2, w->dense_in, N, c->dim, hidden, SET);
    }
    if (is_moe(c, l) && ranks.ep == 1) { // several processes keep their experts' products
        const real *x = c->subtokens > 1 ? subtokens_of(m, l) : a->h2;
        grouped_matmul(a->hidden, x, a->route.token, w->w_in, a->route.offset, E, m->experts.in, m->experts.hidden);
    }
}

#endif
