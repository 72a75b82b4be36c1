// How fast the device could compute at most: by cuBLAS, measured for half a second, and by its data sheet.
// Gives: Peak, measure_peak, measured_peak, datasheet_peak, sheet_peak.
// Needs: product(), blocks(), THREADS, CHECK, stream, start_device() and device_name() of
// train_moe.cu, which includes it at the end of its namespace, `gpu`.
//
// Both are printed, since neither is enough: a data sheet counts on a clock that few devices keep up under full load, and
// cuBLAS is a program like any other. A device lowers its clock within milliseconds when it has reached its limit of
// power, so the best of a few products alone is a rate that no training can hold.
#pragma once

struct Peak { // operations per second of products of floatX
    double sustained; // over half a second without a pause
    double burst;     // the best of a few alone
};

__global__ void fill_kernel(floatX *x, size_t size) { // with anything but zeros, on which a device is faster than on numbers
    size_t i = thread_of_grid();
    if (i < size) {
        store(&x[i], (float)random_uniform(1, i) - 0.5f);
    }
}

Peak measure_peak(void) {
    cudaDeviceProp device;
    cudaEvent_t begin, end;
    int number;
    start_device();
    CHECK(cudaGetDevice(&number));
    CHECK(cudaGetDeviceProperties(&device, number));

    // Matrices (n,n) that are as large as the device is wide. They hold anything but zeros, on which a device is faster.
    int n = min_int(8192, 64 * device.multiProcessorCount);
    size_t size = (size_t)n * n;
    floatX *a, *out;
    CHECK(cudaMalloc((void **)&a, size * sizeof(floatX)));
    CHECK(cudaMalloc((void **)&out, size * sizeof(floatX)));
    fill_kernel<<<blocks(size), THREADS, 0, stream>>>(a, size);
    CHECK(cudaGetLastError());
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));

    // Milliseconds of so many products, one directly after the other.
    auto time_of = [&](int times) {
        float ms = 0;
        CHECK(cudaEventRecord(begin, stream));
        for (int i = 0; i < times; i++) {
            product(out, a, 0, a, 0, n, n, n, SET);
        }
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        return fmax((double)ms, 1e-3);
    };

    double best = time_of(1); // cuBLAS is loaded here, too: never the best
    for (int attempt = 0; attempt < 4; attempt++) {
        best = fmin(best, time_of(1));
    }
#ifdef CUDACPU
    double wanted = 5; // ms: in the emulator the figure means nothing, and every test would wait for it
#else
    double wanted = 500;
#endif
    int times = max_int(1, (int)(wanted / best));
    double work = 2.0 * n * n * n, sustained = time_of(times) / times;
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    CHECK(cudaFree(a));
    CHECK(cudaFree(out));
    Peak peak = {work / (1e-3 * sustained), work / (1e-3 * best)};
    return peak;
}

double measured_peak(void) { // for Backend
    return measure_peak().sustained;
}

// Dense bfloat16 products with float32 sums, in TFLOP/s, as NVIDIA's data sheets and white papers give them (which often
// print twice as much, "with sparsity"); 0: a device that has another one's name and is not the same. Such a figure is
// multiprocessors x operations a clock x clock: of an A100 108 x 2048 x 1.41 GHz = 312.
// The first row counts whose words all the name has in this order, side by side.
const struct Sheet {
    const char *words;
    double tflops;
} sheets[] = {
    {"MIG", 0},               // a slice of a device
    {"Laptop", 0},            // slower, at the maker's choice
    {"GB200", 2500},          // Blackwell data sheet, of each device in an NVL72: 5,000 sparse
    {"B200", 2250},           // Blackwell data sheet, of each device in an HGX B200: 4,500 sparse
    {"GH200", 989.4},         // Grace Hopper data sheet: 1,979 sparse
    {"H200 NVL", 835.5},      // H200 data sheet: 1,671 sparse
    {"H200", 989.4},          // H200 data sheet: 1,979 sparse
    {"H100 PCIe", 756.4},     // H100 data sheet: 1,513 sparse
    {"H100 NVL", 835.5},      // H100 data sheet: 1,671 sparse
    {"H100", 989.4},          // H100 white paper, table of the SXM5
    {"A100", 312},            // A100 data sheet, of all its forms
    {"A30", 165},             // A30 data sheet
    {"A40", 149.7},           // A40 data sheet
    {"A10", 125},             // A10 data sheet
    {"L40S", 362.05},         // L40S data sheet
    {"L40", 181.05},          // L40 data sheet
    {"L4", 121},              // L4 data sheet: 242 sparse
    {"RTX 6000 Ada", 364.2},  // Ada white paper for professionals
    {"RTX A6000", 154.8},     // GA102 white paper
    {"RTX 5090 D", 0},        // slower
    {"RTX 5090", 209.5},      // RTX Blackwell white paper, bfloat16 with float32 sums
    {"RTX 4090 D", 0},        // slower
    {"RTX 4090", 165.2},      // Ada white paper, bfloat16 with float32 sums
    {"RTX 3090 Ti", 0},       // faster
    {"RTX 3090", 71},         // GA102 white paper, bfloat16 with float32 sums
};

// Has `name` these words? "NVIDIA A100-SXM4-80GB" has A100, "NVIDIA A10G" has not A10.
int has_words(const char *name, const char *words) {
    size_t length = strlen(words);
    for (const char *at = strstr(name, words); at; at = strstr(at + 1, words)) {
        if ((at == name || !isalnum((unsigned char)at[-1])) && !isalnum((unsigned char)at[length])) {
            return 1;
        }
    }
    return 0;
}

// Operations per second of the device of this name, by its data sheet; 0: unknown.
double datasheet_peak(const char *name) {
    for (const Sheet &sheet : sheets) {
        if (has_words(name, sheet.words)) {
            return 1e12 * sheet.tflops;
        }
    }
    return 0;
}

double sheet_peak(void) { // for Backend: data sheets' figures are for bfloat16, so the float32 build has none
    char name[128];
    device_name(name);
    return sizeof(floatX) == 2 ? datasheet_peak(name) : 0;
}
