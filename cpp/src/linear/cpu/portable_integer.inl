// Integer products, plainly: the specification of what avx2_integer.inl does with vectors.

template <typename D, typename T>
void integer_blocks(const Weights& w, const IntegerRows& x, const Output& out, int64_t begin, int64_t end) {
  const D decoder(*w.tables);
  const V16 inverse_step = set1(1 / w.tables->integer_step);
  for (int64_t block = begin; block < end; ++block) {
    V16 totals[kMaxIntegerRows];
    for (int m = 0; m < x.rows; ++m) totals[m] = set1(0.0f);
    int64_t unit = 0;
    for (int64_t group = 0; group < w.groups; ++group) {
      const int64_t group_end = unit + w.units_per_group < w.units ? unit + w.units_per_group : w.units;
      const V16 scale = load_scales(w, block, group);
      const V16 zeros = w.zeros != nullptr ? load_zeros(w, block, group) : set1(0.0f);
      while (unit < group_end) {
        const int64_t segment_end = unit + kSegmentUnits < group_end ? unit + kSegmentUnits : group_end;
        int32_t sums[kMaxIntegerRows][16] = {};
        for (; unit < segment_end; ++unit) {
          int32_t integers[16][16];
          decode_unit(decoder, w.codes + (block * w.units + unit) * w.unit_bytes, [&](int k, V16 column) {
            column = sub(mul(column, inverse_step), zeros);
            for (int r = 0; r < 16; ++r) integers[k][r] = static_cast<int32_t>(column[r]);
          });
          for (int m = 0; m < x.rows; ++m) {
            const int tile = m / kIntegerTile * kIntegerTile;
            const int tile_rows = x.rows - tile < kIntegerTile ? x.rows - tile : kIntegerTile;
            const T* values = static_cast<const T*>(x.values) + (tile * w.units + unit * tile_rows) * 16;
            for (int k = 0; k < 16; ++k) {
              const T value = values[(k / 4 * tile_rows + m - tile) * 4 + k % 4];
              for (int r = 0; r < 16; ++r) sums[m][r] += value * integers[x.columns[k]][r];
            }
          }
        }
        for (int m = 0; m < x.rows; ++m) {
          float products[16];
          for (int r = 0; r < 16; ++r) products[r] = static_cast<float>(sums[m][r]);
          totals[m] = add(totals[m], mul(mul(load(products), set1(x.steps[m])), scale));
        }
      }
    }
    alignas(64) float result[16];
    for (int m = 0; m < x.rows; ++m) {
      store(result, totals[m]);
      store_columns(result, out, m, block * 16);
    }
  }
}

IntegerFn find_integer(const ElementTables& tables, bool wide) {
  IntegerFn found = nullptr;
  find_decoder(tables, [&](auto tag) {
    using D = typename decltype(tag)::Decoder;
    found = wide ? integer_blocks<D, int16_t> : integer_blocks<D, int8_t>;
  });
  return found;
}
