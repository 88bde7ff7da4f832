// Integer products with AVX-512 VNNI, included by avx512.cpp.
//
// A register has the codes of sixteen rows by four columns, a row to a 32-bit lane ("quads"). One instruction
// multiplies its bytes, without a sign, by those of x, with one, and adds the four products of a lane to its sum: bytes
// are the elements plus an offset. x in int16 is two bytes, x = 256 high + low, each multiplied by itself. A sum may
// pass through more than 32 bits hold: only the last one has to fit.
//
// A decoder D(tables, flip) gives quads: template <int Q> __m512i bytes(const uint8_t* unit) const, the columns of
// IntegerRows::columns[4 * Q ..], as the bytes value / step + byte_offset, xor flip.

constexpr uint8_t kUnsignedBytes = 0x80;  // a flip: adds 128

inline __m512i set_bytes(uint8_t value) { return _mm512_set1_epi8(static_cast<char>(value)); }

// 2 to 4 bits: looked up by six bits, of which the table ignores those above the code's.
template <int kBits>
struct NibbleBytes {
  __m512i table;
  NibbleBytes(const ElementTables& tables, uint8_t flip)
      : table(_mm512_xor_si512(load_512(tables.bytes), set_bytes(flip))) {}

  template <int Q>
  __m512i bytes(const uint8_t* unit) const {
    __m512i codes;
    if constexpr (kBits == 4) {
      codes = shift_words<-4 * (Q % 2)>(load_512(unit + Q / 2 * 64));
    } else {
      codes = shift_words<-2 * Q>(load_512(unit));
    }
    if constexpr (kBits == 3) {
      // A row's bits: eight of even columns, eight of odd ones. Bytes of a quad: low and high halves of both.
      const __m512i spread = _mm512_set4_epi32(0x0d0d0c0c, 0x09090808, 0x05050404, 0x01010000);
      __m512i top = _mm512_shuffle_epi8(_mm512_cvtepu16_epi32(load_256(unit + 64)), spread);
      top = select(_mm512_set1_epi16(0xff), top, _mm512_srli_epi16(top, 4));
      codes = select(set_bytes(3), codes, shift_words<2 - Q>(top));
    }
    return _mm512_permutexvar_epi8(codes, table);
  }
};

// From the order of a pair unit (layout.hpp) to quads, in each 128-bit lane.
inline __m512i pair_to_quads(__m512i bytes) {
  return _mm512_shuffle_epi8(bytes, _mm512_set4_epi32(0x0f0e0706, 0x0d0c0504, 0x0b0a0302, 0x09080100));
}

// 5 to 7 bits: looked up, the sign included.
template <int kBits>
struct PairBytes {
  __m512i low, high;
  PairBytes(const ElementTables& tables, uint8_t flip)
      : low(_mm512_xor_si512(load_512(tables.bytes), set_bytes(flip))),
        high(_mm512_xor_si512(load_512(tables.bytes + 64), set_bytes(flip))) {}

  template <int Q>
  __m512i bytes(const uint8_t* unit) const {
    const __m512i codes = pair_codes<kBits, Q>(unit);
    if constexpr (kBits == 7) return pair_to_quads(_mm512_permutex2var_epi8(low, codes, high));
    return pair_to_quads(_mm512_permutexvar_epi8(codes, low));
  }
};

// fp8_e1m6, whose magnitudes are the codes.
struct Fp8Bytes {
  __m512i flip;
  Fp8Bytes(const ElementTables&, uint8_t flip_bits) : flip(set_bytes(flip_bits)) {}

  template <int Q>
  __m512i bytes(const uint8_t* unit) const {
    const __m512i codes = load_512(unit + Q * 64);
    const __m512i magnitude = _mm512_and_si512(codes, set_bytes(0x7f));
    const __m512i negative = _mm512_sub_epi8(_mm512_setzero_si512(), magnitude);
    const __m512i values = _mm512_mask_mov_epi8(magnitude, _mm512_movepi8_mask(codes), negative);
    return pair_to_quads(_mm512_xor_si512(values, flip));
  }
};

// int8, and uint8 less 128.
struct QuadBytes {
  __m512i flip;
  QuadBytes(const ElementTables& tables, uint8_t flip_bits)
      : flip(set_bytes(static_cast<uint8_t>(flip_bits ^ (tables.is_signed ? 0 : 0x80)))) {}

  template <int Q>
  __m512i bytes(const uint8_t* unit) const {
    return _mm512_xor_si512(load_512(unit + Q * 64), flip);
  }
};

// Calls use(Tag<D>) for the element.
template <typename Use>
void find_byte_decoder(const ElementTables& tables, Use use) {
  switch (tables.bits) {
    case 2: return use(Tag<NibbleBytes<2>>{});
    case 3: return use(Tag<NibbleBytes<3>>{});
    case 4: return use(Tag<NibbleBytes<4>>{});
    case 5: return use(Tag<PairBytes<5>>{});
    case 6: return use(Tag<PairBytes<6>>{});
    case 7: return use(Tag<PairBytes<7>>{});
    default: break;
  }
  if (tables.is_fp) return use(Tag<Fp8Bytes>{});
  return use(Tag<QuadBytes>{});
}

// A unit that was decoded, [quad][row][4].
struct DecodedBytes {
  template <int Q>
  __m512i bytes(const uint8_t* unit) const {
    return load_512(unit + Q * 64);
  }
};

// A group's scales, and the offset of its bytes, zero points included.
struct IntegerGroup {
  V16 scale;
  __m512i offset;
};

inline IntegerGroup load_group(const Weights& w, int64_t block, int64_t group, int offset) {
  IntegerGroup loaded{load_scales(w, block, group), _mm512_set1_epi32(offset)};
  if (w.zeros != nullptr) {
    const __m128i zeros = load_128(w.zeros + (block * w.groups + group) * 16);
    loaded.offset = _mm512_add_epi32(loaded.offset, _mm512_cvtepu8_epi32(zeros));
  }
  return loaded;
}

// total + (sum - offset * x_sum) * step * scale, as IntegerFn says.
inline V16 add_segment(V16 total, __m512i sum, const IntegerGroup& group, int32_t x_sum, float step) {
  const __m512i offset = _mm512_mullo_epi32(group.offset, _mm512_set1_epi32(x_sum));
  const V16 products = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, offset));
  return add(total, mul(mul(products, set1(step)), group.scale));
}

inline __m512i join_planes(__m512i low, __m512i high) { return _mm512_add_epi32(low, _mm512_slli_epi32(high, 8)); }

inline void store_totals(const V16* totals, int64_t stride, int rows, const Output& out, int64_t block) {
  alignas(64) float result[16];
  for (int m = 0; m < rows; ++m) {
    store(result, totals[m * stride]);
    store_columns(result, out, m, block * 16);
  }
}

inline __m512i broadcast(const int8_t* p) {
  int32_t word = 0;
  __builtin_memcpy(&word, p, sizeof word);
  return _mm512_set1_epi32(word);
}

// sums += x . quad Q of a unit. x: [plane][row][4]. Accumulators of a plane and row hide the latency.
template <int Q, int kPlanes, int kTile, int kAccumulators>
[[gnu::always_inline]] inline void multiply_quad(__m512i bytes, const int8_t* x,
                                                 __m512i (&sums)[kPlanes][kTile][kAccumulators]) {
#pragma GCC unroll 2
  for (int plane = 0; plane < kPlanes; ++plane) {
#pragma GCC unroll 4
    for (int m = 0; m < kTile; ++m) {
      __m512i& sum = sums[plane][m][Q % kAccumulators];
      sum = _mm512_dpbusd_epi32(sum, bytes, broadcast(x + (plane * kTile + m) * 4));
    }
  }
}

// Adds a segment of `units` units to the totals of a tile. x: the tile's values, from the segment on; x_sums: of these.
template <typename D, int kPlanes, int kTile, bool kPrefetch>
[[gnu::always_inline]] inline void multiply_segment(const D& decoder, const uint8_t* codes, int64_t unit_bytes,
                                                    int64_t units, const int8_t* x, const int32_t* x_sums,
                                                    const float* steps, const IntegerGroup& group, V16* totals) {
  constexpr int kAccumulators = kTile == 1 ? 4 : kTile == 2 ? 2 : 1;
  constexpr int kQuad = 4 * kPlanes * kTile;
  __m512i sums[kPlanes][kTile][kAccumulators];
  for (auto& plane : sums) {
    for (auto& row : plane) {
      for (__m512i& sum : row) sum = _mm512_setzero_si512();
    }
  }
  for (int64_t unit = 0; unit < units; ++unit) {
    if constexpr (kPrefetch) prefetch_unit(codes, unit_bytes);
    multiply_quad<0>(decoder.template bytes<0>(codes), x, sums);
    multiply_quad<1>(decoder.template bytes<1>(codes), x + kQuad, sums);
    multiply_quad<2>(decoder.template bytes<2>(codes), x + 2 * kQuad, sums);
    multiply_quad<3>(decoder.template bytes<3>(codes), x + 3 * kQuad, sums);
    codes += unit_bytes;
    x += 4 * kQuad;
  }
  for (int m = 0; m < kTile; ++m) {
    __m512i sum = sums[0][m][0];
    for (int a = 1; a < kAccumulators; ++a) sum = _mm512_add_epi32(sum, sums[0][m][a]);
    if constexpr (kPlanes == 2) {
      __m512i high = sums[1][m][0];
      for (int a = 1; a < kAccumulators; ++a) high = _mm512_add_epi32(high, sums[1][m][a]);
      sum = join_planes(sum, high);
    }
    totals[m] = add_segment(totals[m], sum, group, x_sums[m], steps[m]);
  }
}

// Calls segment(group, number, unit, units) for all segments of a block.
template <typename Segment>
[[gnu::always_inline]] inline void for_each_segment(const Weights& w, int64_t block, const Segment& segment) {
  int64_t unit = 0;
  int64_t number = 0;
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t group_end = unit + w.units_per_group < w.units ? unit + w.units_per_group : w.units;
    const IntegerGroup loaded = load_group(w, block, group, w.tables->byte_offset + kUnsignedBytes);
    while (unit < group_end) {
      const int64_t units = group_end - unit < kSegmentUnits ? group_end - unit : kSegmentUnits;
      segment(loaded, number++, unit, units);
      unit += units;
    }
  }
}

// One tile: decoded in registers.
template <typename D, int kPlanes, int kTile>
void integer_direct(const Weights& w, const IntegerRows& x, const Output& out, int64_t begin, int64_t end) {
  const D decoder(*w.tables, kUnsignedBytes);
  const auto* values = static_cast<const int8_t*>(x.values);
  for (int64_t block = begin; block < end; ++block) {
    const uint8_t* codes = w.codes + block * w.units * w.unit_bytes;
    V16 totals[kTile];
    for (int m = 0; m < kTile; ++m) totals[m] = set1(0.0f);
    for_each_segment(w, block, [&](const IntegerGroup& group, int64_t number, int64_t unit, int64_t units) {
      multiply_segment<D, kPlanes, kTile, true>(decoder, codes + unit * w.unit_bytes, w.unit_bytes, units,
                                                values + unit * 16 * kPlanes * kTile, x.sums + number * kTile, x.steps,
                                                group, totals);
    });
    store_totals(totals, 1, kTile, out, block);
  }
}

// Quads of a unit to [quad][row][4].
template <typename D>
[[gnu::always_inline]] inline void store_bytes(const D& decoder, const uint8_t* unit, uint8_t* out) {
  _mm512_store_si512(out, decoder.template bytes<0>(unit));
  _mm512_store_si512(out + 64, decoder.template bytes<1>(unit));
  _mm512_store_si512(out + 128, decoder.template bytes<2>(unit));
  _mm512_store_si512(out + 192, decoder.template bytes<3>(unit));
}

// A tile of a segment that has been decoded.
template <int kPlanes, int kTile>
[[gnu::noinline]] void multiply_decoded(const uint8_t* bytes, int64_t units, const int8_t* x, const int32_t* x_sums,
                                        const float* steps, const IntegerGroup& group, V16* totals) {
  multiply_segment<DecodedBytes, kPlanes, kTile, false>({}, bytes, 256, units, x, x_sums, steps, group, totals);
}

// More tiles: a segment is decoded once, into the cache.
template <typename D, int kPlanes>
void integer_tiles(const Weights& w, const IntegerRows& x, const Output& out, int64_t begin, int64_t end) {
  const D decoder(*w.tables, kUnsignedBytes);
  alignas(64) uint8_t bytes[kSegmentUnits * 256];
  V16 totals[kMaxIntegerRows];
  for (int64_t block = begin; block < end; ++block) {
    for (int m = 0; m < x.rows; ++m) totals[m] = set1(0.0f);
    for_each_segment(w, block, [&](const IntegerGroup& group, int64_t number, int64_t unit, int64_t units) {
      for (int64_t u = 0; u < units; ++u) {
        const uint8_t* codes = w.codes + (block * w.units + unit + u) * w.unit_bytes;
        prefetch_unit(codes, w.unit_bytes);
        store_bytes(decoder, codes, bytes + u * 256);
      }
      for (int m = 0; m < x.rows; m += kIntegerTile) {
        const int tile = x.rows - m < kIntegerTile ? x.rows - m : kIntegerTile;
        const int8_t* values = static_cast<const int8_t*>(x.values) + (m * w.units + unit * tile) * 16 * kPlanes;
        const int32_t* sums = x.sums + m * x.segments + number * tile;
        const auto multiply = tile == 1   ? multiply_decoded<kPlanes, 1>
                              : tile == 2 ? multiply_decoded<kPlanes, 2>
                              : tile == 3 ? multiply_decoded<kPlanes, 3>
                                          : multiply_decoded<kPlanes, 4>;
        multiply(bytes, units, values, sums, x.steps + m, group, totals + m);
      }
    });
    store_totals(totals, 1, x.rows, out, block);
  }
}

template <typename D, int kPlanes>
void integer_blocks(const Weights& w, const IntegerRows& x, const Output& out, int64_t begin, int64_t end) {
  switch (x.rows) {
    case 1: return integer_direct<D, kPlanes, 1>(w, x, out, begin, end);
    case 2: return integer_direct<D, kPlanes, 2>(w, x, out, begin, end);
    case 3: return integer_direct<D, kPlanes, 3>(w, x, out, begin, end);
    case 4: return integer_direct<D, kPlanes, 4>(w, x, out, begin, end);
    default: return integer_tiles<D, kPlanes>(w, x, out, begin, end);
  }
}

IntegerFn find_integer(const ElementTables& tables, bool wide) {
  IntegerFn found = nullptr;
  find_byte_decoder(tables, [&](auto tag) {
    using D = typename decltype(tag)::Decoder;
    found = wide ? integer_blocks<D, 2> : integer_blocks<D, 1>;
  });
  return found;
}
