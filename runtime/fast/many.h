/* Products of many rows of activations (prompts). Each sum is one chain over the columns, whatever rows are beside it, so
 * that rows of several sequences may share a product.
 *
 * A panel of weights is first turned so that a vector holds a column (or a pair of them) of LANES weight rows: packed
 * weights are unpacked on the way, to the numbers of `PackedLinear` to the bit. Then every activation row meets it.
 * Activations lie in one of three ways:
 *   WIDE: fp32, row after row; weights are widened, and multiplied with fused multiply-adds.
 *   PAIRS: bf16, row after row, for the processor's own products of pairs (AVX512-BF16).
 *   TILES: bf16, arranged for matrix tiles (AMX), which need no turned weights.
 */
enum { WIDE, PAIRS, TILES };
enum { STRIPE = 2 * LANES, DEEP_WORDS = 256 }; /* weight rows, and columns or pairs of them, that are turned at a time */
#if defined(__AVX512F__) || defined(__aarch64__)
enum { MANY = 12 }; /* activation rows whose sums with a stripe of weight rows fit the processor's registers */
#else
enum { MANY = 6 };
#endif

static int64_t are_pairs_fast;

/* How activations of so many columns lie. */
INLINE int way_of(int dtype, size_t columns) {
    if (dtype == BF16 && are_tiles_allowed && columns % TILE_COLUMNS == 0) return TILES;
    return dtype == BF16 && are_pairs_fast && columns % 2 == 0 ? PAIRS : WIDE;
}

/* Find out what this processor does best. Pairs: on AMD's they gain (a step of 16 rows took 0.83 of the time on a Zen 4), on an
 * Intel Emerald Rapids torch's products of pairs came to two thirds of the speed of its fp32 ones. */
void look_at_processor(void) {
    are_tiles_allowed = allow_tiles();
#if LANES == 16 && defined(__AVX512BF16__)
    are_pairs_fast = __builtin_cpu_is("amd");
#endif
}

/* ---- Unpacking. ---- */

INLINE void unpack_group(int dtype, int bits, const uint8_t *at, float scale, char *to) {
    for (int i = 0; i < GROUP; i++) {
        int number = bits == 8 ? at[i] - 128 : (i % 2 ? at[i / 2] >> 4 : at[i / 2] & 15) - 8;
        write_at(dtype, to, i, rounded(dtype, number * scale));
    }
}

#if defined(__SSSE3__)
typedef __m128i sixteen;
#define LOOK_UP(table, places) _mm_shuffle_epi8(table, places)
#define INTERLEAVED_LOW(a, b) _mm_unpacklo_epi8(a, b)
#define INTERLEAVED_HIGH(a, b) _mm_unpackhi_epi8(a, b)
#define FOUR_BITS(bytes, shift) _mm_and_si128(_mm_srli_epi16(bytes, shift), _mm_set1_epi8(15))
#elif defined(__aarch64__)
typedef uint8x16_t sixteen;
#define LOOK_UP(table, places) vqtbl1q_u8(table, places)
#define INTERLEAVED_LOW(a, b) vzip1q_u8(a, b)
#define INTERLEAVED_HIGH(a, b) vzip2q_u8(a, b)
#define FOUR_BITS(bytes, shift) vandq_u8(vreinterpretq_u8_u16(vshlq_u16(vreinterpretq_u16_u8(bytes), vdupq_n_s16(-(shift)))), vdupq_n_u8(15))
#endif

#if defined(LOOK_UP)
/* 32 numbers of 4 bits that share a scale are 16 numbers of 16 bits, whose bytes are looked up. */
INLINE void look_up_group(int dtype, const uint8_t *at, float scale, char *to) {
    uint8_t numbers[32], tables[2][16];
    sixteen bytes, low, high;
    for (int i = 0; i < 16; i++) write_at(dtype, numbers, i, rounded(dtype, (i - 8) * scale));
    for (int i = 0; i < 16; i++) tables[0][i] = numbers[2 * i], tables[1][i] = numbers[2 * i + 1];
    memcpy(&low, tables[0], 16), memcpy(&high, tables[1], 16), memcpy(&bytes, at, 16);
    sixteen even = FOUR_BITS(bytes, 0), odd = FOUR_BITS(bytes, 4);
    const sixteen places[2] = {INTERLEAVED_LOW(even, odd), INTERLEAVED_HIGH(even, odd)};
    for (int i = 0; i < 2; i++) {
        sixteen first = LOOK_UP(low, places[i]), second = LOOK_UP(high, places[i]);
        const sixteen found[2] = {INTERLEAVED_LOW(first, second), INTERLEAVED_HIGH(first, second)};
        memcpy(to + 32 * i, found, sizeof found);
    }
}
#endif

#if LANES == 16 && defined(__AVX512BF16__)
/* The same with the processor's own rounding. Of int4: the 16 numbers that the scale makes, looked up; a number's place
 * in the table is in the low bits of a 16-bit word, whose fifth bit does not matter as the table comes twice. */
INLINE void unpack_group_fast(int bits, const uint8_t *at, float scale, char *to) {
    const floats numbers = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    if (bits == 4) {
        __m512i table = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh((__m512)(numbers * scale)));
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at));
        __m512i places = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(places, table));
    } else {
        floats half[2];
        for (int i = 0; i < 2; i++) {
            ints bytes = (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at + i));
            half[i] = __builtin_convertvector(bytes - 128, floats) * scale;
        }
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)half[1], (__m512)half[0]));
    }
}
#endif

/* Weight row `row` in the model's dtype. */
INLINE void unpack_row_of(int dtype, int bits, const Linear *l, size_t columns, size_t row, char *to) {
    const uint8_t *at = (const uint8_t *)l->weight + row * columns * bits / 8;
    const char *scales = (const char *)l->scale + row * (columns / l->group) * size_of(dtype);
    for (size_t k = 0; k < columns; k += GROUP, at += GROUP * bits / 8, to += GROUP * size_of(dtype)) {
        float scale = read_at(dtype, scales, k / l->group);
#if LANES == 16 && defined(__AVX512BF16__)
        if (dtype == BF16) {
            unpack_group_fast(bits, at, scale, to);
            continue;
        }
#endif
#if defined(LOOK_UP)
        if (dtype != F32 && bits == 4) {
            look_up_group(dtype, at, scale, to);
            continue;
        }
#endif
        unpack_group(dtype, bits, at, scale, to);
    }
}

static void unpack_row(int dtype, const Linear *l, size_t columns, size_t row, char *to) {
    size_t row_bytes = columns * size_of(dtype);
    if (!l->bits) memcpy(to, (const char *)l->weight + row * row_bytes, row_bytes);
    else if (l->bits == 4) BY_DTYPE(dtype, unpack_row_of, 4, l, columns, row, to);
    else BY_DTYPE(dtype, unpack_row_of, 8, l, columns, row, to);
}

/* ---- Activations. ---- */

/* Some rows of activations, as a product reads them. */
typedef struct {
    int dtype, way;
    size_t rows, columns, pitch; /* pitch: bytes from row to row; of tiles from 16 rows to the next */
    const char *at;
} Activations;

INLINE size_t row_pitch(int way, size_t columns) { return way == WIDE ? 4 * columns : way == PAIRS ? 2 * columns : 32 * columns; }
/* Tiles come two by two. */
INLINE size_t whole_rows(int way, size_t rows) { return way == TILES ? (rows + 31) / 32 * 32 : rows; }
INLINE size_t activation_floats(int dtype, size_t rows, size_t columns) {
    int way = way_of(dtype, columns);
    return ALIGNED(whole_rows(way, rows) * columns / (way == WIDE ? 1 : 2));
}
INLINE Activations activations_at(int dtype, size_t rows, size_t columns, void *at) {
    int way = way_of(dtype, columns);
    return (Activations){dtype, way, rows, columns, row_pitch(way, columns), at};
}

/* ---- Turning weights. ---- */

/* The even (`half` 0) or odd numbers of words of two-byte numbers. */
INLINE floats widen_half_of(int dtype, floats pairs, int half) {
    words bits = (words)pairs;
    if (dtype == BF16) return (floats)(half ? bits & 0xffff0000 : bits << 16);
    return half_to_floats(half ? bits >> 16 : bits & 0xffff);
}

/* Columns of STRIPE weight rows, as vectors: [column][weight row], or [pair of columns][weight row]. */
INLINE void turn(int dtype, int way, const char *weights, size_t pitch, size_t columns, floats *to) {
    const int per_word = dtype == F32 ? 1 : 2, per_vector = way == WIDE ? 1 : per_word;
    size_t k = 0;
    for (; k + LANES * per_word <= columns; k += LANES * per_word, weights += 4 * LANES, to += 2 * LANES * per_word / per_vector)
        UNROLL for (int m = 0; m < 2; m++) {
            floats turned[LANES];
            if (per_word == per_vector) {
                transpose(weights + m * LANES * pitch, pitch, to + m, 2);
                continue;
            }
            transpose(weights + m * LANES * pitch, pitch, turned, 1);
            UNROLL for (int j = 0; j < LANES; j++)
                UNROLL for (int half = 0; half < 2; half++)
                    to[(2 * j + half) * 2 + m] = widen_half_of(dtype, turned[j], half);
        }
    for (; k < columns; k += per_vector, weights += per_vector * size_of(dtype), to += 2)
        for (int m = 0; m < STRIPE; m++) {
            float word;
            if (way == WIDE) word = read_at(dtype, weights + m * pitch, 0);
            else memcpy(&word, weights + m * pitch, 4);
            ((float *)to)[m] = word;
        }
}

/* ---- Products. ---- */

/* sums[n] [PANEL] += a stripe of weight rows, turned, times N activation rows, over `count` columns or pairs of them. */
INLINE void multiply_stripe(int way, int N, const floats *weights, const char *x, size_t pitch, size_t count, float *sums,
                            int is_first) {
    floats sum[MANY][2];
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int m = 0; m < 2; m++)
            if (is_first) sum[n][m] = (floats){0};
            else sum[n][m] = *(const floats_at *)(sums + n * PANEL + m * LANES);
    (void)way;
    for (size_t k = 0; k < count; k++, weights += 2, x += 4) {
        floats left = weights[0], right = weights[1];
        KEEP(left);
        KEEP(right);
        UNROLL for (int n = 0; n < N; n++) {
            uint32_t word;
            memcpy(&word, x + n * pitch, 4);
            floats values = (floats)((words){0} + word);
#if LANES == 16 && defined(__AVX512BF16__)
            if (way == PAIRS) {
                sum[n][0] = (floats)_mm512_dpbf16_ps((__m512)sum[n][0], (__m512bh)left, (__m512bh)values);
                sum[n][1] = (floats)_mm512_dpbf16_ps((__m512)sum[n][1], (__m512bh)right, (__m512bh)values);
                continue;
            }
#endif
            sum[n][0] = multiply_add(left, values, sum[n][0]), sum[n][1] = multiply_add(right, values, sum[n][1]);
        }
    }
    UNROLL for (int n = 0; n < N; n++)
        UNROLL for (int m = 0; m < 2; m++) *(floats_at *)(sums + n * PANEL + m * LANES) = sum[n][m];
}

/* A stripe with all activation rows, from word `k` of theirs on. */
INLINE void multiply_rows_by(int way, const floats *weights, const Activations *x, size_t k, size_t count, float *sums) {
    size_t rows = x->rows, groups = (rows + MANY - 1) / MANY;
    const char *at = x->at + 4 * k;
    for (; groups > 0; groups--) {
        size_t N = (rows + groups - 1) / groups;
        switch (N) {
#define CASE(n) case n: multiply_stripe(way, n, weights, at, x->pitch, count, sums, k == 0); break
            CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6);
#if defined(__AVX512F__) || defined(__aarch64__)
            CASE(7); CASE(8); CASE(9); CASE(10); CASE(11); CASE(12);
#endif
#undef CASE
        }
        rows -= N, at += N * x->pitch, sums += N * PANEL;
    }
}

/* What a thread needs for a panel: weight rows, `columns` each, in the model's dtype; and those that are turned. Rows a
 * power of two apart would share their places in the cache. */
INLINE size_t stage_pitch(int dtype, size_t columns) { return (columns * size_of(dtype) + 127) / 64 * 64; }
INLINE size_t stage_floats(int dtype, size_t columns) {
    return PANEL * stage_pitch(dtype, columns) / 4 + DEEP_WORDS * STRIPE;
}

/* sums [rows][PANEL] of a panel of weight rows, in the model's dtype, with all activation rows. */
INLINE void multiply_turned(int dtype, int way, const char *weights, size_t pitch, const Activations *x, floats *turned,
                            float *sums) {
    const size_t per_word = way == WIDE ? 1 : 2, words = x->columns / per_word;
    for (size_t k = 0; k < words; k += DEEP_WORDS) {
        size_t count = words - k < DEEP_WORDS ? words - k : DEEP_WORDS;
        for (int m = 0; m < PANEL; m += STRIPE) {
            turn(dtype, way, weights + m * pitch + k * per_word * size_of(dtype), pitch, count * per_word, turned);
            multiply_rows_by(way, turned, x, k, count, sums + m);
        }
    }
}

static void multiply_wide(int dtype, const char *weights, size_t pitch, const Activations *x, floats *turned, float *sums) {
    BY_DTYPE(dtype, multiply_turned, WIDE, weights, pitch, x, turned, sums);
}

static void multiply_paired(const char *weights, size_t pitch, const Activations *x, floats *turned, float *sums) {
    multiply_turned(BF16, PAIRS, weights, pitch, x, turned, sums);
}

/* ---- On tiles. ---- */

#ifdef HAS_TILES
/* 16 rows of activations from row `first` on: for each 32 columns [pair of columns][row][2]; rows after the last are 0. */
static void arrange_tiles(const char *rows, size_t count, size_t columns, uint32_t *to) {
    size_t pitch = 2 * columns;
    for (size_t k = 0; k < pitch; k += 64, to += TILE_WORDS) {
        uint32_t last[TILE_WORDS] = {0};
        for (size_t n = 0; count < TILE && n < count; n++) memcpy(last + n * TILE, rows + n * pitch + k, 64);
        if (count < TILE) transpose(last, 64, (floats *)to, 1);
        else transpose(rows + k, pitch, (floats *)to, 1);
    }
}

/* sums [2 blocks of weight rows][2 blocks of activation rows][weight row][activation row] over all columns. Meanwhile
 * `lines` cache lines from `ahead` on are fetched for every 32 columns. */
INLINE void multiply_tiles(const char *weights, size_t pitch, size_t columns, const uint32_t *x, float *sums,
                           const char *ahead, size_t lines) {
    const char *below = weights + TILE * pitch;
    const uint32_t *beside = x + columns / TILE_COLUMNS * TILE_WORDS;
    TILE_CODE("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3", "r"(0));
    for (size_t k = 0; k < columns; k += TILE_COLUMNS, x += TILE_WORDS, beside += TILE_WORDS) {
        for (size_t i = 0; i < lines; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        LOAD_TILE("tmm4", weights + 2 * k, pitch);
        LOAD_TILE("tmm6", x, 64);
        MULTIPLY_TILES("tmm0", "tmm4", "tmm6");
        LOAD_TILE("tmm7", beside, 64);
        MULTIPLY_TILES("tmm1", "tmm4", "tmm7");
        LOAD_TILE("tmm5", below + 2 * k, pitch);
        MULTIPLY_TILES("tmm2", "tmm5", "tmm6");
        MULTIPLY_TILES("tmm3", "tmm5", "tmm7");
    }
    STORE_TILE("tmm0", sums);
    STORE_TILE("tmm1", sums + TILE_WORDS);
    STORE_TILE("tmm2", sums + 2 * TILE_WORDS);
    STORE_TILE("tmm3", sums + 3 * TILE_WORDS);
}

/* sums [rows][PANEL] of a panel of weight rows with all activation rows; `ahead` bytes are fetched meanwhile. */
static void multiply_on_tiles(const char *weights, size_t pitch, const Activations *x, const char *ahead,
                              size_t ahead_bytes, float *sums) {
    size_t columns = x->columns, rows = whole_rows(TILES, x->rows);
    size_t steps = rows / (2 * TILE) * (columns / TILE_COLUMNS), lines = (ahead_bytes / 64 + steps - 1) / steps;
    float found[4 * TILE_WORDS] __attribute__((aligned(64)));
    for (size_t n = 0; n < rows; n += 2 * TILE, ahead += lines * columns / TILE_COLUMNS * 64, sums += 2 * TILE * PANEL) {
        multiply_tiles(weights, pitch, columns, (const uint32_t *)(x->at + 2 * n * columns), found, ahead, lines);
        for (int i = 0; i < 4; i++)
            transpose(found + i * TILE_WORDS, 64, (floats *)(sums + i % 2 * TILE * PANEL + i / 2 * TILE), PANEL / LANES);
    }
}
#else
static void arrange_tiles(const char *rows, size_t count, size_t columns, uint32_t *to) {
    (void)rows, (void)count, (void)columns, (void)to;
}
static void multiply_on_tiles(const char *weights, size_t pitch, const Activations *x, const char *ahead,
                              size_t ahead_bytes, float *sums) {
    (void)weights, (void)pitch, (void)x, (void)ahead, (void)ahead_bytes, (void)sums;
}
#endif

/* sums [rows][PANEL] of `count` weight rows from `first` on, of a linear layer, with all activation rows. The panel after
 * them is fetched meanwhile; `stage` is the thread's own. */
static void many_rows_panel(const Linear *l, size_t first, int count, const Activations *x, float *stage, float *sums) {
    size_t columns = x->columns, pitch = columns * size_of(x->dtype), row_bytes = columns * l->bits / 8;
    if (!l->bits) row_bytes = pitch;
    const char *weights = (const char *)l->weight + first * row_bytes, *ahead = weights + PANEL * row_bytes;
    floats *turned = (floats *)stage;
    char *rows = (char *)(stage + DEEP_WORDS * STRIPE);
    if (l->bits || count < PANEL) {
        pitch = stage_pitch(x->dtype, columns), weights = rows;
        for (int m = 0; m < count; m++) unpack_row(x->dtype, l, columns, first + m, rows + m * pitch);
        for (int m = count; m < PANEL; m++) memset(rows + m * pitch, 0, columns * size_of(x->dtype));
    }
    if (x->way == TILES) {
        multiply_on_tiles(weights, pitch, x, ahead, PANEL * row_bytes, sums);
        return;
    }
    for (size_t i = 0; i < PANEL * row_bytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
    if (x->way == PAIRS) multiply_paired(weights, pitch, x, turned, sums);
    else multiply_wide(x->dtype, weights, pitch, x, turned, sums);
}
