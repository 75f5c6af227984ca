/* One linear layer at a time: packed ones for prompts, and for families without kernels for all; on processors with
 * matrix tiles (AMX) plain ones of bf16 for prompts as well.
 *
 * Few rows are multiplied as in a step. More meet weights that are unpacked, to the numbers of `PackedLinear` to the bit:
 * on tiles a panel at a time into the processor's own memory, elsewhere by the caller, who asks for as many at a time as
 * the processor's cache holds.
 */
typedef struct Product {
    const OpenMP *openmp;
    int64_t threads, dtype, rows, columns, outputs;
    const void *inputs;     /* [R, I] */
    Linear weight;          /* [O, I] */
    void *result;           /* [R, O]; of `unpack` [O, I] */
    float *workspace;       /* product_floats() */
    int64_t *counters;      /* [3 FIELDS] */
    const struct Product *also; /* on tiles: another layer with the same inputs; or NULL */
} Product;

/* Phase `number` of two, with `rows` in tasks of `size`. */
static Phase product_phase(const Product *p, int64_t number, int64_t rows, int64_t size) {
    return phase_of(p->counters, 2, number, (rows + size - 1) / size, 0);
}

static void run(const Product *p, void (*body)(void *)) {
    memset(p->counters, 0, 3 * FIELDS * sizeof *p->counters);
    p->openmp->parallel(body, (void *)p, (unsigned)p->threads, 0);
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
INLINE void unpack_row_of(int dtype, int bits, const Product *p, size_t row, char *to) {
    const Linear *l = &p->weight;
    const uint8_t *at = (const uint8_t *)l->weight + row * p->columns * bits / 8;
    const char *scales = (const char *)l->scale + row * (p->columns / l->group) * size_of(dtype);
    for (size_t k = 0; k < (size_t)p->columns; k += GROUP, at += GROUP * bits / 8, to += GROUP * size_of(dtype)) {
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

static void unpack_row(const Product *p, size_t row, char *to) {
    size_t row_bytes = p->columns * size_of((int)p->dtype);
    if (!p->weight.bits) memcpy(to, (const char *)p->weight.weight + row * row_bytes, row_bytes);
    else if (p->weight.bits == 4) BY_DTYPE(p->dtype, unpack_row_of, 4, p, row, to);
    else BY_DTYPE(p->dtype, unpack_row_of, 8, p, row, to);
}

static void unpack_body(void *data) {
    const Product *p = data;
    size_t row_bytes = p->columns * size_of((int)p->dtype);
    Phase phase = product_phase(p, 1, p->outputs, PANEL);
    for (int64_t task; (task = next_task(&phase)) >= 0; finish(&phase))
        for (int64_t row = task * PANEL; row < p->outputs && row < (task + 1) * PANEL; row++)
            unpack_row(p, row, (char *)p->result + row * row_bytes);
    leave(p->openmp, p->counters);
}

/* Write all weights. */
void unpack_weights(const Product *product) {
    run(product, unpack_body);
}

/* ---- Up to MAX_ROWS rows: as in a step. ---- */

INLINE void write_panel(int dtype, const Product *p, size_t first, int count, const float *from, size_t n) {
    for (int m = 0; m < count; m++) write_at(dtype, p->result, n * p->outputs + first + m, from[m]);
}

static void few_rows_body(void *data) {
    const Product *p = data;
    int dtype = (int)p->dtype;
    size_t needed = packed_floats(dtype, p->rows, p->columns), own = ALIGNED(p->columns) + ALIGNED(needed);
    float *row = p->workspace + p->openmp->thread_number() * own, out[MAX_ROWS * PANEL];
    float *packed = row + ALIGNED(p->columns);
    Inputs x = {NULL, {packed, packed}};
    Order order = {.rows = p->rows, .columns = p->columns, .chunk = p->columns};
    for (int64_t n = 0; n < p->rows; n++) {
        for (int64_t i = 0; i < p->columns; i++) row[i] = read_at(dtype, p->inputs, n * p->columns + i);
        pack_row(dtype, (int)p->weight.bits, p->rows, p->columns, n, row, packed);
    }
    Phase phase = product_phase(p, 1, p->outputs, PANEL);
    for (int64_t task; (task = next_task(&phase)) >= 0; finish(&phase)) {
        int64_t first = task * PANEL;
        int count = count_from(first, p->outputs);
        linear(dtype, &p->weight, &order, first, count, &x, out);
        for (int64_t n = 0; n < p->rows; n++) BY_DTYPE(dtype, write_panel, p, first, count, out + n * PANEL, n);
    }
    leave(p->openmp, p->counters);
}

/* ---- Any number of rows, on tiles. ---- */

#ifdef HAS_TILES
INLINE size_t tile_rows(size_t rows) { return (rows + 2 * TILE - 1) / (2 * TILE) * 2 * TILE; }
/* Bytes from one unpacked weight row to the next; rows a power of two apart would share their places in the cache. */
INLINE size_t stage_pitch(size_t columns) { return 2 * columns + 64; }
INLINE size_t tiled_floats(size_t rows, size_t columns, size_t threads) {
    return tile_rows(rows) * columns / 2 + threads * ALIGNED(PANEL * stage_pitch(columns) / 4) + 64;
}

/* Tiles of 16 rows of activations: for each 32 columns [pair of columns][row][2]. */
static void arrange_tiles(const Product *p, size_t first, uint32_t *to) {
    size_t pitch = 2 * p->columns, count = p->rows - first;
    const char *rows = (const char *)p->inputs + first * pitch;
    for (size_t k = 0; k < pitch; k += 64, to += TILE_WORDS) {
        uint32_t last[TILE_WORDS] = {0};
        for (size_t n = 0; count < TILE && n < count; n++) memcpy(last + n * TILE, rows + n * pitch + k, 64);
        if (count < TILE) transpose(last, 64, (floats *)to);
        else transpose(rows + k, pitch, (floats *)to);
    }
}

/* sums [2 blocks of weight rows][2 blocks of activation rows][weight row][activation row] over all columns. Meanwhile
 * `lines` cache lines from `ahead` on are fetched for every 32 columns. */
INLINE void multiply_tiles(const char *weights, size_t pitch, size_t columns, const uint32_t *x, float *sums,
                           const char *ahead, size_t lines) {
    const char *below = weights + TILE * pitch;
    const uint32_t *beside = x + columns / TILE_COLUMNS * TILE_WORDS;
    TILES("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3", "r"(0));
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

/* Sums of up to 32 weight rows from `first` on and 16 activation rows from n on: bias added, rounded, written. */
INLINE void write_tiles(const Product *p, size_t first, int count, size_t n, const float *above, const float *below) {
    floats columns[2][TILE] __attribute__((aligned(64)));
    float row[PANEL];
    transpose(above, 64, columns[0]);
    transpose(below, 64, columns[1]);
    for (int i = 0; i < TILE && n + i < (size_t)p->rows; i++) {
        if (count == PANEL && !p->weight.bias) {
            __m512bh narrow = _mm512_cvtne2ps_pbh((__m512)columns[1][i], (__m512)columns[0][i]);
            memcpy((char *)p->result + 2 * ((n + i) * p->outputs + first), &narrow, sizeof narrow);
            continue;
        }
        memcpy(row, &columns[0][i], 64), memcpy(row + TILE, &columns[1][i], 64);
        add_bias(BF16, p->weight.bias, first, count, row);
        write_panel(BF16, p, first, count, row, n + i);
    }
}

/* Up to PANEL weight rows from `first` on times all activation rows; the panel after them is fetched meanwhile. */
static void multiply_panel(const Product *p, int64_t first, const uint32_t *x, char *stage) {
    size_t columns = p->columns, rows = tile_rows(p->rows), pitch = stage_pitch(columns);
    size_t row_bytes = columns * (p->weight.bits ? p->weight.bits : 16) / 8;
    size_t steps = rows / (2 * TILE) * (columns / TILE_COLUMNS), lines = (PANEL * row_bytes / 64 + steps - 1) / steps;
    const char *weights = stage, *ahead = (const char *)p->weight.weight + (first + PANEL) * row_bytes;
    float sums[4 * TILE_WORDS] __attribute__((aligned(64)));
    int count = count_from(first, p->outputs);
    if (!p->weight.bits && count == PANEL) weights = ahead - PANEL * row_bytes, pitch = row_bytes;
    else for (int m = 0; m < count; m++) unpack_row(p, first + m, stage + m * pitch);
    for (size_t n = 0; n < rows; n += 2 * TILE, ahead += lines * columns / TILE_COLUMNS * 64) {
        multiply_tiles(weights, pitch, columns, x + n * columns / 2, sums, ahead, lines);
        for (int i = 0; i < 2; i++)
            write_tiles(p, first, count, n + i * TILE, sums + i * TILE_WORDS, sums + (2 + i) * TILE_WORDS);
    }
}

static void tiled_body(void *data) {
    const Product *p = data, *q = p;
    size_t columns = p->columns, rows = tile_rows(p->rows);
    uint32_t *x = (uint32_t *)p->workspace;
    char *stage = (char *)(p->workspace + ALIGNED(rows * columns / 2));
    int64_t panels = 0;
    stage += p->openmp->thread_number() * 4 * ALIGNED(PANEL * stage_pitch(columns) / 4);
    Phase arranged = product_phase(p, 1, rows, TILE);
    for (int64_t task; (task = next_task(&arranged)) >= 0; finish(&arranged))
        arrange_tiles(p, task * TILE, x + task * TILE * columns / 2);
    configure_tiles(TILE, PANEL);
    for (q = p; q; q = q->also) panels += panels_of(q->outputs);
    Phase multiplied = phase_of(p->counters, 2, 2, panels, p->threads);
    while (take_run(&multiplied))
        while (multiplied.next < multiplied.end) {
            int64_t at = multiplied.next++;
            for (q = p; at >= panels_of(q->outputs); q = q->also) at -= panels_of(q->outputs);
            multiply_panel(q, at * PANEL, x, stage);
        }
    release_tiles();
    leave(p->openmp, p->counters);
}
#else
INLINE size_t tiled_floats(size_t rows, size_t columns, size_t threads) { return 0 * rows * columns * threads; }
#endif

int64_t product_floats(const Product *p) {
    size_t needed = packed_floats((int)p->dtype, p->rows, p->columns);
    if (p->rows > MAX_ROWS) return (int64_t)tiled_floats(p->rows, p->columns, p->threads);
    return (int64_t)(p->threads * (ALIGNED(p->columns) + ALIGNED(needed)));
}

/* result = inputs times weights; more than MAX_ROWS rows only of bf16 where `allow_tiles` said so. */
void multiply_linear(const Product *product) {
    void (*body)(void *) = few_rows_body;
#ifdef HAS_TILES
    if (product->rows > MAX_ROWS) body = tiled_body;
#endif
    run(product, body);
}
