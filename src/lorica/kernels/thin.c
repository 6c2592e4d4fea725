/* Products with r numbers a token, each in one pass over the activations; see lorica/kernels/__init__.py.
 *
 * Rows are split over threads. What comes of a token depends on that token alone; sums over tokens are taken
 * thread by thread, in the order of the threads. r is a multiple of 8 (filled up with zeros), d too.
 */
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float v8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4)));

static int32_t KEPT[256][8] __attribute__((aligned(64))); /* the eight bits of a byte, as masks of floats */

void lorica_begin(void) {
  for (int byte = 0; byte < 256; byte++)
    for (int k = 0; k < 8; k++) KEPT[byte][k] = (byte >> (7 - k)) & 1 ? -1 : 0;
}

static inline v8 keep(v8 x, uint8_t byte) { return (v8)((i8)x & *(const i8 *)KEPT[byte]); }

static void *room(int64_t floats) { return aligned_alloc(64, (size_t)(floats * 4 + 63) / 64 * 64); }

/* u (T, r) = (keep ⊙ x) (T, d) · At (d, r). `random` (T, d): kept where it is at least `threshold`, and noted in
 * `bits` (T, d / 8); NULL keeps all. Returns 0, or 1 without memory. */
int lorica_down(const float *x, const float *At, const uint8_t *random, int threshold, int64_t T, int64_t d,
                int64_t r, int threads, uint8_t *bits, float *u) {
  const int64_t words = d / 8;
  int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float *rows = room(8 * d);
    if (!rows) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t first = 0; first < T; first += 8) {
      if (!rows) continue;
      const int64_t n = T - first < 8 ? T - first : 8;
      for (int64_t k = 0; k < 8; k++) {
        float *to = rows + k * d;
        const float *from = x + (first + k) * d;
        if (k >= n) {
          memset(to, 0, d * 4);
        } else if (!random) {
          memcpy(to, from, d * 4);
        } else {
          const uint8_t *drawn = random + (first + k) * d;
          uint8_t *noted = bits + (first + k) * words;
          for (int64_t w = 0; w < words; w++) {
            uint8_t byte = 0;
            for (int q = 0; q < 8; q++) byte |= (uint8_t)(drawn[8 * w + q] >= threshold) << (7 - q);
            noted[w] = byte;
            *(v8 *)(to + 8 * w) = keep(*(const v8 *)(from + 8 * w), byte);
          }
        }
      }
      for (int64_t j = 0; j < r; j += 8) {
        v8 s[8] = {{0}};
        const float *a = At + j;
        for (int64_t i = 0; i < d; i++, a += r) {
          const v8 column = *(const v8 *)a;
          for (int k = 0; k < 8; k++) s[k] += column * rows[k * d + i];
        }
        for (int64_t k = 0; k < n; k++) *(v8 *)(u + (first + k) * r + j) = s[k];
      }
    }
    free(rows);
  }
  return failed;
}

/* y (T, d) += scale · u (T, r) · Bt (r, d) */
void lorica_up(const float *u, const float *Bt, float scale, int64_t T, int64_t d, int64_t r, int threads, float *y) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t first = 0; first < T; first += 4) {
    const int64_t n = T - first < 4 ? T - first : 4;
    const float *own[4];
    for (int k = 0; k < 4; k++) own[k] = u + (first + (k < n ? k : 0)) * r;
    for (int64_t i = 0; i < d; i += 8) {
      v8 z[4] = {{0}};
      for (int64_t j = 0; j < r; j++) {
        const v8 b = *(const v8 *)(Bt + j * d + i);
        for (int k = 0; k < 4; k++) z[k] += b * own[k][j];
      }
      for (int64_t k = 0; k < n; k++) *(v8 *)(y + (first + k) * d + i) += z[k] * scale;
    }
  }
}

/* Sums that each thread but the first takes in `parts` (threads - 1, size), added to those of the first. */
static void add_up(float *sums, const float *parts, int64_t size, int threads) {
#pragma omp for schedule(static)
  for (int64_t e = 0; e < size; e++)
    for (int64_t q = 1; q < threads; q++) sums[e] += parts[(q - 1) * size + e];
}

/* g (T, r) = dy (T, d) · B (d, r); dB (d, r) = dyᵀ · u (T, r), one pass over dy. Returns 0, or 1 without memory. */
int lorica_beside(const float *dy, const float *B, const float *u, int64_t T, int64_t d, int64_t r, int threads,
                  float *g, float *dB) {
  float *parts = threads > 1 ? calloc((size_t)(threads - 1) * d * r, 4) : NULL;
  if (threads > 1 && !parts) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int me = omp_get_thread_num();
    float *sums = me ? parts + (int64_t)(me - 1) * d * r : dB;
#pragma omp for schedule(static)
    for (int64_t first = 0; first < T; first += 4) {
      const int64_t n = T - first < 4 ? T - first : 4;
      for (int64_t j = 0; j < r; j += 8) {
        v8 own[4], z[4] = {{0}};
        const float *rows[4];
        for (int k = 0; k < 4; k++) {
          rows[k] = dy + (first + (k < n ? k : 0)) * d;
          own[k] = k < n ? *(const v8 *)(u + (first + k) * r + j) : (v8){0};
        }
        for (int64_t i = 0; i < d; i++) {
          const v8 b = *(const v8 *)(B + i * r + j);
          v8 sum = *(const v8 *)(sums + i * r + j);
          for (int k = 0; k < 4; k++) {
            z[k] += b * rows[k][i];
            sum += own[k] * rows[k][i];
          }
          *(v8 *)(sums + i * r + j) = sum;
        }
        for (int64_t k = 0; k < n; k++) *(v8 *)(g + (first + k) * r + j) = z[k];
      }
    }
    if (parts) add_up(dB, parts, d * r, threads);
  }
  free(parts);
  return 0;
}

/* dx (T, d) += scale · keep ⊙ (g (T, r) · A (r, d)); dA (r, d) = gᵀ · (keep ⊙ x), one pass over x and dx.
 * `bits` NULL keeps all; dx NULL wants dA alone. Returns 0, or 1 without memory. */
int lorica_back(const float *x, const uint8_t *bits, const float *A, const float *g, float scale, int64_t T,
                int64_t d, int64_t r, int threads, float *dx, float *dA) {
  const int64_t words = d / 8;
  float *parts = threads > 1 ? calloc((size_t)(threads - 1) * r * d, 4) : NULL;
  if (threads > 1 && !parts) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int me = omp_get_thread_num();
    float *sums = me ? parts + (int64_t)(me - 1) * r * d : dA;
#pragma omp for schedule(static)
    for (int64_t first = 0; first < T; first += 4) {
      const int64_t n = T - first < 4 ? T - first : 4;
      for (int64_t w = 0; w < words; w++) {
        v8 kept[4], z[4] = {{0}};
        for (int k = 0; k < 4; k++) {
          kept[k] = k < n ? *(const v8 *)(x + (first + k) * d + 8 * w) : (v8){0};
          if (bits && k < n) kept[k] = keep(kept[k], bits[(first + k) * words + w]);
        }
        for (int64_t j = 0; j < r; j++) {
          const v8 a = *(const v8 *)(A + j * d + 8 * w);
          v8 sum = *(const v8 *)(sums + j * d + 8 * w);
          for (int k = 0; k < 4; k++) {
            const float own = g[(first + (k < n ? k : 0)) * r + j];
            z[k] += a * own;
            sum += kept[k] * own;
          }
          *(v8 *)(sums + j * d + 8 * w) = sum;
        }
        for (int64_t k = 0; dx && k < n; k++) {
          v8 add = z[k] * scale;
          if (bits) add = keep(add, bits[(first + k) * words + w]);
          *(v8 *)(dx + (first + k) * d + 8 * w) += add;
        }
      }
    }
    if (parts) add_up(dA, parts, r * d, threads);
  }
  free(parts);
  return 0;
}
