// Several processes with --compress: what has not arrived of the gradients, in checkpoints, so that a run that goes on has the
// same bits as one that was never stopped.
// Gives: write_lost, read_lost. Needs: comm.h, compressed_sums.h; data/safetensors.h; Run of dev/run.h, which includes it.
//
// Each process has an array of its own, which means something only to a process with the same rank, of as many ranks, with
// the same experts, whose model lies in memory in the same way: the CUDA twin leaves gaps between tensors. So the names in
// this file tell all four. The model's and the optimizer's files do not know how many processes there were.
#pragma once

#define LOST_FILE "lost_gradients.safetensors"
static const size_t LOST_PIECE = 1 << 30; // numbers; a longer array is several tensors, since a dimension is counted by int

// Where the model's tensors lie in memory, as a number.
uint32_t hash_layout(const Model *m) {
    uint64_t h = hash64(m->common) ^ m->tables;
    for (int i = 0; i < m->tensor_count; i++) {
        h = hash64(hash64(h ^ m->tensors[i].offset) ^ m->tensors[i].size);
    }
    return (uint32_t)(h >> 32);
}

// Piece i of rank r, of n numbers in all its pieces, of a model of this layout. Returns how many this one has.
size_t lost_piece(const Config *c, int r, uint32_t layout, size_t i, size_t n, Part *p) {
    size_t left = n - i * LOST_PIECE;
    memset(p, 0, sizeof(*p));
    snprintf(p->name, sizeof(p->name), "ranks%d.ep%d.copies%d.rank%d.layout%08x.piece%zu", ranks.size, ranks.ep, c->replicate, r,
             (unsigned)layout, i);
    p->cols = (int)(left < LOST_PIECE ? left : LOST_PIECE);
    return (size_t)p->cols;
}

// The file of a checkpoint, and its entry in the list of checksums. All processes call it; the first one writes.
void write_lost(const Run *run, FILE *sums) {
    const Model *m = run->model;
    if (!MANY || !run->config.compress || !m->crossing->lost) {
        return;
    }
    double *size = (double *)allocate((size_t)2 * ranks.size, sizeof(double));
    double most = 0;
    double *layout = size + ranks.size; // of each process, since their experts may be of other widths
    size[ranks.rank] = (double)m->tables;
    layout[ranks.rank] = (double)hash_layout(m);
    sum_over_ranks(size, 2 * ranks.size);
    int count = 0;
    Part *parts = NULL;
    for (int r = 0; r < ranks.size; r++) {
        for (size_t i = 0; i * LOST_PIECE < (size_t)size[r]; i++) {
            parts = (Part *)reallocate(parts, (size_t)count + 1, sizeof(Part));
            lost_piece(&run->config, r, (uint32_t)layout[r], i, (size_t)size[r], &parts[count++]);
        }
        most = fmax(most, size[r]);
    }
    const char *const prefix[] = {""}, *dir = unfinished_path;
    FILE *file = ranks.rank ? NULL : start_safetensors(dir, LOST_FILE, parts, count, prefix, 1, sums);
    real *from = allocate_reals(ranks.rank ? m->tables : (size_t)most); // of one process after the other
    copy_lost(m, from, 0);
    Part *p = parts;
    for (int r = 0; r < ranks.size; r++) {
        send_to_first(from, from, r ? (size_t)size[r] * sizeof(real) : 0, r);
        for (size_t i = 0; file && i * LOST_PIECE < (size_t)size[r]; i++) {
            write_numbers(file, dir, LOST_FILE, from + i * LOST_PIECE, (size_t)p->cols);
            write_tensor_checksum(sums, p == parts, "", p->name, from + i * LOST_PIECE, (size_t)p->cols * sizeof(real));
            p++;
        }
    }
    if (file) {
        end_checksums(sums);
        close_written(file, dir, LOST_FILE);
    }
    free(from);
    free(parts);
    free(size);
}

// Reads this process's array from the checkpoint in dir. Where there is none that fits, the run begins with nothing lost,
// and says so.
void read_lost(Run *run, const char *dir) {
    Model *m = run->model;
    const Config *c = &run->config;
    if (!has_file(dir, LOST_FILE)) {
        Json *sums = read_checksums(dir); // a user who needs the room may have removed the file
        if (c->compress && json_get(sums, LOST_FILE)) {
            remark("%s/%s was removed: what compressed gradients have lost until then does not come any more", dir, LOST_FILE);
        } else if (c->compress) {
            remark("%s: nothing was compressed until then, so nothing was lost", dir);
        }
        json_free(sums);
        return;
    }
    if (!MANY || !c->compress) {
        remark("%s/%s is not used: it is what compressed gradients have lost; to go on with them, give --compress to as many "
               "processes as before",
               dir, LOST_FILE);
        return;
    }
    WeightFiles files;
    open_weights(&files, dir, LOST_FILE, 1);
    real *lost = allocate_reals(m->tables);
    int found = 1;
    for (size_t i = 0, n; i * LOST_PIECE < m->tables && found; i++) {
        Part p;
        n = lost_piece(c, ranks.rank, hash_layout(m), i, m->tables, &p);
        found = n == part_size(&p) && read_tensor(&files.list[0], p.name, &p, 0, 0, lost + i * LOST_PIECE);
        if (found) {
            check_read(files.list[0].path, "", &p, lost + i * LOST_PIECE);
        }
    }
    close_weights(&files);
    if (found) {
        copy_lost(m, lost, 1);
    }
    free(lost);
    if (!found) {
        remark("%s/%s is of other ranks than %d with --ep %d and --replicate %d, or of the twin of this program: it is not "
               "used, and the run goes on without what was lost until then", dir, LOST_FILE, ranks.size, ranks.ep, c->replicate);
    }
}
