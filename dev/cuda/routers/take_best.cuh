// The best of many candidates, by a radix search: what expert choice and capacities share.
// Gives: take_best. Needs: Rank and warp_scan of common.cuh.
//
// Of each group of tokens, each of `units` units takes the `take` best of its candidates. One block works for
// a group and `each` neighbouring units. The search finds the rank of the last candidate that a unit takes, 8
// bits after 8, beginning with the highest: of the candidates that agree with it so far, those with each
// value of the next 8 bits are counted, 256 bins of them. A struct of candidates has the functions
//   size(mine)                           how many there are in a group for `mine` units
//   rank(i, group, first, mine, &unit)   the rank of candidate i, and its unit: 0 .. mine-1, counted from
//                                        unit `first` on; -1: it is none of these
//   put(i, group, first, mine, taken)    is told what became of candidate i
//   end(group, unit, order)              is told the lowest order_of() that a unit took
#ifndef CUDA_TAKE_BEST_CUH
#define CUDA_TAKE_BEST_CUH
#include "pieces.cuh"

const int TAKE_UNITS = 16;

struct Search { // of a block's units, in shared memory
    int bins[TAKE_UNITS][256];
    Rank least[TAKE_UNITS]; // of the last candidate that is taken, as far as it is known
    int left[TAKE_UNITS];   // to take of those that agree with least; -1: all of them, the search is over
    unsigned lowest[TAKE_UNITS]; // order of the last one taken
    int searching;               // 1: some unit's search goes on
};

// Empties the bins, and counts those candidates that agree with least in all bits above these 8.
template <class Candidates>
__device__ void fill_bins(Search &s, const Candidates &candidates, size_t size, int group, int first,
                          int mine, int shift) {
    for (int i = threadIdx.x; i < mine * 256; i += blockDim.x) {
        s.bins[i / 256][i % 256] = 0;
    }
    if (threadIdx.x == 0) {
        s.searching = 0;
    }
    __syncthreads();
    for (size_t i = threadIdx.x; i < size; i += AHEAD * blockDim.x) {
        Rank rank[AHEAD];
        int of[AHEAD];
        for (int j = 0; j < AHEAD; j++) {
            size_t at = i + j * blockDim.x;
            rank[j] = at < size ? candidates.rank(at, group, first, mine, &of[j]) : 0;
            of[j] = at < size ? of[j] : -1;
        }
        for (int j = 0; j < AHEAD; j++) {
            int u = of[j];
            if (u >= 0 && s.left[u] >= 0 && (shift == 56 || (rank[j] ^ s.least[u]) >> (shift + 8) == 0)) {
                atomicAdd(&s.bins[u][rank[j] >> shift & 255], 1);
            }
        }
    }
    __syncthreads();
}

// Each unit's warp finds the bin in which its last candidate lies. Lane 0 has the highest eight bins.
__device__ void find_bin(Search &s, int mine, int shift) {
    int unit = threadIdx.x / 32, lane = threadIdx.x % 32, want = unit < mine ? s.left[unit] : -1;
    if (want >= 0) {
        int bin = 255 - 8 * lane, sum = 0;
        for (int i = 0; i < 8; i++) {
            sum += s.bins[unit][bin - i];
        }
        int upto = warp_scan(sum);
        unsigned enough = __ballot_sync(ALL_LANES, upto >= want);
        __syncwarp(); // all lanes have read what one of them writes now
        if (enough == 0 && lane == 0) { // so few that all are taken
            s.left[unit] = -1;
        }
        if (enough != 0 && lane == __ffs((int)enough) - 1) {
            want -= upto - sum;
            while (s.bins[unit][bin] < want) {
                want -= s.bins[unit][bin--];
            }
            s.least[unit] |= (Rank)bin << shift;
            s.left[unit] = s.bins[unit][bin] == want ? -1 : want;
            if (s.left[unit] >= 0) {
                atomicOr(&s.searching, 1);
            }
        }
    }
    __syncthreads();
}

template <class Candidates>
__global__ void __launch_bounds__(1024)
    take_best_kernel(Candidates candidates, int units, int each, int take) {
    __shared__ Search search;
    int parts = div_up(units, each), group = blockIdx.x / parts, first = blockIdx.x % parts * each;
    int mine = min_int(each, units - first), unit = threadIdx.x;
    size_t size = candidates.size(mine);
    if (unit < mine) {
        search.least[unit] = 0;
        search.left[unit] = take;
        search.lowest[unit] = 0xffffffffu;
    }
    for (int shift = 56, over = 0; shift >= 0 && !over; shift -= 8) {
        fill_bins(search, candidates, size, group, first, mine, shift);
        find_bin(search, mine, shift);
        over = !search.searching;
        __syncthreads(); // all have seen it
    }
    for (size_t i = threadIdx.x; i < size; i += blockDim.x) {
        int u;
        Rank rank = candidates.rank(i, group, first, mine, &u);
        if (u < 0) {
            continue;
        }
        int taken = rank >= search.least[u];
        candidates.put(i, group, first, mine, taken);
        if (taken) {
            atomicMin(&search.lowest[u], (unsigned)(rank >> 32));
        }
    }
    __syncthreads();
    if (unit < mine) {
        candidates.end(group, first + unit, search.lowest[unit]);
    }
}

template <class Candidates> void take_best(Candidates candidates, int groups, int units, int take) {
    int each = min_int(TAKE_UNITS, max_int(1, (int)((size_t)groups * units / 512)));
    int grid = groups * div_up(units, each), threads = max_int(32 * each, threads_for(candidates.size(each)));
    take_best_kernel<Candidates><<<grid, threads, 0, stream>>>(candidates, units, each, take);
    CHECK(cudaGetLastError());
}

#endif
