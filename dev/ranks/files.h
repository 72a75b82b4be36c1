// A tensor as a single process has it: files are read and written by these, one tensor after the other.
// Gives: allocate_tensor, ranks_read, ranks_write, ranks_read_expert, ranks_write_part; for the CUDA twin ranks_share,
// ranks_gather. Needs: comm.h, gradients.h; dev/offload.h; of train_moe.c the table of weights.
//
// A checkpoint does not tell how many processes wrote it: any number of them can go on with it. One tensor, not the
// model, is what rank 0 gathers at a time, so that it needs hardly more memory than the others; of the experts' tensors, on the CPU,
// it is a part of one expert.
#ifndef RANKS_FILES_H
#define RANKS_FILES_H

// Memory for all numbers of any one tensor, to be freed. What is not written takes no memory of the machine.
real *allocate_tensor(const Model *m) {
    size_t largest = 0;
    for (int i = 0; i < m->tensor_count; i++) {
        largest = m->tensors[i].whole > largest ? m->tensors[i].whole : largest;
    }
    return allocate_reals(largest);
}

// What this process has of a tensor's WEIGHTS, GRADS, MOMENT1 or MOMENT2. It is all of it, but for the moments of
// common weights that are no tables, of which each process has a slice, and for experts, which are divided among the processes.
typedef struct Share {
    size_t at, size; // in memory[what]
    size_t first;    // its first number is this one of the whole tensor's
} Share;

int are_moments(int what) {
    return what == MOMENT1 || what == MOMENT2;
}

Share ranks_share(const Model *m, int what, int tensor) {
    const Tensor *t = &m->tensors[tensor];
    Share s = {t->offset, t->size, t->first};
    if (!are_moments(what)) {
        return s;
    }
    ranks_own_range(m, t, &s.at, &s.size);
    if (s.size == 0) {
        s.at = 0;
        return s;
    }
    s.first += s.at - t->offset;
    s.at = moment_offset(m, s.at);
    return s;
}

// `numbers` has this process's share; that of rank 0 becomes the whole tensor. All processes call it.
void ranks_gather(const Model *m, int what, int tensor, real *numbers) {
    int parts = are_moments(what) && !m->tensors[tensor].looked_up ? ranks.size : 1;
    if (m->tensors[tensor].of_experts) {
        parts = ranks.ep;
    }
    gather_parts(numbers, ranks_share(m, what, tensor).size * sizeof(real), parts);
}

// Gives all numbers of a tensor to rank 0. The others' `to` needs as much memory, and gets their own share.
void ranks_read(Model *m, int what, int tensor, real *to) {
    Share s = ranks_share(m, what, tensor);
    memcpy(to, m->memory[what] + s.at, s.size * sizeof(real));
    ranks_gather(m, what, tensor, to);
}

// --offload: what is in memory of a tensor goes, before its numbers are read or written one after the other.
void let_go_before(const Model *m, int what, int tensor) {
    Pool *pool = find_pool(m, what, tensor);
    if (pool && pool->count) {
        let_go(pool);
    }
}

// Takes over what this process has of the numbers first .. first+n of a tensor, which each process has read from a file: `from`. With
// --offload they do not stay in memory.
void ranks_write_part(Model *m, int what, int tensor, size_t first, size_t n, const real *from) {
    Share s = ranks_share(m, what, tensor);
    size_t begin = first > s.first ? first : s.first, end = first + n < s.first + s.size ? first + n : s.first + s.size;
    let_go_before(m, what, tensor);
    if (begin < end) {
        real *to = m->memory[what] + s.at + (begin - s.first);
        about_to_pass(to, end - begin);
        memcpy(to, from + (begin - first), (end - begin) * sizeof(real));
        passed_over(to, end - begin);
    }
}

// The same with all numbers of the tensor.
void ranks_write(Model *m, int what, int tensor, const real *from) {
    ranks_write_part(m, what, tensor, 0, m->tensors[tensor].whole, from);
}

// The member of a group that has the expert of which a tensor's number `first` is.
int member_of_number(const Config *c, const Tensor *t, size_t first) {
    size_t end = 0;
    int e = -1;
    while (end <= first) {
        end += expert_size(c, t, ++e);
    }
    return e / (c->experts / ranks.ep);
}

// Gives n numbers of one expert to rank 0, from number `first` of its tensor on. All processes call it, and `to` has memory for them.
void ranks_read_expert(Model *m, int what, int tensor, size_t first, size_t n, real *to) {
    int member = member_of_number(&m->config, &m->tensors[tensor], first);
    let_go_before(m, what, tensor);
    if (ranks.rank == member) { // of the first group
        Share s = ranks_share(m, what, tensor);
        const real *from = m->memory[what] + s.at + (first - s.first);
        about_to_pass(from, n);
        memcpy(to, from, n * sizeof(real));
        passed_over(from, n);
    }
    if (member) {
        send_to_first(to, to, n * sizeof(real), member);
    }
}

#endif
