/* Decode steps of llama-like decoder layers on a CPU: a few rows (new tokens of some sequences) through a run of layers
 * in one call, without Python in between.
 *
 * Weights are read where they are (row-major [out, in], any alignment; packed ones by packed.h). All sums are taken in fp32,
 * and every value is rounded to the model's dtype wherever the eager model would store it, so that both paths choose
 * the same tokens. Only GCC's vector extensions are used: the compiler turns them into AVX2, AVX-512 or NEON.
 *
 * Shapes: R rows (new tokens of any sequences), E hidden size, H query heads, K key/value heads, D head size,
 * F feed-forward size, C cache slots of a sequence, V vocabulary.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "two-byte weights are read in pairs, low half first"
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
/* Keep a loaded value in its register: the compiler would rather load it again for every use. */
#if defined(__AVX512F__)
#define KEEP(value) __asm__("" : "+v"(value))
#elif defined(__x86_64__)
#define KEEP(value) __asm__("" : "+x"(value))
#elif defined(__aarch64__)
#define KEEP(value) __asm__("" : "+w"(value))
#else
#define KEEP(value) (void)0
#endif
/* Call a function with its dtype as a constant, so that its loops become vector code for each dtype. */
#define BY_DTYPE(dtype, function, ...)             \
    ((dtype) == F32    ? function(F32, __VA_ARGS__)  \
     : (dtype) == BF16 ? function(BF16, __VA_ARGS__) \
                       : function(F16, __VA_ARGS__))
#define ALIGNED(count) (((size_t)(count) + 15) / 16 * 16)
#if defined(__clang__) || __GNUC__ >= 12
#define MIX(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, (__attribute__((vector_size(16))) int){i, j, k, l})
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef floats floats_at __attribute__((aligned(1), may_alias));
typedef words words_at __attribute__((aligned(1), may_alias));
typedef float quad __attribute__((vector_size(16)));

enum { F32, F16, BF16 };
enum { BLOCK = 2 * LANES, PANEL = 32, SLOTS = 512, MAX_ROWS = 16, MAX_HEAD = 256, CHUNK_FLOATS = 6144,
       STRIP = 4, STREAM_ROWS = 2, AHEAD_BYTES = 4096, TILE_COLUMNS = 32 };
#if defined(__AVX512F__) || defined(__aarch64__)
enum { TILE_ROWS = 8 }; /* activation rows whose sums with two weight rows fit the processor's registers */
#else
enum { TILE_ROWS = 5 };
#endif

/* ---- What Python hands over: 8-byte fields only, mirrored in native.py. ---- */

typedef struct {
    void (*parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
    int (*thread_number)(void), (*num_threads)(void);
} OpenMP;

typedef struct {
    int64_t dtype, hidden_size, num_heads, num_kv_heads, head_dim, rotary_dim, intermediate_size;
    double norm_eps, attention_scale, residual_multiplier;
} Shape;

/* A linear layer [out, in] in the model's dtype; with bits 4 or 8 packed, and `group` columns to a scale in that dtype. */
typedef struct {
    const void *weight, *scale, *bias;
    int64_t bits, group;
} Linear;

/* Pointers may be NULL where a family has no such tensor. */
typedef struct {
    const void *input_norm, *post_norm, *q_norm, *k_norm;
    Linear q, k, v, o, gate, up, down;
    void *keys, *values; /* [sequences, K, C, D] */
    int64_t window;      /* slots a token sees, its own included; 0: all */
    int64_t has_rope;
} Layer;

/* Rows that follow each other, in the step and in their sequence. Keys are stored turned by their position, so that
 * sequences of any lengths share a step. */
typedef struct {
    int64_t sequence;       /* which of the cache's */
    int64_t first_row, num_rows;
    int64_t past;           /* slots that are filled before: the first row goes into the next one */
    int64_t start;          /* first slot that is not padding */
} Piece;

typedef struct {
    const OpenMP *openmp;
    int64_t threads, num_layers;
    int64_t rows, num_pieces, capacity;
    const void *inputs;     /* [R, E] */
    void *outputs;          /* [R, E] */
    const void *cos, *sin;  /* [R, rotary_dim] */
    const Piece *pieces;    /* no sequence twice */
    float *workspace;       /* workspace_floats() */
    int64_t *counters;      /* num_counters() */
} Step;

typedef struct {
    const OpenMP *openmp;
    int64_t threads, dtype, rows, hidden_size, vocab_size;
    double norm_eps, logits_scaling;
    const void *inputs;     /* [R, E] */
    const void *norm;
    Linear weight;
    void *logits;           /* [R, V] */
    float *workspace;
    int64_t *counters;      /* as for a step */
} Head;

/* ---- Elements: fp32 in registers, the model's dtype in memory. ---- */

INLINE size_t size_of(int dtype) { return dtype == F32 ? 4 : 2; }
INLINE uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
INLINE float float_of(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }

/* fp16 to fp32 by moving the fields and scaling: exact for subnormals, infinities and NaN too. */
INLINE float half_to_float(uint32_t half) {
    uint32_t magnitude = (half & 0x7fff) << 13;
    uint32_t bits = bits_of(float_of(magnitude) * 0x1p112f) | (half & 0x8000) << 16;
    return float_of(magnitude >= 0x0f800000 ? bits | 0x7f800000 : bits);
}

INLINE float read_at(int dtype, const void *base, size_t i) {
    uint16_t narrow;
    float wide;
    if (dtype == F32) {
        memcpy(&wide, (const char *)base + 4 * i, 4);
        return wide;
    }
    memcpy(&narrow, (const char *)base + 2 * i, 2);
    return dtype == BF16 ? float_of((uint32_t)narrow << 16) : half_to_float(narrow);
}

INLINE float round_to_bfloat(float value) {
    uint32_t bits = bits_of(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    return value == value ? float_of(rounded) : value;
}

INLINE float round_to_half(float value) {
    uint32_t bits = bits_of(value), rounded = (bits + 0xfff + (bits >> 13 & 1)) & 0xffffe000;
    float magnitude = float_of(bits & 0x7fffffff), normal = float_of(rounded);
    float tiny = copysignf(magnitude + 0.5f - 0.5f, value); /* a multiple of 2^-24, the smallest half */
    float result = magnitude < 0x1p-14f ? tiny : normal;
    result = magnitude >= 65520.0f ? copysignf(INFINITY, value) : result;
    return value == value ? result : value;
}

/* Round to what the model's dtype can hold, staying in fp32. */
INLINE float rounded(int dtype, float value) {
    return dtype == F32 ? value : dtype == BF16 ? round_to_bfloat(value) : round_to_half(value);
}

/* Store a value that `rounded` has made representable. */
INLINE void write_at(int dtype, void *base, size_t i, float value) {
    uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
    uint16_t narrow = (uint16_t)(bits >> 16);
    if (dtype == F32) {
        memcpy((char *)base + 4 * i, &value, 4);
        return;
    }
    if (dtype == F16) {
        uint32_t tiny = (uint32_t)(float_of(magnitude) * 0x1p24f), normal = (magnitude - 0x38000000) >> 13;
        narrow = (uint16_t)(magnitude < 0x38800000 ? tiny : magnitude < 0x7f800000 ? normal : 0x7c00);
        narrow |= (magnitude > 0x7f800000 ? 0x200 : 0) | (bits >> 16 & 0x8000);
    }
    memcpy((char *)base + 2 * i, &narrow, 2);
}

/* e^x to about one unit in the last place, written so that loops over it become vector code. */
INLINE float exponential(float x) {
    float clamped = x < -87.0f ? -87.0f : x > 88.7f ? 88.7f : x;
    float magic = clamped * 1.44269504f + 12582912.0f, n = magic - 12582912.0f;
    float f = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * f + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = (p * f + 1.0f) * f + 1.0f;
    /* The scale 2^n is applied in two halves: n = 128 alone is no fp32 number. */
    int32_t whole = (int32_t)(bits_of(magic) - 0x4b400000), half = whole >> 1;
    p = p * float_of((uint32_t)(half + 127) << 23) * float_of((uint32_t)(whole - half + 127) << 23);
    return x > 88.7f ? INFINITY : x < -87.0f ? 0.0f : p;
}

/* ---- Activations: fp32, in the order in which the products read them. ----
 * Beyond STREAM_ROWS rows, a row is cut into chunks so short that one chunk of all rows stays in the L1 cache; the
 * chunks of all rows lie next to each other. A 32-bit word of two-byte weights yields an even and an odd element, so
 * that each whole block of 2 LANES activations holds its even elements first. */

typedef struct {
    size_t rows, columns, chunk; /* chunk: columns per chunk */
    int is_paired, is_tiled;
} Order;

static int64_t are_tiles_allowed;

INLINE Order order_of(int dtype, size_t rows, size_t columns) {
    size_t num_chunks = rows <= STREAM_ROWS ? 1 : (rows * columns + CHUNK_FLOATS - 1) / CHUNK_FLOATS;
    size_t chunk = (columns + num_chunks - 1) / num_chunks;
    Order order = {rows, columns, (chunk + BLOCK - 1) / BLOCK * BLOCK, dtype != F32, 0};
#if defined(__F16C__)
    order.is_paired = dtype == BF16; /* the processor widens fp16 in order */
#endif
    return order;
}

/* The same for what linear layers read: in bf16 on matrix tiles where the processor has them. Then a word holds a pair of
 * columns, and the words of all rows lie next to each other. */
INLINE Order order_for_products(int dtype, size_t rows, size_t columns) {
    Order order = order_of(dtype, rows, columns);
    order.is_tiled = are_tiles_allowed && dtype == BF16 && columns % TILE_COLUMNS == 0;
    return order;
}

INLINE size_t floats_in(Order order) {
    return (order.columns + order.chunk - 1) / order.chunk * order.chunk * order.rows;
}

/* Where element i of a row comes within the row. */
INLINE size_t place(const Order *order, size_t i) {
    size_t block = i / BLOCK * BLOCK, j = i % BLOCK;
    return order->is_paired && block + BLOCK <= order->columns ? block + j % 2 * LANES + j / 2 : i;
}

INLINE size_t offset_of(const Order *order, size_t row, size_t i) {
    uint32_t at = (uint32_t)place(order, i), chunk = (uint32_t)order->chunk;
    return (at / chunk * order->rows + row) * chunk + at % chunk;
}

/* Put elements first .. first + count - 1 of a row where the products expect them. */
static void arrange(const Order *order, size_t row, size_t first, size_t count, const float *from, float *x) {
    size_t i = 0;
    if (order->is_tiled) {
        for (uint16_t *to = (uint16_t *)x; i < count; i++)
            to[((first + i) / 2 * order->rows + row) * 2 + (first + i) % 2] = (uint16_t)(bits_of(from[i]) >> 16);
        return;
    }
    for (; first % BLOCK == 0 && i + BLOCK <= count; i += BLOCK) {
        float *to = x + offset_of(order, row, first + i);
        if (!order->is_paired) memcpy(to, from + i, 4 * BLOCK);
        else
            for (int j = 0; j < LANES; j++) {
                to[j] = from[i + 2 * j];
                to[LANES + j] = from[i + 2 * j + 1];
            }
    }
    for (; i < count; i++) x[offset_of(order, row, first + i)] = from[i];
}

/* How a linear layer wants to find activations that are written in pieces: packed ones make whole numbers of whole rows
 * themselves, from fp32 as it comes. */
INLINE Order order_before(const Linear *linear, Order order) {
    if (linear->bits) order.chunk = (order.columns + BLOCK - 1) / BLOCK * BLOCK, order.is_paired = order.is_tiled = 0;
    return order;
}

/* ---- Products: a panel of up to PANEL weight rows with all activation rows. ---- */

#if defined(__F16C__)
INLINE floats widen_half(const char *at) {
#if LANES == 16
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
#else
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
#endif
}
#endif

INLINE floats half_to_floats(words half) {
    words magnitude = (half & 0x7fff) << 13;
    words bits = (words)((floats)magnitude * 0x1p112f) | (half & 0x8000) << 16;
    return (floats)(bits | ((words)(magnitude >= 0x0f800000) & 0x7f800000));
}

/* Widen LANES of the BLOCK weights from column k on, to match the order of `place`. */
INLINE floats read_half_block(int dtype, const char *row, size_t k, int half) {
    const char *at = row + k * size_of(dtype);
    if (dtype == F32) return *(const floats_at *)(at + 4 * LANES * half);
#if defined(__F16C__)
    if (dtype == F16) return widen_half(at + 2 * LANES * half);
#endif
    words pairs = *(const words_at *)at;
    if (dtype == BF16) return (floats)(half ? pairs & 0xffff0000 : pairs << 16);
    return half_to_floats(half ? pairs >> 16 : pairs & 0xffff);
}

/* a * b + c, rounded once. Said by name: left to itself, GCC fuses some such sums and not others where it takes short
 * vectors for faster unfused, and then a sum's bits depend on how many rows share the step. */
INLINE floats multiply_add(floats a, floats b, floats c) {
#if LANES == 16
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8 && defined(__FMA__)
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif LANES == 4 && defined(__aarch64__)
    return (floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* sums[n][m] += M weight rows times N activation rows over `width` columns. Each sum is one chain of multiply-adds from
 * the first column to the last, so that a row's sums are the same whatever rows share the step. Weights `ahead` bytes
 * further on are fetched meanwhile: the processor's own prefetchers stop at every page. (Products of bf16 pairs,
 * vdpbf16ps, take twice as long one after the other: 4 % gained with one row, 13 % lost with 16 on Sapphire Rapids.) */
INLINE void tile(int dtype, int M, int N, const char *w, size_t pitch, int is_fetching, ptrdiff_t ahead, const float *x,
                 size_t chunk, size_t width, floats *sums, int is_first) {
    floats sum[TILE_ROWS][2], weights[2];
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int m = 0; m < M; m++) sum[n][m] = is_first ? (floats){0} : sums[n * STRIP + m];
    for (size_t k = 0; k < width; k += BLOCK)
        UNROLL for (int half = 0; half < 2; half++) {
            UNROLL for (int m = 0; m < M; m++) {
                if (is_fetching && half == 0) __builtin_prefetch(w + m * pitch + k * size_of(dtype) + ahead);
                weights[m] = read_half_block(dtype, w + m * pitch, k, half);
                KEEP(weights[m]);
            }
            UNROLL for (int n = 0; n < N; n++) {
                floats values = *(const floats_at *)(x + n * chunk + k + half * LANES);
                KEEP(values);
                UNROLL for (int m = 0; m < M; m++) sum[n][m] = multiply_add(weights[m], values, sum[n][m]);
            }
        }
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int m = 0; m < M; m++) sums[n * STRIP + m] = sum[n][m];
}

/* One or two weight rows with all activation rows, in groups that just fit the processor's registers. */
INLINE void multiply(int dtype, int M, const char *w, size_t pitch, ptrdiff_t ahead, const float *x, size_t chunk,
                     size_t width, int rows, floats *sums, int is_first) {
    int groups = (rows + TILE_ROWS - 1) / TILE_ROWS, is_fetching = 1;
    for (; groups > 0; groups--, is_fetching = 0) {
        int N = (rows + groups - 1) / groups;
#define CASE(n, fetches) \
    case n + 16 * fetches: tile(dtype, M, n, w, pitch, fetches, ahead, x, chunk, width, sums, is_first); break
        switch (N + 16 * is_fetching) {
            CASE(1, 1); CASE(2, 1); CASE(3, 1); CASE(4, 1); CASE(5, 1); CASE(3, 0); CASE(4, 0); CASE(5, 0);
#if defined(__AVX512F__) || defined(__aarch64__)
            CASE(6, 1); CASE(7, 1); CASE(8, 1); CASE(6, 0); CASE(7, 0); CASE(8, 0);
#endif
        }
#undef CASE
        rows -= N, x += N * chunk, sums += N * STRIP;
    }
}

/* Fold each of STRIP = 4 vectors to its total. */
INLINE quad totals(const floats *values) {
    quad v[4] = {{0}};
    for (int i = 0; i < 4; i++) {
        quad part[LANES / 4];
        memcpy(part, &values[i], sizeof(floats));
        for (int j = 0; j < LANES / 4; j++) v[i] += part[j];
    }
    quad even = MIX(v[0], v[1], 0, 4, 1, 5) + MIX(v[0], v[1], 2, 6, 3, 7); /* sums of lanes 0 + 2 and 1 + 3 */
    quad odd = MIX(v[2], v[3], 0, 4, 1, 5) + MIX(v[2], v[3], 2, 6, 3, 7);
    return MIX(even, odd, 0, 1, 4, 5) + MIX(even, odd, 2, 3, 6, 7);
}

/* The columns after the last whole block, one by one: nothing is read past the end of a tensor. */
INLINE float rest_of_row(int dtype, const char *row, const Order *order, const float *x, int n) {
    float sum = 0.0f;
    for (size_t k = order->columns / BLOCK * BLOCK; k < order->columns; k++)
        sum += read_at(dtype, row, k) * x[offset_of(order, n, k)];
    return sum;
}

/* Up to STRIP weight rows with one chunk, from column k on, of all activation rows. */
INLINE void multiply_strip(int dtype, const char *w, const Order *order, size_t k, int count, const float *x,
                           floats *sums) {
    size_t size = size_of(dtype), pitch = order->columns * size, chunk = order->chunk;
    size_t whole = order->columns / BLOCK * BLOCK, width = whole - k < chunk ? whole - k : chunk;
    /* Memory is read fastest one weight row after the other, if the few sums under way keep up with it. */
    int is_single = order->rows <= STREAM_ROWS && LANES == 16;
    size_t num_chunks = (whole + chunk - 1) / chunk, further = num_chunks > 2 ? 2 : 1, left = num_chunks - k / chunk;
    /* Fetched is what comes two chunks of a strip later, in this strip or the next; where they are rows, some rows on. */
    ptrdiff_t ahead = further < left ? further * chunk * size : STRIP * pitch - (num_chunks - further) * chunk * size;
    if (num_chunks == 1) ahead = (dtype == F32 ? 2 : 4) * pitch;
    if (num_chunks == 1 && (is_single || ahead < AHEAD_BYTES)) ahead = AHEAD_BYTES;
    w += k * size;
    for (int m = 0, done; m < count; m += done, w += done * pitch) {
        done = is_single || m + 1 == count ? 1 : 2;
        if (done == 1) multiply(dtype, 1, w, pitch, ahead, x, chunk, width, (int)order->rows, sums + m, k == 0);
        else multiply(dtype, 2, w, pitch, ahead, x, chunk, width, (int)order->rows, sums + m, k == 0);
    }
}

INLINE void panel_of(int dtype, const char *w, const Order *order, int count, const float *x, float *out) {
    floats sums[MAX_ROWS * STRIP] = {{0}};
    size_t pitch = order->columns * size_of(dtype), whole = order->columns / BLOCK * BLOCK;
    for (int m = 0; m < count; m += STRIP, w += STRIP * pitch, out += STRIP) {
        int left = count - m < STRIP ? count - m : STRIP;
        for (size_t k = 0; k < whole; k += order->chunk)
            multiply_strip(dtype, w, order, k, left, x + k * order->rows, sums);
        for (int n = 0; n < (int)order->rows; n++) {
            quad sum = totals(sums + n * STRIP);
            for (int i = 0; whole < order->columns && i < left; i++)
                sum[i] += rest_of_row(dtype, w + i * pitch, order, x, n);
            memcpy(out + n * PANEL, &sum, sizeof sum);
        }
    }
}

/* out[n][m] = weight row m . activation row n, for `count` <= PANEL rows of weights. */
static void panel(int dtype, const void *w, const Order *order, int count, const float *x, float *out) {
    BY_DTYPE(dtype, panel_of, w, order, count, x, out);
}

#include "packed.h"
#include "tiles.h"
#include "many.h"

/* Activations of all rows, as each kind of weights reads them. */
typedef struct {
    float *plain, *packed[2]; /* arranged; for 4 and for 8 bits */
} Inputs;

INLINE float *packed_for(const Inputs *x, const Linear *linear) { return x->packed[linear->bits == 8]; }

INLINE void add_bias(int dtype, const void *bias, size_t first, int count, float *sums) {
    for (int m = 0; m < count; m++)
        sums[m] = rounded(dtype, bias ? sums[m] + read_at(dtype, bias, first + m) : sums[m]);
}

/* The same for rows `first` and on of a linear layer: bias added, rounded as the model stores it. */
static void linear(int dtype, const Linear *l, const Order *order, size_t first, int count, const Inputs *x, float *out) {
    size_t columns = order->columns;
    if (l->bits) packed_panel(dtype, l, order->rows, columns, first, count, packed_for(x, l), out);
    else if (order->is_tiled) tiled_panel((const char *)l->weight + first * columns * 2, order, count, x->plain, out);
    else panel(dtype, (const char *)l->weight + first * columns * size_of(dtype), order, count, x->plain, out);
    for (size_t n = 0; n < order->rows; n++) BY_DTYPE(dtype, add_bias, l->bias, first, count, out + n * PANEL);
}

/* ---- Norms and rotary positions. ---- */

/* 1 / root mean square of `count` values. */
INLINE float inverse_rms(const float *values, size_t count, double eps) {
    floats sums[4] = {{0}};
    quad total;
    size_t i = 0;
    for (; i + BLOCK <= count; i += BLOCK)
        for (int half = 0; half < 2; half++) {
            floats v = *(const floats_at *)(values + i + half * LANES);
            sums[half] += v * v;
        }
    total = totals(sums);
    for (; i < count; i++) total[0] += values[i] * values[i];
    return 1.0f / sqrtf((total[0] + total[1]) / count + (float)eps);
}

INLINE void rms_norm_of(int dtype, const void *weight, double eps, size_t count, const float *from, float *to) {
    float scale = inverse_rms(from, count, eps);
    for (size_t i = 0; i < count; i++)
        to[i] = rounded(dtype, rounded(dtype, from[i] * scale) * read_at(dtype, weight, i));
}

static void rms_norm(int dtype, const void *weight, double eps, size_t count, const float *from, float *to) {
    BY_DTYPE(dtype, rms_norm_of, weight, eps, count, from, to);
}

/* Norm all rows of hidden [R, E] into x, as `count` linear layers will read it; `row` is room for one row. */
static void norm_rows(int dtype, const void *weight, double eps, const Order *order, const float *hidden,
                      const Linear *const *readers, int count, float *row, const Inputs *x) {
    int wanted[9] = {0};
    for (int i = 0; i < count; i++) wanted[readers[i]->bits] = 1;
    for (size_t n = 0; n < order->rows; n++) {
        rms_norm(dtype, weight, eps, order->columns, hidden + n * order->columns, row);
        if (wanted[0]) arrange(order, n, 0, order->columns, row, x->plain);
        for (int bits = 4; bits <= 8; bits += 4)
            if (wanted[bits]) pack_row(dtype, bits, order->rows, order->columns, n, row, x->packed[bits == 8]);
    }
}

/* Turn a head by its position: halves paired, each product and the sum rounded as the eager model does. */
INLINE void rotate(int dtype, size_t half, const float *cos, const float *sin, float *head) {
    for (size_t i = 0; i < half; i++) {
        float a = head[i], b = head[half + i];
        head[i] = rounded(dtype, rounded(dtype, a * cos[i]) - rounded(dtype, b * sin[i]));
        head[half + i] = rounded(dtype, rounded(dtype, b * cos[half + i]) + rounded(dtype, a * sin[half + i]));
    }
}

/* ---- The state of one call, shared by its threads. ---- */

typedef struct {
    const Shape *shape;
    const Layer *layers;
    const Step *step;
    Order by_hidden, by_heads, by_ffn; /* of activations entering q/k/v and gate/up, o, and down */
    float *cos, *sin;                  /* [R, rotary_dim] */
    float *hidden;                     /* [R, E], the residual stream */
    float *qkv;                        /* [R, (H + 2 K) D] */
    float *attended, *activated;       /* arranged */
    float *own;                        /* per thread: room for one row, then rows for each kind of weights */
    size_t own_floats;
} Decode;

/* The most that one kind of packed weights wants to read. */
static size_t packed_room(const Decode *d) {
    int dtype = (int)d->shape->dtype;
    size_t widest = d->by_heads.columns > d->by_ffn.columns ? d->by_heads.columns : d->by_ffn.columns;
    widest = widest > d->by_hidden.columns ? widest : d->by_hidden.columns;
    return packed_floats(dtype, d->by_hidden.rows, widest);
}

/* What a thread needs: room for one row, then for all rows as each kind of weights reads them. */
INLINE size_t own_floats(Order by_hidden, size_t packed) {
    return ALIGNED(by_hidden.columns) + floats_in(by_hidden) + 2 * packed;
}

INLINE Inputs own_inputs(float *own, Order by_hidden, size_t packed) {
    float *plain = own + ALIGNED(by_hidden.columns), *first = plain + floats_in(by_hidden);
    return (Inputs){plain, {first, first + packed}};
}

static size_t lay_out(Decode *d, const Shape *shape, size_t rows, size_t threads, float *workspace) {
    size_t num_heads = shape->num_heads, wide = (num_heads + 2 * shape->num_kv_heads) * shape->head_dim;
    float *next = workspace;
    d->shape = shape;
    d->by_hidden = order_for_products((int)shape->dtype, rows, shape->hidden_size);
    d->by_heads = order_for_products((int)shape->dtype, rows, num_heads * shape->head_dim);
    d->by_ffn = order_for_products((int)shape->dtype, rows, shape->intermediate_size);
    d->own_floats = own_floats(d->by_hidden, packed_room(d));
    d->cos = next, next += ALIGNED(rows * shape->rotary_dim);
    d->sin = next, next += ALIGNED(rows * shape->rotary_dim);
    d->hidden = next, next += ALIGNED(rows * shape->hidden_size);
    d->qkv = next, next += ALIGNED(rows * wide);
    d->attended = next, next += floats_in(d->by_heads);
    d->activated = next, next += floats_in(d->by_ffn);
    d->own = next, next += threads * d->own_floats;
    return (size_t)(next - workspace);
}

int64_t workspace_floats(const Shape *shape, int64_t rows, int64_t threads) {
    Decode decode;
    return (int64_t)lay_out(&decode, shape, rows, threads, NULL);
}

/* ---- How threads share a call. ----
 * A call is a row of phases, a phase a number of tasks in any order, all done before the next phase begins. Threads take
 * tasks as they get free, and nobody waits for a thread that holds none. One that the system interrupts in a task does
 * not hold up the rest either: who has waited long enough does the task again. A result is made in memory of the thread's
 * own, and only the first to finish may publish it where the next phase reads. */

enum { PHASES = 5, FIELDS = 8 }; /* phases of a layer; counters of a phase, a cache line */
enum { TAKEN, DONE, IS_REDONE };
enum { PAUSES = 32, PATIENCE_NS = 30000, SPIN_NS = 100000, REST_NS = 50000 };

typedef struct {
    int64_t *counters;   /* [FIELDS] */
    uint32_t *published; /* by task: the last phase whose result of that number was published */
    uint32_t number;     /* of the phase in the call, from 1 */
    int64_t count;       /* tasks */
    int64_t start, idle, own, redo;
    int64_t next, end;   /* of the run of tasks that this thread took last */
    int64_t runs;        /* what is left is taken as so many runs; 0: as single tasks, each done once */
} Phase;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

INLINE int64_t load(const int64_t *counter) { return __atomic_load_n(counter, __ATOMIC_ACQUIRE); }
INLINE int64_t take(int64_t *counter, int64_t count) { return __atomic_fetch_add(counter, count, __ATOMIC_RELAXED); }

INLINE void pause_briefly(void) {
#if defined(__x86_64__)
    for (int i = 0; i < PAUSES; i++) __builtin_ia32_pause();
#elif defined(__aarch64__)
    for (int i = 0; i < PAUSES; i++) __asm__ volatile("yield");
#endif
}

/* Wait for other threads: at first awake, then by leaving the processor to whoever needs it. */
static void wait_a_little(int64_t idle_since) {
    if (now() - idle_since < SPIN_NS) pause_briefly();
    else nanosleep(&(struct timespec){0, REST_NS}, NULL);
}

/* The counters of all phases and of who has left come first, then `published`. `threads`: how many share the tasks; 0: they
 * are taken one by one, and done once. */
static Phase phase_of(int64_t *counters, int64_t num_phases, int64_t number, int64_t count, int64_t threads) {
    uint32_t *published = (uint32_t *)(counters + (num_phases + 1) * FIELDS);
    return (Phase){.counters = counters + number * FIELDS, .published = published, .number = (uint32_t)number,
                   .count = count, .start = now(), .redo = -1, .runs = 2 * threads};
}

static size_t counters_of(int64_t num_phases, int64_t most_weight_rows) {
    return (num_phases + 1) * FIELDS + most_weight_rows / PANEL + 4;
}

static int64_t most_weight_rows(const Shape *s) {
    int64_t most = (s->num_heads + 2 * s->num_kv_heads) * s->head_dim;
    if (s->intermediate_size > most) most = s->intermediate_size;
    return s->hidden_size > most ? s->hidden_size : most;
}

/* Enough for a step of some layers, and for a head. */
int64_t num_counters(const Shape *shape, int64_t num_layers, int64_t vocab_size) {
    int64_t most = most_weight_rows(shape);
    return (int64_t)counters_of(PHASES * num_layers + 1, vocab_size > most ? vocab_size : most);
}

static void reset(int64_t *counters, int64_t num_phases, int64_t most_weight_rows) {
    memset(counters, 0, 8 * counters_of(num_phases, most_weight_rows));
}

INLINE int has_tasks(const Phase *p) { return load(p->counters + TAKEN) < p->count; }

/* Whether this thread may do a task again that another one holds: once per phase, and not before it has waited as long
 * as tasks of its own took several times over. */
static int may_redo(const Phase *p) {
    if (!p->runs || p->own == 0 || p->redo >= 0) return 0;
    if (now() - p->idle < PATIENCE_NS + 4 * (p->idle - p->start) / p->own) return 0;
    return __atomic_exchange_n(p->counters + IS_REDONE, 1, __ATOMIC_RELAXED) == 0;
}

INLINE int is_published(const Phase *p, int64_t task) {
    return __atomic_load_n(p->published + task, __ATOMIC_RELAXED) >= p->number;
}

/* Take tasks that follow each other, fewer the fewer are left: memory is read fastest in long runs. */
static int take_run(Phase *p) {
    int64_t left = p->count - load(p->counters + TAKEN), size = p->runs && left > p->runs ? left / p->runs : 1;
    if (left > 0) p->next = take(p->counters + TAKEN, size), p->end = p->next + size;
    if (p->end > p->count) p->end = p->count;
    return p->next < p->end;
}

/* The next task; -1 when all are done. */
static int64_t next_task(Phase *p) {
    while (p->next < p->end || (p->idle == 0 && take_run(p))) {
        int64_t task = p->next++;
        if (!p->runs || !is_published(p, task)) return p->own++, task;
    }
    if (p->idle == 0) p->idle = load(p->counters + DONE) < p->count ? now() : 1;
    while (load(p->counters + DONE) < p->count) {
        for (; p->redo >= 0 && p->redo < p->count; p->redo++)
            if (!is_published(p, p->redo)) return p->redo;
        if (may_redo(p)) p->redo = 0;
        else wait_a_little(p->idle);
    }
    return -1;
}

/* Whether this thread is the first to have a task's result, and so to publish it and then call `finish`. */
INLINE int is_first(const Phase *p, int64_t task) {
    uint32_t last = __atomic_load_n(p->published + task, __ATOMIC_RELAXED);
    return last < p->number &&
           __atomic_compare_exchange_n(p->published + task, &last, p->number, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

INLINE void finish(const Phase *p) { __atomic_fetch_add(p->counters + DONE, 1, __ATOMIC_RELEASE); }

/* Before its first thread leaves a call all others have: the system's own way to wait for them would keep it awake. */
static void leave(const OpenMP *omp, int64_t *counters) {
    int64_t idle = now();
    if (omp->thread_number() != 0) __atomic_fetch_add(counters, 1, __ATOMIC_RELEASE);
    else while (load(counters) < omp->num_threads() - 1) wait_a_little(idle);
}

INLINE int64_t panels_of(int64_t rows) { return (rows + PANEL - 1) / PANEL; }
INLINE int count_from(int64_t first, int64_t end) { return (int)(end - first < PANEL ? end - first : PANEL); }

/* ---- Phase 1: q, k and v of all rows. ---- */

static void project(const Decode *d, const Layer *layer, const Inputs *x, Phase *phase) {
    const Shape *s = d->shape;
    const Linear *const projections[] = {&layer->q, &layer->k, &layer->v};
    int64_t q = s->num_heads * s->head_dim, k = s->num_kv_heads * s->head_dim, wide = q + 2 * k;
    int64_t q_panels = panels_of(q), k_panels = panels_of(k);
    float out[MAX_ROWS * PANEL];
    for (int64_t task; (task = next_task(phase)) >= 0;) {
        int part = task < q_panels ? 0 : task < q_panels + k_panels ? 1 : 2;
        int64_t first = PANEL * (part == 0 ? task : task - q_panels - (part - 1) * k_panels);
        int64_t column = first + (part == 0 ? 0 : q + (part - 1) * k);
        int count = count_from(first, part == 0 ? q : k);
        linear((int)s->dtype, projections[part], &d->by_hidden, first, count, x, out);
        if (!is_first(phase, task)) continue;
        for (size_t n = 0; n < d->by_hidden.rows; n++) memcpy(d->qkv + n * wide + column, out + n * PANEL, 4 * count);
        finish(phase);
    }
}

/* ---- Phase 2: rotary positions, cache, attention; one task per piece and key/value head. ---- */

/* Norm and turn a head of one row, as a query or a key; cos and sin [rotary_dim] are the row's. */
static void prepare_head(const Shape *s, const Layer *layer, const void *norm, const float *cos, const float *sin,
                         const float *from, float *to) {
    if (norm) rms_norm((int)s->dtype, norm, s->norm_eps, s->head_dim, from, to);
    else memcpy(to, from, 4 * s->head_dim);
    if (layer->has_rope) BY_DTYPE(s->dtype, rotate, s->rotary_dim / 2, cos, sin, to);
}

static void append(const Decode *d, const Layer *layer, int64_t kv_head, size_t n, size_t slot, char *keys, char *values) {
    const Shape *s = d->shape;
    size_t D = s->head_dim, wide = (s->num_heads + 2 * s->num_kv_heads) * D;
    const float *key = d->qkv + n * wide + (s->num_heads + kv_head) * D, *value = key + s->num_kv_heads * D;
    float turned[MAX_HEAD];
    prepare_head(s, layer, layer->k_norm, d->cos + n * s->rotary_dim, d->sin + n * s->rotary_dim, key, turned);
    for (size_t i = 0; i < D; i++) {
        write_at((int)s->dtype, keys, slot * D + i, turned[i]);
        write_at((int)s->dtype, values, slot * D + i, value[i]);
    }
}

/* scores[h][slot] = key . query h. */
static void score(int dtype, const char *keys, const Order *order, int count, const float *query, float *scores) {
    float out[MAX_ROWS * PANEL];
    for (int slot = 0; slot < count; slot += PANEL) {
        int part = count_from(slot, count);
        panel(dtype, keys + slot * order->columns * size_of(dtype), order, part, query, out);
        for (size_t h = 0; h < order->rows; h++) memcpy(scores + h * SLOTS + slot, out + h * PANEL, 4 * part);
    }
}

INLINE floats larger(floats a, floats b) {
    words is_larger = (words)(a > b);
    return (floats)(((words)a & is_larger) | ((words)b & ~is_larger));
}

/* Softmax over one block of scores with the running maximum `top` and sum `total`; `sum` [D] is rescaled to match.
 * The weights are rounded, their total is not: so does torch's attention on CPUs, in blocks of the same size. */
static void soften(int dtype, float *scores, int count, float scale, float *top, float *total, float *sum,
                   size_t head_dim) {
    floats *blocks = (floats *)scores, tops = (floats){0} - INFINITY, part[4] = {{0}};
    int num_blocks = (count + LANES - 1) / LANES;
    float largest = *top, shrink;
    for (int i = count; i < num_blocks * LANES; i++) scores[i] = -INFINITY;
    for (int i = 0; i < num_blocks; i++) {
        blocks[i] *= scale;
        tops = larger(blocks[i], tops);
    }
    for (int i = 0; i < LANES; i++) largest = tops[i] > largest ? tops[i] : largest;
    shrink = exponential(*top - largest);
    for (int i = 0; i < num_blocks * LANES; i++) scores[i] = exponential(scores[i] - largest);
    for (int i = 0; i < num_blocks; i++) part[i % 4] += blocks[i];
    for (int i = 0; i < num_blocks * LANES; i++) scores[i] = rounded(dtype, scores[i]);
    for (size_t i = 0; i < head_dim && *top > -INFINITY; i++) sum[i] *= shrink;
    quad sums = totals(part);
    *total = *total * shrink + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    *top = largest;
}

/* sums[n] [D] += weights[n][slot] * values[slot] for N heads and the C blocks from column i on, D in the order of
 * `place`. */
INLINE void mix(int dtype, int N, int C, const char *values, size_t head_dim, size_t i, int count, const float *weights,
                float *sums) {
    floats sum[4][8], part[8];
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int c = 0; c < 2 * C; c++) sum[n][c] = *(const floats_at *)(sums + n * MAX_HEAD + i + c * LANES);
    for (int slot = 0; slot < count; slot++, values += head_dim * size_of(dtype)) {
        __builtin_prefetch(values + i * size_of(dtype) + AHEAD_BYTES);
        UNROLL for (int c = 0; c < 2 * C; c++) part[c] = read_half_block(dtype, values, i + c / 2 * BLOCK, c % 2);
        UNROLL for (int n = 0; n < N; n++)
            UNROLL for (int c = 0; c < 2 * C; c++) sum[n][c] += weights[n * SLOTS + slot] * part[c];
    }
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int c = 0; c < 2 * C; c++) *(floats_at *)(sums + n * MAX_HEAD + i + c * LANES) = sum[n][c];
}

/* The same for whole heads. */
INLINE void mix_heads(int dtype, int N, const char *values, size_t head_dim, int count, const float *weights,
                      float *sums) {
    const int C = N == 1 ? 4 : N == 2 ? 2 : 1;
    size_t i = 0;
    for (; i + C * BLOCK <= head_dim; i += C * BLOCK) mix(dtype, N, C, values, head_dim, i, count, weights, sums);
    for (; i + BLOCK <= head_dim; i += BLOCK) mix(dtype, N, 1, values, head_dim, i, count, weights, sums);
    for (; i < head_dim; i++)
        for (int n = 0; n < N; n++)
            for (int slot = 0; slot < count; slot++)
                sums[n * MAX_HEAD + i] += weights[n * SLOTS + slot] * read_at(dtype, values, slot * head_dim + i);
}

INLINE void mix_all(int dtype, int heads, const char *values, size_t head_dim, int count, const float *weights,
                    float *sums) {
    for (; heads >= 4; heads -= 4, weights += 4 * SLOTS, sums += 4 * MAX_HEAD)
        mix_heads(dtype, 4, values, head_dim, count, weights, sums);
    if (heads == 3) mix_heads(dtype, 3, values, head_dim, count, weights, sums);
    if (heads == 2) mix_heads(dtype, 2, values, head_dim, count, weights, sums);
    if (heads == 1) mix_heads(dtype, 1, values, head_dim, count, weights, sums);
}

/* Query heads head .. head + heads - 1 of row n over slots first .. end - 1 of the key/value head they share. */
static void attend_heads(const Decode *d, const Layer *layer, size_t n, size_t head, int heads, const char *keys,
                         const char *values, size_t first, size_t end) {
    int dtype = (int)d->shape->dtype;
    size_t D = d->shape->head_dim, wide = (d->shape->num_heads + 2 * d->shape->num_kv_heads) * D;
    Order order = order_of(dtype, heads, D), before_o = order_before(&layer->o, d->by_heads);
    const float *cos = d->cos + n * d->shape->rotary_dim, *sin = d->sin + n * d->shape->rotary_dim;
    float query[CHUNK_FLOATS], sums[MAX_ROWS * MAX_HEAD], one[MAX_HEAD];
    float scores[MAX_ROWS * SLOTS] __attribute__((aligned(sizeof(floats))));
    float top[MAX_ROWS], total[MAX_ROWS], scale = (float)d->shape->attention_scale;
    for (int h = 0; h < heads; h++) {
        prepare_head(d->shape, layer, layer->q_norm, cos, sin, d->qkv + n * wide + (head + h) * D, one);
        arrange(&order, h, 0, D, one, query);
        memset(sums + h * MAX_HEAD, 0, 4 * D);
        top[h] = -INFINITY, total[h] = 0.0f;
    }
    for (size_t slot = first; slot < end; slot += SLOTS) {
        int count = (int)(end - slot < SLOTS ? end - slot : SLOTS);
        const char *block = values + slot * D * size_of(dtype);
        score(dtype, keys + slot * D * size_of(dtype), &order, count, query, scores);
        for (int h = 0; h < heads; h++)
            soften(dtype, scores + h * SLOTS, count, scale, top + h, total + h, sums + h * MAX_HEAD, D);
        BY_DTYPE(dtype, mix_all, heads, block, D, count, scores, sums);
    }
    for (int h = 0; h < heads; h++) {
        float part = total[h] == 0.0f ? 0.0f : 1.0f / total[h]; /* a padding token sees nothing */
        for (size_t i = 0; i < D; i++) one[i] = rounded(dtype, sums[h * MAX_HEAD + place(&order, i)] * part);
        arrange(&before_o, n, (head + h) * D, D, one, d->attended);
    }
}

/* The keys and values of a piece's rows go into the cache, then each row looks back from its own. */
static void attend_piece(const Decode *d, const Layer *layer, const Piece *piece, int64_t kv_head) {
    const Shape *s = d->shape;
    int64_t group = s->num_heads / s->num_kv_heads, num_heads = piece->sequence * s->num_kv_heads + kv_head;
    int64_t at = num_heads * d->step->capacity * s->head_dim * (int64_t)size_of((int)s->dtype);
    char *keys = (char *)layer->keys + at, *values = (char *)layer->values + at;
    for (int64_t t = 0; t < piece->num_rows; t++)
        append(d, layer, kv_head, piece->first_row + t, piece->past + t, keys, values);
    for (int64_t t = 0; t < piece->num_rows; t++) {
        int64_t end = piece->past + t + 1, first = piece->start;
        if (layer->window && end - layer->window > first) first = end - layer->window;
        for (int64_t g = 0; g < group; g += MAX_ROWS)
            attend_heads(d, layer, piece->first_row + t, kv_head * group + g,
                         (int)(group - g < MAX_ROWS ? group - g : MAX_ROWS), keys, values, first, end);
    }
}

static void attend(const Decode *d, const Layer *layer, Phase *phase) {
    int64_t kv_heads = d->shape->num_kv_heads;
    for (int64_t task; (task = next_task(phase)) >= 0; finish(phase))
        attend_piece(d, layer, d->step->pieces + task / kv_heads, task % kv_heads);
}

/* ---- Phases 3 and 5: o and down, added to the residual stream. ---- */

INLINE void add_rounded(int dtype, const float *from, float multiplier, int count, float *to) {
    for (int m = 0; m < count; m++) to[m] = rounded(dtype, to[m] + rounded(dtype, from[m] * multiplier));
}

static void add_linear(const Decode *d, const Linear *l, const Order *order, float *from, const Inputs *x,
                       Phase *phase) {
    int dtype = (int)d->shape->dtype;
    int64_t E = d->shape->hidden_size;
    float out[MAX_ROWS * PANEL], multiplier = (float)d->shape->residual_multiplier;
    Order before = order_before(l, *order);
    Inputs inputs = {from, {x->packed[0], x->packed[1]}};
    for (size_t n = 0; l->bits && has_tasks(phase) && n < order->rows; n++)
        pack_row(dtype, (int)l->bits, order->rows, order->columns, n, from + n * before.chunk, packed_for(x, l));
    for (int64_t task; (task = next_task(phase)) >= 0;) {
        int64_t first = task * PANEL;
        int count = count_from(first, E);
        linear(dtype, l, order, first, count, &inputs, out);
        if (!is_first(phase, task)) continue;
        for (size_t n = 0; n < order->rows; n++)
            BY_DTYPE(dtype, add_rounded, out + n * PANEL, multiplier, count, d->hidden + n * E + first);
        finish(phase);
    }
}

/* ---- Phase 4: gate and up, SiLU. ---- */

INLINE void activate(int dtype, int count, const float *up, float *gate) {
    for (int m = 0; m < count; m++)
        gate[m] = rounded(dtype, rounded(dtype, gate[m] / (1.0f + exponential(-gate[m]))) * up[m]);
}

static void gate_and_up(const Decode *d, const Layer *layer, const Inputs *x, Phase *phase) {
    int dtype = (int)d->shape->dtype;
    float gate[MAX_ROWS * PANEL], up[MAX_ROWS * PANEL];
    Order before_down = order_before(&layer->down, d->by_ffn);
    for (int64_t task; (task = next_task(phase)) >= 0;) {
        int64_t first = task * PANEL;
        int count = count_from(first, d->shape->intermediate_size);
        linear(dtype, &layer->gate, &d->by_hidden, first, count, x, gate);
        linear(dtype, &layer->up, &d->by_hidden, first, count, x, up);
        for (size_t n = 0; n < d->by_hidden.rows; n++) BY_DTYPE(dtype, activate, count, up + n * PANEL, gate + n * PANEL);
        if (!is_first(phase, task)) continue;
        for (size_t n = 0; n < d->by_hidden.rows; n++) arrange(&before_down, n, first, count, gate + n * PANEL, d->activated);
        finish(phase);
    }
}

/* ---- Entry points. ---- */

static Phase phase_of_layer(const Decode *d, int64_t layer, int64_t phase, int64_t count, int64_t threads) {
    return phase_of(d->step->counters, PHASES * d->step->num_layers, PHASES * layer + phase, count, threads);
}

/* Norm what a phase's linear layers read, unless other threads have taken all of it. */
static void prepare(const Decode *d, const Phase *phase, const void *norm, const Linear *const *readers, int count,
                    float *row, const Inputs *x) {
    int dtype = (int)d->shape->dtype;
    if (has_tasks(phase)) norm_rows(dtype, norm, d->shape->norm_eps, &d->by_hidden, d->hidden, readers, count, row, x);
}

static void decode_layer(const Decode *d, int64_t index, float *row, const Inputs *x) {
    const Shape *s = d->shape;
    const Layer *layer = d->layers + index;
    const Linear *const projections[] = {&layer->q, &layer->k, &layer->v}, *const gates[] = {&layer->gate, &layer->up};
    int64_t q_panels = panels_of(s->num_heads * s->head_dim), k_panels = panels_of(s->num_kv_heads * s->head_dim);
    Phase projected = phase_of_layer(d, index, 1, q_panels + 2 * k_panels, d->step->threads);
    prepare(d, &projected, layer->input_norm, projections, 3, row, x);
    project(d, layer, x, &projected);
    Phase attended = phase_of_layer(d, index, 2, d->step->num_pieces * s->num_kv_heads, 0);
    attend(d, layer, &attended);
    Phase mixed = phase_of_layer(d, index, 3, panels_of(s->hidden_size), d->step->threads);
    add_linear(d, &layer->o, &d->by_heads, d->attended, x, &mixed);
    Phase activated = phase_of_layer(d, index, 4, panels_of(s->intermediate_size), d->step->threads);
    prepare(d, &activated, layer->post_norm, gates, 2, row, x);
    gate_and_up(d, layer, x, &activated);
    Phase lowered = phase_of_layer(d, index, 5, panels_of(s->hidden_size), d->step->threads);
    add_linear(d, &layer->down, &d->by_ffn, d->activated, x, &lowered);
}

static void decode_body(void *data) {
    const Decode *d = data;
    const OpenMP *omp = d->step->openmp;
    float *row = d->own + omp->thread_number() * d->own_floats;
    Inputs x = own_inputs(row, d->by_hidden, packed_room(d));
    if (are_tiles_allowed) configure_tiles(d->by_hidden.rows, PANEL);
    for (int64_t index = 0; index < d->step->num_layers; index++) decode_layer(d, index, row, &x);
    if (are_tiles_allowed) release_tiles();
    leave(omp, d->step->counters);
}

/* One decode step of all layers. Outputs may be the inputs. */
void decode_layers(const Shape *shape, const Layer *layers, const Step *step) {
    int dtype = (int)shape->dtype;
    size_t rows = step->rows, count = rows * shape->hidden_size;
    Decode decode = {.layers = layers, .step = step};
    lay_out(&decode, shape, rows, step->threads, step->workspace);
    reset(step->counters, PHASES * step->num_layers, most_weight_rows(shape));
    for (size_t i = 0; i < count; i++) decode.hidden[i] = read_at(dtype, step->inputs, i);
    for (size_t i = 0; i < rows * shape->rotary_dim; i++) {
        decode.cos[i] = read_at(dtype, step->cos, i);
        decode.sin[i] = read_at(dtype, step->sin, i);
    }
    step->openmp->parallel(decode_body, &decode, (unsigned)step->threads, 0);
    for (size_t i = 0; i < count; i++) write_at(dtype, step->outputs, i, decode.hidden[i]);
}

INLINE void store(int dtype, const float *from, float divisor, int count, void *to, size_t first) {
    for (int m = 0; m < count; m++) write_at(dtype, to, first + m, rounded(dtype, from[m] / divisor));
}

static void head_body(void *data) {
    const Head *h = data;
    int dtype = (int)h->dtype;
    Order order = order_for_products(dtype, h->rows, h->hidden_size);
    size_t packed = packed_floats(dtype, h->rows, h->hidden_size);
    float out[MAX_ROWS * PANEL], *hidden = h->workspace, *row = hidden + ALIGNED(h->rows * h->hidden_size);
    row += h->openmp->thread_number() * own_floats(order, packed);
    Inputs x = own_inputs(row, order, packed);
    const Linear *const readers[] = {&h->weight};
    Phase phase = phase_of(h->counters, 1, 1, panels_of(h->vocab_size), h->threads);
    if (are_tiles_allowed) configure_tiles(h->rows, PANEL);
    if (has_tasks(&phase)) norm_rows(dtype, h->norm, h->norm_eps, &order, hidden, readers, 1, row, &x);
    for (int64_t task; (task = next_task(&phase)) >= 0;) {
        int64_t first = task * PANEL;
        int count = count_from(first, h->vocab_size);
        linear(dtype, &h->weight, &order, first, count, &x, out);
        if (!is_first(&phase, task)) continue;
        for (size_t n = 0; n < order.rows; n++)
            BY_DTYPE(dtype, store, out + n * PANEL, (float)h->logits_scaling, count, h->logits, n * h->vocab_size + first);
        finish(&phase);
    }
    if (are_tiles_allowed) release_tiles();
    leave(h->openmp, h->counters);
}

/* Final norm and logits; needs a layer's workspace. */
void compute_logits(const Head *head) {
    reset(head->counters, 1, head->vocab_size);
    for (int64_t i = 0; i < head->rows * head->hidden_size; i++)
        head->workspace[i] = read_at((int)head->dtype, head->inputs, i);
    head->openmp->parallel(head_body, (void *)head, (unsigned)head->threads, 0);
}

#include "reading.h"
#include "products.h"

/* ---- The machine's limit: read memory and do nothing else. ---- */

typedef struct {
    const OpenMP *openmp;
    int64_t threads, num_spans;
    const char *const *spans;
    const int64_t *sizes;
    int64_t *counter;
    int64_t checksum;
} Scan;

static void scan_body(void *data) {
    Scan *scan = data;
    const int64_t piece = 1 << 20;
    words sum = {0};
    for (int64_t number, base = 0, span = 0; number = take(scan->counter, 1), 1;) {
        while (span < scan->num_spans && number - base >= (scan->sizes[span] + piece - 1) / piece)
            base += (scan->sizes[span] + piece - 1) / piece, span++;
        if (span == scan->num_spans) break;
        const char *at = scan->spans[span] + (number - base) * piece, *end = scan->spans[span] + scan->sizes[span];
        for (const char *stop = at + piece < end ? at + piece : end; at + 4 * sizeof(words) <= stop; at += 4 * sizeof(words))
            UNROLL for (int i = 0; i < 4; i++) {
                __builtin_prefetch(at + i * sizeof(words) + AHEAD_BYTES);
                sum ^= *(const words_at *)(at + i * sizeof(words));
            }
    }
    for (int i = 0; i < LANES; i++) __atomic_fetch_xor(&scan->checksum, (int64_t)sum[i], __ATOMIC_RELAXED);
}

/* Read every span once, with all threads; the checksum only keeps the compiler from leaving the reads out. */
void read_memory(Scan *scan) {
    *scan->counter = scan->checksum = 0;
    scan->openmp->parallel(scan_body, scan, (unsigned)scan->threads, 0);
}
