/* One packed layer at a time: what transformers' layers call for prompts, and families without kernels for all.
 *
 * Few rows are multiplied as in a step. More meet weights that are unpacked, to the numbers of `PackedLinear` to the bit:
 * on processors with matrix tiles (AMX) a panel at a time into the processor's own memory, elsewhere by the caller, who
 * asks for as many at a time as the processor's cache holds.
 */
#if LANES == 16 && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef struct {
    const OpenMP *openmp;
    int64_t threads, dtype, rows, columns, outputs;
    const void *inputs;     /* [R, I] */
    Linear weight;          /* [O, I] */
    void *result;           /* [R, O]; of `unpack` [O, I] */
    float *workspace;       /* product_floats() */
    int64_t *counters;      /* [3 FIELDS] */
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
    if (p->weight.bits == 4) BY_DTYPE(p->dtype, unpack_row_of, 4, p, row, to);
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
    Order order = {p->rows, p->columns, p->columns, 0};
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
enum { TILE = 16, TILE_WORDS = 256, TILE_COLUMNS = 32 };

#define TILES(text, ...) __asm__ volatile(text ::__VA_ARGS__ : "memory")
#define LOAD_TILE(tile, base, stride) TILES("tileloadd (%0,%1,1), %%" tile, "r"(base), "r"((long)(stride)))
#define STORE_TILE(tile, base) TILES("tilestored %%" tile ", (%0,%1,1)", "r"(base), "r"(64l))
#define MULTIPLY_TILES(sum, weights, inputs) TILES("tdpbf16ps %%" inputs ", %%" weights ", %%" sum, "r"(0))

/* Ask the system for tiles, once per process; returns whether they may be used. */
int64_t allow_tiles(void) {
    const long request = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

/* All tiles are 16 rows of 64 bytes. */
static void configure_tiles(void) {
    struct { uint8_t palette, start, zero[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = TILE;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

INLINE size_t tile_rows(size_t rows) { return (rows + 2 * TILE - 1) / (2 * TILE) * 2 * TILE; }
/* Bytes from one unpacked weight row to the next; rows a power of two apart would share their places in the cache. */
INLINE size_t stage_pitch(size_t columns) { return 2 * columns + 64; }
INLINE size_t tiled_floats(size_t rows, size_t columns, size_t threads) {
    return tile_rows(rows) * columns / 2 + threads * ALIGNED(PANEL * stage_pitch(columns) / 4) + 64;
}

/* Tiles of 16 rows of activations: for each 32 columns [pair of columns][row][2]. */
static void arrange_tiles(const Product *p, size_t first, uint32_t *to) {
    for (size_t k = 0; k < (size_t)p->columns; k += TILE_COLUMNS, to += TILE_WORDS)
        for (size_t n = 0; n < TILE; n++) {
            uint32_t words[TILE_COLUMNS / 2] = {0};
            size_t at = (first + n) * p->columns + k;
            if (first + n < (size_t)p->rows) memcpy(words, (const char *)p->inputs + 2 * at, sizeof words);
            for (size_t pair = 0; pair < TILE_COLUMNS / 2; pair++) to[pair * TILE + n] = words[pair];
        }
}

/* sums [2 blocks of weight rows][2 blocks of activation rows][weight row][activation row] over all columns. */
INLINE void multiply_tiles(const char *weights, size_t pitch, size_t columns, const uint32_t *x, float *sums) {
    const char *below = weights + TILE * pitch;
    const uint32_t *beside = x + columns / TILE_COLUMNS * TILE_WORDS;
    TILES("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3", "r"(0));
    for (size_t k = 0; k < columns; k += TILE_COLUMNS, x += TILE_WORDS, beside += TILE_WORDS) {
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

/* Rows become columns. */
INLINE void transpose(const float *from, floats *to) {
    floats fours[4][4]; /* [rows 4i .. 4i + 3][j]: columns j, 4 + j, 8 + j, 12 + j */
    for (int i = 0; i < 4; i++) {
        const floats *row = (const floats *)from + 4 * i;
        floats a = PICK(row[0], row[1], LOW_PAIRS), b = PICK(row[2], row[3], LOW_PAIRS);
        floats c = PICK(row[0], row[1], HIGH_PAIRS), d = PICK(row[2], row[3], HIGH_PAIRS);
        fours[i][0] = PICK(a, b, LOW_TWOS), fours[i][1] = PICK(a, b, HIGH_TWOS);
        fours[i][2] = PICK(c, d, LOW_TWOS), fours[i][3] = PICK(c, d, HIGH_TWOS);
    }
    for (int j = 0; j < 4; j++) {
        floats even[2], odd[2];
        for (int i = 0; i < 2; i++) {
            even[i] = PICK(fours[2 * i][j], fours[2 * i + 1][j], EVEN_FOURS);
            odd[i] = PICK(fours[2 * i][j], fours[2 * i + 1][j], ODD_FOURS);
        }
        to[j] = PICK(even[0], even[1], EVEN_FOURS), to[8 + j] = PICK(even[0], even[1], ODD_FOURS);
        to[4 + j] = PICK(odd[0], odd[1], EVEN_FOURS), to[12 + j] = PICK(odd[0], odd[1], ODD_FOURS);
    }
}

/* Sums of 16 weight rows from `first` on and 16 activation rows from n on: bias added, rounded, written. */
INLINE void write_tile(const Product *p, size_t first, int count, size_t n, const float *sums) {
    floats columns[TILE] __attribute__((aligned(64)));
    transpose(sums, columns);
    for (int i = 0; i < TILE && n + i < (size_t)p->rows; i++) {
        float *row = (float *)(columns + i);
        if (count == TILE && !p->weight.bias) {
            words bits = (words)columns[i], up = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
            words is_nan = (words)(columns[i] != columns[i]);
            few_halves narrow = __builtin_convertvector((up & ~is_nan) | ((bits >> 16 | 64) & is_nan), few_halves);
            memcpy((char *)p->result + 2 * ((n + i) * p->outputs + first), &narrow, sizeof narrow);
            continue;
        }
        add_bias(BF16, p->weight.bias, first, count, row);
        write_panel(BF16, p, first, count, row, n + i);
    }
}

static void tiled_body(void *data) {
    const Product *p = data;
    size_t columns = p->columns, pitch = stage_pitch(columns), rows = tile_rows(p->rows);
    uint32_t *x = (uint32_t *)p->workspace;
    char *stage = (char *)(p->workspace + ALIGNED(rows * columns / 2));
    float sums[4 * TILE_WORDS] __attribute__((aligned(64)));
    stage += p->openmp->thread_number() * 4 * ALIGNED(PANEL * pitch / 4);
    Phase arranged = product_phase(p, 1, rows, TILE);
    for (int64_t task; (task = next_task(&arranged)) >= 0; finish(&arranged))
        arrange_tiles(p, task * TILE, x + task * TILE * columns / 2);
    configure_tiles();
    Phase multiplied = product_phase(p, 2, p->outputs, PANEL);
    for (int64_t task; (task = next_task(&multiplied)) >= 0; finish(&multiplied)) {
        int64_t first = task * PANEL;
        int count = count_from(first, p->outputs);
        for (int m = 0; m < count; m++) unpack_row(p, first + m, stage + m * pitch);
        for (size_t n = 0; n < rows; n += 2 * TILE) {
            multiply_tiles(stage, pitch, columns, x + n * columns / 2, sums);
            for (int i = 0; i < 4; i++) {
                int at = i / 2 * TILE, left = count - at < TILE ? count - at : TILE;
                if (left > 0) write_tile(p, first + at, left, n + i % 2 * TILE, sums + i * TILE_WORDS);
            }
        }
    }
    __asm__ volatile("tilerelease" ::: "memory");
    leave(p->openmp, p->counters);
}
#else
int64_t allow_tiles(void) { return 0; }
INLINE size_t tiled_floats(size_t rows, size_t columns, size_t threads) { return 0 * rows * columns * threads; }
#endif

int64_t product_floats(const Product *p) {
    size_t needed = packed_floats((int)p->dtype, p->rows, p->columns);
    if (p->rows > MAX_ROWS) return (int64_t)tiled_floats(p->rows, p->columns, p->threads);
    return (int64_t)(p->threads * (ALIGNED(p->columns) + ALIGNED(needed)));
}

/* result = inputs times weights; more than MAX_ROWS rows only of bf16 where `allow_tiles` said so. */
void multiply_packed(const Product *product) {
    void (*body)(void *) = few_rows_body;
#ifdef HAS_TILES
    if (product->rows > MAX_ROWS) body = tiled_body;
#endif
    run(product, body);
}
