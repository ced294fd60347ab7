// A U-Net's operations on a CPU, on maps of float32 that lie as (pictures, height, width, channels).
//
// 3x3 convolutions go by Winograd's method, F(4x4, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
// CVPR 2016 (arXiv:1509.09308): a tile of 4x4 results comes from 6x6 pixels by 36 multiplications, where a direct convolution
// takes 144. A few neighbouring tiles are transformed, multiplied and transformed back at a time, so that nothing between
// leaves the core's own cache.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#if defined(__AVX512F__)
constexpr int LANES = 16, TILES = 12;  // two vectors for each of this many tiles, or pixels, lie in registers
#else
constexpr int LANES = 8, TILES = 6;
#endif
constexpr int64_t LARGE = 4 << 20;  // numbers of a map that no cache keeps
constexpr int STRETCH = 32;  // pixels of a row, at whose end their first one is still in the nearest cache
constexpr int SIDE = 4, WINDOW = SIDE + 2, PLACES = WINDOW * WINDOW;

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(alignof(float))));

using Job = void (*)(void *);

// OpenMP's, and how many of its threads are wanted.
struct Threads {
    void (*parallel)(Job, void *, unsigned threads, unsigned flags);  // GOMP_parallel
    void (*wait)();                                                   // GOMP_barrier
    int (*size)();                                                    // omp_get_num_threads
    int (*number)();                                                  // omp_get_thread_num
    int64_t count;
};

// One of the threads that go through the same list of operations together.
struct Member {
    // How many of its jobs of this operation have been begun, and of the one after it; in a cache line of its own.
    struct alignas(64) Begun {
        std::atomic<int64_t> jobs[2] = {};
    };
    const Threads &threads;
    Begun *all;  // one for each member
    int64_t size, number, turn = 0;

    // work(job) for each job, when all have done what was shared before. A member has the same part of each map, which lies in
    // the caches of its core, and when it is done it helps the others with theirs.
    template <class Work>
    void share(int64_t jobs, Work work) {
        if (turn && size > 1) threads.wait();
        const int64_t now = turn++ % 2;
        all[number].jobs[turn % 2] = 0;
        for (int64_t n = 0; n < size; n++) {
            const int64_t owner = (number + n) % size, end = jobs * (owner + 1) / size;
            for (int64_t job; (job = jobs * owner / size + all[owner].jobs[now]++) < end;) work(job);
        }
        _mm_sfence();  // what was streamed is there for the others
    }
};

using Operation = void (*)(const void *arguments, Member &);

struct Call {
    Operation operation;
    const void *arguments;
};

// A 3x3 convolution with padding 1 of one map, or of two as if concatenated. Channels are whole vectors.
struct Convolution {
    const float *first, *second;  // second may be null
    // Transformed, (36, out / LANES, in, LANES); those of `convolve_directly`: (out / LANES, 9 * in, LANES).
    const float *weights, *bias;
    float *out, *pooled;  // pooled, by 2x2, may be null
    float *workspace;     // 36 * (in + out) for each tile, or for TILES of each thread; or 9 * in for each pixel
    int64_t pictures, height, width, first_channels, second_channels, out_channels, relu;
    int64_t halves;  // weights are bfloat16, with two channels of `in` side by side, and so is what they are multiplied with
};

// A transposed convolution of 2x2 windows that do not overlap, into a map that may be larger: what is beyond is zeros, or the
// last row and column go on.
struct Doubling {
    const float *map;
    const float *weights;  // (4, out / LANES, in, LANES)
    const float *bias;
    float *out, *workspace;  // of halves, width * in / 2 for each thread
    int64_t pictures, height, width, channels, out_height, out_width, out_channels, replicate;
    int64_t halves;  // as above; channels are whole vectors then
};

// Squares of pixels as channels, and zeros for further channels; the last row and column go on beyond the picture.
struct Splitting {
    const float *picture;
    float *out;
    int64_t steps[4];  // in the picture, from one of its (pictures, channels, height, width) to the next
    int64_t pictures, channels, height, width, side, out_height, out_width, out_channels;
};

// A 1x1 convolution whose results are squares of pixels; what lies beyond the result is left out.
struct Head {
    const float *map;
    const float *weights;  // (out / LANES, in, LANES), with zeros for channels that the result has not
    const float *bias;
    float *out;  // (pictures, out_channels, out_height, out_width)
    int64_t pictures, height, width, channels, side, out_height, out_width, out_channels;
};

namespace {

INLINE Vector load(const float *place) { return *reinterpret_cast<const Vector *>(place); }
INLINE void store(float *place, Vector vector) { *reinterpret_cast<Vector *>(place) = vector; }
// Past the caches, for a map that will have left them by the time it is read.
INLINE void stream(float *place, Vector vector) {
#if defined(__AVX512F__)
    _mm512_stream_ps(place, (__m512)vector);
#else
    _mm256_stream_ps(place, (__m256)vector);
#endif
}
INLINE Vector larger(Vector a, Vector b) { return a < b ? b : a; }  // NaN where a is
INLINE Vector larger_or_nan(Vector a, Vector b) { return b == b ? larger(a, b) : b; }

INLINE Vector largest(Vector a, Vector b, Vector c, Vector d) {
    return larger_or_nan(larger_or_nan(a, b), larger_or_nan(c, d));
}
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// A number of x times a vector of weights; of halves, two numbers of bfloat16 side by side, times two for each lane.
template <bool halves>
INLINE Vector add_product(Vector sum, float x, Vector weight) {
#if defined(__AVX512BF16__)
    if constexpr (halves) return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(x), (__m512bh)weight);
#endif
    return sum + x * weight;
}

// Numbers as what add_product takes of x, from `offset` on.
template <bool halves>
INLINE void put(float *x, int64_t offset, Vector numbers) {
#if defined(__AVX512BF16__)
    if constexpr (halves) {
        auto place = reinterpret_cast<__m256i *>(reinterpret_cast<uint16_t *>(x) + offset);
        return _mm256_storeu_si256(place, (__m256i)_mm512_cvtneps_pbh((__m512)numbers));
    }
#endif
    store(x + offset, numbers);
}

// out[n][v] = start[v] + sum over k of x[n][k] weights[v][k], for `count` rows of x and `vectors` vectors of channels.
template <bool halves, int count, int vectors>
INLINE void multiply_all(const float *x, int64_t in, const float *weights, const float *start, float *out, int64_t stride) {
    Vector sums[count][vectors];
    UNROLL for (int n = 0; n < count; n++)
        UNROLL for (int v = 0; v < vectors; v++) sums[n][v] = start ? load(start + v * LANES) : Vector{};
    for (int64_t k = 0; k < in; k++) {
        Vector weight[vectors];
        UNROLL for (int v = 0; v < vectors; v++) weight[v] = load(weights + (v * in + k) * LANES);
        UNROLL for (int n = 0; n < count; n++)
            UNROLL for (int v = 0; v < vectors; v++) sums[n][v] = add_product<halves>(sums[n][v], x[n * in + k], weight[v]);
    }
    UNROLL for (int n = 0; n < count; n++)
        UNROLL for (int v = 0; v < vectors; v++) store(out + n * stride + v * LANES, sums[n][v]);
}

// The same for a count that only the call knows, up to TILES.
template <bool halves, int vectors, int most = TILES>
INLINE void multiply_some(int64_t count, const float *x, int64_t in, const float *weights, const float *start, float *out,
                          int64_t stride) {
    if constexpr (most > 0) {
        if (count == most) multiply_all<halves, most, vectors>(x, in, weights, start, out, stride);
        else multiply_some<halves, vectors, most - 1>(count, x, in, weights, start, out, stride);
    }
}

// The same for any number of channels. Without a start it is zero. Of halves, `in` counts pairs.
template <bool halves>
void multiply(int64_t count, const float *x, int64_t in, const float *weights, const float *start, int64_t channels, float *out,
              int64_t stride) {
    int64_t c = 0;
    for (; c + 2 * LANES <= channels; c += 2 * LANES)
        multiply_some<halves, 2>(count, x, in, weights + c * in, start ? start + c : start, out + c, stride);
    if (c < channels) multiply_some<halves, 1>(count, x, in, weights + c * in, start ? start + c : start, out + c, stride);
}

// Interpolation at 0, the square roots of 1/2 and 2 with either sign, and infinity: less rounding error than at 0, 1 and 2.
constexpr float ROOT = 1.41421356f;

INLINE void transform_input(const Vector d[WINDOW], Vector result[WINDOW]) {
    Vector a = d[4] - 2 * d[2], b = (d[3] - 2 * d[1]) * (ROOT / 2), c = d[4] - d[2] / 2, e = (d[3] - d[1] / 2) * ROOT;
    result[0] = d[0] + d[4] - 2.5f * d[2];
    result[1] = a + b;
    result[2] = a - b;
    result[3] = c + e;
    result[4] = c - e;
    result[5] = d[1] + d[5] - 2.5f * d[3];
}

INLINE void transform_output(const Vector m[WINDOW], Vector result[SIDE]) {
    Vector a = m[1] + m[2], b = (m[1] - m[2]) * (ROOT / 2), c = m[3] + m[4], d = (m[3] - m[4]) * ROOT;
    result[0] = m[0] + a + c;
    result[1] = b + d;
    result[2] = a / 2 + 2 * c;
    result[3] = b / 2 + 2 * d + m[5];
}

// Windows of `tiles` neighbours in a row, transformed, with `pitch` from one to the next and `step` from place to place.
template <bool halves>
void read_row(const float *map, int64_t height, int64_t width, int64_t channels, int64_t top, int64_t left, int64_t tiles,
              float *result, int64_t pitch, int64_t step) {
    Vector columns[WINDOW][SIDE * TILES + 2];
    for (int64_t c = 0; c < channels; c += LANES) {
        for (int64_t j = 0; j < SIDE * tiles + 2; j++) {
            Vector pixels[WINDOW] = {}, column[WINDOW];
            const int64_t x = left - 1 + j;
            if (x >= 0 && x < width)
                for (int i = 0; i < WINDOW; i++) {
                    const int64_t y = top - 1 + i;
                    if (y >= 0 && y < height) pixels[i] = load(map + (y * width + x) * channels + c);
                }
            transform_input(pixels, column);
            for (int i = 0; i < WINDOW; i++) columns[i][j] = column[i];
        }
        for (int64_t tile = 0; tile < tiles; tile++)
            for (int i = 0; i < WINDOW; i++) {
                Vector row[WINDOW];
                transform_input(&columns[i][SIDE * tile], row);
                for (int j = 0; j < WINDOW; j++) put<halves>(result + (i * WINDOW + j) * step + tile * pitch, c, row[j]);
            }
    }
}

// A tile's products, with `step` from one place to the next, as pixels of the result.
void write_tile(const Convolution &of, const float *products, int64_t step, int64_t picture, int64_t top, int64_t left,
                int64_t channel) {
    const Vector bias = load(of.bias + channel);
    Vector between[SIDE][WINDOW], y[SIDE][SIDE];
    for (int j = 0; j < WINDOW; j++) {
        Vector column[WINDOW], transformed[SIDE];
        for (int i = 0; i < WINDOW; i++) column[i] = load(products + (i * WINDOW + j) * step);
        transform_output(column, transformed);
        for (int i = 0; i < SIDE; i++) between[i][j] = transformed[i];
    }
    for (int i = 0; i < SIDE; i++) {
        transform_output(between[i], y[i]);
        for (int j = 0; j < SIDE; j++) {
            y[i][j] += bias;
            if (of.relu) y[i][j] = larger(y[i][j], Vector{});
        }
    }
    const int64_t rows = smaller(SIDE, of.height - top), columns = smaller(SIDE, of.width - left);
    float *out = of.out + ((picture * of.height + top) * of.width + left) * of.out_channels + channel;
    const bool large = of.pictures * of.height * of.width * of.out_channels >= LARGE;
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) (large ? stream : store)(out + (i * of.width + j) * of.out_channels, y[i][j]);
    if (!of.pooled) return;
    const int64_t height = of.height / 2, width = of.width / 2;
    float *pooled = of.pooled + ((picture * height + top / 2) * width + left / 2) * of.out_channels + channel;
    for (int i = 0; i + 1 < rows; i += 2)
        for (int j = 0; j + 1 < columns; j += 2)
            store(pooled + (i / 2 * width + j / 2) * of.out_channels,
                  largest(y[i][j], y[i][j + 1], y[i + 1][j], y[i + 1][j + 1]));
}

template <bool halves>
constexpr int64_t IN_A_FLOAT = halves ? 2 : 1;  // numbers, in what is multiplied

// The tiles of all pictures, row by row.
template <bool halves>
struct Tiles {
    const Convolution &of;
    int64_t across, in_picture, count, in;

    explicit Tiles(const Convolution &of)
        : of(of),
          across(parts(of.width, SIDE)),
          in_picture(across * parts(of.height, SIDE)),
          count(of.pictures * in_picture),
          in((of.first_channels + of.second_channels) / IN_A_FLOAT<halves>) {}

    // The windows of some, transformed: (36, count, in), with `step` from one place to the next.
    void read(int64_t start, int64_t count, float *windows, int64_t step) const {
        const int64_t area = of.height * of.width;
        for (int64_t tile = start, run; tile < start + count; tile += run, windows += run * in) {  // those that lie in one row
            const int64_t picture = tile / in_picture, top = tile % in_picture / across * SIDE, left = tile % across * SIDE;
            run = smaller(start + count - tile, across - left / SIDE);
            read_row<halves>(of.first + picture * area * of.first_channels, of.height, of.width, of.first_channels, top, left,
                             run, windows, in, step);
            if (of.second)
                read_row<halves>(of.second + picture * area * of.second_channels, of.height, of.width, of.second_channels, top,
                                 left, run, windows + of.first_channels / IN_A_FLOAT<halves>, in, step);
        }
    }

    // Their products, laid out likewise, as pixels of the result.
    void write(int64_t start, int64_t count, const float *products, int64_t step) const {
        for (int64_t tile = start; tile < start + count; tile++)
            for (int64_t channel = 0; channel < of.out_channels; channel += LANES)
                write_tile(of, products + (tile - start) * of.out_channels + channel, step, tile / in_picture,
                           tile % in_picture / across * SIDE, tile % across * SIDE, channel);
    }
};

// Tiles transformed, multiplied and transformed back, as many at a time as stay in the nearest caches.
template <bool halves>
void by_tiles(const Convolution &of, Member &member) {
    const Tiles<halves> tiles(of);
    if (!tiles.count) return;
    const int64_t in = tiles.in, out = of.out_channels;
    const int64_t rounds = parts(tiles.count, TILES * member.size);  // of all threads, each with about as many tiles
    const int64_t block = parts(tiles.count, rounds * member.size);
    member.share(parts(tiles.count, block), [&](int64_t job) {
        float *windows = of.workspace + member.number * PLACES * TILES * (in + out), *products = windows + PLACES * TILES * in;
        const int64_t start = job * block, count = smaller(block, tiles.count - start);
        tiles.read(start, count, windows, TILES * in);
        for (int64_t place = 0; place < PLACES; place++)
            multiply<halves>(count, windows + place * TILES * in, in, of.weights + place * out * in, nullptr, out,
                             products + place * TILES * out, out);
        tiles.write(start, count, products, TILES * out);
    });
}

// The same with all tiles at a time, for so few that it is the weights that count: each is read by one thread.
template <bool halves>
void by_places(const Convolution &of, Member &member) {
    const Tiles<halves> tiles(of);
    const int64_t in = tiles.in, out = of.out_channels;
    float *windows = of.workspace, *products = windows + PLACES * tiles.count * in;
    member.share(tiles.count, [&](int64_t tile) { tiles.read(tile, 1, windows + tile * in, tiles.count * in); });
    member.share(PLACES, [&](int64_t place) {
        for (int64_t tile = 0; tile < tiles.count; tile += TILES)
            multiply<halves>(smaller(TILES, tiles.count - tile), windows + (place * tiles.count + tile) * in, in,
                             of.weights + place * out * in, nullptr, out, products + (place * tiles.count + tile) * out, out);
    });
    member.share(tiles.count, [&](int64_t tile) { tiles.write(tile, 1, products + tile * out, tiles.count * out); });
}

// Not by Winograd's method, but as a product with the windows of all pixels; of a single row, or pixel, only with those taps
// that meet it.
template <bool halves>
void by_pixels(const Convolution &of, Member &member) {
    const int64_t area = of.height * of.width, pixels = of.pictures * area, channels = of.first_channels + of.second_channels;
    const int64_t begin = of.height > 1 ? 0 : of.width > 1 ? 3 : 4, end = 9 - begin;
    const int64_t a_tap = channels / IN_A_FLOAT<halves>, in = (end - begin) * a_tap;
    member.share(pixels, [&](int64_t pixel) {
        float *window = of.workspace + pixel * in;
        for (int64_t tap = begin; tap < end; tap++) {
            const int64_t y = pixel % area / of.width + tap / 3 - 1, x = pixel % of.width + tap % 3 - 1;
            const bool inside = y >= 0 && y < of.height && x >= 0 && x < of.width;
            const int64_t place = pixel / area * area + y * of.width + x;
            for (int64_t c = 0; c < channels; c += LANES) {
                const bool beside = c >= of.first_channels;
                const float *from = beside ? of.second + place * of.second_channels + c - of.first_channels
                                           : of.first + place * of.first_channels + c;
                put<halves>(window + (tap - begin) * a_tap, c, inside ? load(from) : Vector{});
            }
        }
    });
    member.share(of.out_channels / LANES, [&](int64_t block) {
        const int64_t channel = block * LANES;
        for (int64_t pixel = 0; pixel < pixels; pixel += TILES) {
            float *out = of.out + pixel * of.out_channels + channel;
            const int64_t count = smaller(TILES, pixels - pixel);
            multiply<halves>(count, of.workspace + pixel * in, in, of.weights + (channel * 9 + begin * LANES) * a_tap,
                             of.bias + channel, LANES, out, of.out_channels);
            for (int64_t n = 0; of.relu && n < count; n++)
                store(out + n * of.out_channels, larger(load(out + n * of.out_channels), Vector{}));
        }
        for (int64_t y = 0; of.pooled && y < of.pictures * (of.height / 2); y++)
            for (int64_t x = 0; x < of.width / 2; x++) {
                const int64_t corner = y / (of.height / 2) * area + y % (of.height / 2) * 2 * of.width + 2 * x;
                const float *from = of.out + corner * of.out_channels + channel, *below = from + of.width * of.out_channels;
                store(of.pooled + (y * (of.width / 2) + x) * of.out_channels + channel,
                      largest(load(from), load(from + of.out_channels), load(below), load(below + of.out_channels)));
            }
    });
}

// A transposed convolution, a row of the map at a time.
template <bool halves>
void by_rows(const Doubling &of, Member &member) {
    const int64_t in = of.channels / IN_A_FLOAT<halves>, pixel = of.out_channels, across = of.out_width * pixel;
    const auto beyond = [&](float *from, float *end, int64_t back) {
        for (; from < end; from += LANES) store(from, of.replicate ? load(from - back) : Vector{});
    };
    member.share(of.pictures * of.height, [&](int64_t row) {
        const float *pixels = of.map + row * of.width * of.channels;
        if constexpr (halves) {
            float *rounded = of.workspace + member.number * of.width * in;
            for (int64_t n = 0; n < of.width * of.channels; n += LANES) put<halves>(rounded, n, load(pixels + n));
            pixels = rounded;
        }
        const int64_t top = row % of.height * 2;
        float *out = of.out + (row / of.height * of.out_height + top) * across;
        for (int64_t left = 0; left < of.width; left += TILES)
            for (int64_t corner = 0; corner < 4; corner++)
                multiply<halves>(smaller(TILES, of.width - left), pixels + left * in, in,
                                 of.weights + corner * of.out_channels * in, of.bias, of.out_channels,
                                 out + corner / 2 * across + (2 * left + corner % 2) * pixel, 2 * pixel);
        for (int y = 0; y < 2; y++) beyond(out + y * across + 2 * of.width * pixel, out + (y + 1) * across, pixel);
        if (top + 2 == 2 * of.height) beyond(out + 2 * across, out + (of.out_height - top) * across, across);
    });
}

}  // namespace

extern "C" {

// Each operation in turn, by all threads.
void run(const Call *calls, int64_t count, const Threads *threads) {
    const std::unique_ptr<Member::Begun[]> begun(new Member::Begun[threads->count]);
    struct Run {
        const Call *calls;
        int64_t count;
        const Threads &threads;
        Member::Begun *begun;
    } all{calls, count, *threads, begun.get()};
    Job job = [](void *data) {
        auto &all = *static_cast<Run *>(data);
        const bool alone = all.threads.count == 1;
        Member member{all.threads, all.begun, alone ? 1 : all.threads.size(), alone ? 0 : all.threads.number()};
        for (int64_t n = 0; n < all.count; n++) all.calls[n].operation(all.calls[n].arguments, member);
    };
    if (threads->count > 1) threads->parallel(job, &all, threads->count, 0);
    else job(&all);
}

int64_t lanes() { return LANES; }
int64_t tiles() { return TILES; }
int64_t has_halves() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

void convolve(const void *arguments, Member &member) {
    const auto of = *static_cast<const Convolution *>(arguments);
    of.halves ? by_tiles<true>(of, member) : by_tiles<false>(of, member);
}

void convolve_in_stages(const void *arguments, Member &member) {
    const auto of = *static_cast<const Convolution *>(arguments);
    of.halves ? by_places<true>(of, member) : by_places<false>(of, member);
}

void convolve_directly(const void *arguments, Member &member) {
    const auto of = *static_cast<const Convolution *>(arguments);
    of.halves ? by_pixels<true>(of, member) : by_pixels<false>(of, member);
}

void double_map(const void *arguments, Member &member) {
    const auto of = *static_cast<const Doubling *>(arguments);
    of.halves ? by_rows<true>(of, member) : by_rows<false>(of, member);
}

void split_picture(const void *arguments, Member &member) {
    const auto of = *static_cast<const Splitting *>(arguments);
    member.share(of.pictures * of.out_height, [&](int64_t row) {
        const float *picture = of.picture + row / of.out_height * of.steps[0];
        float *out = of.out + row * of.out_width * of.out_channels;
        for (int64_t left = 0; left < of.out_width; left += STRETCH) {
            const int64_t end = smaller(left + STRETCH, of.out_width);
            std::fill(out + left * of.out_channels, out + end * of.out_channels, 0.0f);
            for (int64_t k = 0; k < smaller(of.out_channels, of.channels * of.side * of.side); k++) {
                const int64_t down = k / of.side % of.side, right = k % of.side;
                const float *from = picture + k / (of.side * of.side) * of.steps[1] +
                                    smaller(row % of.out_height * of.side + down, of.height - 1) * of.steps[2];
                const int64_t inside = smaller(end, parts(of.width - right, of.side));
                for (int64_t x = left; x < inside; x++)
                    out[x * of.out_channels + k] = from[(x * of.side + right) * of.steps[3]];
                for (int64_t x = inside; x < end; x++) out[x * of.out_channels + k] = from[(of.width - 1) * of.steps[3]];
            }
        }
    });
}

void apply_head(const void *arguments, Member &member) {
    const auto of = *static_cast<const Head *>(arguments);
    member.share(of.pictures * of.height, [&](int64_t row) {
        const int64_t picture = row / of.height, top = row % of.height * of.side, all = of.out_channels * of.side * of.side;
        for (int64_t left = 0; left < of.width; left += TILES)
            for (int64_t channel = 0; channel < all; channel += LANES) {
                const int64_t count = smaller(TILES, of.width - left);
                float results[TILES][LANES];
                multiply<false>(count, of.map + (row * of.width + left) * of.channels, of.channels,
                                of.weights + channel * of.channels, of.bias + channel, LANES, results[0], LANES);
                for (int64_t k = channel; k < smaller(all, channel + LANES); k++) {
                    const int64_t plane = picture * of.out_channels + k / (of.side * of.side), y = top + k / of.side % of.side;
                    for (int64_t n = 0; n < count && y < of.out_height; n++) {
                        const int64_t x = (left + n) * of.side + k % of.side;
                        if (x < of.out_width) of.out[(plane * of.out_height + y) * of.out_width + x] = results[n][k - channel];
                    }
                }
            }
    });
}
}
