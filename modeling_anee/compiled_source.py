"""C source of the kernels that `compiled.py` builds: linear maps, and the two halves of a layer for a few tokens.

Activations become integers of 16 bits with one step a row, products are summed exactly in 32 bits, so an output depends neither
on the number of rows nor on the order of sums. Weights lie in blocks of 16 outputs, 64 bytes at a time: 4 inputs of each
output in 8 bits, 8 in 4 bits. Halves of 16 bits, masked and shifted, then meet pairs of inputs in one instruction.
"""

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define LANES 16  /* outputs of a block */
#define GROUP 32  /* inputs that share a scale in 4 bits */
#define MIDDLE 8  /* what the offset of a group stands for, of 0 to 15 */
#define ROWS 8    /* rows at once: their sums stay in registers */
#define FLOAT_ROWS 6    /* the same in the base's own weights, */
#define FLOAT_OUTPUTS 4 /* beside so many outputs */
#define AHEAD 4096 /* bytes that are asked of memory before they are used */
#define PART 4096 /* outputs that one thread corrects at once */
#define MOST_RANK 64
#define MOST_BLOCKS 8 /* of 16 channels of a head */
#define INLINE static inline __attribute__((always_inline))

typedef int32_t i32x16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(4)));
typedef int16_t i16x32 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16x32 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2)));
typedef float f32x16 __attribute__((vector_size(64), aligned(4)));
typedef float f32x8 __attribute__((vector_size(32), aligned(4)));
typedef float f32x4 __attribute__((vector_size(16), aligned(4)));

enum { FLOAT, INT8, INT4 };
enum { SILU, GELU_TANH };

typedef struct {
  int64_t kind, outputs, inputs, rank;
  const void *weight;
  const void *scales; /* INT8: float [out]; INT4: bfloat16 [out / 16, in / 32, 2, 16], scales and offsets */
  const float *bias, *directions; /* [out], [rank, in], or NULL */
  const int8_t *lost;             /* [rank, out], or NULL */
  float largest; /* activation, in steps */
} Map;

typedef struct {
  Map qkv, output;
  const float *norm;
  int64_t heads, groups, size;
  float epsilon, scaling;
  const int64_t *group; /* [heads], that each attends to */
} Attention;

typedef struct {
  Map gate_up, down;
  const float *norm;
  int64_t activation;
  float epsilon;
} FeedForward;

/* Rows as integers: digits [rows, padded] in steps [rows], their sums [rows] and those of each group [rows, groups]. */
typedef struct {
  int16_t *digits;
  float *steps;
  int32_t *sums, *group_sums;
  int64_t padded;
} Encoded;

static int64_t padded(int64_t inputs) { return (inputs + GROUP - 1) / GROUP * GROUP; }

/* Memory of the calling thread, kept from call to call. */
static void *scratch(size_t bytes) {
  static _Thread_local void *kept;
  static _Thread_local size_t size;
  if (bytes > size) {
    free(kept);
    kept = malloc(bytes);
    size = kept ? bytes : 0;
  }
  return kept;
}

static int64_t encoded_bytes(int64_t rows, int64_t inputs) {
  int64_t all = padded(inputs);
  return rows * (2 * all + 4 * (all / GROUP) + 8) + 64;
}

static Encoded encoded_in(void *memory, int64_t rows, int64_t inputs) {
  int64_t all = padded(inputs);
  Encoded e = {memory, 0, 0, 0, all};
  e.steps = (float *)(e.digits + rows * all);
  e.sums = (int32_t *)(e.steps + rows);
  e.group_sums = e.sums + rows;
  return e;
}

static void encode(const float *x, int64_t inputs, float largest, Encoded e, int64_t row) {
  int16_t *digits = e.digits + row * e.padded;
  float most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < inputs; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
  float step = most / largest > 1.17549435e-38f ? most / largest : 1.17549435e-38f, inverse = 1 / step;
  for (int64_t i = 0; i < inputs; i++) digits[i] = (int16_t)(int32_t)rintf(x[i] * inverse);
  memset(digits + inputs, 0, 2 * (e.padded - inputs));
  int32_t sum = 0, *own = e.group_sums + row * (e.padded / GROUP);
  for (int64_t g = 0; g < e.padded / GROUP; g++) {
    int32_t part = 0;
    for (int i = 0; i < GROUP; i++) part += digits[g * GROUP + i];
    own[g] = part;
    sum += part;
  }
  e.steps[row] = step;
  e.sums[row] = sum;
}

/* sum + a b, where 32 products of 16 bits are added in pairs */
INLINE i32x16 add_pairs(i32x16 sum, u16x32 a, i32x16 b) {
#if defined(__AVX512VNNI__)
  return (i32x16)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (i32x16)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  __m256i u[2], v[2], s[2];
  memcpy(u, &a, 64); memcpy(v, &b, 64); memcpy(s, &sum, 64);
  for (int k = 0; k < 2; k++) s[k] = _mm256_add_epi32(s[k], _mm256_madd_epi16(u[k], v[k]));
  memcpy(&sum, s, 64);
  return sum;
#else
  i32x16 c = (i32x16)a;
  return sum + (c << 16 >> 16) * (b << 16 >> 16) + (c >> 16) * (b >> 16);
#endif
}

INLINE i32x16 pair_of(const int16_t *x) {
  int32_t two;
  memcpy(&two, x, 4);
  return (i32x16){} + two;
}

INLINE u16x32 weights_at(const uint8_t *w) { return *(const u16x32 *)w; }

INLINE f32x16 widened(const uint16_t *x) {
  return (f32x16)(__builtin_convertvector(*(const u16x16 *)x, u32x16) << 16);
}

INLINE void store(float *out, f32x16 x, int64_t many) {
  if (many >= LANES) *(f32x16 *)out = x;
  else memcpy(out, &x, 4 * many);
}

/* A block of outputs in 8 bits, where 128 was added to each weight, for some rows. */
INLINE void int8_tile(const Map *m, int64_t block, Encoded e, int64_t row, float *out, const int rows) {
  const uint8_t *w = (const uint8_t *)m->weight + block * e.padded * LANES;
  const int16_t *x = e.digits + row * e.padded;
  i32x16 a[ROWS], b[ROWS];
  for (int r = 0; r < rows; r++) a[r] = b[r] = (i32x16){};
  for (int64_t i = 0; i < e.padded; i += 4) {
    if (rows == 1) __builtin_prefetch(w + i * LANES + AHEAD);
    u16x32 both = weights_at(w + i * LANES), even = both & 255, odd = both >> 8;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      a[r] = add_pairs(a[r], even, pair_of(x + r * e.padded + i));
      b[r] = add_pairs(b[r], odd, pair_of(x + r * e.padded + i + 2));
    }
  }
  f32x16 scale;
  int64_t many = m->outputs - block * LANES < LANES ? m->outputs - block * LANES : LANES;
  memset(&scale, 0, sizeof scale);
  memcpy(&scale, (const float *)m->scales + block * LANES, 4 * many);
  for (int r = 0; r < rows; r++) {
    /* What leaves 32 bits on the way comes back: the difference fits. */
    u32x16 sum = (u32x16)a[r] + (u32x16)b[r] - 128u * (uint32_t)e.sums[row + r];
    store(out + r * m->outputs, __builtin_convertvector((i32x16)sum, f32x16) * scale * e.steps[row + r], many);
  }
}

INLINE void int4_tile(const Map *m, int64_t block, Encoded e, int64_t row, float *out, const int rows) {
  int64_t groups = e.padded / GROUP, many = m->outputs - block * LANES;
  const uint8_t *w = (const uint8_t *)m->weight + block * e.padded * (LANES / 2);
  const uint16_t *scales = (const uint16_t *)m->scales + block * groups * 2 * LANES;
  f32x16 sums[ROWS];
  for (int r = 0; r < rows; r++) sums[r] = (f32x16){};
  for (int64_t g = 0; g < groups; g++, w += GROUP * LANES / 2, scales += 2 * LANES) {
    const int16_t *x = e.digits + row * e.padded + g * GROUP;
    i32x16 a[ROWS], b[ROWS];
    for (int r = 0; r < rows; r++) a[r] = b[r] = (i32x16){};
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      if (rows == 1) __builtin_prefetch(w + 64 * k + AHEAD);
      u16x32 four = weights_at(w + 64 * k);
      u16x32 first = four & 15, second = four >> 4 & 15, third = four >> 8 & 15, last = four >> 12;
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) {
        const int16_t *own = x + r * e.padded + 8 * k;
        a[r] = add_pairs(add_pairs(a[r], first, pair_of(own)), third, pair_of(own + 4));
        b[r] = add_pairs(add_pairs(b[r], second, pair_of(own + 2)), last, pair_of(own + 6));
      }
    }
    f32x16 scale = widened(scales), offset = widened(scales + LANES);
    for (int r = 0; r < rows; r++) {
      int32_t all = e.group_sums[(row + r) * groups + g];
      sums[r] += scale * __builtin_convertvector(a[r] + b[r] - MIDDLE * all, f32x16) + offset * (float)all;
    }
  }
  for (int r = 0; r < rows; r++) store(out + r * m->outputs, sums[r] * e.steps[row + r], many);
}

#define SOME_ROWS(name, tile)                                                                                        \
  static void name(const Map *m, int64_t block, Encoded e, int64_t row, float *out, int64_t rows) {                  \
    switch (rows) {                                                                                                  \
      case 1: tile(m, block, e, row, out, 1); break;                                                                 \
      case 2: tile(m, block, e, row, out, 2); break;                                                                 \
      case 3: tile(m, block, e, row, out, 3); break;                                                                 \
      case 4: tile(m, block, e, row, out, 4); break;                                                                 \
      case 5: tile(m, block, e, row, out, 5); break;                                                                 \
      case 6: tile(m, block, e, row, out, 6); break;                                                                 \
      case 7: tile(m, block, e, row, out, 7); break;                                                                 \
      default: tile(m, block, e, row, out, ROWS);                                                                    \
    }                                                                                                                \
  }
SOME_ROWS(int8_rows, int8_tile)
SOME_ROWS(int4_rows, int4_tile)

static void integer_blocks(const Map *m, Encoded e, float *out, int64_t rows, int64_t threads) {
  int64_t blocks = (m->outputs + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t row = 0; row < rows; row += ROWS) {
      int64_t some = rows - row < ROWS ? rows - row : ROWS;
      float *start = out + row * m->outputs + block * LANES;
      if (m->kind == INT8) int8_rows(m, block, e, row, start, some);
      else int4_rows(m, block, e, row, start, some);
    }
}

static float dot(const float *a, const float *b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

INLINE float sum_of(f32x16 x) {
  f32x8 halves[2];
  memcpy(halves, &x, 64);
  halves[0] += halves[1];
  f32x4 quarters[2];
  memcpy(quarters, halves, 32);
  quarters[0] += quarters[1];
  return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
}

/* A few outputs in the base's own weights for some rows: every sum is made in one order, whatever the number of rows. */
INLINE void float_tile(const Map *m, int64_t first, const float *x, float *out, const int outputs, const int rows) {
  int64_t n = m->inputs, whole = n / LANES * LANES;
  const float *w = (const float *)m->weight + first * n;
  f32x16 sums[FLOAT_ROWS][FLOAT_OUTPUTS];
  for (int r = 0; r < rows; r++)
    for (int o = 0; o < outputs; o++) sums[r][o] = (f32x16){};
  for (int64_t i = 0; i < whole; i += LANES) {
    f32x16 weights[FLOAT_OUTPUTS];
#pragma GCC unroll 4
    for (int o = 0; o < outputs; o++) {
      weights[o] = *(const f32x16 *)(w + o * n + i);
      __builtin_prefetch(w + (o + outputs) * n + i, 0, 2); /* the next outputs, while these are in the cache */
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      f32x16 inputs = *(const f32x16 *)(x + r * n + i);
#pragma GCC unroll 4
      for (int o = 0; o < outputs; o++) sums[r][o] += inputs * weights[o];
    }
  }
  for (int r = 0; r < rows; r++)
    for (int o = 0; o < outputs; o++) {
      float rest = 0;
      for (int64_t i = whole; i < n; i++) rest += x[r * n + i] * w[o * n + i];
      out[r * m->outputs + first + o] = sum_of(sums[r][o]) + rest;
    }
}

#define FLOAT_TILES(many)                                                                                            \
  for (int64_t row = 0; row < rows; row += FLOAT_ROWS) {                                                              \
    const float *own = x + row * m->inputs;                                                                           \
    float *start = out + row * m->outputs;                                                                            \
    switch (rows - row) {                                                                                             \
      case 1: float_tile(m, first, own, start, many, 1); break;                                                    \
      case 2: float_tile(m, first, own, start, many, 2); break;                                                    \
      case 3: float_tile(m, first, own, start, many, 3); break;                                                    \
      case 4: float_tile(m, first, own, start, many, 4); break;                                                    \
      case 5: float_tile(m, first, own, start, many, 5); break;                                                    \
      default: float_tile(m, first, own, start, many, FLOAT_ROWS);                                                 \
    }                                                                                                                 \
  }

static void float_rows(const Map *m, const float *x, float *out, int64_t rows, int64_t threads) {
  int64_t some = m->outputs / FLOAT_OUTPUTS;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < some; part++) {
    int64_t first = part * FLOAT_OUTPUTS;
    FLOAT_TILES(FLOAT_OUTPUTS)
  }
  for (int64_t first = some * FLOAT_OUTPUTS; first < m->outputs; first++) FLOAT_TILES(1)
}

/* What rounding lost along a few directions, and the bias. */
static void add_rest(const Map *m, const float *x, float *out, int64_t threads) {
  float along[MOST_RANK];
  for (int64_t k = 0; k < m->rank; k++) along[k] = dot(x, m->directions + k * m->inputs, m->inputs);
  int64_t parts = (m->outputs + PART - 1) / PART;
#pragma omp parallel for num_threads(threads) schedule(static) if (parts > 1 && threads > 1)
  for (int64_t part = 0; part < parts; part++) {
    int64_t from = part * PART, to = from + PART < m->outputs ? from + PART : m->outputs;
    for (int64_t k = 0; k < m->rank; k++)
      for (int64_t o = from; o < to; o++) out[o] += along[k] * (float)m->lost[k * m->outputs + o];
    for (int64_t o = from; o < to && m->bias; o++) out[o] += m->bias[o];
  }
}

static void linear(const Map *m, const float *x, float *out, int64_t rows, void *memory, int64_t threads) {
  if (m->kind == FLOAT) {
    float_rows(m, x, out, rows, threads);
  } else {
    Encoded e = encoded_in(memory, rows, m->inputs);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) encode(x + row * m->inputs, m->inputs, m->largest, e, row);
    integer_blocks(m, e, out, rows, threads);
  }
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
  for (int64_t row = 0; row < rows; row++) add_rest(m, x + row * m->inputs, out + row * m->outputs, rows > 1 ? 1 : threads);
}

/* Rows [rows, in] -> [rows, out]; 0, or 1 where there is no memory. */
int anee_linear(const Map *m, const float *x, float *out, int64_t rows, int64_t threads) {
  void *memory = scratch(encoded_bytes(rows, m->inputs));
  if (!memory) return 1;
  linear(m, x, out, rows, memory, threads);
  return 0;
}

static void rms_norm(const float *x, const float *weight, float epsilon, float *out, int64_t n) {
  float scale = 1 / sqrtf(dot(x, x, n) / n + epsilon);
  for (int64_t i = 0; i < n; i++) out[i] = x[i] * weight[i] * scale;
}

/* e^x to the last bit or two, for x of at most 0 in a loop that is vectorised */
INLINE float exponential(float x) {
  x = x < -87 ? -87 : x > 88 ? 88 : x;
  float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f, p = p * r + 8.3334519073e-3f, p = p * r + 4.1665795894e-2f, p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f, p = p * r * r + r + 1;
  int32_t bits = ((int32_t)n + 127) << 23;
  float power;
  memcpy(&power, &bits, 4);
  return p * power;
}

/* Keys are turned, and so are queries: channel i goes with i + half. */
static void rotate(float *head, const float *cosine, const float *sine, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    float a = head[i], b = head[half + i];
    head[i] = a * cosine[i] + b * sine[i];
    head[half + i] = b * cosine[half + i] + a * sine[half + i];
  }
}

/* Scores to shares. */
static void soften(float *scores, int64_t length) {
  float most = -INFINITY, all = 0;
  for (int64_t s = 0; s < length; s++) most = scores[s] > most ? scores[s] : most;
#pragma omp simd reduction(+ : all)
  for (int64_t s = 0; s < length; s++) all += scores[s] = exponential(scores[s] - most);
  for (int64_t s = 0; s < length; s++) scores[s] /= all;
}

/* One query of so many times 16 channels. */
INLINE void attend_blocks(float scaling, const float *query, const float *keys, const float *values, int64_t length,
                          float *scores, float *out, const int blocks) {
  f32x16 q[MOST_BLOCKS], sums[MOST_BLOCKS];
  for (int j = 0; j < blocks; j++) q[j] = *(const f32x16 *)(query + LANES * j), sums[j] = (f32x16){};
  for (int64_t s = 0; s < length; s++) {
    f32x16 product = {};
#pragma GCC unroll 8
    for (int j = 0; j < blocks; j++) product += q[j] * *(const f32x16 *)(keys + LANES * (s * blocks + j));
    scores[s] = sum_of(product) * scaling;
  }
  soften(scores, length);
  for (int64_t s = 0; s < length; s++)
#pragma GCC unroll 8
    for (int j = 0; j < blocks; j++) sums[j] += scores[s] * *(const f32x16 *)(values + LANES * (s * blocks + j));
  for (int j = 0; j < blocks; j++) *(f32x16 *)(out + LANES * j) = sums[j];
}

static void attend_head(const Attention *a, const float *query, const float *keys, const float *values, int64_t length,
                        float *scores, float *out) {
  int64_t n = a->size;
  switch (n) {
    case 4 * LANES: attend_blocks(a->scaling, query, keys, values, length, scores, out, 4); return;
    case 6 * LANES: attend_blocks(a->scaling, query, keys, values, length, scores, out, 6); return;
    case 8 * LANES: attend_blocks(a->scaling, query, keys, values, length, scores, out, 8); return;
  }
  for (int64_t s = 0; s < length; s++) scores[s] = dot(query, keys + s * n, n) * a->scaling;
  soften(scores, length);
  memset(out, 0, 4 * n);
  for (int64_t s = 0; s < length; s++)
    for (int64_t i = 0; i < n; i++) out[i] += scores[s] * values[s * n + i];
}

/* The first half of a layer for tokens that follow each other: rows [rows, D] -> out [rows, D]. Keys and values of `length`
   tokens, the new ones' last, are in storage [2 groups, capacity, size], where the new ones are written. A token's outputs are
   the same bits alone and with others. */
int anee_attend(const Attention *a, const float *x, const float *cosine, const float *sine, int64_t rotated, float *storage,
                int64_t capacity, int64_t length, float *out, int64_t rows, int64_t threads) {
  int64_t width = a->qkv.inputs, joint = a->qkv.outputs, inner = a->heads * a->size, n = a->size, jobs = rows * a->heads;
  int64_t most = width > inner ? width : inner;
  float *normed = scratch(4 * (rows * (width + joint + inner) + jobs * length) + encoded_bytes(rows, most));
  if (!normed) return 1;
  float *heads = normed + rows * width, *mixed = heads + rows * joint, *scores = mixed + rows * inner;
  void *memory = scores + jobs * length;
  for (int64_t r = 0; r < rows; r++) rms_norm(x + r * width, a->norm, a->epsilon, normed + r * width, width);
  linear(&a->qkv, normed, heads, rows, memory, threads);
  for (int64_t r = 0; r < rows; r++) {
    float *own = heads + r * joint;
    for (int64_t h = 0; h < a->heads + a->groups && rotated; h++)
      rotate(own + h * n, cosine + r * rotated, sine + r * rotated, rotated / 2);
    for (int64_t g = 0; g < 2 * a->groups; g++)
      memcpy(storage + (g * capacity + length - rows + r) * n, own + (a->heads + g) * n, 4 * n);
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t job = 0; job < jobs; job++) {
    int64_t h = job / rows, r = job % rows, seen = length - rows + r + 1;
    const float *keys = storage + a->group[h] * capacity * n, *values = keys + a->groups * capacity * n;
    attend_head(a, heads + r * joint + h * n, keys, values, seen, scores + job * length, mixed + r * inner + h * n);
  }
  linear(&a->output, mixed, out, rows, memory, threads);
  for (int64_t i = 0; i < rows * a->output.outputs; i++) out[i] += x[i];
  return 0;
}

static void activate(int64_t kind, float *gate, const float *up, int64_t n) {
  if (kind == SILU)
    for (int64_t i = 0; i < n; i++) gate[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
  else
    for (int64_t i = 0; i < n; i++) {
      float inner = 1.5957691216f * (gate[i] + 0.044715f * gate[i] * gate[i] * gate[i]); /* twice that of tanh */
      gate[i] = gate[i] / (1 + exponential(-inner)) * up[i];
    }
}

/* The second half: rows [rows, D] -> out [rows, D]. */
int anee_feed(const FeedForward *f, const float *x, float *out, int64_t rows, int64_t threads) {
  int64_t width = f->gate_up.inputs, joint = f->gate_up.outputs, inner = joint / 2;
  int64_t most = width > inner ? width : inner;
  float *normed = scratch(4 * rows * (width + joint) + encoded_bytes(rows, most));
  if (!normed) return 1;
  float *gate = normed + rows * width;
  void *memory = gate + rows * joint;
  for (int64_t r = 0; r < rows; r++) rms_norm(x + r * width, f->norm, f->epsilon, normed + r * width, width);
  linear(&f->gate_up, normed, gate, rows, memory, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
  for (int64_t r = 0; r < rows; r++) activate(f->activation, gate + r * joint, gate + r * joint + inner, inner);
  for (int64_t r = 1; r < rows; r++) memmove(gate + r * inner, gate + r * joint, 4 * inner);
  linear(&f->down, gate, out, rows, memory, threads);
  for (int64_t i = 0; i < rows * f->down.outputs; i++) out[i] += x[i];
  return 0;
}
"""
