// A U-Net's operations on a CPU in float32, on maps that lie as (pictures, height, width, channels).
//
// 3x3 convolutions go by Winograd's method, F(4x4, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
// CVPR 2016 (arXiv:1509.09308): a tile of 4x4 results comes from 6x6 pixels by 36 multiplications, where a direct convolution
// takes 144. A few neighbouring tiles are transformed, multiplied and transformed back at a time, so that nothing between
// leaves the core's own cache.

#include <immintrin.h>

#include <atomic>
#include <cstdint>

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

struct Threads {
    void (*parallel)(Job, void *, unsigned threads, unsigned flags);  // GOMP_parallel
    int64_t count;
};

// A 3x3 convolution with padding 1 of one map, or of two as if concatenated. Channels are whole vectors.
struct Convolution {
    const float *first, *second;  // second may be null
    const float *weights;         // of `convolve`: transformed, (36, out / LANES, in, LANES);
    const float *bias;            // of `convolve_directly`: (out / LANES, 9 * in, LANES)
    float *out, *pooled;          // pooled, by 2x2, may be null
    float *workspace;             // workspace_size() for each thread; or 9 * in for each pixel
    int64_t pictures, height, width, first_channels, second_channels, out_channels, relu;
    Threads threads;
};

// A transposed convolution of 2x2 windows that do not overlap, into a map that may be larger by a row and a column.
struct Doubling {
    const float *map;
    const float *weights;  // (4, out / LANES, in, LANES)
    const float *bias;
    float *out;
    int64_t pictures, height, width, channels, out_height, out_width, out_channels;
    Threads threads;
};

// Squares of pixels as channels, and zeros for further channels; the last row and column go on beyond the picture.
struct Splitting {
    const float *picture;
    float *out;
    int64_t steps[4];  // in the picture, from one of its (pictures, channels, height, width) to the next
    int64_t pictures, channels, height, width, side, out_height, out_width, out_channels;
    Threads threads;
};

// A 1x1 convolution whose results are squares of pixels; what lies beyond the result is left out.
struct Head {
    const float *map;
    const float *weights;  // (out / LANES, in, LANES), with zeros for channels that the result has not
    const float *bias;
    float *out;  // (pictures, out_channels, out_height, out_width)
    int64_t pictures, height, width, channels, side, out_height, out_width, out_channels;
    Threads threads;
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
INLINE Vector larger(Vector a, Vector b) { return a < b ? b : a; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// work(thread, job) for each job, the next one for whichever thread is free.
template <class Work>
void share(Threads threads, int64_t jobs, Work work) {
    struct Shared {
        Work &work;
        int64_t jobs;
        std::atomic<int64_t> job{0}, thread{0};
    } shared{work, jobs};
    Job run = [](void *data) {
        auto &shared = *static_cast<Shared *>(data);
        const int64_t thread = shared.thread++;
        for (int64_t job; (job = shared.job++) < shared.jobs;) shared.work(thread, job);
        _mm_sfence();  // what was streamed is there for the other threads
    };
    if (threads.count > 1 && jobs > 1) threads.parallel(run, &shared, smaller(threads.count, jobs), 0);
    else run(&shared);
}

// out[n][v] = start[v] + sum over k of x[n][k] weights[v][k], for `count` rows of x and `vectors` vectors of channels.
template <int count, int vectors>
INLINE void multiply_all(const float *x, int64_t in, const float *weights, const float *start, float *out, int64_t stride) {
    Vector sums[count][vectors];
    UNROLL for (int n = 0; n < count; n++)
        UNROLL for (int v = 0; v < vectors; v++) sums[n][v] = start ? load(start + v * LANES) : Vector{};
    for (int64_t k = 0; k < in; k++) {
        Vector weight[vectors];
        UNROLL for (int v = 0; v < vectors; v++) weight[v] = load(weights + (v * in + k) * LANES);
        UNROLL for (int n = 0; n < count; n++)
            UNROLL for (int v = 0; v < vectors; v++) sums[n][v] += x[n * in + k] * weight[v];
    }
    UNROLL for (int n = 0; n < count; n++)
        UNROLL for (int v = 0; v < vectors; v++) store(out + n * stride + v * LANES, sums[n][v]);
}

// The same for a count that only the call knows, up to TILES.
template <int vectors, int most = TILES>
INLINE void multiply_some(int64_t count, const float *x, int64_t in, const float *weights, const float *start, float *out,
                          int64_t stride) {
    if constexpr (most > 0) {
        if (count == most) multiply_all<most, vectors>(x, in, weights, start, out, stride);
        else multiply_some<vectors, most - 1>(count, x, in, weights, start, out, stride);
    }
}

// The same for any number of channels. Without a start it is zero.
void multiply(int64_t count, const float *x, int64_t in, const float *weights, const float *start, int64_t channels, float *out,
              int64_t stride) {
    int64_t c = 0;
    for (; c + 2 * LANES <= channels; c += 2 * LANES)
        multiply_some<2>(count, x, in, weights + c * in, start ? start + c : start, out + c, stride);
    if (c < channels) multiply_some<1>(count, x, in, weights + c * in, start ? start + c : start, out + c, stride);
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

// Windows of `tiles` neighbours in a row, transformed: (36, TILES, pitch).
void read_tiles(const float *map, int64_t height, int64_t width, int64_t channels, int64_t top, int64_t left, int64_t tiles,
                float *result, int64_t pitch) {
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
                for (int j = 0; j < WINDOW; j++) store(result + ((i * WINDOW + j) * TILES + tile) * pitch + c, row[j]);
            }
    }
}

// A tile's products, (36, TILES, out), as pixels of the result.
void write_tile(const Convolution &of, const float *products, int64_t picture, int64_t top, int64_t left, int64_t channel) {
    const Vector bias = load(of.bias + channel);
    Vector halves[SIDE][WINDOW], y[SIDE][SIDE];
    for (int j = 0; j < WINDOW; j++) {
        Vector column[WINDOW], half[SIDE];
        for (int i = 0; i < WINDOW; i++) column[i] = load(products + (i * WINDOW + j) * TILES * of.out_channels);
        transform_output(column, half);
        for (int i = 0; i < SIDE; i++) halves[i][j] = half[i];
    }
    for (int i = 0; i < SIDE; i++) {
        transform_output(halves[i], y[i]);
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
                  larger(larger(y[i][j], y[i][j + 1]), larger(y[i + 1][j], y[i + 1][j + 1])));
}

}  // namespace

extern "C" {

int64_t lanes() { return LANES; }

// Numbers that a convolution needs for each thread.
int64_t workspace_size(int64_t in_channels, int64_t out_channels) { return PLACES * TILES * (in_channels + out_channels); }

void convolve(const Convolution *convolution) {
    const Convolution of = *convolution;
    const int64_t in = of.first_channels + of.second_channels;
    const int64_t across = parts(of.width, SIDE), tiles = across * parts(of.height, SIDE);
    const int64_t rounds = parts(tiles, TILES * of.threads.count);  // of all threads, each with about as many tiles
    const int64_t block = parts(tiles, rounds * of.threads.count), blocks = parts(tiles, block);
    share(of.threads, of.pictures * blocks, [&](int64_t thread, int64_t job) {
        float *windows = of.workspace + thread * workspace_size(in, of.out_channels), *products = windows + PLACES * TILES * in;
        const int64_t picture = job / blocks, start = job % blocks * block, count = smaller(block, tiles - start);
        const float *first = of.first + picture * of.height * of.width * of.first_channels;
        const float *second = of.second + picture * of.height * of.width * of.second_channels;
        for (int64_t tile = 0, run; tile < count; tile += run) {  // those that lie in one row
            const int64_t top = (start + tile) / across * SIDE, left = (start + tile) % across * SIDE;
            run = smaller(count - tile, across - left / SIDE);
            float *into = windows + tile * in;
            read_tiles(first, of.height, of.width, of.first_channels, top, left, run, into, in);
            if (of.second) read_tiles(second, of.height, of.width, of.second_channels, top, left, run, into + of.first_channels, in);
        }
        for (int64_t place = 0; place < PLACES; place++)
            multiply(count, windows + place * TILES * in, in, of.weights + place * of.out_channels * in, nullptr, of.out_channels,
                     products + place * TILES * of.out_channels, of.out_channels);
        for (int64_t tile = 0; tile < count; tile++)
            for (int64_t channel = 0; channel < of.out_channels; channel += LANES)
                write_tile(of, products + tile * of.out_channels + channel, picture, (start + tile) / across * SIDE,
                           (start + tile) % across * SIDE, channel);
    });
}

// The same as a product with the windows of all pixels, for maps of so few that transformed weights would be most of the work.
void convolve_directly(const Convolution *convolution) {
    const Convolution of = *convolution;
    const int64_t in = of.first_channels + of.second_channels, area = of.height * of.width, pixels = of.pictures * area;
    share(of.threads, pixels, [&](int64_t, int64_t pixel) {
        float *window = of.workspace + pixel * 9 * in;
        for (int64_t tap = 0; tap < 9; tap++) {
            const int64_t y = pixel % area / of.width + tap / 3 - 1, x = pixel % of.width + tap % 3 - 1;
            const bool inside = y >= 0 && y < of.height && x >= 0 && x < of.width;
            const int64_t place = pixel / area * area + y * of.width + x;
            for (int64_t c = 0; c < in; c += LANES, window += LANES) {
                const bool beside = c >= of.first_channels;
                const float *from = beside ? of.second + place * of.second_channels + c - of.first_channels
                                           : of.first + place * of.first_channels + c;
                store(window, inside ? load(from) : Vector{});
            }
        }
    });
    share(of.threads, of.out_channels / LANES, [&](int64_t, int64_t block) {
        const int64_t channel = block * LANES;
        for (int64_t pixel = 0; pixel < pixels; pixel += TILES) {
            float *out = of.out + pixel * of.out_channels + channel;
            const int64_t count = smaller(TILES, pixels - pixel);
            multiply(count, of.workspace + pixel * 9 * in, 9 * in, of.weights + channel * 9 * in, of.bias + channel, LANES, out,
                     of.out_channels);
            for (int64_t n = 0; of.relu && n < count; n++)
                store(out + n * of.out_channels, larger(load(out + n * of.out_channels), Vector{}));
        }
        for (int64_t y = 0; of.pooled && y < of.pictures * (of.height / 2); y++)
            for (int64_t x = 0; x < of.width / 2; x++) {
                const int64_t corner = y / (of.height / 2) * area + y % (of.height / 2) * 2 * of.width + 2 * x;
                const float *from = of.out + corner * of.out_channels + channel, *below = from + of.width * of.out_channels;
                store(of.pooled + (y * (of.width / 2) + x) * of.out_channels + channel,
                      larger(larger(load(from), load(from + of.out_channels)), larger(load(below), load(below + of.out_channels))));
            }
    });
}

void double_map(const Doubling *doubling) {
    const Doubling of = *doubling;
    share(of.threads, of.pictures * of.height, [&](int64_t, int64_t row) {
        const float *pixels = of.map + row * of.width * of.channels;
        float *out = of.out + (row / of.height * of.out_height + row % of.height * 2) * of.out_width * of.out_channels;
        for (int64_t left = 0; left < of.width; left += TILES)
            for (int64_t corner = 0; corner < 4; corner++)
                multiply(smaller(TILES, of.width - left), pixels + left * of.channels, of.channels,
                         of.weights + corner * of.out_channels * of.channels, of.bias, of.out_channels,
                         out + (corner / 2 * of.out_width + 2 * left + corner % 2) * of.out_channels, 2 * of.out_channels);
    });
}

void split_picture(const Splitting *splitting) {
    const Splitting of = *splitting;
    share(of.threads, of.pictures * of.out_height, [&](int64_t, int64_t row) {
        const float *picture = of.picture + row / of.out_height * of.steps[0];
        float *out = of.out + row * of.out_width * of.out_channels;
        for (int64_t left = 0; left < of.out_width; left += STRETCH)
            for (int64_t k = 0; k < of.out_channels; k++) {
                const int64_t channel = k / (of.side * of.side), down = k / of.side % of.side, right = k % of.side;
                const float *from = picture + channel * of.steps[1] +
                                    smaller(row % of.out_height * of.side + down, of.height - 1) * of.steps[2];
                for (int64_t x = left; x < smaller(left + STRETCH, of.out_width); x++)
                    out[x * of.out_channels + k] =
                        channel < of.channels ? from[smaller(x * of.side + right, of.width - 1) * of.steps[3]] : 0;
            }
    });
}

void apply_head(const Head *head) {
    const Head of = *head;
    share(of.threads, of.pictures * of.height, [&](int64_t, int64_t row) {
        const int64_t picture = row / of.height, top = row % of.height * of.side, all = of.out_channels * of.side * of.side;
        for (int64_t left = 0; left < of.width; left += TILES)
            for (int64_t channel = 0; channel < all; channel += LANES) {
                const int64_t count = smaller(TILES, of.width - left);
                float results[TILES][LANES];
                multiply(count, of.map + (row * of.width + left) * of.channels, of.channels, of.weights + channel * of.channels,
                         of.bias + channel, LANES, results[0], LANES);
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
