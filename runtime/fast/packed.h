/* Products with packed weights: whole numbers of 4 or 8 bits and one scale per group of columns, read as they lie.
 *
 * Activations become whole numbers as well: 16 bits and a power of two for every 32 of a row (fp32 models: twice that).
 * Numbers of bf16 survive this unchanged unless they are 128 times smaller than the largest of their 32. The sum over
 * 32 columns is then a whole number, exact in whatever order it is taken; only sums over groups are rounded, in fp32
 * and in one order for every number of rows, so that a row's result does not depend on what shares its step.
 *
 * Columns go in units of UNIT = 32 LANES, a lane per group. Activations of a unit are UNIT_PARTS vectors of 16-bit
 * numbers in the order in which the weights come out of their bytes, then a correction for stored weights being higher
 * by 8 or 128, then scales. Units of all rows lie next to each other; columns after the last are 0.
 */
#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

/* Within every 16 bytes of two vectors: their lanes 0 and 1, 2 and 3, as pairs or as they are. FOURS: whole 16 bytes.
 * LANE_GROUPS: the group whose sum `sum_groups` leaves in a lane. */
#if LANES == 16
#define LOW_PAIRS 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define HIGH_PAIRS 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define LOW_TWOS 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH_TWOS 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define EVEN_FOURS 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define ODD_FOURS 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#define LANE_GROUPS 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15
#elif LANES == 8
#define LOW_PAIRS 0, 8, 1, 9, 4, 12, 5, 13
#define HIGH_PAIRS 2, 10, 3, 11, 6, 14, 7, 15
#define LOW_TWOS 0, 1, 8, 9, 4, 5, 12, 13
#define HIGH_TWOS 2, 3, 10, 11, 6, 7, 14, 15
#define EVEN_FOURS 0, 1, 2, 3, 8, 9, 10, 11
#define ODD_FOURS 4, 5, 6, 7, 12, 13, 14, 15
#define LANE_GROUPS 0, 2, 4, 6, 1, 3, 5, 7
#else
#define LOW_PAIRS 0, 4, 1, 5
#define HIGH_PAIRS 2, 6, 3, 7
#define LOW_TWOS 0, 1, 4, 5
#define HIGH_TWOS 2, 3, 6, 7
#define LANE_GROUPS 0, 1, 2, 3
#endif

typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(4 * LANES)));
typedef uint16_t few_halves __attribute__((vector_size(2 * LANES)));
typedef ints ints_at __attribute__((aligned(1), may_alias));
typedef halves halves_at __attribute__((aligned(1), may_alias));
typedef few_halves few_halves_at __attribute__((aligned(1), may_alias));

enum { GROUP = 32, UNIT = GROUP * LANES, UNIT_PARTS = 16, NEAR_FLOATS = 8192 };

INLINE int parts_of(int dtype) { return dtype == F32 ? 2 : 1; }
INLINE size_t units_in(size_t columns) { return (columns + UNIT - 1) / UNIT; }
/* Floats that one row takes in a unit: numbers, corrections, scales. */
INLINE size_t unit_floats(int dtype) { return (size_t)parts_of(dtype) * (UNIT_PARTS + 1) * LANES + LANES; }
/* The lane of a group's sum. */
INLINE int lane_of(int group) { return group % (LANES / 4) * 4 + group / (LANES / 4); }

/* ---- Scales. ---- */

/* Scales of a whole unit with 32 columns to a scale, each in its group's lane. */
INLINE floats read_scales(int dtype, const char *at) {
    if (dtype == BF16) {
#if LANES == 16 && defined(__AVX512BW__)
        const __m512i from = (__m512i)(ints){LANE_GROUPS} << 16;
        __m512i scales = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)at));
        return (floats)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, from, scales);
#else
        words wide = __builtin_convertvector(*(const few_halves_at *)at, words) << 16;
        return (floats)PICK(wide, wide, LANE_GROUPS);
#endif
    }
    floats wide;
    if (dtype == F32) wide = *(const floats_at *)at;
#if defined(__F16C__)
    else wide = widen_half(at);
#else
    else wide = half_to_floats(__builtin_convertvector(*(const few_halves_at *)at, words));
#endif
    return PICK(wide, wide, LANE_GROUPS);
}

/* Some weight rows and all activation rows. */
typedef struct {
    const Linear *linear;
    size_t rows, columns, row_bytes, row_scale_bytes;
    const char *weights, *weights_end, *scales, *scales_end;
    size_t chunk; /* units whose activations stay in the L1 cache while several weight rows pass */
    int dtype;
} Packed;

INLINE Packed packed_of(int dtype, const Linear *linear, size_t rows, size_t columns, size_t first, int count) {
    size_t row_bytes = columns * linear->bits / 8, row_scale_bytes = columns / linear->group * size_of(dtype);
    size_t chunk = rows == 1 ? units_in(columns) : NEAR_FLOATS / (rows * unit_floats(dtype));
    Packed packed = {.linear = linear, .rows = rows, .columns = columns, .dtype = dtype};
    packed.row_bytes = row_bytes, packed.row_scale_bytes = row_scale_bytes;
    packed.weights = (const char *)linear->weight + first * row_bytes;
    packed.weights_end = packed.weights + count * row_bytes;
    packed.scales = (const char *)linear->scale + first * row_scale_bytes;
    packed.scales_end = packed.scales + count * row_scale_bytes;
    packed.chunk = chunk ? chunk : 1;
    return packed;
}

/* `at`, or a copy where `size` bytes would reach past `end`. What follows a row in its last unit does not matter, as
 * activations are 0 there, but it must be readable, and as a scale finite. */
INLINE const char *readable(const char *at, size_t size, const char *end, char *copy) {
    if (at + size <= end) return at;
    memset(copy, 0, size);
    return memcpy(copy, at, end - at);
}

/* Scales of unit `unit` of the row whose scales start at `scales`, each in its group's lane. */
INLINE floats unit_scales(const Packed *p, const char *scales, size_t unit) {
    const size_t bytes = LANES * size_of(p->dtype);
    floats found = {0};
    char copy[LANES * 4];
    if (p->linear->group == GROUP)
        return read_scales(p->dtype, readable(scales + unit * bytes, bytes, p->scales_end, copy));
    for (size_t g = 0, column = unit * UNIT; g < LANES && column < p->columns; g++, column += GROUP)
        found[lane_of(g)] = read_at(p->dtype, scales, column / p->linear->group);
    return found;
}

/* ---- Activations as whole numbers. ---- */

INLINE size_t packed_floats(int dtype, size_t rows, size_t columns) {
    return rows * units_in(columns) * unit_floats(dtype);
}

/* Numbers of a unit in the order in which `spread` yields their weights. */
INLINE void reorder(int bits, const int16_t *from, int16_t *to) {
    const int stride = bits == 4 ? 4 : 2;
    for (int block = 0; block < UNIT; block += stride * 2 * LANES)
        UNROLL for (int part = 0; part < stride; part++)
            for (int j = 0; j < 2 * LANES; j++) to[block + part * 2 * LANES + j] = from[block + stride * j + part];
}

/* 32 activations as whole numbers, in fp32 up to `parts` of them each; returns what they are multiples of. A number that
 * is not finite makes all that not finite. */
INLINE float whole_numbers(int parts, const float *from, int16_t *high, int16_t *low, int32_t *sums) {
    uint32_t largest = 0;
    for (int i = 0; i < GROUP; i++) {
        uint32_t magnitude = bits_of(from[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    int is_finite = largest < 0x7f800000, exponent = (int)(largest >> 23), top = parts == 1 ? 14 : 13;
    exponent = exponent < 64 ? 64 : exponent; /* below 2^-63: to multiples that keep what matters in a sum */
    /* The largest comes to 2^top .. 2^(top + 1); rounding it does not leave 16 bits. */
    float up = is_finite ? float_of((uint32_t)(254 + top - exponent) << 23) : 0.0f;
    int32_t sum = 0, low_sum = 0;
    for (int i = 0; i < GROUP; i++) {
        float wanted = is_finite ? from[i] * up : 0.0f, near = wanted + 12582912.0f;
        high[i] = (int16_t)bits_of(near);
        sum += high[i];
        if (parts == 2) {
            low[i] = (int16_t)bits_of((wanted - (near - 12582912.0f)) * 32768.0f + 12582912.0f);
            low_sum += low[i];
        }
    }
    sums[0] = sum, sums[1] = low_sum;
    return is_finite ? float_of((uint32_t)(exponent - top - (parts == 2 ? 15 : 0)) << 23) : NAN;
}

INLINE void pack_unit(int parts, int bits, const float *from, float *to) {
    int16_t natural[2][UNIT]; /* in the order of the columns */
    int32_t sums[2], *correction = (int32_t *)(to + parts * UNIT_PARTS * LANES);
    float *scales = to + parts * (UNIT_PARTS + 1) * LANES;
    for (int g = 0; g < LANES; g++) {
        int lane = lane_of(g);
        scales[lane] = whole_numbers(parts, from + g * GROUP, natural[0] + g * GROUP, natural[1] + g * GROUP, sums);
        for (int part = 0; part < parts; part++) correction[part * LANES + lane] = -(sums[part] << (bits - 1));
    }
    for (int part = 0; part < parts; part++)
        reorder(bits, natural[part], (int16_t *)(to + part * UNIT_PARTS * LANES));
}

#define BY_KIND(parts, bits, function, ...)                                               \
    ((parts) == 1 ? ((bits) == 4 ? function(1, 4, __VA_ARGS__) : function(1, 8, __VA_ARGS__)) \
                  : ((bits) == 4 ? function(2, 4, __VA_ARGS__) : function(2, 8, __VA_ARGS__)))

/* Row n of `rows`, as products with weights of so many bits read it. */
static void pack_row(int dtype, int bits, size_t rows, size_t columns, size_t n, const float *from, float *x) {
    size_t pitch = unit_floats(dtype);
    float padded[UNIT] = {0};
    for (size_t k = 0; k < columns; k += UNIT, x += rows * pitch) {
        const float *unit = columns - k < UNIT ? memcpy(padded, from + k, 4 * (columns - k)) : from + k;
        BY_KIND(parts_of(dtype), bits, pack_unit, unit, x + n * pitch);
    }
}

/* ---- Products. ---- */

/* Per lane: the sum, plus two products of signed 16-bit numbers. */
INLINE ints multiply_pairs(ints sum, halves a, halves b) {
#if LANES == 16 && defined(__AVX512VNNI__)
    return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif LANES == 16 && defined(__AVX512BW__)
    return sum + (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif LANES == 8 && defined(__AVX2__)
    return sum + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif LANES == 4 && defined(__SSE2__)
    return sum + (ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif LANES == 4 && defined(__aarch64__)
    int16x8_t left = (int16x8_t)a, right = (int16x8_t)b;
    return sum + (ints)vpaddq_s32(vmull_s16(vget_low_s16(left), vget_low_s16(right)), vmull_high_s16(left, right));
#else
    ints even = (ints)a << 16 >> 16, odd = (ints)a >> 16;
    return sum + even * ((ints)b << 16 >> 16) + odd * ((ints)b >> 16);
#endif
}

/* The weights of some quarters of a unit, not yet lowered by 8 or 128. */
INLINE void spread(int bits, int quarters, const char *at, halves *weights) {
    for (int i = 0; i < quarters * UNIT_PARTS / 4;) {
        halves bytes = *(const halves_at *)at;
        at += sizeof bytes;
        KEEP(bytes);
        if (bits == 8) weights[i++] = bytes & 255, weights[i++] = bytes >> 8;
        else
            UNROLL for (int shift = 0; shift < 16; shift += 4) weights[i++] = shift < 12 ? bytes >> shift & 15 : bytes >> 12;
    }
}

/* The sums of a unit's groups, each in its lane; those after the quarters are 0. */
INLINE ints sum_groups(int bits, int quarters, const halves *weights, const float *x, ints correction) {
    ints sums[8] = {{0}};
    const int stride = bits == 4 ? 4 : 2;
    UNROLL for (int i = 0; i < quarters * UNIT_PARTS / 4 / stride; i++) {
        UNROLL for (int part = i * stride; part < (i + 1) * stride; part++)
            sums[i] = multiply_pairs(sums[i], weights[part], *(const halves_at *)(x + part * LANES));
    }
    UNROLL for (int i = 0; bits == 8 && i < 4; i++) { /* a group has eight lanes: make it four */
#if LANES == 4
        sums[i] = sums[2 * i] + sums[2 * i + 1];
#else
        sums[i] = PICK(sums[2 * i], sums[2 * i + 1], EVEN_FOURS) + PICK(sums[2 * i], sums[2 * i + 1], ODD_FOURS);
#endif
    }
    ints a = PICK(sums[0], sums[1], LOW_PAIRS) + PICK(sums[0], sums[1], HIGH_PAIRS);
    ints b = PICK(sums[2], sums[3], LOW_PAIRS) + PICK(sums[2], sums[3], HIGH_PAIRS);
    return PICK(a, b, LOW_TWOS) + (PICK(a, b, HIGH_TWOS) + correction);
}

/* sum + one unit of a weight row, times one activation row. */
INLINE floats multiply_unit(int parts, int bits, int quarters, const halves *weights, floats scales, const float *x,
                            floats sum) {
    const size_t after = parts * UNIT_PARTS * LANES;
    ints high = sum_groups(bits, quarters, weights, x, *(const ints_at *)(x + after));
    floats groups = __builtin_convertvector(high, floats);
    if (parts == 2) {
        ints low = sum_groups(bits, quarters, weights, x + UNIT_PARTS * LANES, *(const ints_at *)(x + after + LANES));
        groups = groups * 32768.0f + __builtin_convertvector(low, floats);
    }
    return multiply_add(groups, scales * *(const floats_at *)(x + after + parts * LANES), sum);
}

/* sums[n] += the first quarters of unit `unit`, at `at` in a weight row, times N activation rows. */
INLINE void multiply_rows(int parts, int bits, int N, int quarters, const Packed *p, const char *at, const char *scales,
                          size_t unit, const float *x, floats *sums) {
    const size_t pitch = (parts * (UNIT_PARTS + 1) + 1) * LANES;
    floats found = unit_scales(p, scales, unit);
    halves weights[UNIT_PARTS];
    spread(bits, quarters, at, weights);
    for (int n = 0; n < N; n++, x += pitch, sums += STRIP)
        *sums = multiply_unit(parts, bits, quarters, weights, found, x, *sums);
}

/* Units first .. end - 1 of one weight row; nothing is read past its end. What comes is fetched into the L2 cache: 6 to
 * 9 % quicker than into L1 on an Intel Xeon with AMX (plain weights: 3 % slower). */
INLINE void multiply_units(int parts, int bits, int N, const Packed *p, const char *w, const char *scales, size_t first,
                           size_t end, const float *x, floats *sums) {
    const size_t pitch = N * (parts * (UNIT_PARTS + 1) + 1) * LANES, whole = p->columns / UNIT, bytes = UNIT * bits / 8;
    for (; first < end && first < whole; first++, x += pitch) {
        const char *at = w + first * bytes;
        UNROLL for (int i = 0; i < UNIT * bits / 8; i += 64) __builtin_prefetch(at + i + AHEAD_BYTES, 0, 2);
        __builtin_prefetch(scales + first * LANES * size_of(p->dtype) + AHEAD_BYTES / 4, 0, 2);
        multiply_rows(parts, bits, N, 4, p, at, scales, first, x, sums);
    }
    if (first < end) {
        const int is_short = p->columns % UNIT <= UNIT / 4;
        char copy[UNIT];
        const char *at = readable(w + first * bytes, is_short ? bytes / 4 : bytes, p->weights_end, copy);
        if (is_short) multiply_rows(parts, bits, N, 1, p, at, scales, first, x, sums);
        else multiply_rows(parts, bits, N, 4, p, at, scales, first, x, sums);
    }
}

INLINE void packed_panel_of(int parts, int bits, int N, const Packed *p, int count, const float *x, float *out) {
    const size_t pitch = N * (parts * (UNIT_PARTS + 1) + 1) * LANES, num_units = units_in(p->columns);
    for (int m = 0; m < count; m += STRIP) {
        floats sums[MAX_ROWS * STRIP];
        int left = count - m < STRIP ? count - m : STRIP;
        memset(sums, 0, N * STRIP * sizeof *sums);
        for (size_t unit = 0; unit < num_units; unit += p->chunk) {
            size_t end = unit + p->chunk < num_units ? unit + p->chunk : num_units;
            for (int i = m; i < m + left; i++) {
                const char *row = p->weights + i * p->row_bytes, *scales = p->scales + i * p->row_scale_bytes;
                multiply_units(parts, bits, N, p, row, scales, unit, end, x + unit * pitch, sums + i - m);
            }
        }
        for (int n = 0; n < N; n++) {
            quad sum = totals(sums + n * STRIP);
            memcpy(out + n * PANEL + m, &sum, sizeof sum);
        }
    }
}

/* Functions of their own: a compiler that sees both at once makes one of them, for any number of rows. */
static __attribute__((noinline)) void one_row(int parts, const Packed *p, int count, const float *x, float *out) {
    BY_KIND(parts, p->linear->bits, packed_panel_of, 1, p, count, x, out);
}

static __attribute__((noinline)) void many_rows(int parts, const Packed *p, int count, const float *x, float *out) {
    BY_KIND(parts, p->linear->bits, packed_panel_of, (int)p->rows, p, count, x, out);
}

/* out[n][m] = weight row first + m . activation row n, for `count` <= PANEL rows of weights. */
static void packed_panel(int dtype, const Linear *linear, size_t rows, size_t columns, size_t first, int count,
                         const float *x, float *out) {
    Packed packed = packed_of(dtype, linear, rows, columns, first, count);
    if (rows == 1) one_row(parts_of(dtype), &packed, count, x, out);
    else many_rows(parts_of(dtype), &packed, count, x, out);
}
