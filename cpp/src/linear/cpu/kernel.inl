// The linear kernels, written once over a vector of 16 floats and a decoder. portable.cpp, avx2.cpp and avx512.cpp
// define, in an unnamed namespace, and then include this file:
//
//   V16                       16 floats: load, store, set1, add, mul, sub, fma(a, b, c) = a * b + c
//   kParts, Part              1: a Part is a V16; 2: its `lo` and `hi`, which also have add, sub and fma
//   load_f16, load_bf16, load_e8m0, load_e4m3, load_u8     16 numbers as floats, exactly (all NaN codes arrive as NaN)
//   store_f16, store_bf16     round to nearest even
//   kDirectRows               the most rows of x in a direct kernel's registers: 4 or 8
//   kTwoTileRows              the most rows for which two direct tiles take less time than a panel
//   kTileRows, kPanelBlocks   shape of the register tile of multiply_panel
//   a decoder D               D(tables); template <int Q, int P> void decode(const uint8_t* unit, Part out[4]) const:
//                             columns 4Q .. 4Q + 3 of a unit, part P of their 16 rows, exact in float;
//                             D::kUnsigned: it serves elements with a zero point
//                             D::column(Q, j), where it has one, is the column that out[j] holds instead of 4Q + j
//   find_decoder(tables, use) calls use(Tag<D>) for the element
//
// One arithmetic for all activations: fma on floats. bf16 dot products gain a few percent at one row, lose more from
// four on (bench/fma_or_dot.cpp) and would need fp16 and fp32 activations split.
//
// Rounding: a sum of up to 16 K-steps runs in one accumulator (fewer where rows of x are few and several accumulators
// hide the latency), is multiplied by the group's scale and added to the total in one fma. That gives the bound of
// linear.hpp: at most 16 + K/16 roundings reach any term.

template <int P, typename V>
inline auto& part(V& v) {
  if constexpr (kParts == 1) {
    return v;
  } else if constexpr (P == 0) {
    return v.lo;
  } else {
    return v.hi;
  }
}

V16 load_scales(const Weights& w, int64_t block, int64_t group) {
  const int64_t at = (block * w.groups + group) * 16;
  switch (w.scale) {
    case Scale::fp32: return load(static_cast<const float*>(w.scales) + at);
    case Scale::fp16: return load_f16(static_cast<const uint16_t*>(w.scales) + at);
    case Scale::bf16: return load_bf16(static_cast<const uint16_t*>(w.scales) + at);
    case Scale::e8m0: return load_e8m0(static_cast<const uint8_t*>(w.scales) + at);
    case Scale::e4m3: break;
  }
  return mul(load_e4m3(static_cast<const uint8_t*>(w.scales) + at), set1(w.global_scale));
}

V16 load_zeros(const Weights& w, int64_t block, int64_t group) {
  return load_u8(w.zeros + (block * w.groups + group) * 16);
}

void load_row(const void* row, Real type, int64_t count, float* out) {
  int64_t i = 0;
  switch (type) {
    case Real::f32:
      for (; i < count; ++i) out[i] = static_cast<const float*>(row)[i];
      return;
    case Real::f16:
      for (; i + 16 <= count; i += 16) store(out + i, load_f16(static_cast<const uint16_t*>(row) + i));
      break;
    case Real::bf16:
      for (; i + 16 <= count; i += 16) store(out + i, load_bf16(static_cast<const uint16_t*>(row) + i));
      break;
  }
  if (i == count) return;
  alignas(32) uint16_t rest[16] = {};
  alignas(64) float values[16];
  for (int64_t j = i; j < count; ++j) rest[j - i] = static_cast<const uint16_t*>(row)[j];
  store(values, type == Real::f16 ? load_f16(rest) : load_bf16(rest));
  for (int64_t j = i; j < count; ++j) out[j] = values[j - i];
}

void store_columns(const float* sums, const Output& out, int64_t row, int64_t col) {
  V16 value = load(sums);
  if (out.bias != nullptr) value = add(value, load(out.bias + col));
  const int64_t valid = out.cols - col < 16 ? out.cols - col : 16;
  const int64_t at = row * out.row_stride + col;
  if (out.residual != nullptr) {
    alignas(64) float added[16] = {};
    const int64_t bytes = (row * out.residual_stride + col) * (out.residual_type == Real::f32 ? 4 : 2);
    load_row(static_cast<const char*>(out.residual) + bytes, out.residual_type, valid, added);
    value = add(value, load(added));
  }
  alignas(64) float wide[16];
  alignas(32) uint16_t narrow[16];
  switch (out.type) {
    case Real::f32:
      if (valid == 16) {
        store(static_cast<float*>(out.data) + at, value);
      } else {
        store(wide, value);
        for (int64_t i = 0; i < valid; ++i) static_cast<float*>(out.data)[at + i] = wide[i];
      }
      return;
    case Real::f16: store_f16(narrow, value); break;
    case Real::bf16: store_bf16(narrow, value); break;
  }
  for (int64_t i = 0; i < valid; ++i) static_cast<uint16_t*>(out.data)[at + i] = narrow[i];
}

template <typename D>
constexpr int column_of(int quarter, int j) {
  if constexpr (requires { D::column(0, 0); }) {
    return D::column(quarter, j);
  } else {
    return 4 * quarter + j;
  }
}

// Software prefetch distance in bytes: far enough for memory, near enough to stay in the cache.
constexpr int64_t kAhead = 1536;

inline void prefetch_unit(const uint8_t* codes, int64_t unit_bytes) {
  for (int64_t line = 0; line < unit_bytes; line += 64) __builtin_prefetch(codes + kAhead + line);
}

// --- direct: few rows of x, decoded weights go straight from registers to the arithmetic ---------------------

// sums[m] += x[m] . (quarter Q of the unit), accumulator of a column: its number modulo kAccumulators.
template <int Q, int P, int kTile, int kAccumulators, bool kZeros, typename D>
[[gnu::always_inline]] inline void multiply_quarter(const D& decoder, const uint8_t* unit, const float* x, V16 zeros,
                                                    Part (&sums)[kTile][kAccumulators]) {
  Part columns[4];
  decoder.template decode<Q, P>(unit, columns);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Part column = kZeros ? sub(columns[j], part<P>(zeros)) : columns[j];
#pragma GCC unroll 8
    for (int m = 0; m < kTile; ++m) {
      const V16 x_value = set1(x[column_of<D>(Q, j) * kTile + m]);
      Part& sum = sums[m][j % kAccumulators];
      sum = fma(column, part<P>(x_value), sum);
    }
  }
}

// Part P of totals[m] += scale * (x[m] . units).
template <int P, int kTile, int kAccumulators, bool kZeros, typename D>
[[gnu::always_inline]] inline void multiply_units(const D& decoder, const uint8_t* codes, int64_t unit_bytes,
                                                  const float* x, int64_t units, V16 scale, V16 zeros, V16* totals) {
  const V16 zero = set1(0.0f);
  Part sums[kTile][kAccumulators];
  for (int m = 0; m < kTile; ++m) {
    for (int a = 0; a < kAccumulators; ++a) sums[m][a] = part<P>(zero);
  }
  for (int64_t u = 0; u < units; ++u) {
    if (P == 0) prefetch_unit(codes, unit_bytes);
    multiply_quarter<0, P, kTile, kAccumulators, kZeros>(decoder, codes, x, zeros, sums);
    multiply_quarter<1, P, kTile, kAccumulators, kZeros>(decoder, codes, x, zeros, sums);
    multiply_quarter<2, P, kTile, kAccumulators, kZeros>(decoder, codes, x, zeros, sums);
    multiply_quarter<3, P, kTile, kAccumulators, kZeros>(decoder, codes, x, zeros, sums);
    codes += unit_bytes;
    x += 16 * kTile;
  }
  for (int m = 0; m < kTile; ++m) {
    Part sum = sums[m][0];
    for (int a = 1; a < kAccumulators; ++a) sum = add(sum, sums[m][a]);
    part<P>(totals[m]) = fma(sum, part<P>(scale), part<P>(totals[m]));
  }
}

template <typename D, bool kZeros, int kTile>
void direct_tile(const Weights& w, const float* x, int rows, const Output& out, int64_t begin, int64_t end) {
  // Accumulators hide the latency of fma; units per sum keep at most 16 steps in each.
  constexpr int kAccumulators = kTile == 1 ? 4 : kTile == 2 ? 2 * kParts : kParts;
  constexpr int kUnitsPerSum = kAccumulators;
  const D decoder(*w.tables);
  for (int64_t block = begin; block < end; ++block) {
    const uint8_t* codes = w.codes + block * w.units * w.unit_bytes;
    V16 totals[kTile];
    for (int m = 0; m < kTile; ++m) totals[m] = set1(0.0f);
    int64_t unit = 0;
    for (int64_t group = 0; group < w.groups; ++group) {
      const int64_t group_end = unit + w.units_per_group < w.units ? unit + w.units_per_group : w.units;
      const V16 scale = load_scales(w, block, group);
      const V16 zeros = kZeros ? load_zeros(w, block, group) : set1(0.0f);
      while (unit < group_end) {
        const int64_t units = group_end - unit < kUnitsPerSum ? group_end - unit : kUnitsPerSum;
        const auto multiply = [&]<int P>() {
          multiply_units<P, kTile, kAccumulators, kZeros>(decoder, codes + unit * w.unit_bytes, w.unit_bytes,
                                                          x + unit * 16 * kTile, units, scale, zeros, totals);
        };
        multiply.template operator()<0>();
        if constexpr (kParts == 2) multiply.template operator()<1>();
        unit += units;
      }
    }
    alignas(64) float result[16];
    for (int m = 0; m < kTile; ++m) {
      if (m >= rows) break;
      store(result, totals[m]);
      store_columns(result, out, m, block * 16);
    }
  }
}

template <typename D, bool kZeros>
void direct(const Weights& w, const float* x, int rows, const Output& out, int64_t begin, int64_t end) {
  if (rows == 1) return direct_tile<D, kZeros, 1>(w, x, rows, out, begin, end);
  if (rows == 2) return direct_tile<D, kZeros, 2>(w, x, rows, out, begin, end);
  if constexpr (kDirectRows == 4) return direct_tile<D, kZeros, 4>(w, x, rows, out, begin, end);
  if (rows <= 4) return direct_tile<D, kZeros, 4>(w, x, rows, out, begin, end);
  return direct_tile<D, kZeros, kDirectRows>(w, x, rows, out, begin, end);
}

// --- panels: many rows of x, weights decoded once per panel --------------------------------------------------

constexpr int kPanelCols = kPanelBlocks * 16;

// Calls use(k, column) for the columns of quarter Q of a unit.
template <int Q, typename D, typename Use>
[[gnu::always_inline]] inline void decode_quarter(const D& decoder, const uint8_t* unit, const Use& use) {
  Part parts[kParts][4];
  decoder.template decode<Q, 0>(unit, parts[0]);
  if constexpr (kParts == 2) decoder.template decode<Q, 1>(unit, parts[1]);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    V16 column;
    part<0>(column) = parts[0][j];
    if constexpr (kParts == 2) part<1>(column) = parts[1][j];
    use(column_of<D>(Q, j), column);
  }
}

template <typename D, typename Use>
[[gnu::always_inline]] inline void decode_unit(const D& decoder, const uint8_t* unit, const Use& use) {
  decode_quarter<0>(decoder, unit, use);
  decode_quarter<1>(decoder, unit, use);
  decode_quarter<2>(decoder, unit, use);
  decode_quarter<3>(decoder, unit, use);
}

template <typename D, bool kZeros>
void panel(const Weights& w, int64_t block, int64_t unit, int count, float* panel_out, float* scales_out) {
  const D decoder(*w.tables);
  for (int b = 0; b < kPanelBlocks; ++b) {
    float* out = panel_out + b * 16;
    float* scale_out = scales_out + b * 16;
    if (block + b >= w.blocks) {
      for (int k = 0; k < count * 16; ++k) store(out + k * kPanelCols, set1(0.0f));
      for (int u = 0; u < count; ++u) store(scale_out + u * kPanelCols, set1(0.0f));
      continue;
    }
    const uint8_t* codes = w.codes + ((block + b) * w.units + unit) * w.unit_bytes;
    int64_t group = unit / w.units_per_group;
    int64_t left = (group + 1) * w.units_per_group - unit;  // units of the group
    V16 scale = load_scales(w, block + b, group);
    V16 zeros = kZeros ? load_zeros(w, block + b, group) : set1(0.0f);
    for (int u = 0; u < count; ++u) {
      if (left == 0) {
        ++group;
        left = w.units_per_group;
        scale = load_scales(w, block + b, group);
        if (kZeros) zeros = load_zeros(w, block + b, group);
      }
      --left;
      prefetch_unit(codes, w.unit_bytes);
      decode_unit(decoder, codes, [out, zeros](int k, V16 column) {
        store(out + k * kPanelCols, kZeros ? sub(column, zeros) : column);
      });
      store(scale_out, scale);
      codes += w.unit_bytes;
      out += 16 * kPanelCols;
      scale_out += kPanelCols;
    }
  }
}

template <typename D, bool kZeros>
void transposed_panel(const Weights& w, int64_t block, int64_t unit, int count, float* panel_out) {
  const D decoder(*w.tables);
  alignas(64) float tile[16][16];
  for (int u = 0; u < kPanelBlocks; ++u) {
    for (int b = 0; b < count; ++b) {
      float* out = panel_out + b * 16 * kPanelCols + u * 16;
      if (unit + u >= w.units) {
        for (int n = 0; n < 16; ++n) store(out + n * kPanelCols, set1(0.0f));
        continue;
      }
      const int64_t group = (unit + u) / w.units_per_group;
      const V16 zeros = kZeros ? load_zeros(w, block + b, group) : set1(0.0f);
      const V16 scale = load_scales(w, block + b, group);
      const uint8_t* codes = w.codes + ((block + b) * w.units + unit + u) * w.unit_bytes;
      decode_unit(decoder, codes, [&tile, zeros, scale](int k, V16 column) {
        store(tile[k], mul(kZeros ? sub(column, zeros) : column, scale));
      });
      for (int n = 0; n < 16; ++n) {
        for (int k = 0; k < 16; ++k) out[n * kPanelCols + k] = tile[k][n];
      }
    }
  }
}

void multiply_panel(const float* x, const float* panel_in, const float* scales, int count, float* sums) {
  for (int u = 0; u < count; ++u) {
    V16 acc[kTileRows][kPanelBlocks];
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m) {
#pragma GCC unroll 2
      for (int b = 0; b < kPanelBlocks; ++b) acc[m][b] = set1(0.0f);
    }
    for (int k = 0; k < 16; ++k) {
#pragma GCC unroll 2
      for (int b = 0; b < kPanelBlocks; ++b) {
        const V16 column = load(panel_in + b * 16);
#pragma GCC unroll 8
        for (int m = 0; m < kTileRows; ++m) acc[m][b] = fma(column, set1(x[m]), acc[m][b]);
      }
      panel_in += kPanelCols;
      x += kTileRows;
    }
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m) {
#pragma GCC unroll 2
      for (int b = 0; b < kPanelBlocks; ++b) {
        float* sum = sums + m * kPanelCols + b * 16;
        const V16 total = load(sum);
        store(sum, scales == nullptr ? add(acc[m][b], total) : fma(acc[m][b], load(scales + b * 16), total));
      }
    }
    if (scales != nullptr) scales += kPanelCols;
  }
}

// --- the table ----------------------------------------------------------------------------------------------

DecodedKernels decoded(const ElementTables& tables, bool zeros) {
  DecodedKernels kernels{};
  find_decoder(tables, [&](auto tag) {
    using D = typename decltype(tag)::Decoder;
    kernels = {direct<D, false>, panel<D, false>, transposed_panel<D, false>};
    if constexpr (D::kUnsigned) {
      if (zeros) kernels = {direct<D, true>, panel<D, true>, transposed_panel<D, true>};
    }
  });
  return kernels;
}

constexpr LinearKernels kTable = {decoded,   multiply_panel, kDirectRows, kTwoTileRows,
                                  kTileRows, kPanelBlocks,   load_row,    store_columns};
