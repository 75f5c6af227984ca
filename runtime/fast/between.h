/* What lies between the products of a prompt, which torch computes: sums and norms, rotary positions and the cache, SiLU.
 *
 * Rows are shared out among threads. Every value is rounded where the eager model stores it, as in a step.
 */
enum { ROWS_AT_A_TIME = 4 };

typedef struct {
    const OpenMP *openmp;
    int64_t threads, rows;
    int64_t *counters;      /* [2 FIELDS] */
} Crew;

typedef struct {
    Crew crew;
    int64_t dtype, columns;
    double norm_eps, multiplier;
    void *hidden;           /* [R, E], the residual stream: the update is added here */
    const void *update;     /* [R, E]; NULL: nothing is added */
    const void *norm;       /* [E]; NULL: there is no result */
    void *result;           /* [R, E] */
    float *workspace;       /* [threads, 2, ALIGNED(E)] */
} Join;

typedef struct {
    Crew crew;
    const Shape *shape;
    const Layer *layer;
    int64_t new_tokens;     /* rows of a sequence */
    int64_t past, capacity; /* slots of every sequence: filled before, and all */
    int64_t q_pitch, k_pitch, v_pitch; /* numbers from row to row */
    void *q;                /* [R, H D]: normed and turned in place */
    const void *k, *v;      /* [R, K D] */
    const void *cos, *sin;  /* [R, rotary_dim] */
} Placement;

typedef struct {
    Crew crew;
    int64_t dtype, columns, pitch;
    const void *gate, *up;  /* [R, F], `pitch` numbers from row to row */
    void *result;           /* [R, F] */
} Activation;

/* The next rows of this thread: the first of them; -1 when all are taken. */
INLINE int64_t next_rows(const Crew *crew, int64_t *end) {
    int64_t first = take(crew->counters + FIELDS, ROWS_AT_A_TIME);
    *end = first + ROWS_AT_A_TIME < crew->rows ? first + ROWS_AT_A_TIME : crew->rows;
    return first < crew->rows ? first : -1;
}

static void share_rows(const Crew *crew, void (*body)(void *), const void *work) {
    memset(crew->counters, 0, 2 * FIELDS * sizeof *crew->counters);
    crew->openmp->parallel(body, (void *)work, (unsigned)crew->threads, 0);
}

INLINE void read_row(int dtype, const void *from, size_t count, float *to) {
    for (size_t i = 0; i < count; i++) to[i] = read_at(dtype, from, i);
}

INLINE void write_row(int dtype, const float *from, size_t count, void *to) {
    for (size_t i = 0; i < count; i++) write_at(dtype, to, i, from[i]);
}

INLINE void join_row(int dtype, const Join *j, size_t n, float *sum, float *other) {
    size_t count = j->columns, at = n * count * size_of(dtype);
    read_row(dtype, (char *)j->hidden + at, count, sum);
    if (j->update) {
        read_row(dtype, (const char *)j->update + at, count, other);
        add_rounded(dtype, other, (float)j->multiplier, (int)count, sum);
        write_row(dtype, sum, count, (char *)j->hidden + at);
    }
    if (j->norm) {
        rms_norm_of(dtype, j->norm, j->norm_eps, count, sum, other);
        write_row(dtype, other, count, (char *)j->result + at);
    }
}

static void join_body(void *data) {
    const Join *j = data;
    float *sum = j->workspace + j->crew.openmp->thread_number() * 2 * ALIGNED(j->columns), *other = sum + ALIGNED(j->columns);
    for (int64_t n, end; (n = next_rows(&j->crew, &end)) >= 0;)
        for (; n < end; n++) BY_DTYPE(j->dtype, join_row, j, n, sum, other);
    leave(j->crew.openmp, j->crew.counters);
}

/* hidden += update, and its norm. */
void join_rows(const Join *join) { share_rows(&join->crew, join_body, join); }

/* Queries are turned, keys are turned into the cache, values go there as they are. */
INLINE void place_row(int dtype, const Placement *p, size_t n) {
    const Shape *s = p->shape;
    const Layer *layer = p->layer;
    size_t D = s->head_dim, size = size_of(dtype), sequence = n / p->new_tokens, slot = p->past + n % p->new_tokens;
    float cos[MAX_HEAD], sin[MAX_HEAD], head[MAX_HEAD], turned[MAX_HEAD];
    read_row(dtype, (const char *)p->cos + n * s->rotary_dim * size, s->rotary_dim, cos);
    read_row(dtype, (const char *)p->sin + n * s->rotary_dim * size, s->rotary_dim, sin);
    for (int64_t h = 0; h < s->num_heads; h++) {
        char *q = (char *)p->q + (n * p->q_pitch + h * D) * size;
        read_row(dtype, q, D, head);
        prepare_head(s, layer, layer->q_norm, cos, sin, head, turned);
        write_row(dtype, turned, D, q);
    }
    for (int64_t h = 0; h < s->num_kv_heads; h++) {
        size_t to = ((sequence * s->num_kv_heads + h) * p->capacity + slot) * D * size;
        read_row(dtype, (const char *)p->k + (n * p->k_pitch + h * D) * size, D, head);
        prepare_head(s, layer, layer->k_norm, cos, sin, head, turned);
        write_row(dtype, turned, D, (char *)layer->keys + to);
        memcpy((char *)layer->values + to, (const char *)p->v + (n * p->v_pitch + h * D) * size, D * size);
    }
}

static void place_body(void *data) {
    const Placement *p = data;
    for (int64_t n, end; (n = next_rows(&p->crew, &end)) >= 0;)
        for (; n < end; n++) BY_DTYPE(p->shape->dtype, place_row, p, n);
    leave(p->crew.openmp, p->crew.counters);
}

void place_heads(const Placement *placement) { share_rows(&placement->crew, place_body, placement); }

INLINE void activate_row(int dtype, const Activation *a, size_t n) {
    size_t columns = a->columns, size = size_of(dtype);
    float gate[SLOTS], up[SLOTS];
    for (size_t i = 0; i < columns; i += SLOTS) {
        size_t count = columns - i < SLOTS ? columns - i : SLOTS, from = (n * a->pitch + i) * size;
        read_row(dtype, (const char *)a->gate + from, count, gate);
        read_row(dtype, (const char *)a->up + from, count, up);
        activate(dtype, (int)count, up, gate);
        write_row(dtype, gate, count, (char *)a->result + (n * columns + i) * size);
    }
}

static void activate_body(void *data) {
    const Activation *a = data;
    for (int64_t n, end; (n = next_rows(&a->crew, &end)) >= 0;)
        for (; n < end; n++) BY_DTYPE(a->dtype, activate_row, a, n);
    leave(a->crew.openmp, a->crew.counters);
}

/* SiLU(gate) * up. */
void activate_rows(const Activation *activation) { share_rows(&activation->crew, activate_body, activation); }
