/* The linear layers of a training step: their products, each with what follows on it before it
   leaves the first cache, and Adam.

   kernels.py compiles this file where there is a C compiler; operations.py has the formulas, the
   shapes and the same in torch. All arrays are float32. Those of images, activations and their
   gradients are contiguous within a member; weights, biases and what belongs to them lie `stride`
   apart from one member to the next. Numbers that are none stay so.

   A product is made tile by tile: TALL rows and up to WIDE vectors of columns stay in registers
   while the depth is gone through, the right factor's columns packed in a panel beforehand (Goto
   and van de Geijn 2008, Anatomy of high-performance matrix multiplication). So every number has
   one order of additions, whatever the number of threads: a thread has whole columns, or whole
   rows.

   For products of bf16 both factors are rounded to it as they are packed, two neighbours along the
   depth to a word; sums, and all that is read and written, are float32 as otherwise. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* By registers: TALL times WIDE sums, WIDE vectors of a panel and one number of the left factor.
   Without fused multiplication and addition torch makes the products, and on a processor with a
   matrix unit those of bf16. */
#if defined __AVX512F__
#define LANES 16
#define TALL 8
#elif defined __AVX2__ && defined __FMA__
#define LANES 8
#define TALL 4
#endif
#define WIDE 3

/* Numbers in a row of the widest panel; 0 where there are no products. */
#ifdef LANES
#define PANEL (WIDE * LANES)
const int64_t panel_width = PANEL;
#else
const int64_t panel_width = 0;
#endif
#if defined LANES && !defined __AMX_BF16__
const int64_t multiplies_bf16 = 1;
#else
const int64_t multiplies_bf16 = 0;
#endif

/* Of fewer multiplications, waiting for the other threads takes longer than doing them. */
static int worthwhile(int64_t multiplications) { return multiplications > 1 << 18; }

/* Share1, 1 - beta1, and share2 are what is new in the moments; rate and correction are the step
   size and 1 / sqrt of what both moments lack in the first steps. */
static inline void update(float grad, float *weight, float *exp_avg, float *exp_avg_sq,
                          float share1, float share2, float rate, float correction, float eps) {
  float first = *exp_avg + share1 * (grad - *exp_avg);
  float second = *exp_avg_sq + share2 * (grad * grad - *exp_avg_sq);
  *exp_avg = first;
  *exp_avg_sq = second;
  *weight -= rate * first / (sqrtf(second) * correction + eps);
}

void adam(int64_t members, int64_t size, int64_t stride, const float *grads, float *weights,
          float *exp_avg, float *exp_avg_sq, const float *rates, const float *corrections,
          float share1, float share2, float eps, int threads) {
  for (int64_t e = 0; e < members; e++) {
    float rate = rates[e], correction = corrections[e];
#pragma omp parallel for simd schedule(static) num_threads(threads) if (worthwhile(8 * size))
    for (int64_t i = e * stride; i < e * stride + size; i++)
      update(grads[i], weights + i, exp_avg + i, exp_avg_sq + i, share1, share2, rate, correction,
             eps);
  }
}

#ifdef LANES
#include <immintrin.h>

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int vectors(int64_t width) { return (width + LANES - 1) / LANES; }

/* Where the part of a thread begins, in whole units; part(..., me + 1, ...) is its end. */
static int64_t part(int64_t whole, int64_t unit, int me, int threads) {
  int64_t units = (whole + unit - 1) / unit;
  return smaller(whole, units * me / threads * unit);
}

/* The upper half of a float32, rounded to nearest, ties to even; what is no number stays so. */
static inline uint32_t rounded(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  uint32_t nearest = bits + 0x7fff + (bits >> 16 & 1);
  return (x == x ? nearest : bits | 0x400000) >> 16;
}

static inline int64_t half(int64_t depth) { return (depth + 1) / 2; }

static inline void put_word(float *place, float first, float second) {
  uint32_t word = rounded(first) | rounded(second) << 16;
  memcpy(place, &word, sizeof word);
}

/* Rows (height, depth) of b as words (height, half(depth)), a last odd one with 0. */
static void round_rows(int64_t height, int64_t depth, const float *b, float *out) {
  for (int64_t i = 0; i < height; i++) {
    const float *row = b + i * depth;
    float *place = out + i * half(depth);
    for (int64_t k = 0; k < depth / 2; k++)
      put_word(place + k, row[2 * k], row[2 * k + 1]);
    if (depth % 2)
      put_word(place + depth / 2, row[depth - 1], 0);
  }
}

/* sum + a b; of words the products of both halves. */
static inline __attribute__((always_inline)) vector plus_product(vector sum, float a, vector b,
                                                                 int bf16) {
  if (!bf16)
    return sum + a * b;
#ifdef __AVX512BF16__
  return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
#else
  uint32_t word;
  memcpy(&word, &a, sizeof word);
  words left = (words){0} + word, right = (words)b;
  sum += (vector)(left & 0xffff0000) * (vector)(right & 0xffff0000);
  return sum + (vector)(left << 16) * (vector)(right << 16);
#endif
}

/* out (tall, wide vectors) = a (tall, depth) panel (depth, wide vectors); the numbers of a lie
   `down` apart in a column and `along` in a row. Of bf16 a, panel and depth are of words. */
static inline __attribute__((always_inline)) void
product(int64_t depth, const float *a, int64_t down, int64_t along, const float *panel, float *out,
        int tall, int wide, int bf16) {
  vector sum[TALL][WIDE];
  for (int i = 0; i < tall; i++)
    for (int j = 0; j < wide; j++)
      sum[i][j] = (vector){0};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; k++) {
    vector b[WIDE];
    for (int j = 0; j < wide; j++)
      b[j] = *(const vector *)(panel + (k * wide + j) * LANES);
    for (int i = 0; i < tall; i++)
      for (int j = 0; j < wide; j++)
        sum[i][j] = plus_product(sum[i][j], a[i * down + k * along], b[j], bf16);
  }
  for (int i = 0; i < tall; i++)
    for (int j = 0; j < wide; j++)
      *(vector *)(out + (i * wide + j) * LANES) = sum[i][j];
}

static inline __attribute__((always_inline)) void
product_of_width(int64_t depth, const float *a, int64_t down, int64_t along, const float *panel,
                 float *out, int tall, int wide, int bf16) {
  if (wide == WIDE)
    product(depth, a, down, along, panel, out, tall, WIDE, bf16);
  else if (wide == 2)
    product(depth, a, down, along, panel, out, tall, 2, bf16);
  else
    product(depth, a, down, along, panel, out, tall, 1, bf16);
}

/* The same for any height up to TALL. */
static inline __attribute__((always_inline)) void
product_of_height(int64_t height, int64_t depth, const float *a, int64_t down, int64_t along,
                  const float *panel, int wide, float *out, int bf16) {
  if (height == TALL)
    product_of_width(depth, a, down, along, panel, out, TALL, wide, bf16);
  else
    for (int64_t i = 0; i < height; i++)
      product_of_width(depth, a + i * down, down, along, panel, out + i * wide * LANES, 1, wide,
                       bf16);
}

static __attribute__((noinline)) void tile(int64_t height, int64_t depth, const float *a,
                                           int64_t down, int64_t along, const float *panel,
                                           int wide, float *out, int bf16) {
  if (bf16)
    product_of_height(height, depth, a, down, along, panel, wide, out, 1);
  else
    product_of_height(height, depth, a, down, along, panel, wide, out, 0);
}

/* A panel (depth, full) of b (depth, width), whose rows lie `stride` apart, filled up with 0. */
static void pack(int64_t depth, int64_t width, const float *b, int64_t stride, int64_t full,
                 float *panel) {
  if (width == PANEL) /* which the compiler knows, and calls nothing for */
    for (int64_t k = 0; k < depth; k++)
      memcpy(panel + k * PANEL, b + k * stride, PANEL * sizeof *panel);
  else
    for (int64_t k = 0; k < depth; k++)
      for (int64_t j = 0; j < full; j++)
        panel[k * full + j] = j < width ? b[k * stride + j] : 0;
}

/* The same in words, (half(depth), full). */
static void pack_words(int64_t depth, int64_t width, const float *b, int64_t stride, int64_t full,
                       float *panel) {
  static const float nothing[PANEL];
  for (int64_t k = 0; k < depth; k += 2) {
    const float *row = b + k * stride, *next = k + 1 < depth ? row + stride : nothing;
    float *place = panel + k / 2 * full;
    for (int64_t j = 0; j < width; j++)
      put_word(place + j, row[j], next[j]);
    memset(place + width, 0, (full - width) * sizeof *place);
  }
}

/* As `pack` of b transposed: the columns of the panel are rows of b. In pieces, of which what is
   written stays in the first cache until whole lines are full. */
static void pack_transposed(int64_t depth, int64_t width, const float *b, int64_t stride,
                            float *panel) {
  int64_t full = vectors(width) * LANES, fours = width / 4 * 4, deep = depth / 4 * 4;
  for (int64_t piece = 0; piece < deep; piece += 64) {
    int64_t end = smaller(deep, piece + 64);
    for (int64_t j = 0; j < fours; j += 4) {
      for (int64_t k = piece; k < end; k += 4) {
        const float *row = b + j * stride + k;
        __m128 r0 = _mm_loadu_ps(row), r1 = _mm_loadu_ps(row + stride),
               r2 = _mm_loadu_ps(row + 2 * stride), r3 = _mm_loadu_ps(row + 3 * stride);
        _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
        float *place = panel + k * full + j;
        _mm_store_ps(place, r0);
        _mm_store_ps(place + full, r1);
        _mm_store_ps(place + 2 * full, r2);
        _mm_store_ps(place + 3 * full, r3);
      }
    }
  }
  for (int64_t k = 0; k < depth; k++)
    for (int64_t j = k < deep ? fours : 0; j < full; j++)
      panel[k * full + j] = j < width ? b[j * stride + k] : 0;
}

/* scratch: (threads, room), room at least in * panel_width, of bf16 (in + 1) * (batch +
   panel_width) */
void linear(int64_t members, int64_t batch, int64_t in, int64_t out, const float *x,
            int64_t x_stride, const float *weights, const float *bias, int64_t stride, float unit,
            int rectify, float *y, int bf16, float *scratch, int64_t room, int threads) {
  int64_t deep = bf16 ? half(in) : in;
  threads = worthwhile(members * batch * in * out) ? threads : 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int me = 0; me < threads; me++) {
    float *panel = scratch + me * room, sums[TALL * PANEL] __attribute__((aligned(64)));
    float *columns = panel + deep * PANEL, *rows = columns + deep * PANEL; /* in words */
    int64_t first = part(out, LANES, me, threads), end = part(out, LANES, me + 1, threads);
    for (int64_t e = 0; e < members; e++) {
      const float *left = x + e * x_stride;
      if (bf16 && first < end) {
        round_rows(batch, in, left, rows);
        left = rows;
      }
      for (int64_t j = first; j < end; j += PANEL) {
        int64_t width = smaller(PANEL, end - j);
        int wide = vectors(width);
        const float *offset = bias + e * stride + j, *right = weights + e * stride + j * in;
        if (bf16) {
          round_rows(width, in, right, columns);
          right = columns;
        }
        pack_transposed(deep, width, right, deep, panel);
        for (int64_t i = 0; i < batch; i += TALL) {
          int64_t height = smaller(TALL, batch - i);
          tile(height, deep, left + i * deep, deep, 1, panel, wide, sums, bf16);
          for (int64_t h = 0; h < height; h++) {
            float *row = y + (e * batch + i + h) * out + j;
            const float *sum = sums + h * wide * LANES;
            for (int64_t w = 0; w < width; w++) {
              float value = unit * sum[w] + offset[w];
              row[w] = rectify && value < 0 ? 0 : value;
            }
          }
        }
      }
    }
  }
}

/* scratch: (threads, room), room at least out * panel_width, of bf16 (out + 1) * (batch +
   panel_width); after, bias_grad: NULL if there is no rectifier. */
void input_gradient(int64_t members, int64_t batch, int64_t out, int64_t in, const float *grad,
                    const float *weights, int64_t stride, float scale, const float *after,
                    float *bias_grad, int64_t bias_stride, float *result, int bf16, float *scratch,
                    int64_t room, int threads) {
  int64_t deep = bf16 ? half(out) : out;
  threads = worthwhile(members * batch * in * out) ? threads : 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int me = 0; me < threads; me++) {
    float *panel = scratch + me * room, sums[TALL * PANEL] __attribute__((aligned(64)));
    float *rows = panel + deep * PANEL; /* in words */
    int64_t first = part(in, LANES, me, threads), end = part(in, LANES, me + 1, threads);
    for (int64_t e = 0; e < members; e++) {
      const float *left = grad + e * batch * out;
      if (bf16 && first < end) {
        round_rows(batch, out, left, rows);
        left = rows;
      }
      for (int64_t j = first; j < end; j += PANEL) {
        int64_t width = smaller(PANEL, end - j);
        int wide = vectors(width);
        float column[PANEL] = {0};
        (bf16 ? pack_words : pack)(out, width, weights + e * stride + j, in, wide * LANES, panel);
        for (int64_t i = 0; i < batch; i += TALL) {
          int64_t height = smaller(TALL, batch - i);
          tile(height, deep, left + i * deep, deep, 1, panel, wide, sums, bf16);
          for (int64_t h = 0; h < height; h++) {
            int64_t start = (e * batch + i + h) * in + j;
            float *row = result + start;
            const float *sum = sums + h * wide * LANES;
            for (int64_t w = 0; w < width; w++) {
              float passed = after && after[start + w] <= 0 ? 0 : scale * sum[w];
              row[w] = passed;
              column[w] += passed;
            }
          }
        }
        if (bias_grad)
          memcpy(bias_grad + e * bias_stride + j, column, width * sizeof *column);
      }
    }
  }
}

/* Writes grads, or if that is NULL makes Adam's step of the weights, which then need not be written
   and read once more: memory, not arithmetic, is what Adam waits for.
   scratch: (threads, room), room at least (batch + 1) * (in + panel_width) */
void weight_gradient(int64_t members, int64_t batch, int64_t out, int64_t in, const float *grad,
                     const float *h, int64_t stride, float factor, float *grads, float *weights,
                     float *exp_avg, float *exp_avg_sq, const float *rates,
                     const float *corrections, float share1, float share2, float eps,
                     int bf16, float *scratch, int64_t room, int threads) {
  int64_t deep = bf16 ? half(batch) : batch;
  threads = worthwhile(members * batch * in * out) ? threads : 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int me = 0; me < threads; me++) {
    float *panels = scratch + me * room, sums[TALL * PANEL] __attribute__((aligned(64)));
    float *columns = panels + deep * vectors(in) * LANES; /* (deep, TALL), of grad */
    int64_t first = part(out, TALL, me, threads), end = part(out, TALL, me + 1, threads);
    for (int64_t e = 0; e < members; e++) {
      for (int64_t j = 0; j < in; j += PANEL) {
        int64_t width = smaller(PANEL, in - j);
        (bf16 ? pack_words : pack)(batch, width, h + e * batch * in + j, in,
                                   vectors(width) * LANES, panels + j * deep);
      }
      for (int64_t i = first; i < end; i += TALL) {
        int64_t height = smaller(TALL, end - i);
        (bf16 ? pack_words : pack)(batch, height, grad + e * batch * out + i, out, TALL, columns);
        for (int64_t j = 0; j < in; j += PANEL) {
          int64_t width = smaller(PANEL, in - j), start = e * stride + i * in + j;
          int wide = vectors(width);
          /* What comes next from memory, on its way while the product is made. */
          for (int64_t r = 0; r < height && !grads; r++) {
            for (int64_t w = 0; w < width + 15; w += 16) {
              int64_t line = start + r * in + smaller(w, width - 1);
              __builtin_prefetch(weights + line, 0, 2);
              __builtin_prefetch(exp_avg + line, 0, 2);
              __builtin_prefetch(exp_avg_sq + line, 0, 2);
            }
          }
          tile(height, deep, columns, 1, TALL, panels + j * deep, wide, sums, bf16);
          for (int64_t r = 0; r < height; r++) {
            const float *sum = sums + r * wide * LANES;
            int64_t row = start + r * in;
            if (grads)
              for (int64_t w = 0; w < width; w++)
                grads[row + w] = factor * sum[w];
            else
              for (int64_t w = 0; w < width; w++)
                update(factor * sum[w], weights + row + w, exp_avg + row + w, exp_avg_sq + row + w,
                       share1, share2, rates[e], corrections[e], eps);
          }
        }
      }
    }
  }
}
#endif
