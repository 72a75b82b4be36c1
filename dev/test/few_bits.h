// A model in memory whose feed-forward matrices are in blocks, as one that was read from a file.
// Gives: put_in_blocks. Needs: train_moe.c.
#pragma once

// A model like `from` with its feed-forward matrices in blocks; `from` gets the numbers that these stand for.
Model *put_in_blocks(Model *from, int scheme) {
    Config c = from->config;
    c.blocks = scheme;
    Model *m = model_allocate(&c, from->max_tokens, 0, NULL);
    m->purpose = FOR_WEIGHTS;
    for (int i = 0; i < m->tensor_count; i++) {
        const Tensor *t = &m->tensors[i];
        real *numbers = from->memory[WEIGHTS] + from->tensors[i].offset;
        if (!is_in_blocks(&c, t)) {
            memcpy(m->memory[WEIGHTS] + t->offset, numbers, t->size * sizeof(real));
            continue;
        }
        Blocks *b = (Blocks *)own(m, 1, sizeof(Blocks));
        b->count = t->of_experts ? c.experts : 1;
        b->matrix = (BlockMatrix *)own(m, (size_t)b->count, sizeof(BlockMatrix));
        for (int e = 0; e < b->count; e++) {
            int format = scheme == ALL_Q4_0 || (scheme == MIXED && e % 2) ? FORMAT_Q4_0 : FORMAT_Q8_0, cols = t->shape[2];
            unsigned char *to = (unsigned char *)own(m, (size_t)t->shape[1] * packed_bytes(format, cols), 1);
            unsigned char *row = (unsigned char *)allocate(encoded_bytes(format, (size_t)cols), 1);
            b->matrix[e].format = format;
            b->matrix[e].rows = to;
            for (int r = 0; r < t->shape[1]; r++, numbers += cols, to += packed_bytes(format, cols)) {
                encode_row(format, row, numbers, cols);
                decode_row(format, numbers, row, cols);
                pack_row(to, format, row, cols);
            }
            free(row);
        }
        *weights_of(m, i) = as_weights(b);
    }
    return m;
}
