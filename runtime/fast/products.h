/* One linear layer at a time: packed ones for families whose layers have no kernels.
 *
 * Few rows are multiplied as in a step, more as in a prompt.
 */
typedef struct {
    const OpenMP *openmp;
    int64_t threads, dtype, rows, columns, outputs;
    const void *inputs;     /* [R, I] */
    Linear weight;          /* [O, I] */
    void *result;           /* [R, O] */
    float *workspace;       /* product_floats() */
    int64_t *counters;      /* [3 FIELDS] */
} Product;

/* Phase `number` of two, with `rows` in tasks of `size`. */
static Phase product_phase(const Product *p, int64_t number, int64_t rows, int64_t size) {
    return phase_of(p->counters, 2, number, (rows + size - 1) / size, 0);
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

/* ---- Any number of rows. ---- */

static void many_rows_body(void *data) {
    const Product *p = data;
    int dtype = (int)p->dtype;
    size_t rows = p->rows, size = size_of(dtype);
    Activations x = activations_at(dtype, rows, p->columns, p->workspace);
    float *sums = p->workspace + activation_floats(dtype, rows, p->columns);
    sums += p->openmp->thread_number() * panel_floats(dtype, rows, p->columns);
    float *stage = sums + whole_rows(TILES, rows) * PANEL;
    Phase laid = product_phase(p, 1, rows, LAID_ROWS);
    for (int64_t task; (task = next_task(&laid)) >= 0; finish(&laid))
        lay_rows(&x, task * LAID_ROWS, (const char *)p->inputs + task * LAID_ROWS * p->columns * size);
    if (x.way == TILES) configure_tiles(LAID_ROWS, PANEL);
    Phase phase = product_phase(p, 2, p->outputs, PANEL);
    for (int64_t task; (task = next_task(&phase)) >= 0; finish(&phase)) {
        int64_t first = task * PANEL;
        int count = count_from(first, p->outputs);
        many_rows_panel(&p->weight, first, count, &x, stage, sums);
        for (size_t n = 0; n < rows; n++) {
            BY_DTYPE(dtype, add_bias, p->weight.bias, first, count, sums + n * PANEL);
            BY_DTYPE(dtype, write_panel, p, first, count, sums + n * PANEL, n);
        }
    }
    if (x.way == TILES) release_tiles();
    leave(p->openmp, p->counters);
}

int64_t product_floats(const Product *p) {
    int dtype = (int)p->dtype;
    size_t own = ALIGNED(p->columns) + ALIGNED(packed_floats(dtype, p->rows, p->columns));
    if (p->rows <= MAX_ROWS) return (int64_t)(p->threads * own);
    own = panel_floats(dtype, p->rows, p->columns);
    return (int64_t)(activation_floats(dtype, p->rows, p->columns) + p->threads * own);
}

/* result = inputs times weights. */
void multiply_linear(const Product *product) {
    memset(product->counters, 0, 3 * FIELDS * sizeof *product->counters);
    product->openmp->parallel(product->rows > MAX_ROWS ? many_rows_body : few_rows_body, (void *)product,
                              (unsigned)product->threads, 0);
}
