/* Compiled steps of a layer for decoded tokens: n rows, each the one new token of a sequence of its own.
 *
 * kernels.py calls the functions that are not inlined, after it has checked shapes and dtypes; hatch_build.py compiles
 * this file. Elements are float or bfloat16 (`bf16` says which, a constant after inlining); all sums are in float.
 * Plain C with GNU vector types. A function returns 0, or -1 if there is no memory. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef SOURCE
#define SOURCE 0
#endif
const uint32_t source = SOURCE; /* CRC-32 of this file: kernels.py loads no library that was built from another */

#define SHARED_ROWS 16 /* of a batch from which on its work is shared among threads */

#define INLINE static inline __attribute__((always_inline))

/* Built for a CPU with AVX2 (x86-64-v3); on one without, torch does the work. Built for any x86-64, the loops below
 * took 40 times as long; built for AVX-512 (Zen 4), no less than now. */
#ifdef __x86_64__
#define LANES 8
__attribute__((target("arch=x86-64"))) int runs_here(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
#else
#define LANES 4
int runs_here(void) { return 1; }
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

/* ---- threads ---------------------------------------------------------------------------------------------------
 *
 * The calling thread's own OpenMP team, which torch's operators use as well, as another one would take the cores from
 * it; resolved from torch's libgomp when this is loaded, and without it all is done by the caller. */

#ifdef __linux__
__attribute__((weak)) void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);
__attribute__((weak)) int omp_get_max_threads(void);
__attribute__((weak)) int omp_get_num_threads(void);
__attribute__((weak)) int omp_get_thread_num(void);
#endif

/* `part` does what is from `from` to `to` of n things; 0, or -1 if there is no memory. */
typedef int Part(const void *job, int from, int to);

typedef struct {
    Part *part;
    const void *job;
    int n, most, status;
} Shared;

static void of_team(void *argument) {
    Shared *shared = argument;
#ifdef __linux__
    int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
    if (team > shared->most) team = shared->most;
    if (me >= team) return;
    int from = (int)(me * shared->n / team), to = (int)((me + 1) * shared->n / team);
    if (from < to && shared->part(shared->job, from, to)) __atomic_store_n(&shared->status, -1, __ATOMIC_RELAXED);
#else
    shared->status = shared->part(shared->job, 0, shared->n);
#endif
}

/* All n things, by as many threads as have `grain` of them; fewer are not worth waking one. The others of the team do
 * nothing, but belong to it: libgomp ends those of a larger team than the one that it is asked for. */
static int share(Part *part, const void *job, int n, int grain) {
#ifdef __linux__
    int there = GOMP_parallel && omp_get_max_threads && omp_get_num_threads && omp_get_thread_num;
    if (there && grain > 0 && n >= 2 * grain && omp_get_max_threads() > 1) {
        Shared shared = {part, job, n, n / grain, 0};
        GOMP_parallel(of_team, &shared, 0, 0);
        return shared.status;
    }
#endif
    return part(job, 0, n);
}

/* ---- elements -------------------------------------------------------------------------------------------------- */

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Round to nearest, ties to even; a NaN stays one. */
INLINE uint16_t to_bf16(float x) {
    uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE float rounded(int bf16, float x) { return bf16 ? float_of((uint32_t)to_bf16(x) << 16) : x; }

INLINE size_t size_of(int bf16) { return bf16 ? sizeof(uint16_t) : sizeof(float); }

INLINE void *at(int bf16, const void *elements, size_t i) { return (char *)elements + i * size_of(bf16); }

INLINE float load(int bf16, const void *elements, size_t i) {
    return bf16 ? float_of((uint32_t)((const uint16_t *)elements)[i] << 16) : ((const float *)elements)[i];
}

INLINE void store(int bf16, void *elements, size_t i, float x) {
    if (bf16)
        ((uint16_t *)elements)[i] = to_bf16(x);
    else
        ((float *)elements)[i] = x;
}

#pragma GCC diagnostic ignored "-Wpsabi" /* about calls of what follows, which are all inlined */

/* 2 LANES elements. A pair of bfloat16 is one word, whose halves are moved into place without a shuffle: then `even`
 * has elements 0, 2, 4 ... and `odd` 1, 3, 5 ...; of float, they are simply the first LANES and the rest. */
INLINE void load_pair(int bf16, floats *even, floats *odd, const void *elements) {
    if (bf16) {
        words pairs, low, high;
        memcpy(&pairs, elements, sizeof pairs);
        low = pairs << 16, high = pairs & 0xffff0000;
        memcpy(even, &low, sizeof low), memcpy(odd, &high, sizeof high);
    } else {
        memcpy(even, elements, sizeof *even), memcpy(odd, (const float *)elements + LANES, sizeof *odd);
    }
}

/* sums (2 LANES) += what was computed from such a pair. */
INLINE void add_pair(int bf16, float *sums, floats even, floats odd) {
    float one[LANES], other[LANES];
    memcpy(one, &even, sizeof one), memcpy(other, &odd, sizeof other);
    for (int l = 0; l < LANES; l++) {
        sums[bf16 ? 2 * l : l] += one[l];
        sums[bf16 ? 2 * l + 1 : LANES + l] += other[l];
    }
}

/* Into the second-level cache: 32 sequences of 130 tokens, 3.5 MB of keys and values from memory, took 250 us a layer
 * where they took 530 without. Into the first, 530 as well: it has too few places for lines that are on their way. */
INLINE void prefetch(const void *memory, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)memory + i, 0, 2);
}

/* e^x for x <= 0 within 1e-7, and 0 below -87; NaN gives NaN. Cephes' polynomial, without a branch. */
INLINE float exp_negative(float x) {
    float low = x < -87.0f ? -87.0f : x;
    float shifted = low * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the low bits now hold x / ln 2, to nearest */
    float n = shifted - 12582912.0f;
    float r = low - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    float y = p * float_of((bits_of(shifted) + 127) << 23);
    return x < -87.0f ? 0.0f : y;
}

/* ---- sums of weighted rows: the inner loop of everything ----------------------------------------------------- */

/* sums (heads, 2 LANES) += weights (heads, count) x rows (count, 2 LANES), for 1 to 4 heads. Every sum waits for its
 * last addition, so `chains` rows are added to as many sums, which are added together at the end. */
INLINE void add_tile(int bf16, int heads, int chains, float *sums, size_t sums_stride, const float *weights,
                     size_t weights_stride, const void *rows, size_t row_stride, size_t count) {
    floats even[4][4] = {0}, odd[4][4] = {0}, a, b;
    size_t i = 0;
    for (; i + chains <= count; i += chains)
        for (int c = 0; c < chains; c++) {
            load_pair(bf16, &a, &b, at(bf16, rows, (i + c) * row_stride));
            for (int g = 0; g < heads; g++) {
                even[c][g] += a * weights[g * weights_stride + i + c];
                odd[c][g] += b * weights[g * weights_stride + i + c];
            }
        }
    for (; i < count; i++) {
        load_pair(bf16, &a, &b, at(bf16, rows, i * row_stride));
        for (int g = 0; g < heads; g++) {
            even[0][g] += a * weights[g * weights_stride + i];
            odd[0][g] += b * weights[g * weights_stride + i];
        }
    }
    for (int g = 0; g < heads; g++) {
        for (int c = 1; c < chains; c++) even[0][g] += even[c][g], odd[0][g] += odd[c][g];
        add_pair(bf16, sums + g * sums_stride, even[0][g], odd[0][g]);
    }
}

INLINE void add_columns(int bf16, int heads, int chains, float *sums, size_t sums_stride, const float *weights,
                        size_t weights_stride, const void *rows, size_t row_stride, size_t count, size_t columns) {
    size_t c = 0;
    for (; c + 2 * LANES <= columns; c += 2 * LANES)
        add_tile(bf16, heads, chains, sums + c, sums_stride, weights, weights_stride, at(bf16, rows, c), row_stride,
                 count);
    for (; c < columns; c++)
        for (int g = 0; g < heads; g++)
            for (size_t i = 0; i < count; i++)
                sums[g * sums_stride + c] += weights[g * weights_stride + i] * load(bf16, rows, i * row_stride + c);
}

/* The same for any number of heads; `alike`: each head's numbers are added up in one order, however many there are. */
INLINE void add_rows(int bf16, int alike, int heads, float *sums, size_t sums_stride, const float *weights,
                     size_t weights_stride, const void *rows, size_t row_stride, size_t count, size_t columns) {
#define ADD(some)                                                                                                    \
    add_columns(bf16, some, alike || some > 3 ? 1 : 2, sums, sums_stride, weights, weights_stride, rows, row_stride, \
                count, columns)
    for (int g = 0; g < heads; g += 4, sums += 4 * sums_stride, weights += 4 * weights_stride)
        switch (heads - g) {
        case 1: ADD(1); break;
        case 2: ADD(2); break;
        case 3: ADD(3); break;
        default: ADD(4);
        }
#undef ADD
}

/* ---- RMS norm and the adapter's delta ------------------------------------------------------------------------ */

/* y (d) = x / rms(x) * weight, in float. */
INLINE void norm_row(int bf16, float *y, const void *x, const void *weight, float eps, int d) {
    float sums[16] = {0}, sum = 0.0f;
    int i = 0;
    for (; i + 16 <= d; i += 16)
        for (int l = 0; l < 16; l++) sums[l] += load(bf16, x, i + l) * load(bf16, x, i + l);
    for (; i < d; i++) sum += load(bf16, x, i) * load(bf16, x, i);
    for (int l = 0; l < 16; l++) sum += sums[l];
    float scale = 1.0f / sqrtf(sum / (float)d + eps);
    for (i = 0; i < d; i++) y[i] = load(bf16, x, i) * scale * load(bf16, weight, i);
}

/* out (n, d) = x (n, d) / rms(x) * weight (d). */
INLINE int norm(int bf16, int n, int d, float eps, void *out, const void *x, const void *weight) {
    float *y = malloc(sizeof(float) * d);
    if (!y) return -1;
    for (size_t i = 0; i < (size_t)n; i++) {
        norm_row(bf16, y, at(bf16, x, i * d), weight, eps, d);
        for (int j = 0; j < d; j++) store(bf16, out, i * d + j, y[j]);
    }
    free(y);
    return 0;
}

int rms_norm(int bf16, int n, int d, float eps, void *out, const void *x, const void *weight) {
    return bf16 ? norm(1, n, d, eps, out, x, weight) : norm(0, n, d, eps, out, x, weight);
}

/* qkv (n, q + k + v) += v_p B_p, of v (n, 3, r) and a packed B: tiles (r, 16) of 16 columns each, `stride` elements
 * apart. Tile by tile for all rows, so that B is read once. */
typedef struct {
    int bf16, n, q_size, kv_size, r;
    int64_t stride;
    void *qkv;
    const void *b;
    const float *v;
} Delta;

INLINE int delta_tiles(int bf16, const Delta *job, int from, int to) {
    const int n = job->n, r = job->r;
    const size_t width = job->q_size + 2 * job->kv_size;
    float *sums = malloc(sizeof(float) * n * 16);
    if (n && !sums) return -1;
    for (size_t tile = from; tile < (size_t)to; tile++) {
        const size_t c = 16 * tile;
        int p = (int)c < job->q_size ? 0 : (int)c < job->q_size + job->kv_size ? 1 : 2;
        for (int i = 0; i < n; i++)
            for (int l = 0; l < 16; l++) sums[i * 16 + l] = load(bf16, job->qkv, i * width + c + l);
        add_rows(bf16, 1, n, sums, 16, job->v + p * r, 3 * r, at(bf16, job->b, tile * job->stride), 16, r, 16);
        for (int i = 0; i < n; i++)
            for (int l = 0; l < 16; l++) store(bf16, job->qkv, i * width + c + l, sums[i * 16 + l]);
    }
    free(sums);
    return 0;
}

static int delta_part(const void *argument, int from, int to) {
    const Delta *job = argument;
    return job->bf16 ? delta_tiles(1, job, from, to) : delta_tiles(0, job, from, to);
}

int add_delta(int bf16, int n, int q_size, int kv_size, int r, int64_t stride, void *qkv, const void *v,
              const void *b) {
    const size_t count = (size_t)n * 3 * r;
    float *weights = malloc(sizeof(float) * count);
    if (count && !weights) return -1;
    for (size_t i = 0; i < count; i++) weights[i] = load(bf16, v, i);
    Delta job = {bf16, n, q_size, kv_size, r, stride, qkv, b, weights};
    int tiles = (q_size + 2 * kv_size) / 16;
    int status = share(delta_part, &job, tiles, n < SHARED_ROWS ? tiles : 8);
    free(weights);
    return status;
}

/* ---- attention over a block KV cache ----------------------------------------------------------------------------
 *
 * H query heads, K key-value heads, G = H / K, e head_dim. Of a block of 16 tokens, one layer's keys are
 * (K, e, 16), so that the scores of 16 tokens are summed side by side, and its values (K, 16, e). */

#define BLOCK 16

typedef struct {
    int32_t n, max_blocks, num_blocks, layers, slot, window, heads, kv_heads, head_dim; /* window 0: none */
    float eps;
} Shape;

INLINE int first_token(const Shape *s, int position) {
    return s->window && position >= s->window ? position - s->window + 1 : 0;
}

typedef struct { /* the blocks that a row attends to */
    const int32_t *blocks;
    int count;
} Seen;

INLINE Seen seen(const Shape *s, const int32_t *blocks, int position) {
    int first_block = first_token(s, position) / BLOCK;
    return (Seen){blocks + first_block, position / BLOCK + 1 - first_block};
}

/* One head of q or k (e), normed and rotated: functions.rotate, with its three roundings. */
INLINE void prepare_head(int bf16, float *y, float *x, const void *head, const void *norm, float eps, const void *cos,
                         const void *signed_sin, int e) {
    if (norm) norm_row(bf16, x, head, norm, eps, e);
    for (int d = 0; d < e; d++) x[d] = norm ? rounded(bf16, x[d]) : load(bf16, head, d);
    for (int half = 0, d = 0; half < 2; half++) {
        const float *other = half ? x - e / 2 : x + e / 2;
        for (; d < (half ? e : e / 2); d++) {
            float here = rounded(bf16, x[d] * load(bf16, cos, d));
            y[d] = rounded(bf16, here + rounded(bf16, other[d] * load(bf16, signed_sin, d)));
        }
    }
}

/* scores (count, a multiple of 16) become e^(score - the largest); returns their sum. */
INLINE float exponentials(float *scores, size_t count) {
    float top = scores[0], total = 0.0f, tops[BLOCK], sums[BLOCK] = {0};
    memcpy(tops, scores, sizeof tops);
    for (size_t i = BLOCK; i < count; i += BLOCK)
        for (int l = 0; l < BLOCK; l++) tops[l] = scores[i + l] > tops[l] ? scores[i + l] : tops[l];
    for (int l = 0; l < BLOCK; l++) top = tops[l] > top ? tops[l] : top;
    for (size_t i = 0; i < count; i++) scores[i] = exp_negative(scores[i] - top);
    for (size_t i = 0; i < count; i += BLOCK)
        for (int l = 0; l < BLOCK; l++) sums[l] += scores[i + l];
    for (int l = 0; l < BLOCK; l++) total += sums[l];
    return total;
}

/* One row: writes its key and value into its sequence's last block, and what its H heads attend to into out (H, e).
 * Block after block for all heads, since a block's memory lies together; while scores are added up, the values are
 * fetched from memory, and while values are, the `next` row's keys. scratch: (2 + 2 H) e + 16 H max_blocks floats. */
INLINE void attend_row(int bf16, const Shape *s, void *out, const void *qkv, const void *cos, const void *signed_sin,
                       const void *q_norm, const void *k_norm, void *pool, int position, Seen own, Seen next,
                       float *scratch) {
    const int e = s->head_dim, H = s->heads, K = s->kv_heads, group = H / K, last = own.count - 1;
    const int skipped = first_token(s, position) % BLOCK, new_token = position % BLOCK; /* in the first, last block */
    const size_t of_head = (size_t)e * BLOCK, to_values = K * of_head, to_next = 2 * to_values * s->layers;
    const size_t span = (size_t)own.count * BLOCK, bytes = size_of(bf16) * of_head;
    float *x = scratch, *k = x + e, *q = k + e, *mixed = q + H * e, *scores = mixed + H * e;

    void *keys = at(bf16, pool, own.blocks[last] * to_next), *values = at(bf16, keys, to_values);
    for (int h = 0; h < K; h++) {
        prepare_head(bf16, k, x, at(bf16, qkv, (H + h) * e), k_norm, s->eps, cos, signed_sin, e);
        for (int d = 0; d < e; d++) store(bf16, keys, h * of_head + d * BLOCK + new_token, k[d]);
        memcpy(at(bf16, values, h * of_head + new_token * e), at(bf16, qkv, (H + K + h) * e), size_of(bf16) * e);
    }
    for (int h = 0; h < H; h++)
        prepare_head(bf16, q + h * e, x, at(bf16, qkv, h * e), q_norm, s->eps, cos, signed_sin, e);
    for (int i = 0; i < H * e; i++) q[i] /= sqrtf((float)e);

    memset(scores, 0, sizeof(float) * H * span);
    for (int b = 0; b <= last; b++)
        for (int h = 0; h < K; h++) {
            keys = at(bf16, pool, own.blocks[b] * to_next + h * of_head); /* (e, 16) */
            prefetch(at(bf16, keys, to_values), bytes);
            add_rows(bf16, 0, group, scores + h * group * span + b * BLOCK, span, q + h * group * e, e, keys, BLOCK, e,
                     BLOCK);
        }

    float sums[H];
    for (int h = 0; h < H; h++) {
        float *row = scores + h * span;
        for (int t = 0; t < skipped; t++) row[t] = -INFINITY;
        for (int t = new_token + 1; t < BLOCK; t++) row[last * BLOCK + t] = -INFINITY;
        sums[h] = exponentials(row, span);
    }

    memset(mixed, 0, sizeof(float) * H * e);
    for (int b = 0; b <= last; b++)
        for (int h = 0; h < K; h++) {
            int from = b == 0 ? skipped : 0, to = b == last ? new_token + 1 : BLOCK;
            const float *weights = scores + h * group * span + b * BLOCK + from;
            values = at(bf16, pool, own.blocks[b] * to_next + to_values + h * of_head + from * e); /* (to - from, e) */
            if (b < next.count) prefetch(at(bf16, pool, next.blocks[b] * to_next + h * of_head), bytes);
            add_rows(bf16, 0, group, mixed + h * group * e, e, weights, span, values, e, to - from, e);
        }
    for (int h = 0; h < H; h++)
        for (int d = 0; d < e; d++) store(bf16, out, h * e + d, mixed[h * e + d] / sums[h]);
}

typedef struct {
    int bf16;
    const Shape *s;
    void *out, *pool;
    const void *qkv, *cos, *signed_sin, *q_norm, *k_norm;
    const int32_t *blocks, *positions;
} Attention;

INLINE int attend_rows(int bf16, const Attention *job, int from, int to) {
    const Shape *s = job->s;
    const size_t e = s->head_dim, H = s->heads, width = (H + 2 * s->kv_heads) * e;
    float *scratch = malloc(sizeof(float) * ((2 + 2 * H) * e + H * BLOCK * s->max_blocks));
    if (!scratch) return -1;
    Seen own = seen(s, job->blocks + (size_t)from * s->max_blocks, job->positions[from]);
    for (size_t i = from; i < (size_t)to; i++) {
        int more = i + 1 < (size_t)to;
        Seen next = more ? seen(s, job->blocks + (i + 1) * s->max_blocks, job->positions[i + 1]) : (Seen){0};
        attend_row(bf16, s, at(bf16, job->out, i * H * e), at(bf16, job->qkv, i * width), at(bf16, job->cos, i * e),
                   at(bf16, job->signed_sin, i * e), job->q_norm, job->k_norm, job->pool, job->positions[i], own, next,
                   scratch);
        own = next;
    }
    free(scratch);
    return 0;
}

static int attention_part(const void *argument, int from, int to) {
    const Attention *job = argument;
    return job->bf16 ? attend_rows(1, job, from, to) : attend_rows(0, job, from, to);
}

/* Or 1 + the number of a row whose position or block is not in the pool; nothing is written then. */
int decode_attention(int bf16, const Shape *s, void *out, const void *qkv, const void *cos, const void *signed_sin,
                     const void *q_norm, const void *k_norm, void *pool, const int32_t *blocks,
                     const int32_t *positions) {
    for (int i = 0; i < s->n; i++) { /* before anything is written */
        if (positions[i] < 0 || positions[i] / BLOCK >= s->max_blocks) return 1 + i;
        Seen own = seen(s, blocks + (size_t)i * s->max_blocks, positions[i]);
        for (int b = 0; b < own.count; b++)
            if (own.blocks[b] < 0 || own.blocks[b] >= s->num_blocks) return 1 + i;
    }
    if (!s->n) return 0;
    pool = at(bf16, pool, (size_t)2 * s->kv_heads * s->head_dim * BLOCK * s->slot);
    Attention job = {bf16, s, out, pool, qkv, cos, signed_sin, q_norm, k_norm, blocks, positions};
    return share(attention_part, &job, s->n, SHARED_ROWS / 2);
}
