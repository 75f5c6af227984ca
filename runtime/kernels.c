/* Decode steps of llama-like decoder layers on a CPU: a few rows (sequences x new tokens) through a run of layers in
 * one call, without Python in between.
 *
 * Weights are read where they are (row-major [out, in], any alignment, nothing packed). All sums are taken in fp32,
 * and every value is rounded to the model's dtype wherever the eager model would store it, so that both paths choose
 * the same tokens. Only GCC's vector extensions are used: the compiler turns them into AVX2, AVX-512 or NEON.
 *
 * Shapes: B sequences, S new tokens, R = B S rows, E hidden size, H query heads, K key/value heads, D head size,
 * F feed-forward size, C cache slots, V vocabulary.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
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
#define UNROLL _Pragma("GCC unroll 8")

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef floats floats_at __attribute__((aligned(1), may_alias));
typedef words words_at __attribute__((aligned(1), may_alias));
typedef float quad __attribute__((vector_size(16)));

enum { F32, F16, BF16 };
enum { BLOCK = 2 * LANES, PANEL = 32, MAX_ROWS = 16, MAX_HEAD = 256, CHUNK_BYTES = 16384 };

/* ---- What Python hands over: 8-byte fields only, mirrored in native.py. ---- */

typedef struct {
    void (*parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
    void (*barrier)(void);
    int (*thread_number)(void);
    int (*thread_count)(void);
} Runtime;

typedef struct {
    int64_t dtype, hidden_size, num_heads, num_kv_heads, head_dim, rotary_dim, intermediate_size;
    double norm_eps, attention_scale, residual_multiplier;
} Shape;

/* Pointers may be NULL where a family has no such tensor. */
typedef struct {
    const void *input_norm, *q, *k, *v, *q_bias, *k_bias, *v_bias, *q_norm, *k_norm, *o, *o_bias;
    const void *post_norm, *gate, *up, *gate_bias, *up_bias, *down, *down_bias;
    void *keys, *values; /* [sequences, K, C, D] */
    int64_t window;      /* slots a token sees, its own included; 0: all */
    int64_t has_rope;
} Layer;

typedef struct {
    const Runtime *runtime;
    int64_t threads, num_layers;
    int64_t first_sequence, batch, new_tokens, past, capacity;
    const void *inputs;     /* [B, S, E] */
    void *outputs;          /* [B, S, E] */
    const void *cos, *sin;  /* [B, S, rotary_dim] */
    const int64_t *start;   /* [B] first slot that is not padding */
    float *workspace;       /* workspace_floats() */
    int64_t *counters;      /* num_counters(), any content */
} Step;

typedef struct {
    const Runtime *runtime;
    int64_t threads, dtype, rows, hidden_size, vocab_size;
    double norm_eps, logits_scaling;
    const void *inputs;     /* [R, E] */
    const void *norm, *weight;
    void *logits;           /* [R, V] */
    float *workspace;
    int64_t *counters;
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
 * A row is cut into chunks small enough that one chunk of all rows stays in the L1 cache; the chunks of all rows lie
 * next to each other. A 32-bit word of two-byte weights yields an even and an odd element, so that each whole block
 * of 2 LANES activations holds its even elements first. */

INLINE size_t chunk_columns(size_t rows) {
    size_t columns = CHUNK_BYTES / 4;
    while (columns * rows > CHUNK_BYTES / 4 && columns > 256) columns /= 2;
    return columns;
}

INLINE size_t padded_floats(size_t rows, size_t columns) {
    size_t chunk = chunk_columns(rows);
    return (columns + chunk - 1) / chunk * chunk * rows;
}

INLINE int is_paired(int dtype) {
#if defined(__F16C__)
    return dtype == BF16; /* the processor widens fp16 in order */
#else
    return dtype != F32;
#endif
}

INLINE size_t place(int dtype, size_t i, size_t columns) {
    size_t block = i / BLOCK * BLOCK, j = i % BLOCK;
    return is_paired(dtype) && block + BLOCK <= columns ? block + j % 2 * LANES + j / 2 : i;
}

INLINE size_t offset_of(int dtype, size_t rows, size_t row, size_t i, size_t columns) {
    size_t chunk = chunk_columns(rows), at = place(dtype, i, columns);
    return (at / chunk * rows + row) * chunk + at % chunk;
}

/* ---- Products: a panel of up to PANEL weight rows with all activation rows. ---- */

INLINE floats half_to_floats(words half) {
    words magnitude = (half & 0x7fff) << 13;
    words bits = (words)((floats)magnitude * 0x1p112f) | (half & 0x8000) << 16;
    return (floats)(bits | ((words)(magnitude >= 0x0f800000) & 0x7f800000));
}

/* Widen the BLOCK weights from column k on, to match the order of `place`. */
INLINE void read_block(int dtype, const char *row, size_t k, floats *first, floats *second) {
    const char *at = row + k * size_of(dtype);
    if (dtype == F32) {
        *first = *(const floats_at *)at;
        *second = *(const floats_at *)(at + 4 * LANES);
        return;
    }
#if defined(__F16C__)
    if (dtype == F16) {
#if LANES == 16
        *first = (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
        *second = (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(at + 32)));
#else
        *first = (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
        *second = (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(at + 16)));
#endif
        return;
    }
#endif
    words pairs = *(const words_at *)at;
    *first = dtype == BF16 ? (floats)(pairs << 16) : half_to_floats(pairs & 0xffff);
    *second = dtype == BF16 ? (floats)(pairs & 0xffff0000) : half_to_floats(pairs >> 16);
}

/* sums[n][m] += M weight rows times N activation rows over `width` columns; all sums stay in registers. */
INLINE void tile(int dtype, int M, int N, const char *w, size_t pitch, const float *x, size_t chunk, size_t width,
                 floats *sums, int is_first) {
    floats sum[4][4], first[4], second[4];
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int m = 0; m < M; m++) sum[n][m] = is_first ? (floats){0} : sums[n * PANEL + m];
    for (size_t k = 0; k < width; k += BLOCK) {
        UNROLL for (int m = 0; m < M; m++) read_block(dtype, w + m * pitch, k, &first[m], &second[m]);
        UNROLL for (int n = 0; n < N; n++) {
            floats low = *(const floats_at *)(x + n * chunk + k);
            floats high = *(const floats_at *)(x + n * chunk + k + LANES);
            UNROLL for (int m = 0; m < M; m++) sum[n][m] += first[m] * low;
            UNROLL for (int m = 0; m < M; m++) sum[n][m] += second[m] * high;
        }
    }
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int m = 0; m < M; m++) sums[n * PANEL + m] = sum[n][m];
}
