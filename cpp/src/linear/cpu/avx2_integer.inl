// Integer products with AVX2, included by avx2.cpp.
//
// A register has the codes of eight rows by four columns, a row to a 32-bit lane ("quads"). With x in int8, bytes are
// multiplied without a sign by bytes with one, and two products added, by one instruction that saturates at 16 bits;
// all decoders keep below that. With x in int16, even and odd columns become 16-bit numbers whose products are added in
// 32 bits. Either way a lane's sum is a row's, and no sum crosses lanes.
//
// A decoder D(tables) gives quads: template <int Q> Quads decode(const uint8_t* unit, int half) const, rows 8 * half
// on, the columns of IntegerRows::columns[4 * Q ..].
//   D::kSigned  the numbers are `magnitude` with the sign of the bytes of `sign` (0 only where the magnitude is);
//               else they are `magnitude` and `sign` means nothing
//   D::kChain   so many products of byte pairs of a unit fit in 16 bits: 2 * 127 * largest * kChain < 2^15
//   D::kBias    of those with a sign: what makes them positive and below 2^7, or 0: nothing does

struct Quads {
  __m256i magnitude, sign;
};

// From the order of a pair unit (layout.hpp) to quads, in each 128-bit half.
inline __m256i load_quads(const uint8_t* p) {
  const __m256i order = _mm256_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15,  //
                                         0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
  return _mm256_shuffle_epi8(load_256(p), order);
}

// 2 to 4 bits: looked up, with the offset that makes them positive. At most 32.
template <int kBits>
struct NibbleQuads {
  static constexpr bool kSigned = false;
  static constexpr int kChain = 4;
  __m256i table;
  explicit NibbleQuads(const ElementTables& tables) : table(load_table(tables.integers)) {}

  template <int Q>
  Quads decode(const uint8_t* unit, int half) const {
    __m256i codes;
    if constexpr (kBits == 4) {
      codes = shift_words<-4 * (Q % 2)>(load_256(unit + Q / 2 * 64 + half * 32));
      codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    } else {
      codes = _mm256_and_si256(shift_words<-2 * Q>(load_256(unit + half * 32)), _mm256_set1_epi8(3));
    }
    if constexpr (kBits == 3) {
      // A row's bits: eight of even columns, eight of odd ones. Bytes of a quad: low and high halves of both.
      const __m256i spread = _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13,  //
                                              0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13);
      const __m256i rows = _mm256_cvtepu16_epi32(load_128(unit + 64 + half * 16));
      __m256i top = _mm256_shuffle_epi8(rows, spread);
      top = select(_mm256_set1_epi16(0xff), top, _mm256_srli_epi16(top, 4));
      top = _mm256_and_si256(shift_words<2 - Q>(top), _mm256_set1_epi8(4));
      codes = _mm256_or_si256(codes, top);
    }
    return {_mm256_shuffle_epi8(table, codes), codes};
  }
};

// The low four bits of the codes of a pair unit, and its other planes.
template <int Q>
inline __m256i low_nibbles(const uint8_t* unit, int half) {
  const __m256i codes = shift_words<-4 * (Q % 2)>(load_quads(unit + Q / 2 * 64 + half * 32));
  return _mm256_and_si256(codes, _mm256_set1_epi8(15));
}
// Bit 4 * half + Q of its bytes is the code's last bit.
template <int kBits>
inline __m256i top_bits(const uint8_t* unit, int half) {
  const __m256i plane = load_quads(unit + (kBits == 5 ? 128 : 192));
  return half == 0 ? plane : _mm256_srli_epi16(plane, 4);
}

// fp of 5 to 8 bits: the magnitude is looked up by four bits at a time, or is the code itself (fp8_e1m6).
template <int kBits>
struct FpQuads {
  static constexpr bool kSigned = true;
  static constexpr int kBias = kBits == 5 ? 28 : kBits == 6 ? 60 : 0;  // fp5_e2m2 and fp6_e2m3 have the largest
  static constexpr int kChain = kBits == 5 ? 4 : kBits == 6 ? 2 : 1;
  static constexpr int kTables = kBits == 8 ? 1 : 1 << (kBits - 5);
  __m256i table[kTables];
  explicit FpQuads(const ElementTables& tables) {
    for (int i = 0; i < kTables; ++i) table[i] = load_table(tables.integers + 16 * i);
  }

  template <int Q>
  Quads decode(const uint8_t* unit, int half) const {
    const __m256i nonzero = _mm256_set1_epi8(1);
    if constexpr (kBits == 8) {
      const __m256i codes = load_quads(unit + Q * 64 + half * 32);
      return {_mm256_and_si256(codes, _mm256_set1_epi8(0x7f)), _mm256_or_si256(codes, nonzero)};
    } else {
      const __m256i low = low_nibbles<Q>(unit, half);
      __m256i magnitude = _mm256_shuffle_epi8(table[0], low);
      __m256i sign;
      if constexpr (kBits == 5) {
        sign = shift_words<7 - Q>(top_bits<5>(unit, half));
      } else {
        // Bit 2Q of these chooses between pairs of tables; a blend looks at the last bit of a byte.
        const __m256i middle = load_quads(unit + 128 + half * 32);
        const __m256i first = shift_words<7 - 2 * Q>(middle);
        const __m256i second = shift_words<6 - 2 * Q>(middle);
        magnitude = _mm256_blendv_epi8(magnitude, _mm256_shuffle_epi8(table[1], low), first);
        if constexpr (kBits == 6) {
          sign = second;
        } else {
          const __m256i upper =
              _mm256_blendv_epi8(_mm256_shuffle_epi8(table[2], low), _mm256_shuffle_epi8(table[3], low), first);
          magnitude = _mm256_blendv_epi8(magnitude, upper, second);
          sign = shift_words<7 - Q>(top_bits<7>(unit, half));
        }
      }
      return {magnitude, _mm256_or_si256(sign, nonzero)};
    }
  }
};

// Integers of 5 to 7 bits; those with a sign get an offset, which is to turn their last bit.
template <int kBits>
struct IntQuads {
  static constexpr bool kSigned = false;
  static constexpr int kChain = kBits == 5 ? 4 : kBits == 6 ? 2 : 1;
  __m256i flip;
  explicit IntQuads(const ElementTables& tables) : flip(_mm256_set1_epi8(static_cast<char>(tables.integer_offset))) {}

  template <int Q>
  Quads decode(const uint8_t* unit, int half) const {
    __m256i codes = low_nibbles<Q>(unit, half);
    if constexpr (kBits >= 6) {
      const __m256i middle = shift_words<4 - 2 * Q>(load_quads(unit + 128 + half * 32));
      codes = _mm256_or_si256(codes, _mm256_and_si256(middle, _mm256_set1_epi8(0x30)));
    }
    if constexpr (kBits != 6) {
      constexpr int kTop = kBits - 1;
      const __m256i top = shift_words<kTop - Q>(top_bits<kBits>(unit, half));
      codes = _mm256_or_si256(codes, _mm256_and_si256(top, _mm256_set1_epi8(1 << kTop)));
    }
    return {_mm256_xor_si256(codes, flip), codes};
  }
};

// int8, and uint8 less 128.
struct ByteQuads {
  static constexpr bool kSigned = true;
  static constexpr int kBias = 0;
  static constexpr int kChain = 1;
  __m256i flip;
  explicit ByteQuads(const ElementTables& tables) : flip(_mm256_set1_epi8(static_cast<char>(tables.integer_offset))) {}

  template <int Q>
  Quads decode(const uint8_t* unit, int half) const {
    const __m256i values = _mm256_xor_si256(load_256(unit + Q * 64 + half * 32), flip);
    return {_mm256_abs_epi8(values), values};
  }
};

inline __m256i broadcast(const void* p) {
  int32_t word = 0;
  __builtin_memcpy(&word, p, sizeof word);
  return _mm256_set1_epi32(word);
}

// sum += addend, in this order: the compiler would rather add all addends first, and has no registers for so many.
inline void accumulate(__m256i& sum, __m256i addend) {
  sum = _mm256_add_epi32(sum, addend);
  asm("" : "+x"(sum));
}

// To 16 bits: even columns and odd ones.
template <bool kSigned>
[[gnu::always_inline]] inline void widen_quads(Quads quads, __m256i* even, __m256i* odd) {
  if constexpr (kSigned) {
    const __m256i values = _mm256_sign_epi8(quads.magnitude, quads.sign);
    *even = _mm256_srai_epi16(_mm256_slli_epi16(values, 8), 8);
    *odd = _mm256_srai_epi16(values, 8);
  } else {
    *even = _mm256_and_si256(quads.magnitude, _mm256_set1_epi16(0xff));
    *odd = _mm256_srli_epi16(quads.magnitude, 8);
  }
}

// sums[m] += x[m] . quad, both int16. x: [row][2 even columns, 2 odd ones].
template <bool kSigned, int kTile>
[[gnu::always_inline]] inline void multiply_quad(Quads quads, const int16_t* x, __m256i (&sums)[kTile]) {
  __m256i even;
  __m256i odd;
  widen_quads<kSigned>(quads, &even, &odd);
#pragma GCC unroll 4
  for (int m = 0; m < kTile; ++m) {
    const __m256i products = _mm256_madd_epi16(even, broadcast(x + m * 4));
    accumulate(sums[m], products);
    accumulate(sums[m], _mm256_madd_epi16(odd, broadcast(x + m * 4 + 2)));
  }
}

// The same in int8, by way of 16-bit sums of kChain quads: Q says which of the unit's.
template <typename D, int Q, int kTile>
[[gnu::always_inline]] inline void multiply_quad(Quads quads, const int8_t* x, __m256i (&pairs)[kTile],
                                                 __m256i (&sums)[kTile]) {
#pragma GCC unroll 4
  for (int m = 0; m < kTile; ++m) {
    __m256i values = broadcast(x + m * 4);
    if constexpr (D::kSigned) values = _mm256_sign_epi8(values, quads.sign);
    const __m256i products = _mm256_maddubs_epi16(quads.magnitude, values);
    pairs[m] = Q % D::kChain == 0 ? products : _mm256_add_epi16(pairs[m], products);
    if constexpr (Q % D::kChain == D::kChain - 1) {
      accumulate(sums[m], _mm256_madd_epi16(pairs[m], _mm256_set1_epi16(1)));
    }
  }
}

template <typename D, typename T, int kTile>
[[gnu::always_inline]] inline void multiply_unit(const D& decoder, const uint8_t* unit, const T* x,
                                                 __m256i (&sums)[2][kTile]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    if constexpr (sizeof(T) == 2) {
      multiply_quad<D::kSigned, kTile>(decoder.template decode<0>(unit, half), x, sums[half]);
      multiply_quad<D::kSigned, kTile>(decoder.template decode<1>(unit, half), x + 4 * kTile, sums[half]);
      multiply_quad<D::kSigned, kTile>(decoder.template decode<2>(unit, half), x + 8 * kTile, sums[half]);
      multiply_quad<D::kSigned, kTile>(decoder.template decode<3>(unit, half), x + 12 * kTile, sums[half]);
    } else {
      __m256i pairs[kTile];
      multiply_quad<D, 0, kTile>(decoder.template decode<0>(unit, half), x, pairs, sums[half]);
      multiply_quad<D, 1, kTile>(decoder.template decode<1>(unit, half), x + 4 * kTile, pairs, sums[half]);
      multiply_quad<D, 2, kTile>(decoder.template decode<2>(unit, half), x + 8 * kTile, pairs, sums[half]);
      multiply_quad<D, 3, kTile>(decoder.template decode<3>(unit, half), x + 12 * kTile, pairs, sums[half]);
    }
  }
}

// A group's scales, and the offset of its decoded numbers, zero points included.
struct IntegerGroup {
  V16 scale;
  __m256i offset[2];
};

inline IntegerGroup load_group(const Weights& w, int64_t block, int64_t group) {
  IntegerGroup loaded{load_scales(w, block, group), {}};
  for (int half = 0; half < 2; ++half) {
    loaded.offset[half] = _mm256_set1_epi32(w.tables->integer_offset);
    if (w.zeros != nullptr) {
      const __m256i zeros = widen_u8(w.zeros + (block * w.groups + group) * 16 + 8 * half);
      loaded.offset[half] = _mm256_add_epi32(loaded.offset[half], zeros);
    }
  }
  return loaded;
}

// What the sums of a segment begin with: what their rows' offset will have added to them.
template <int kTile>
[[gnu::always_inline]] inline void start_sums(const IntegerGroup& group, const int32_t* x_sums,
                                              __m256i (&sums)[2][kTile]) {
  for (int half = 0; half < 2; ++half) {
    for (int m = 0; m < kTile; ++m) {
      const __m256i offset = _mm256_mullo_epi32(group.offset[half], _mm256_set1_epi32(x_sums[m]));
      sums[half][m] = _mm256_sub_epi32(_mm256_setzero_si256(), offset);
    }
  }
}

template <int kTile>
[[gnu::always_inline]] inline void add_sums(const IntegerGroup& group, const float* steps,
                                            const __m256i (&sums)[2][kTile], V16* totals) {
  for (int m = 0; m < kTile; ++m) {
    const V16 products = {_mm256_cvtepi32_ps(sums[0][m]), _mm256_cvtepi32_ps(sums[1][m])};
    totals[m] = add(totals[m], mul(mul(products, set1(steps[m])), group.scale));
  }
}

inline void store_totals(const V16* totals, int rows, const Output& out, int64_t block) {
  alignas(64) float result[16];
  for (int m = 0; m < rows; ++m) {
    store(result, totals[m]);
    store_columns(result, out, m, block * 16);
  }
}

// Calls segment(group, number, unit, units) for all segments of a block.
template <typename Segment>
[[gnu::always_inline]] inline void for_each_segment(const Weights& w, int64_t block, const Segment& segment) {
  int64_t unit = 0;
  int64_t number = 0;
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t group_end = unit + w.units_per_group < w.units ? unit + w.units_per_group : w.units;
    const IntegerGroup loaded = load_group(w, block, group);
    while (unit < group_end) {
      const int64_t units = group_end - unit < kSegmentUnits ? group_end - unit : kSegmentUnits;
      segment(loaded, number++, unit, units);
      unit += units;
    }
  }
}

// One tile: decoded in registers.
template <typename D, typename T, int kTile>
void integer_direct(const Weights& w, const IntegerRows& x, const Output& out, int64_t begin, int64_t end) {
  const D decoder(*w.tables);
  const T* values = static_cast<const T*>(x.values);
  for (int64_t block = begin; block < end; ++block) {
    const uint8_t* codes = w.codes + block * w.units * w.unit_bytes;
    V16 totals[kTile];
    for (int m = 0; m < kTile; ++m) totals[m] = set1(0.0f);
    for_each_segment(w, block, [&](const IntegerGroup& group, int64_t number, int64_t unit, int64_t units) {
      __m256i sums[2][kTile];
      start_sums<kTile>(group, x.sums + number * kTile, sums);
      for (const int64_t end_unit = unit + units; unit < end_unit; ++unit) {
        const uint8_t* unit_codes = codes + unit * w.unit_bytes;
        prefetch_unit(unit_codes, w.unit_bytes);
        multiply_unit<D, T, kTile>(decoder, unit_codes, values + unit * 16 * kTile, sums);
      }
      add_sums<kTile>(group, x.steps, sums, totals);
    });
    store_totals(totals, kTile, out, block);
  }
}

// --- more rows: a segment is decoded once, into the cache, in the form that costs a row least -----------------------
//
//   Words      for int16: [quad][even columns, odd ones][row][2] in 16 bits
//   Bytes      for int8, where a bias or the decoder's own offset leaves nothing negative: [quad][row][4] in 8 bits
//   SignBytes  for int8: the same with a sign, which goes to x; an instruction more for each row

inline void store_256(void* p, __m256i v) { _mm256_store_si256(static_cast<__m256i*>(p), v); }

template <typename D>
struct Words {
  using Value = int16_t;
  static constexpr int kUnitBytes = 512;
  static constexpr int kBias = 0;

  template <int Q>
  static void store(const D& decoder, const uint8_t* unit, uint8_t* out) {
    for (int half = 0; half < 2; ++half) {
      __m256i even;
      __m256i odd;
      widen_quads<D::kSigned>(decoder.template decode<Q>(unit, half), &even, &odd);
      store_256(out + Q * 128 + half * 32, even);
      store_256(out + Q * 128 + 64 + half * 32, odd);
    }
  }

  template <int kTile>
  [[gnu::always_inline]] static void multiply(const uint8_t* unit, const int16_t* x, __m256i (&sums)[2][kTile]) {
#pragma GCC unroll 8
    for (int pair = 0; pair < 8; ++pair) {
      const __m256i lo = load_256(unit + pair * 64);
      const __m256i hi = load_256(unit + pair * 64 + 32);
#pragma GCC unroll 4
      for (int m = 0; m < kTile; ++m) {
        const __m256i values = broadcast(x + pair / 2 * 4 * kTile + m * 4 + pair % 2 * 2);
        accumulate(sums[0][m], _mm256_madd_epi16(lo, values));
        accumulate(sums[1][m], _mm256_madd_epi16(hi, values));
      }
    }
  }
};

template <typename D>
struct Bytes {
  using Value = int8_t;
  static constexpr int kUnitBytes = 256;
  static constexpr int kBias = [] {
    if constexpr (D::kSigned) return D::kBias;
    return 0;
  }();
  // As D::kChain, of what the bias makes twice as large.
  static constexpr int kChain = kBias > 0 && D::kChain > 1 ? D::kChain / 2 : D::kChain;

  template <int Q>
  static void store(const D& decoder, const uint8_t* unit, uint8_t* out) {
    for (int half = 0; half < 2; ++half) {
      const Quads quads = decoder.template decode<Q>(unit, half);
      __m256i values = quads.magnitude;
      if constexpr (D::kSigned) {
        values = _mm256_add_epi8(_mm256_sign_epi8(values, quads.sign), _mm256_set1_epi8(kBias));
      }
      store_256(out + Q * 64 + half * 32, values);
    }
  }

  template <int kTile>
  [[gnu::always_inline]] static void multiply(const uint8_t* unit, const int8_t* x, __m256i (&sums)[2][kTile]) {
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (kChain == 4) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i w[4] = {load_256(unit + half * 32), load_256(unit + 64 + half * 32),
                              load_256(unit + 128 + half * 32), load_256(unit + 192 + half * 32)};
#pragma GCC unroll 4
        for (int m = 0; m < kTile; ++m) {
          __m256i pairs = _mm256_maddubs_epi16(w[0], broadcast(x + m * 4));
#pragma GCC unroll 3
          for (int quad = 1; quad < 4; ++quad) {
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[quad], broadcast(x + (quad * kTile + m) * 4)));
          }
          accumulate(sums[half][m], _mm256_madd_epi16(pairs, ones));
        }
      }
    } else {
#pragma GCC unroll 4
      for (int quad = 0; quad < 4; quad += kChain) {
#pragma GCC unroll 4
        for (int m = 0; m < kTile; ++m) {
          const __m256i values = broadcast(x + (quad * kTile + m) * 4);
          __m256i lo = _mm256_maddubs_epi16(load_256(unit + quad * 64), values);
          __m256i hi = _mm256_maddubs_epi16(load_256(unit + quad * 64 + 32), values);
          if constexpr (kChain == 2) {
            const __m256i next = broadcast(x + ((quad + 1) * kTile + m) * 4);
            lo = _mm256_add_epi16(lo, _mm256_maddubs_epi16(load_256(unit + quad * 64 + 64), next));
            hi = _mm256_add_epi16(hi, _mm256_maddubs_epi16(load_256(unit + quad * 64 + 96), next));
          }
          accumulate(sums[0][m], _mm256_madd_epi16(lo, ones));
          accumulate(sums[1][m], _mm256_madd_epi16(hi, ones));
        }
      }
    }
  }
};

template <typename D>
struct SignBytes {
  using Value = int8_t;
  static constexpr int kUnitBytes = 256;
  static constexpr int kBias = 0;

  template <int Q>
  static void store(const D& decoder, const uint8_t* unit, uint8_t* out) {
    for (int half = 0; half < 2; ++half) {
      const Quads quads = decoder.template decode<Q>(unit, half);
      store_256(out + Q * 64 + half * 32, _mm256_sign_epi8(quads.magnitude, quads.sign));
    }
  }

  template <int kTile>
  [[gnu::always_inline]] static void multiply(const uint8_t* unit, const int8_t* x, __m256i (&sums)[2][kTile]) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int quad = 0; quad < 4; ++quad) {
      const __m256i lo = load_256(unit + quad * 64);
      const __m256i hi = load_256(unit + quad * 64 + 32);
      const __m256i lo_magnitude = _mm256_abs_epi8(lo);
      const __m256i hi_magnitude = _mm256_abs_epi8(hi);
#pragma GCC unroll 4
      for (int m = 0; m < kTile; ++m) {
        const __m256i values = broadcast(x + (quad * kTile + m) * 4);
        const __m256i lo_pairs = _mm256_maddubs_epi16(lo_magnitude, _mm256_sign_epi8(values, lo));
        const __m256i hi_pairs = _mm256_maddubs_epi16(hi_magnitude, _mm256_sign_epi8(values, hi));
        accumulate(sums[0][m], _mm256_madd_epi16(lo_pairs, ones));
        accumulate(sums[1][m], _mm256_madd_epi16(hi_pairs, ones));
      }
    }
  }
};

// A tile of a segment that has been decoded.
template <typename Decoded, int kTile>
[[gnu::noinline]] void multiply_decoded(const uint8_t* codes, int64_t units, const typename Decoded::Value* x,
                                        const int32_t* x_sums, const float* steps, const IntegerGroup& group,
                                        V16* totals) {
  __m256i sums[2][kTile];
  start_sums<kTile>(group, x_sums, sums);
  for (int64_t unit = 0; unit < units; ++unit) {
    Decoded::template multiply<kTile>(codes, x, sums);
    codes += Decoded::kUnitBytes;
    x += 16 * kTile;
  }
  add_sums<kTile>(group, steps, sums, totals);
}

template <typename D, typename Decoded>
void decoded_tiles(const Weights& w, const IntegerRows& x, const Output& out, int64_t begin, int64_t end) {
  using T = typename Decoded::Value;
  const D decoder(*w.tables);
  alignas(64) uint8_t decoded[kSegmentUnits * Decoded::kUnitBytes];
  V16 totals[kMaxIntegerRows];
  for (int64_t block = begin; block < end; ++block) {
    for (int m = 0; m < x.rows; ++m) totals[m] = set1(0.0f);
    for_each_segment(w, block, [&](IntegerGroup group, int64_t number, int64_t unit, int64_t units) {
      for (int64_t u = 0; u < units; ++u) {
        const uint8_t* codes = w.codes + (block * w.units + unit + u) * w.unit_bytes;
        uint8_t* unit_out = decoded + u * Decoded::kUnitBytes;
        prefetch_unit(codes, w.unit_bytes);
        Decoded::template store<0>(decoder, codes, unit_out);
        Decoded::template store<1>(decoder, codes, unit_out);
        Decoded::template store<2>(decoder, codes, unit_out);
        Decoded::template store<3>(decoder, codes, unit_out);
      }
      for (__m256i& offset : group.offset) offset = _mm256_add_epi32(offset, _mm256_set1_epi32(Decoded::kBias));
      for (int m = 0; m < x.rows; m += kIntegerTile) {
        const int tile = x.rows - m < kIntegerTile ? x.rows - m : kIntegerTile;
        const T* values = static_cast<const T*>(x.values) + (m * w.units + unit * tile) * 16;
        const int32_t* sums = x.sums + m * x.segments + number * tile;
        const auto multiply = tile == 1   ? multiply_decoded<Decoded, 1>
                              : tile == 2 ? multiply_decoded<Decoded, 2>
                              : tile == 3 ? multiply_decoded<Decoded, 3>
                                          : multiply_decoded<Decoded, 4>;
        multiply(decoded, units, values, sums, x.steps + m, group, totals + m);
      }
    });
    store_totals(totals, x.rows, out, block);
  }
}

template <typename D, typename T>
void integer_tiles(const Weights& w, const IntegerRows& x, const Output& out, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == 2) {
    decoded_tiles<D, Words<D>>(w, x, out, begin, end);
  } else if constexpr (!D::kSigned || Bytes<D>::kBias > 0) {
    decoded_tiles<D, Bytes<D>>(w, x, out, begin, end);
  } else {
    decoded_tiles<D, SignBytes<D>>(w, x, out, begin, end);
  }
}

template <typename D, typename T>
void integer_blocks(const Weights& w, const IntegerRows& x, const Output& out, int64_t begin, int64_t end) {
  switch (x.rows) {
    case 1: return integer_direct<D, T, 1>(w, x, out, begin, end);
    case 2: return integer_direct<D, T, 2>(w, x, out, begin, end);
    case 3: return integer_direct<D, T, 3>(w, x, out, begin, end);
    case 4: return integer_direct<D, T, 4>(w, x, out, begin, end);
    default: return integer_tiles<D, T>(w, x, out, begin, end);
  }
}

template <typename D>
IntegerFn integer_of(bool wide) {
  return wide ? integer_blocks<D, int16_t> : integer_blocks<D, int8_t>;
}

IntegerFn find_integer(const ElementTables& tables, bool wide) {
  switch (tables.bits) {
    case 2: return integer_of<NibbleQuads<2>>(wide);
    case 3: return integer_of<NibbleQuads<3>>(wide);
    case 4: return integer_of<NibbleQuads<4>>(wide);
    case 5: return tables.is_fp ? integer_of<FpQuads<5>>(wide) : integer_of<IntQuads<5>>(wide);
    case 6: return tables.is_fp ? integer_of<FpQuads<6>>(wide) : integer_of<IntQuads<6>>(wide);
    case 7: return tables.is_fp ? integer_of<FpQuads<7>>(wide) : integer_of<IntQuads<7>>(wide);
    default: return tables.is_fp ? integer_of<FpQuads<8>>(wide) : integer_of<ByteQuads>(wide);
  }
}
