/* Layers of a model for many rows (prompts), but for attention, which torch computes: from one layer's attention to the next
 * one's in a call. Rows may be of several sequences. Every value is rounded where the eager model stores it.
 */
typedef struct {
    const OpenMP *openmp;
    int64_t threads, rows, num_pieces, capacity;
    const Shape *shape;
    const Layer *layer;     /* finished: o, gate and up, down; NULL before the first */
    const Layer *next;      /* begun: q, k, v, positions, cache; NULL after the last */
    void *hidden;           /* [R, E], the residual stream */
    const void *attended;   /* [R, H D] */
    void *qkv;              /* [R, (H + 2 K) D]: queries and keys are normed and turned */
    const void *cos, *sin;  /* [R, rotary_dim] */
    const Piece *pieces;
    float *workspace;       /* reading_floats() */
    int64_t *counters;      /* [(READ_PHASES + 1) FIELDS] */
} Reading;

enum { LAID_ROWS = 16, PLACED_ROWS = 4, READ_PHASES = 9 };

/* A thread's room for a panel: its sums with all rows, and what `many_rows_panel` needs. */
INLINE size_t panel_floats(int dtype, size_t rows, size_t columns) {
    return whole_rows(TILES, rows) * PANEL + ALIGNED(stage_floats(dtype, columns));
}

INLINE void read_row(int dtype, const void *from, size_t count, float *to) {
    for (size_t i = 0; i < count; i++) to[i] = read_at(dtype, from, i);
}

INLINE void write_row(int dtype, const float *from, size_t count, void *to) {
    for (size_t i = 0; i < count; i++) write_at(dtype, to, i, from[i]);
}

/* Up to LAID_ROWS rows of the model's dtype, from row `first` of the activations on, as a product reads them. */
static void lay_rows(const Activations *x, size_t first, const char *rows) {
    size_t count = x->rows - first < LAID_ROWS ? x->rows - first : LAID_ROWS, pitch = x->columns * size_of(x->dtype);
    char *to = (char *)x->at + first * x->columns * (x->way == WIDE ? 4 : 2);
    if (x->way == TILES) {
        arrange_tiles(rows, count, x->columns, (uint32_t *)to);
        if (first + LAID_ROWS >= x->rows && first / LAID_ROWS % 2 == 0) memset(to + x->pitch, 0, x->pitch);
        return;
    }
    for (size_t n = 0; n < count; n++, rows += pitch, to += x->pitch) {
        if (x->way == PAIRS) memcpy(to, rows, x->pitch);
        else BY_DTYPE(x->dtype, read_row, rows, x->columns, (float *)to);
    }
}

/* ---- The room of a call. ---- */

INLINE size_t larger_of(size_t a, size_t b) { return a > b ? a : b; }

typedef struct {
    size_t hidden, heads, ffn, wide; /* columns of what q, o and down read, and of q, k and v together */
    size_t widest, sums;             /* of what products read; numbers of a panel's sums */
    char *x, *activated;             /* what the next product reads; [R, F] */
    float *own;                      /* per thread: sums of two panels, two rows, and what `many_rows_panel` needs */
    size_t own_floats;
} Room;

static size_t room_of(const Shape *s, size_t rows, size_t threads, float *workspace, Room *room) {
    int dtype = (int)s->dtype;
    size_t widest, sums = whole_rows(TILES, rows) * PANEL, x_floats, activated_floats;
    room->hidden = s->hidden_size, room->heads = s->num_heads * s->head_dim, room->ffn = s->intermediate_size;
    room->wide = room->heads + 2 * s->num_kv_heads * s->head_dim;
    widest = ALIGNED(larger_of(larger_of(room->hidden, room->heads), room->ffn));
    x_floats = activation_floats(dtype, rows, room->hidden);
    x_floats = larger_of(x_floats, activation_floats(dtype, rows, room->heads));
    x_floats = larger_of(x_floats, activation_floats(dtype, rows, room->ffn));
    activated_floats = ALIGNED(rows * room->ffn * size_of(dtype) / 4 + 1);
    room->widest = widest, room->sums = sums;
    room->own_floats = 2 * sums + 2 * widest + ALIGNED(stage_floats(dtype, widest));
    room->x = (char *)workspace, room->activated = (char *)(workspace + x_floats);
    room->own = workspace + x_floats + activated_floats;
    return x_floats + activated_floats + threads * room->own_floats;
}

/* A thread at work. */
typedef struct {
    const Reading *call;
    Room room;
    int dtype;
    float *sums[2], *row, *other, *stage;
} Reader;

static Phase phase_of_reading(const Reader *r, int64_t number, int64_t count) {
    return phase_of(r->call->counters, READ_PHASES, number, count, 0);
}

/* ---- Before a product: rows are normed and laid out. ---- */

INLINE void norm_row(int dtype, const Reader *r, const void *norm, const char *from, size_t columns, char *to) {
    read_row(dtype, from, columns, r->row);
    rms_norm_of(dtype, norm, r->call->shape->norm_eps, columns, r->row, r->other);
    write_row(dtype, r->other, columns, to);
}

/* Rows [R, columns] of the model's dtype, normed if there is a norm, become what the next product reads. */
static Activations lay_out_rows(const Reader *r, int64_t number, const void *rows, const void *norm, size_t columns) {
    Activations x = activations_at(r->dtype, r->call->rows, columns, r->room.x);
    size_t pitch = columns * size_of(r->dtype);
    Phase phase = phase_of_reading(r, number, (r->call->rows + LAID_ROWS - 1) / LAID_ROWS);
    for (int64_t task; (task = next_task(&phase)) >= 0; finish(&phase)) {
        size_t first = task * LAID_ROWS, count = x.rows - first < LAID_ROWS ? x.rows - first : LAID_ROWS;
        const char *from = (const char *)rows + first * pitch;
        char *normed = (char *)r->stage;
        for (size_t n = 0; norm && n < count; n++)
            BY_DTYPE(r->dtype, norm_row, r, norm, from + n * pitch, columns, normed + n * pitch);
        lay_rows(&x, first, norm ? normed : from);
    }
    return x;
}

/* ---- Products. ---- */

static void multiply_into(const Reader *r, const Linear *l, size_t first, int count, const Activations *x, float *sums) {
    many_rows_panel(l, first, count, x, r->stage, sums);
    for (size_t n = 0; n < x->rows; n++) BY_DTYPE(r->dtype, add_bias, l->bias, first, count, sums + n * PANEL);
}

INLINE void add_to_row(int dtype, const Reader *r, const float *update, int count, char *hidden) {
    read_row(dtype, hidden, count, r->row);
    add_rounded(dtype, update, (float)r->call->shape->residual_multiplier, count, r->row);
    write_row(dtype, r->row, count, hidden);
}

/* hidden += a linear layer of rows [R, columns]. */
static void add_product(const Reader *r, int64_t number, const Linear *l, const void *rows, size_t columns) {
    size_t E = r->room.hidden, size = size_of(r->dtype);
    Activations x = lay_out_rows(r, number, rows, NULL, columns);
    Phase phase = phase_of_reading(r, number + 1, panels_of(E));
    for (int64_t task; (task = next_task(&phase)) >= 0; finish(&phase)) {
        size_t first = task * PANEL;
        int count = count_from(first, E);
        multiply_into(r, l, first, count, &x, r->sums[0]);
        for (size_t n = 0; n < x.rows; n++)
            BY_DTYPE(r->dtype, add_to_row, r, r->sums[0] + n * PANEL, count, (char *)r->call->hidden + (n * E + first) * size);
    }
}

static void activate_product(const Reader *r, int64_t number, const Layer *layer) {
    size_t F = r->room.ffn, size = size_of(r->dtype);
    Activations x = lay_out_rows(r, number, r->call->hidden, layer->post_norm, r->room.hidden);
    Phase phase = phase_of_reading(r, number + 1, panels_of(F));
    for (int64_t task; (task = next_task(&phase)) >= 0; finish(&phase)) {
        size_t first = task * PANEL;
        int count = count_from(first, F);
        multiply_into(r, &layer->gate, first, count, &x, r->sums[0]);
        multiply_into(r, &layer->up, first, count, &x, r->sums[1]);
        for (size_t n = 0; n < x.rows; n++) {
            float *gate = r->sums[0] + n * PANEL;
            BY_DTYPE(r->dtype, activate, count, r->sums[1] + n * PANEL, gate);
            BY_DTYPE(r->dtype, write_row, gate, count, r->room.activated + (n * F + first) * size);
        }
    }
}

static void project_rows(const Reader *r, int64_t number, const Layer *layer) {
    const Linear *const projections[] = {&layer->q, &layer->k, &layer->v};
    size_t q = r->room.heads, k = (r->room.wide - q) / 2, size = size_of(r->dtype);
    int64_t q_panels = panels_of(q), k_panels = panels_of(k);
    Activations x = lay_out_rows(r, number, r->call->hidden, layer->input_norm, r->room.hidden);
    Phase phase = phase_of_reading(r, number + 1, q_panels + 2 * k_panels);
    for (int64_t task; (task = next_task(&phase)) >= 0; finish(&phase)) {
        int part = task < q_panels ? 0 : task < q_panels + k_panels ? 1 : 2;
        size_t first = PANEL * (part == 0 ? task : task - q_panels - (part - 1) * k_panels);
        size_t column = first + (part == 0 ? 0 : q + (part - 1) * k);
        int count = count_from(first, part == 0 ? q : k);
        multiply_into(r, projections[part], first, count, &x, r->sums[0]);
        for (size_t n = 0; n < x.rows; n++)
            BY_DTYPE(r->dtype, write_row, r->sums[0] + n * PANEL, count, (char *)r->call->qkv + (n * r->room.wide + column) * size);
    }
}

/* ---- Positions, and the cache. ---- */

INLINE void place_row(int dtype, const Reading *call, const Layer *layer, const Piece *piece, size_t n) {
    const Shape *s = call->shape;
    size_t D = s->head_dim, size = size_of(dtype), slot = piece->past + n - piece->first_row, kv_heads = s->num_kv_heads;
    char *head = (char *)call->qkv + n * (s->num_heads + 2 * kv_heads) * D * size;
    float cos[MAX_HEAD], sin[MAX_HEAD], from[MAX_HEAD], turned[MAX_HEAD];
    read_row(dtype, (const char *)call->cos + n * s->rotary_dim * size, s->rotary_dim, cos);
    read_row(dtype, (const char *)call->sin + n * s->rotary_dim * size, s->rotary_dim, sin);
    for (size_t h = 0; h < s->num_heads + kv_heads; h++, head += D * size) {
        int is_key = h >= (size_t)s->num_heads;
        size_t to = ((piece->sequence * kv_heads + h - s->num_heads) * call->capacity + slot) * D * size;
        read_row(dtype, head, D, from);
        prepare_head(s, layer, is_key ? layer->k_norm : layer->q_norm, cos, sin, from, turned);
        write_row(dtype, turned, D, is_key ? (char *)layer->keys + to : head);
        if (is_key) memcpy((char *)layer->values + to, head + kv_heads * D * size, D * size);
    }
}

static void place_rows(const Reader *r, int64_t number, const Layer *layer) {
    Phase phase = phase_of_reading(r, number, (r->call->rows + PLACED_ROWS - 1) / PLACED_ROWS);
    for (int64_t task; (task = next_task(&phase)) >= 0; finish(&phase)) {
        const Piece *piece = r->call->pieces;
        for (int64_t n = task * PLACED_ROWS; n < r->call->rows && n < (task + 1) * PLACED_ROWS; n++) {
            while (n >= piece->first_row + piece->num_rows) piece++;
            BY_DTYPE(r->dtype, place_row, r->call, layer, piece, n);
        }
    }
}

/* ---- Entry points. ---- */

static void read_body(void *data) {
    const Reading *call = data;
    const Layer *layer = call->layer, *next = call->next;
    Reader r = {.call = call, .dtype = (int)call->shape->dtype};
    room_of(call->shape, call->rows, call->threads, call->workspace, &r.room);
    r.sums[0] = r.room.own + call->openmp->thread_number() * r.room.own_floats, r.sums[1] = r.sums[0] + r.room.sums;
    r.row = r.sums[1] + r.room.sums, r.other = r.row + r.room.widest, r.stage = r.other + r.room.widest;
    if (are_tiles_allowed) configure_tiles(LAID_ROWS, PANEL);
    if (layer) {
        add_product(&r, 1, &layer->o, call->attended, r.room.heads);
        activate_product(&r, 3, layer);
        add_product(&r, 5, &layer->down, r.room.activated, r.room.ffn);
    }
    if (next) {
        project_rows(&r, 7, next);
        place_rows(&r, 9, next);
    }
    if (are_tiles_allowed) release_tiles();
    leave(call->openmp, call->counters);
}

int64_t reading_floats(const Shape *shape, int64_t rows, int64_t threads) {
    Room room;
    return (int64_t)room_of(shape, rows, threads, NULL, &room);
}

/* Finish a layer and begin the next one. */
void read_rows(const Reading *reading) {
    memset(reading->counters, 0, (READ_PHASES + 1) * FIELDS * sizeof *reading->counters);
    reading->openmp->parallel(read_body, (void *)reading, (unsigned)reading->threads, 0);
}
