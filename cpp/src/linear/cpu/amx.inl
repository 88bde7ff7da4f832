// Products in the tile registers of AMX, included by avx512.cpp.
//
// A tile of weights is 64 bytes of columns by the sixteen rows of a block: 64 columns as bytes or 32 as bf16 ("a
// step"). Four blocks (a strip) share each tile of x. A segment's steps, at most four, are decoded into the cache while
// the tiles of the segment before it are multiplied, so that no tile is loaded right after it was stored; all tiles of
// x then use what was decoded. A segment's sums leave the tiles to be scaled in fp32.
//
// TDPBF16PS takes bf16 subnormals for zero and makes none, which is in the bound of linear.hpp. It adds the products of
// even columns in one chain, of odd ones in another, then both, then that to the tile: at most 15 + 1 + 3 roundings for
// four steps, 15 + 1 for the 32 columns of one, and one more for each segment.
//
// The configuration belongs to the thread, and to whoever loaded it last: it is set at the start of a task and released
// at its end. The compiler knows nothing of tiles; what memory they read and write it is told by the operands.

struct TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

struct alignas(64) Tile {
  uint8_t bytes[1024];  // [row][64]
};

inline void load_tile_config(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
inline void release_tiles() { __asm__ volatile("tilerelease"); }
template <int T>
inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void load_tile(const void* rows) {
  const auto& tile = *static_cast<const Tile*>(rows);  // or its first rows
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(rows), "r"(int64_t{64}), "m"(tile));
}
template <int T>
inline void store_tile(Tile* tile) {
  __asm__ volatile("tilestored %%tmm%c1, (%2,%3,1)" : "+m"(*tile) : "i"(T), "r"(tile), "r"(int64_t{64}));
}
// Tile C += tile A (x) . tile B (weights).
template <bool kBf16, int C, int A, int B>
inline void multiply_tiles() {
  if constexpr (kBf16) {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  } else {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
}

constexpr int kSegmentSteps = 4;
static_assert(kSegmentSteps * kByteStepUnits == kSegmentUnits);

// Decoded bytes and decoded bf16: kUnits units make a step, kUnitBytes of its tile each.
template <typename D>
struct ByteWeights {
  static constexpr bool kBf16 = false;
  static constexpr int kUnits = kByteStepUnits;
  D decoder;
  explicit ByteWeights(const ElementTables& tables) : decoder(tables, 0) {}

  void store_unit(const Weights&, int64_t, int64_t, const uint8_t* unit, uint8_t* out) const {
    store_bytes(decoder, unit, out);
  }
};

template <typename D, bool kZeros>
struct Bf16Weights {
  static constexpr bool kBf16 = true;
  static constexpr int kUnits = kBf16StepUnits;
  D decoder;
  explicit Bf16Weights(const ElementTables& tables) : decoder(tables) {}

  // Columns 4 * Q .. in two rows of a tile.
  template <int Q>
  void store_pairs(const uint8_t* unit, V16 zeros, uint8_t* out) const {
    __m512i pairs[2];
    if constexpr (!kZeros && requires { decoder.template pairs<Q>(unit, pairs); }) {
      decoder.template pairs<Q>(unit, pairs);
    } else {
      V16 columns[4];
      decoder.template decode<Q, 0>(unit, columns);
      for (int i = 0; i < 2; ++i) {
        // Integers of up to eight bits less zero points: bf16 numbers, as all elements but those of nf4.
        const __m512i even = _mm512_castps_si512(kZeros ? sub(columns[2 * i], zeros) : columns[2 * i]);
        const __m512i odd = _mm512_castps_si512(kZeros ? sub(columns[2 * i + 1], zeros) : columns[2 * i + 1]);
        pairs[i] = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(even, 16), odd);
      }
    }
    _mm512_store_si512(out + Q * 128, pairs[0]);
    _mm512_store_si512(out + Q * 128 + 64, pairs[1]);
  }

  void store_unit(const Weights& w, int64_t block, int64_t group, const uint8_t* unit, uint8_t* out) const {
    const V16 zeros = kZeros ? load_zeros(w, block, group) : set1(0.0f);
    store_pairs<0>(unit, zeros, out);
    store_pairs<1>(unit, zeros, out);
    store_pairs<2>(unit, zeros, out);
    store_pairs<3>(unit, zeros, out);
  }
};

// Part of a strip between two scalings.
struct TileSegment {
  int64_t block;  // the strip's first
  int64_t group;
  int64_t number;  // in the block
  int64_t unit;
  int64_t units;
  int64_t step;  // of x
  int64_t steps;
};

template <int kUnits>
inline TileSegment segment_at(const Weights& w, int64_t block, int64_t group, int64_t number, int64_t unit,
                              int64_t step) {
  int64_t end = (group + 1) * w.units_per_group;
  if (end > w.units) end = w.units;
  const int64_t units = end - unit < kUnits * kSegmentSteps ? end - unit : kUnits * kSegmentSteps;
  return {block, group, number, unit, units, step, (units + kUnits - 1) / kUnits};
}

template <int kUnits>
inline TileSegment next_segment(const Weights& w, const TileSegment& s) {
  const int64_t unit = s.unit + s.units;
  if (unit == w.units) return segment_at<kUnits>(w, s.block + kAmxBlocks, 0, 0, 0, 0);
  const int64_t group = unit == (s.group + 1) * w.units_per_group ? s.group + 1 : s.group;
  return segment_at<kUnits>(w, s.block, group, s.number + 1, unit, s.step + s.steps);
}

// A step of a strip's blocks, [block][row][64]. Blocks past the last are the last one again.
template <typename W>
[[gnu::always_inline]] inline void decode_step(const W& weights, const Weights& w, const TileSegment& s, int64_t step,
                                               int64_t end, Tile* out) {
  constexpr int kUnitBytes = 1024 / W::kUnits;
  const int64_t first = step * W::kUnits;
  for (int64_t b = 0; b < kAmxBlocks; ++b) {
    const int64_t block = s.block + b < end ? s.block + b : end - 1;
    const uint8_t* codes = w.codes + (block * w.units + s.unit + first) * w.unit_bytes;
    for (int64_t u = 0; u < W::kUnits; ++u) {
      uint8_t* target = out[b].bytes + u * kUnitBytes;
      if (first + u < s.units) {
        prefetch_unit(codes, w.unit_bytes);
        weights.store_unit(w, block, s.group, codes, target);
        codes += w.unit_bytes;
      } else {
        // x is zero there, but a NaN that was left behind would not be.
        for (int i = 0; i < kUnitBytes; i += 64) _mm512_store_si512(target + i, _mm512_setzero_si512());
      }
    }
  }
}

template <bool kBf16>
[[gnu::always_inline]] inline void multiply_step(const uint8_t* x, const Tile* weights) {
  load_tile<4>(x);
  load_tile<5>(weights);
  multiply_tiles<kBf16, 0, 4, 5>();
  load_tile<6>(weights + 1);
  multiply_tiles<kBf16, 1, 4, 6>();
  load_tile<7>(weights + 2);
  multiply_tiles<kBf16, 2, 4, 7>();
  load_tile<5>(weights + 3);
  multiply_tiles<kBf16, 3, 4, 5>();
}

// Calls fold(first row, sums, segment) for the sums [block][row of the tile][16] of each tile of x and segment, and
// finish(block) after the last segment of a strip. x.tile_rows of x, in `planes`, make the rows of a tile.
template <typename W, typename Fold, typename Finish>
[[gnu::always_inline]] inline void multiply_strips(const Weights& w, const TileRows& x, int planes, int64_t begin,
                                                   int64_t end, const Fold& fold, const Finish& finish) {
  constexpr int kUnits = W::kUnits;
  const W weights(*w.tables);
  const int rows = planes * x.tile_rows;
  Tile panels[2][kSegmentSteps * kAmxBlocks];
  Tile sums[kAmxBlocks];

  TileConfig config{};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = static_cast<uint8_t>(t <= 4 ? rows : 16);
  }
  load_tile_config(config);

  TileSegment now = segment_at<kUnits>(w, begin, 0, 0, 0, 0);
  Tile* panel = panels[0];
  Tile* ahead = panels[1];
  for (int64_t step = 0; step < now.steps; ++step) {
    decode_step(weights, w, now, step, end, panel + step * kAmxBlocks);
  }
  while (now.block < end) {
    const TileSegment next = next_segment<kUnits>(w, now);
    const int64_t next_steps = next.block < end ? next.steps : 0;
    const uint8_t* tile = static_cast<const uint8_t*>(x.values) + now.step * rows * 64;
    for (int row = 0; row < x.rows; row += x.tile_rows) {
      zero_tile<0>();
      zero_tile<1>();
      zero_tile<2>();
      zero_tile<3>();
      for (int64_t step = 0; step < now.steps; ++step) {
        multiply_step<W::kBf16>(tile + step * rows * 64, panel + step * kAmxBlocks);
        if (row == 0 && step < next_steps) {
          decode_step(weights, w, next, step, end, ahead + step * kAmxBlocks);
        }
      }
      store_tile<0>(sums);
      store_tile<1>(sums + 1);
      store_tile<2>(sums + 2);
      store_tile<3>(sums + 3);
      fold(row, sums, now);
      tile += x.tile_steps * rows * 64;
    }
    for (int64_t step = now.steps; step < next_steps; ++step) {
      decode_step(weights, w, next, step, end, ahead + step * kAmxBlocks);
    }
    if (next.block != now.block) finish(now.block);
    Tile* decoded = ahead;
    ahead = panel;
    panel = decoded;
    now = next;
  }
  release_tiles();
}

// Rows of a tile that are rows of x.
inline int valid_rows(const TileRows& x, int row) { return x.rows - row < x.tile_rows ? x.rows - row : x.tile_rows; }

// Writes the totals [row][block] of a strip, and leaves them zero.
inline void finish_strip(V16* totals, int rows, const Output& out, int64_t block, int64_t end) {
  for (int b = 0; b < kAmxBlocks && block + b < end; ++b) store_totals(totals + b, kAmxBlocks, rows, out, block + b);
  for (int i = 0; i < rows * kAmxBlocks; ++i) totals[i] = set1(0.0f);
}

inline __m512i sums_of(const Tile& tile, int row) { return load_512(tile.bytes + 64 * row); }

template <typename D, int kPlanes>
void amx_integer(const Weights& w, const IntegerRows& x, const Output& out, int64_t begin, int64_t end) {
  if (w.units == 0) return integer_blocks<D, kPlanes>(w, x, out, begin, end);
  V16 totals[kMaxAmxRows * kAmxBlocks];
  for (int i = 0; i < x.rows * kAmxBlocks; ++i) totals[i] = set1(0.0f);
  constexpr int kRows = kAmxRows / kPlanes;
  const int tile_rows = x.rows < kRows ? x.rows : kRows;
  const TileRows tiles{x.values, x.tile_steps, x.rows, tile_rows};
  multiply_strips<ByteWeights<D>>(
      w, tiles, kPlanes, begin, end,
      [&](int row, const Tile* sums, const TileSegment& s) {
        const int32_t* x_sums = x.sums + row * x.segments + s.number * tile_rows;
        for (int b = 0; b < kAmxBlocks && s.block + b < end; ++b) {
          const IntegerGroup group = load_group(w, s.block + b, s.group, w.tables->byte_offset);
          for (int m = 0; m < valid_rows(tiles, row); ++m) {
            __m512i sum = sums_of(sums[b], m);
            if constexpr (kPlanes == 2) sum = join_planes(sum, sums_of(sums[b], tile_rows + m));
            V16& total = totals[(row + m) * kAmxBlocks + b];
            total = add_segment(total, sum, group, x_sums[m], x.steps[row + m]);
          }
        }
      },
      [&](int64_t block) { finish_strip(totals, x.rows, out, block, end); });
}

template <typename D, bool kZeros>
void amx_bf16(const Weights& w, const TileRows& x, const Output& out, int64_t begin, int64_t end) {
  V16 totals[kMaxAmxRows * kAmxBlocks];
  for (int i = 0; i < x.rows * kAmxBlocks; ++i) totals[i] = set1(0.0f);
  multiply_strips<Bf16Weights<D, kZeros>>(
      w, x, 1, begin, end,
      [&](int row, const Tile* sums, const TileSegment& s) {
        for (int b = 0; b < kAmxBlocks && s.block + b < end; ++b) {
          const V16 scale = load_scales(w, s.block + b, s.group);
          for (int m = 0; m < valid_rows(x, row); ++m) {
            V16& total = totals[(row + m) * kAmxBlocks + b];
            total = fma(_mm512_castsi512_ps(sums_of(sums[b], m)), scale, total);
          }
        }
      },
      [&](int64_t block) { finish_strip(totals, x.rows, out, block, end); });
}

IntegerFn find_amx_integer(const ElementTables& tables, bool wide) {
  IntegerFn found = nullptr;
  find_byte_decoder(tables, [&](auto tag) {
    using D = typename decltype(tag)::Decoder;
    found = wide ? amx_integer<D, 2> : amx_integer<D, 1>;
  });
  return found;
}

Bf16Fn find_amx_bf16(const ElementTables& tables, bool zeros) {
  Bf16Fn found = nullptr;
  find_decoder(tables, [&](auto tag) {
    using D = typename decltype(tag)::Decoder;
    found = amx_bf16<D, false>;
    if constexpr (D::kUnsigned) {
      if (zeros) found = amx_bf16<D, true>;
    }
  });
  return found;
}
