/* What a training step does between encoder and decoder and after them, each in one pass over
   memory.

   kernels.py compiles this file where there is a C compiler; operations.py has the formulas, the
   shapes and the same in torch. All arrays are float32 and contiguous but for the gradients of
   the biases, whose members lie `stride` apart. Numbers that are none stay so: a member that
   diverges must be seen to.

   Every sum has one order, whatever the number of threads: a thread has whole blocks of rows, or
   whole members. Without OpenMP the pragmas are ignored, and one thread does it all. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Images whose likelihood has sums of its own. */
#define ROWS 16
const int64_t rows = ROWS;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* exp(x) = scale (1 + rest), |x| <= 88, to 2 units in the last place: rest is exp of what lies
   within half a log 2 of 0, less 1, by its Taylor polynomial, so that exp(x) - 1 is exact near 0. */
static inline float exponential(float x, float *scale) {
  float whole = rintf(x * 1.44269504f);
  /* log 2 in two parts, the first short enough for its product to be exact */
  float f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float rest = 1.0f / 40320;
  rest = rest * f + 1.0f / 5040;
  rest = rest * f + 1.0f / 720;
  rest = rest * f + 1.0f / 120;
  rest = rest * f + 1.0f / 24;
  rest = rest * f + 1.0f / 6;
  rest = rest * f + 0.5f;
  rest = rest * f * f + f;
  uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
  memcpy(scale, &bits, sizeof bits);
  return rest;
}

/* sigma^2 - 1 = (sigma - 1) (sigma + 1), exact near a variance of 1. */
static inline float excess_variance(float logvar, float *sigma) {
  float half = 0.5f * logvar, scale;
  float rest = exponential(half < -87 ? -87 : half > 88 ? 88 : half, &scale);
  *sigma = half > 88 ? INFINITY : scale + scale * rest;
  return (scale * rest + (scale - 1)) * (*sigma + 1);
}

/* log(1 + e) for 0 <= e <= 1: 2 artanh(s), s = e / (2 + e) <= 1/3. */
static inline float log_one_plus(float e) {
  float s = e / (2 + e), square = s * s;
  float sum = 1.0f / 15;
  sum = sum * square + 1.0f / 13;
  sum = sum * square + 1.0f / 11;
  sum = sum * square + 1.0f / 9;
  sum = sum * square + 1.0f / 7;
  sum = sum * square + 1.0f / 5;
  sum = sum * square + 1.0f / 3;
  return 2 * s * (sum * square + 1);
}

void levels(int64_t size, const uint8_t *images, float *x, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
  for (int64_t i = 0; i < size; i++)
    x[i] = images[i];
}

/* scratch: room for a double and `pixels` numbers of every block of rows of every member. */
void bernoulli(int64_t members, int64_t batch, int64_t pixels, float *logits, const float *x,
               float unit, double *log_px, float *bias_grad, int64_t stride, float share,
               void *scratch, int threads) {
  int64_t blocks = (batch + ROWS - 1) / ROWS;
  double *block_sums = scratch;
  float *columns = (float *)(block_sums + members * blocks);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t e = 0; e < members; e++) {
    for (int64_t block = 0; block < blocks; block++) {
      int64_t first = block * ROWS, end = smaller(first + ROWS, batch);
      float *column = columns + (e * blocks + block) * pixels;
      memset(column, 0, pixels * sizeof *column);
      double sum = 0;
      for (int64_t i = first; i < end; i++) {
        float *row = logits + (e * batch + i) * pixels;
        const float *level = x + (e * batch + i) * pixels;
        float likelihood = 0;
#pragma omp simd reduction(+ : likelihood)
        for (int64_t j = 0; j < pixels; j++) {
          float logit = row[j], pixel = level[j] * unit, scale;
          float size = fabsf(logit);
          float rest = exponential(size > 87 ? -87 : -size, &scale);
          float small = scale + scale * rest; /* exp(-|logit|) */
          float positive = logit < 0 ? 0 : logit;
          likelihood += pixel * logit - positive - log_one_plus(small);
          float grad = (logit < 0 ? small : 1.0f) / (1 + small) - pixel;
          row[j] = grad;
          column[j] += grad;
        }
        sum += likelihood;
      }
      block_sums[e * blocks + block] = sum;
    }
  }
  for (int64_t e = 0; e < members; e++) {
    float *sums = bias_grad + e * stride;
    memset(sums, 0, pixels * sizeof *sums);
    for (int64_t block = 0; block < blocks; block++) {
      log_px[e] += block_sums[e * blocks + block];
      for (int64_t j = 0; j < pixels; j++)
        sums[j] += share * columns[(e * blocks + block) * pixels + j];
    }
  }
}

void latent(int64_t members, int64_t batch, int64_t dims, const float *head, const float *noise,
            float *z, float *deviation, double *kl, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (members > 1)
  for (int64_t e = 0; e < members; e++) {
    double sum = 0;
    for (int64_t i = 0; i < batch; i++) {
      int64_t image = e * batch + i;
      const float *mean = head + image * 2 * dims, *logvar = mean + dims;
      float divergence = 0;
#pragma omp simd reduction(+ : divergence)
      for (int64_t j = 0; j < dims; j++) {
        float sigma, excess = excess_variance(logvar[j], &sigma);
        float offset = sigma * noise[image * dims + j];
        deviation[image * dims + j] = offset;
        z[image * dims + j] = mean[j] + offset;
        divergence += 0.5f * (mean[j] * mean[j] + excess - logvar[j]);
      }
      sum += divergence;
    }
    kl[e] += sum;
  }
}

void latent_gradient(int64_t members, int64_t batch, int64_t dims, float *head,
                     const float *grad_z, const float *deviation, const float *kl_weight,
                     float share, float *bias_grad, int64_t stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (members > 1)
  for (int64_t e = 0; e < members; e++) {
    float *sums = bias_grad + e * stride, weight = share * kl_weight[e];
    for (int64_t j = 0; j < 2 * dims; j++)
      sums[j] = 0;
    for (int64_t i = 0; i < batch; i++) {
      int64_t image = e * batch + i;
      float *mean = head + image * 2 * dims, *logvar = mean + dims;
      const float *grad = grad_z + image * dims, *offset = deviation + image * dims;
#pragma omp simd
      for (int64_t j = 0; j < dims; j++) {
        float sigma, excess = excess_variance(logvar[j], &sigma);
        mean[j] = grad[j] + weight * mean[j];
        logvar[j] = 0.5f * (grad[j] * offset[j] + weight * excess);
        sums[j] += mean[j];
        sums[j + dims] += logvar[j];
      }
    }
  }
}
