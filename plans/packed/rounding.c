/* Weights -> whole numbers of few bits and one scale per group of 32: what blocks.py computes, to the bit, and many times
 * faster. Every step is the one there, in fp32, in the same order; read the reasons there.
 *
 * A strip of groups lies side by side, so that the compiler turns every loop over them into vector code of whatever width
 * the processor has, and no sum depends on that width. Values that are not finite are left to blocks.py: they make the sums
 * infinite or NaN.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "weights are read and numbers are packed low byte first"
#endif
#if FLT_EVAL_METHOD != 0 || defined(__FAST_MATH__) || __FINITE_MATH_ONLY__
#error "other compilers' arithmetic gives other bytes"
#endif

#define INLINE static inline __attribute__((always_inline))

enum { GROUP = 32, HALF = GROUP / 2, STRIP = 64, BLOCK_GROUPS = 4096 };
enum { BF16, F16, F32, F64 }; /* the order of kernel.py */

/* What Python hands over: 8-byte fields only, mirrored in kernel.py. */
typedef struct {
    const uint8_t *data;
    uint8_t *words;
    uint16_t *scales;
    int64_t num_groups, stored, bits, scale;
    double squared_error, squared; /* returned */
} Run;

typedef float Lanes[STRIP]; /* one number of every group */

typedef struct {
    Lanes weights[2][HALF]; /* even columns before odd ones */
    Lanes scale, inverse;
    Lanes products[HALF];
    uint32_t pairs[HALF][STRIP];
} Strip;

INLINE float from_bits(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
INLINE uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }

/* ---- Stored numbers. ---- */

INLINE float from_half(uint32_t half) {
    uint32_t magnitude = half & 0x7FFF;
    float value = from_bits(magnitude << 13) * 0x1p112f;
    value = magnitude >= 0x7C00 ? from_bits(0x7F800000 | magnitude << 13) : value;
    return from_bits(bits_of(value) | (half & 0x8000) << 16);
}

/* To nearest, ties to even, as all rounding here. */
INLINE uint32_t to_half(float value) {
    uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFF, sign = bits >> 16 & 0x8000;
    uint32_t normal = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    uint32_t small = bits_of(from_bits(magnitude) + 0.5f) - 0x3F000000; /* the sum's last place is that of a small half */
    uint32_t half = magnitude < 113u << 23 ? small : normal;
    return sign | (magnitude >= 0x477FF000 ? 0x7C00 : half);
}

INLINE uint32_t to_bfloat(float value) {
    uint32_t bits = bits_of(value);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

INLINE void load_as(Strip *strip, const uint8_t *data, int count, int stored) {
    if (count < STRIP) memset(strip->weights, 0, sizeof strip->weights), memset(strip->pairs, 0, sizeof strip->pairs);
    for (int lane = 0; lane < count; lane++) {
        if (stored == BF16 || stored == F16) {
            uint32_t pairs[HALF];
            memcpy(pairs, data + lane * sizeof pairs, sizeof pairs);
            for (int i = 0; i < HALF; i++) strip->pairs[i][lane] = pairs[i];
        } else if (stored == F32) {
            float values[GROUP];
            memcpy(values, data + lane * sizeof values, sizeof values);
            for (int i = 0; i < GROUP; i++) strip->weights[i % 2][i / 2][lane] = values[i];
        } else {
            double values[GROUP];
            memcpy(values, data + lane * sizeof values, sizeof values);
            for (int i = 0; i < GROUP; i++) strip->weights[i % 2][i / 2][lane] = (float)values[i];
        }
    }
    if (stored == F32 || stored == F64) return;
    for (int i = 0; i < HALF; i++) {
        for (int lane = 0; lane < STRIP; lane++) {
            uint32_t pair = strip->pairs[i][lane];
            strip->weights[0][i][lane] = stored == BF16 ? from_bits(pair << 16) : from_half(pair & 0xFFFF);
            strip->weights[1][i][lane] = stored == BF16 ? from_bits(pair & 0xFFFF0000) : from_half(pair >> 16);
        }
    }
}

/* Fill the weights of `count` groups; those beyond are zeros. */
static void load(Strip *strip, const uint8_t *data, int count, int stored) {
    if (stored == BF16) load_as(strip, data, count, BF16);
    else if (stored == F16) load_as(strip, data, count, F16);
    else if (stored == F32) load_as(strip, data, count, F32);
    else load_as(strip, data, count, F64);
}

/* ---- Arithmetic. ---- */

/* Add up the products of every group by halves; they are overwritten. */
INLINE void fold(Lanes *products, float *sums) {
    for (int half = HALF / 2; half >= 1; half /= 2)
        for (int i = 0; i < half; i++)
            for (int lane = 0; lane < STRIP; lane++) products[i][lane] += products[i + half][lane];
    memcpy(sums, products[0], sizeof(Lanes));
}

INLINE void invert(const float *scale, float *inverse) {
    for (int lane = 0; lane < STRIP; lane++) inverse[lane] = fabsf(scale[lane]) >= FLT_MIN ? 1 / scale[lane] : 0;
}

/* Cut off, then round: what is added leaves no room for a fraction. A zero loses its sign. */
INLINE float nearest(float value, float low, float high) {
    value = value > low ? value : low;
    value = value < high ? value : high;
    return value + 0x1.8p23f - 0x1.8p23f;
}

/* Set the scales that make the extreme of every group the lowest number. */
INLINE void scale_by_extremes(Strip *strip, float low) {
    Lanes most, least;
    memcpy(most, strip->weights, sizeof most), memcpy(least, most, sizeof least);
    for (int i = 0; i < GROUP; i++) {
        const float *values = strip->weights[i % 2][i / 2];
        for (int lane = 0; lane < STRIP; lane++) {
            most[lane] = values[lane] > most[lane] ? values[lane] : most[lane];
            least[lane] = values[lane] < least[lane] ? values[lane] : least[lane];
        }
    }
    for (int lane = 0; lane < STRIP; lane++)
        strip->scale[lane] = (most[lane] > -least[lane] ? most[lane] : least[lane]) / low;
}

/* Give the first scales in `first` times `factor` one turn, and keep what is better than before. */
INLINE void improve(Strip *strip, const float *first, float factor, float *gains, float low, float high) {
    Lanes mixed, squares, scale;
    for (int lane = 0; lane < STRIP; lane++) scale[lane] = first[lane] * factor, squares[lane] = 0;
    invert(scale, strip->inverse);
    for (int i = 0; i < HALF; i++) {
        const float *even = strip->weights[0][i], *odd = strip->weights[1][i];
        for (int lane = 0; lane < STRIP; lane++) {
            float a = nearest(even[lane] * strip->inverse[lane], low, high);
            float b = nearest(odd[lane] * strip->inverse[lane], low, high);
            strip->products[i][lane] = even[lane] * a + odd[lane] * b;
            squares[lane] += a * a + b * b; /* whole numbers: exact in any order */
        }
    }
    fold(strip->products, mixed);
    for (int lane = 0; lane < STRIP; lane++) {
        float sum = mixed[lane] + 0.0f; /* zeros without their sign may have added up to -0 */
        float found = sum / (squares[lane] > 1 ? squares[lane] : 1), gain = sum * found;
        int is_better = gain > gains[lane];
        strip->scale[lane] = is_better ? found : strip->scale[lane];
        gains[lane] = is_better ? gain : gains[lane];
    }
}

INLINE void choose_scales(Strip *strip, int bits, float low, float high) {
    Lanes first, gains;
    scale_by_extremes(strip, low);
    memcpy(first, strip->scale, sizeof first);
    for (int lane = 0; lane < STRIP; lane++) strip->scale[lane] = 0, gains[lane] = -1;
    improve(strip, first, 1, gains, low, high);
    if (bits == 8) return;
    improve(strip, first, 0.9f, gains, low, high);
    improve(strip, first, (float)(-8.0 / 7.0), gains, low, high);
}

/* Round the scales to the dtype they are stored in. */
INLINE void store_scales(Strip *strip, uint16_t *scales, int count, int dtype) {
    uint32_t stored[STRIP];
    for (int lane = 0; lane < STRIP; lane++) {
        stored[lane] = dtype == BF16 ? to_bfloat(strip->scale[lane]) : to_half(strip->scale[lane]);
        strip->scale[lane] = dtype == BF16 ? from_bits(stored[lane] << 16) : from_half(stored[lane]);
    }
    for (int lane = 0; lane < count; lane++) scales[lane] = stored[lane];
}

/* Make pairs of numbers, and the squared errors of every group. */
INLINE void round_weights(Strip *strip, float *errors, int bits, float low, float high) {
    invert(strip->scale, strip->inverse);
    for (int i = 0; i < HALF; i++) {
        const float *even = strip->weights[0][i], *odd = strip->weights[1][i];
        for (int lane = 0; lane < STRIP; lane++) {
            float a = nearest(even[lane] * strip->inverse[lane], low, high);
            float b = nearest(odd[lane] * strip->inverse[lane], low, high);
            float c = even[lane] - a * strip->scale[lane], d = odd[lane] - b * strip->scale[lane];
            strip->products[i][lane] = c * c + d * d;
            strip->pairs[i][lane] = (uint32_t)(int32_t)(a - low) | (uint32_t)(int32_t)(b - low) << bits;
        }
    }
    fold(strip->products, errors);
}

INLINE void store_pairs(const Strip *strip, uint8_t *words, int count, int bits) {
    const int per_word = 16 / bits, num_words = bits;
    uint32_t packed[8][STRIP];
    for (int i = 0; i < num_words; i++) {
        for (int lane = 0; lane < STRIP; lane++) packed[i][lane] = strip->pairs[i * per_word][lane];
        for (int place = 1; place < per_word; place++)
            for (int lane = 0; lane < STRIP; lane++)
                packed[i][lane] |= strip->pairs[i * per_word + place][lane] << 2 * bits * place;
    }
    for (int lane = 0; lane < count; lane++)
        for (int i = 0; i < num_words; i++) memcpy(words + 4 * (lane * num_words + i), &packed[i][lane], 4);
}

INLINE void square_weights(Strip *strip, float *squares) {
    for (int i = 0; i < HALF; i++) {
        const float *even = strip->weights[0][i], *odd = strip->weights[1][i];
        for (int lane = 0; lane < STRIP; lane++)
            strip->products[i][lane] = even[lane] * even[lane] + odd[lane] * odd[lane];
    }
    fold(strip->products, squares);
}

/* ---- Runs. ---- */

/* Round the weights of a strip that is loaded; the sums are those of every group. */
INLINE void round_as(Strip *strip, const Run *run, int64_t start, int count, float *errors, int bits) {
    const float low = bits == 4 ? -8 : -128, high = bits == 4 ? 7 : 127;
    choose_scales(strip, bits, low, high);
    store_scales(strip, run->scales + start, count, run->scale);
    round_weights(strip, errors, bits, low, high);
    store_pairs(strip, run->words + start * 4 * bits, count, bits);
}

static void round_strip(const Run *run, int64_t start, int count, double *errors, double *squares) {
    const int size = run->stored == F64 ? 8 : run->stored == F32 ? 4 : 2;
    Strip strip;
    Lanes sums;
    load(&strip, run->data + start * GROUP * size, count, run->stored);
    square_weights(&strip, sums);
    for (int lane = 0; lane < count; lane++) squares[lane] = sums[lane];
    if (run->bits == 4) round_as(&strip, run, start, count, sums, 4);
    else round_as(&strip, run, start, count, sums, 8);
    for (int lane = 0; lane < count; lane++) errors[lane] = sums[lane];
}

/* Add up by halves; overwrites its argument, of BLOCK_GROUPS numbers. */
static double total(double *sums) {
    for (int half = BLOCK_GROUPS / 2; half >= 1; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

void round_groups(Run *run) {
    double errors[BLOCK_GROUPS], squares[BLOCK_GROUPS];
    run->squared_error = run->squared = 0;
    for (int64_t block = 0; block < run->num_groups; block += BLOCK_GROUPS) {
        memset(errors, 0, sizeof errors), memset(squares, 0, sizeof squares);
        for (int64_t i = 0; i < BLOCK_GROUPS && block + i < run->num_groups; i += STRIP) {
            int64_t left = run->num_groups - block - i;
            round_strip(run, block + i, left < STRIP ? left : STRIP, errors + i, squares + i);
        }
        run->squared_error += total(errors), run->squared += total(squares);
    }
}
