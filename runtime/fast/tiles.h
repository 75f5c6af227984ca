/* Blocks of words that are turned, and matrix tiles. */

/* LANES rows of LANES words, `pitch` bytes apart, become columns, `step` vectors apart. */
INLINE void transpose(const void *from, size_t pitch, floats *to, size_t step) {
    enum { FOURS = LANES / 4 };
    floats fours[FOURS][4]; /* [rows 4i .. 4i + 3][j]: columns j, 4 + j, 8 + j, 12 + j */
    UNROLL for (int i = 0; i < FOURS; i++) {
        floats row[4];
        UNROLL for (int j = 0; j < 4; j++) row[j] = *(const floats_at *)((const char *)from + (4 * i + j) * pitch);
        floats a = PICK(row[0], row[1], LOW_PAIRS), b = PICK(row[2], row[3], LOW_PAIRS);
        floats c = PICK(row[0], row[1], HIGH_PAIRS), d = PICK(row[2], row[3], HIGH_PAIRS);
        fours[i][0] = PICK(a, b, LOW_TWOS), fours[i][1] = PICK(a, b, HIGH_TWOS);
        fours[i][2] = PICK(c, d, LOW_TWOS), fours[i][3] = PICK(c, d, HIGH_TWOS);
    }
    UNROLL for (int j = 0; j < 4; j++) {
#if LANES == 16
        floats even[2], odd[2];
        UNROLL for (int i = 0; i < 2; i++) {
            even[i] = PICK(fours[2 * i][j], fours[2 * i + 1][j], EVEN_FOURS);
            odd[i] = PICK(fours[2 * i][j], fours[2 * i + 1][j], ODD_FOURS);
        }
        to[j * step] = PICK(even[0], even[1], EVEN_FOURS), to[(8 + j) * step] = PICK(even[0], even[1], ODD_FOURS);
        to[(4 + j) * step] = PICK(odd[0], odd[1], EVEN_FOURS), to[(12 + j) * step] = PICK(odd[0], odd[1], ODD_FOURS);
#elif LANES == 8
        to[j * step] = PICK(fours[0][j], fours[1][j], EVEN_FOURS);
        to[(4 + j) * step] = PICK(fours[0][j], fours[1][j], ODD_FOURS);
#else
        to[j * step] = fours[0][j];
#endif
    }
}

/* Matrix tiles (AMX): the processor's own products of 16 rows of weights with 16 rows of activations, in bf16. Each sum is
 * one chain over the columns, whatever rows are beside it.
 */
#ifdef HAS_TILES
enum { TILE = 16, TILE_WORDS = 256 };

#define TILE_CODE(text, ...) __asm__ volatile(text ::__VA_ARGS__ : "memory")
#define LOAD_TILE(tile, base, stride) TILE_CODE("tileloadd (%0,%1,1), %%" tile, "r"(base), "r"((long)(stride)))
#define STORE_TILE(tile, base) TILE_CODE("tilestored %%" tile ", (%0,%1,1)", "r"(base), "r"(64l))
#define MULTIPLY_TILES(sum, weights, inputs) TILE_CODE("tdpbf16ps %%" inputs ", %%" weights ", %%" sum, "r"(0))

/* Ask the system for tiles, once per process; returns whether they may be used. */
static int64_t allow_tiles(void) {
    const long request = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

/* Sums 0 to 3, weights 4 and 5 (of up to 16 rows each, `count` together), activations 6 and 7 (of `rows`, up to 16). */
static void configure_tiles(size_t rows, int count) {
    int above = count < TILE ? count : TILE, below = count > TILE ? count - TILE : 1;
    struct { uint8_t palette, start, zero[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = i == 4 || i == 5 ? 64 : 4 * rows;
        config.rows[i] = i == 0 || i == 1 || i == 4 ? above : i < 6 ? below : TILE;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

static void release_tiles(void) { __asm__ volatile("tilerelease" ::: "memory"); }

/* out[n][m] = weight row m . activation row n, as `panel`, of activations that were arranged for tiles. */
static void tiled_panel(const char *w, const Order *order, int count, const float *x, float *out) {
    size_t rows = order->rows, pitch = 2 * order->columns;
    float sums[2 * TILE_WORDS] __attribute__((aligned(64)));
    floats columns[2][TILE];
    const char *ahead = w + PANEL * pitch;
    if (count < PANEL) configure_tiles(rows, count);
    TILE_CODE("tilezero %%tmm0\n\ttilezero %%tmm2", "r"(0));
    for (size_t k = 0; k < pitch; k += 64, x += TILE * rows) {
        for (int i = 0; i < PANEL; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        LOAD_TILE("tmm6", x, 4 * rows);
        LOAD_TILE("tmm4", w + k, pitch);
        MULTIPLY_TILES("tmm0", "tmm4", "tmm6");
        if (count <= TILE) continue;
        LOAD_TILE("tmm5", w + TILE * pitch + k, pitch);
        MULTIPLY_TILES("tmm2", "tmm5", "tmm6");
    }
    STORE_TILE("tmm0", sums);
    STORE_TILE("tmm2", sums + TILE_WORDS);
    for (int i = 0; i < 2; i++) transpose(sums + i * TILE_WORDS, 64, columns[i], 1);
    for (size_t n = 0; n < rows; n++)
        for (int i = 0; i < 2; i++) memcpy(out + n * PANEL + i * TILE, columns[i] + n, 64);
    if (count < PANEL) configure_tiles(rows, PANEL);
}
#else
static int64_t allow_tiles(void) { return 0; }
static void configure_tiles(size_t rows, int count) { (void)rows, (void)count; }
static void release_tiles(void) {}
static void tiled_panel(const char *w, const Order *order, int count, const float *x, float *out) {
    (void)w, (void)order, (void)count, (void)x, (void)out;
}
#endif
