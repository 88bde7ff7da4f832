/* A C program that uses the installed library through narrowgauge.h: quantize, pack, multiply, and compare with plain
 * arithmetic. Prints the largest error; exits with 1 if it is not small or if bad input is accepted. With two paths it
 * also loads a matrix from the first, packs it and saves it to the second. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "narrowgauge/narrowgauge.h"

enum { kRows = 48, kCols = 200 };

static void check(ng_status status, const char* what) {
  if (status == NG_OK) return;
  fprintf(stderr, "C: %s failed with status %d: %s\n", what, (int)status, ng_last_error());
  exit(1);
}

int main(int argc, char** argv) {
  static float weights[kRows * kCols], decoded[kRows * kCols], x[kCols], y[kRows];
  for (int i = 0; i < kRows * kCols; ++i) weights[i] = sinf((float)i);
  for (int i = 0; i < kCols; ++i) x[i] = cosf((float)i);

  const int64_t matrix_shape[] = {kRows, kCols}, x_shape[] = {1, kCols}, y_shape[] = {1, kRows};
  const ng_tensor weights_view = {weights, NG_F32, 2, matrix_shape, NULL};
  const ng_tensor decoded_view = {decoded, NG_F32, 2, matrix_shape, NULL};
  const ng_tensor x_view = {x, NG_F32, 2, x_shape, NULL};
  const ng_tensor y_view = {y, NG_F32, 2, y_shape, NULL};

  ng_qtensor* q = NULL;
  check(ng_quantize(&weights_view, "fp6", NULL, &q), "ng_quantize");
  check(ng_pack(q), "ng_pack");
  check(ng_dequantize(q, &decoded_view), "ng_dequantize");
  check(ng_linear(&x_view, q, NULL, NULL, &y_view), "ng_linear");

  double worst = 0;
  for (int row = 0; row < kRows; ++row) {
    double expected = 0;
    for (int i = 0; i < kCols; ++i) expected += (double)x[i] * (double)decoded[row * kCols + i];
    worst = fmax(worst, fabs(expected - (double)y[row]));
  }
  printf("C: version %s, %s, %s, %lld bytes, largest error %.2g\n", ng_version(), ng_isa(), ng_qtensor_format(q),
         (long long)ng_qtensor_nbytes(q), worst);
  if (!(worst < 1e-4)) return 1;

  ng_qtensor* none = NULL;
  if (ng_quantize(&weights_view, "fp6_e9m9", NULL, &none) != NG_INVALID_ARGUMENT || none != NULL) {
    printf("C: the format fp6_e9m9 was accepted\n");
    return 1;
  }
  printf("C: refused as it should be: %s\n", ng_last_error());
  ng_qtensor_free(q);

  if (argc == 3) {
    ng_qtensor* loaded = NULL;
    check(ng_load(argv[1], NULL, &loaded), "ng_load");
    check(ng_pack(loaded), "ng_pack");
    check(ng_save(loaded, argv[2], NULL), "ng_save");
    ng_qtensor_free(loaded);
  }
  return 0;
}
