// Products of tiles: how a block fetches tiles of two matrices into shared memory, multiplies them,
// and gives each thread eight neighbours of the results. Gives: Tile, Fetcher and what begins one,
// Warp, Results, multiply, lay_out, read_eight. Needs: floatX, THREADS, copy_async and its kin,
// load_matrices and mma of dev/cuda/common.cuh, all inside `namespace gpu`.
//
// A block makes TM x TN results of a product A B and multiplies TK columns of A by TK rows of B in
// a step. Either matrix lies in memory with k along its rows, or with one row for each k ("by k").

#pragma once

const int TM = 128, TN = 128, TK = 32;
const int PIECE = 16;                           // bytes that cp.async copies at a time
const int EACH = PIECE / (int)sizeof(floatX);   // numbers of a piece
const int TILE = TM * TK * (int)sizeof(floatX); // bytes of a tile of A in shared memory, and of B
const int COPIES = TILE / PIECE / THREADS;      // pieces of a tile that a thread copies

// The results from (row,column) on of one expert's product, which is (high,columns) in all.
struct Tile {
    int e, first, rows; // the expert; its rows are the slots first ... first + rows
    int row, high;
    int column, columns;
    int depth; // how many products each result sums
    int F, H, gated, activation;
};

// ---- how tiles come into shared memory

// Where a piece of a row of a tile lies, in bytes. A tile of A has TM rows of TK numbers or, BY_K,
// TK rows of TM numbers, without gaps. ldmatrix reads the same piece of eight rows at once. Where
// these lay in the same banks of shared memory, it would wait for each in turn. So the pieces of a
// row change places by the row's number, and those of any eight rows lie in different banks.
template <bool BY_K> __device__ int place_of(int row, int piece) {
    const int PIECES = (BY_K ? TM : TK) / EACH;
    int turn = PIECES < 8 ? row / (8 / PIECES) % PIECES : row % 8;
    return (row * PIECES + (piece ^ turn)) * PIECE;
}

// Keeps x in a register. A compiler would rather compute it again in each round of a loop.
#ifdef CUDACPU
template <class T> void keep(T &) {
}
#else
__device__ void keep(int &x) {
    asm volatile("" : "+r"(x));
}
__device__ void keep(const int *&p) {
    asm volatile("" : "+l"(p));
}
#endif

// One matrix of a product, as one thread fetches it: COPIES pieces of each tile, STEP rows apart.
// Each has a pointer, which moves on along k by the same number of bytes. Rows and columns that the
// tile has beyond the matrix's edge repeat its last ones: nobody reads their results, and the loop
// needs no conditions for them. Where each k is another token's row, the next tokens' numbers say
// where to go on: one pointer is enough, and each address is that plus the token's number times the
// pitch.
template <bool BY_K, bool BY_TOKEN> struct Fetcher {
    static constexpr bool by_k = BY_K, moves = !(BY_K && BY_TOKEN);
    static constexpr int PIECES = (BY_K ? TM : TK) / EACH, STEP = THREADS / PIECES;
    const char *from[COPIES]; // the next tile's pieces; where they do not move, that of token 0
    unsigned pitch;           // bytes from a row to the next
    int place;                // of the first piece in the tile
    const int *token;         // the tokens of all k
    int k, depth;             // the first piece's k in the next tile, and how many there are
    unsigned next[COPIES];    // the tokens of the next tile

    __device__ static int row() {
        return threadIdx.x / PIECES;
    }
    __device__ static int column() {
        return threadIdx.x % PIECES * EACH;
    }

    __device__ void begin(size_t ld, int the_depth) {
        pitch = (unsigned)(ld * sizeof(floatX));
        place = place_of<BY_K>(row(), threadIdx.x % PIECES);
        keep(place);
        k = row();
        depth = the_depth;
    }

    __device__ void look_up() { // a step before they are needed
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            next[i] = __ldg(token + min(k + i * STEP, depth - 1));
        }
    }

    __device__ const char *piece(int i) const {
        return moves ? from[i] : from[0] + (size_t)next[i] * pitch;
    }

    // The first tile has only its first `there` of TK; the rest of it becomes 0.
    __device__ void fetch_first(char *tile, int there) {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            int mine = BY_K ? row() + i * STEP : column();
            copy_async(tile + place + i * STEP * PIECES * PIECE, mine < there ? piece(i) : from[0],
                       mine < there ? 16 : 0);
        }
        move(there);
    }

    __device__ void fetch(char *tile) {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            copy_async(tile + place + i * STEP * PIECES * PIECE, piece(i), 16);
        }
        move(TK);
    }

    __device__ void move(int by) {
        if (moves) {
            unsigned bytes = by * (BY_K ? pitch : (unsigned)sizeof(floatX));
#pragma unroll
            for (int i = 0; i < COPIES; i++) {
                from[i] += bytes;
            }
        } else {
            k += by;
            look_up();
        }
    }
};

// The rows that a tile of rows_kernel begins with: those of the slots' tokens, or the slots' own.
template <bool BY_TOKEN>
__device__ void begin_rows(Fetcher<false, BY_TOKEN> *a, const floatX *p, size_t ld, const Tile &t,
                           const int *token) {
    a->begin(ld, t.depth);
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        size_t slot = t.first + min(a->row() + i * a->STEP, t.rows - 1);
        size_t row = BY_TOKEN ? token[slot] : slot;
        a->from[i] = (const char *)(p + row * ld + a->column());
    }
}

// The rows of a matrix of weights, each of which makes a column of the results. With `pairs` eight
// rows of the gate and their eight of up take turns, so that a warp has both.
__device__ void begin_weights(Fetcher<false, false> *b, const floatX *w, size_t ld, const Tile &t,
                              bool pairs) {
    b->begin(ld, t.depth);
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        int c = b->row() + i * b->STEP, f = t.column + (pairs ? c / 16 * 8 + c % 8 : c);
        size_t row = min(f, t.columns - 1) + (pairs && c / 8 % 2 ? t.F : 0);
        b->from[i] = (const char *)(w + row * ld + b->column());
    }
}

// A matrix by k, from its column `column` of `columns` on. With tokens, row token[k] belongs to k.
template <bool BY_TOKEN>
__device__ void begin_by_k(Fetcher<true, BY_TOKEN> *f, const floatX *p, size_t ld, int column,
                           int columns, const int *token, int depth) {
    f->begin(ld, depth);
    int c = min(column + f->column(), columns - EACH);
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        f->from[i] = (const char *)(p + (BY_TOKEN ? 0 : (f->row() + i * f->STEP) * ld) + c);
    }
    if (BY_TOKEN) {
        f->token = token;
        keep(f->token);
        f->look_up();
    }
}

// ---- the product

// What a thread of a warp has in its registers: acc[i][j] is mma's d for the warp's rows 16*i ...
// and columns 8*j ... .
typedef float Results[4][4][4];

struct Warp { // its (64,32) of the tile
    int lane, row, column;
};

__device__ Warp this_warp() {
    int warp = threadIdx.x / 32;
    return {(int)threadIdx.x % 32, warp / 4 * 64, warp % 4 * 32};
}

// Where a lane reads its row of each ldmatrix: (16,16) of the tile, COUNT of them one below the
// other from row (of A; of B column) `first` on. The pieces of the next 16 rows lie in the same
// order, and so do, BY_K, those of the next 16 k: hence so few places are enough.
template <bool BY_K, int COUNT> struct Reader {
    static constexpr int PLACES = BY_K ? COUNT : TK / 16;
    int place[PLACES];

    // row and k: this lane's within the matrices.
    __device__ void begin(int first, int row, int k) {
#pragma unroll
        for (int i = 0; i < PLACES; i++) {
            place[i] = BY_K ? place_of<true>(k, (first + 16 * i + row) / EACH)
                            : place_of<false>(first + row, (16 * i + k) / EACH);
            keep(place[i]);
        }
    }
    __device__ const char *at(const char *tile, int i, int k) const {
        return BY_K ? tile + place[i] + k * (TM / EACH * PIECE)
                    : tile + place[k / 16] + 16 * i * (TK / EACH * PIECE);
    }
};

// acc += a b, of tiles that lie as place_of() says.
#ifdef FP32
template <bool A_BY_K, bool B_BY_K> struct Multiplier {
    Warp w;

    __device__ void begin(Warp warp) {
        w = warp;
    }
    template <bool BY_K> __device__ static float number(const char *tile, int row, int k) {
        int at = BY_K ? place_of<true>(k, row / EACH) : place_of<false>(row, k / EACH);
        return ((const float *)(tile + at))[BY_K ? row % EACH : k % EACH];
    }
    __device__ void add(Results &acc, const char *a, const char *b) const {
        for (int k = 0; k < TK; k++) {
            float of_a[8], of_b[8];
            for (int i = 0; i < 8; i++) {
                int m = w.row + 8 * i + w.lane / 4;
                int n = w.column + i / 2 * 8 + w.lane % 4 * 2 + i % 2;
                of_a[i] = number<A_BY_K>(a, m, k);
                of_b[i] = number<B_BY_K>(b, n, k);
            }
            for (int i = 0; i < 64; i++) {
                int m = i / 16 * 2 + i / 2 % 2, n = i / 4 % 4 * 2 + i % 2;
                acc[i / 16][i / 4 % 4][i % 4] += of_a[m] * of_b[n];
            }
        }
    }
};
#else
template <bool A_BY_K, bool B_BY_K> struct Multiplier {
    Reader<A_BY_K, 4> of_a;
    Reader<B_BY_K, 2> of_b;

    __device__ void begin(Warp w) {
        int low = w.lane % 16, high = w.lane / 16 * 8;
        int rest = w.lane % 8, eighth = w.lane / 8 % 2 * 8;
        of_a.begin(w.row, A_BY_K ? eighth : low, A_BY_K ? rest + high : high);
        of_b.begin(w.column, B_BY_K ? high : rest + high, B_BY_K ? low : eighth);
    }
    __device__ void add(Results &acc, const char *a, const char *b) const {
#pragma unroll
        for (int k = 0; k < TK; k += 16) {
            unsigned x[4][4], y[2][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                A_BY_K ? load_matrices_transposed(x[i], of_a.at(a, i, k))
                       : load_matrices(x[i], of_a.at(a, i, k));
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                B_BY_K ? load_matrices_transposed(y[j], of_b.at(b, j, k))
                       : load_matrices(y[j], of_b.at(b, j, k));
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    mma(acc[i][j], x[i], y[j / 2] + j % 2 * 2);
                }
            }
        }
    }
};
#endif

// acc = a b over all of k. Shared memory has STAGES pairs of tiles: while one is multiplied, the
// next STAGES - 1 are on their way. A warp is idle where all its results lie beyond the matrix: it
// fetches for the others and multiplies nothing.
template <int STAGES, class A, class B>
__device__ void multiply(Results &acc, char *tiles, A &a, B &b, int depth, Warp w, int idle) {
    const int PAIR = 2 * TILE;
    int steps = (depth + TK - 1) / TK, first = depth - (steps - 1) * TK;
    Multiplier<A::by_k, B::by_k> product;
    product.begin(w);
    keep(idle);

    // The first tile takes what is left of the depth, so that the loop has whole tiles alone.
    a.fetch_first(tiles, first);
    b.fetch_first(tiles + TILE, first);
    copy_commit();
    for (int s = 1; s < STAGES - 1; s++) {
        if (s < steps) {
            a.fetch(tiles + s * PAIR);
            b.fetch(tiles + s * PAIR + TILE);
        }
        copy_commit(); // an empty one too: copy_wait() counts them
    }

    int now = 0, next = (STAGES - 1) * PAIR;
#pragma unroll 1
    for (int left = steps; left > 0; left--) {
        copy_wait<STAGES - 2>();
        __syncthreads(); // the tile is there, and all have used up the one that is overwritten now
        if (left >= STAGES) {
            a.fetch(tiles + next);
            b.fetch(tiles + next + TILE);
        }
        copy_commit();
        if (!idle) {
            product.add(acc, tiles + now, tiles + now + TILE);
        }
        next = now;
        now = now == (STAGES - 1) * PAIR ? 0 : now + PAIR;
    }
    copy_wait<0>();
    __syncthreads(); // from here on the tiles' memory serves the ends
}

// ---- the results: from registers through shared memory to rows of eight neighbours

const int HALF = 32; // rows of a warp's 64 that pass through at a time
const int LAID = 40; // numbers from a row to the next there: 8 more than there are, so that rows
                     // lie in different banks

__device__ float *room_of(char *tiles) {
    return (float *)tiles + threadIdx.x / 32 * HALF * LAID;
}

// room (HALF,LAID) = a half of the warp's results, row by row.
__device__ void lay_out(float *room, const Results &acc, int half, int lane) {
    __syncwarp(); // others still read the half before
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float *v = acc[2 * half + i][j];
            float *to = room + (16 * i + lane / 4) * LAID + 8 * j + lane % 4 * 2;
            *(float2 *)to = make_float2(v[0], v[1]);
            *(float2 *)(to + 8 * LAID) = make_float2(v[2], v[3]);
        }
    }
    __syncwarp();
}

__device__ void read_eight(float (&v)[8], const float *room) {
    float4 low = *(const float4 *)room, high = *(const float4 *)(room + 4);
    v[0] = low.x;
    v[1] = low.y;
    v[2] = low.z;
    v[3] = low.w;
    v[4] = high.x;
    v[5] = high.y;
    v[6] = high.z;
    v[7] = high.w;
}
