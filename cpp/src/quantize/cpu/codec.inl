// The codec's kernels, written once over GCC vectors of kLanes floats. portable.cpp, avx2.cpp and avx512.cpp include
// this file inside an unnamed namespace after they define
//
//   kLanes                            floats in a vector
//   F divide_fast(F x, F s, F y)      RN(x / s), given y = RN(1 / s), for s in [kFastLow, kFastHigh]
//   largest(I), largest(H)            the largest lane; lanes are not negative
//   widen_codes, narrow_codes         64 codes, one a byte, to and from vectors of 32-bit lanes
//   widen_halves, narrow_halves       kLanes 16-bit numbers to and from a vector of 32-bit lanes
//   pack_block<N>, unpack_block<N>    64 codes of N bits, one a byte, to and from 8 N bytes
//
// and the vectors F, I, U and H of kLanes float, int32_t, uint32_t and uint16_t. Every operation is an IEEE one on its
// own (no contraction), so all instruction sets agree bit for bit.

constexpr int64_t kVectors = kBlock / kLanes;  // of a block of codes

constexpr int32_t kInfBits = 0x7f800000;
constexpr int32_t kMagnitude = 0x7fffffff;
// bf16 and fp16 as sources and results, in the terms of the fp elements.
constexpr Floating kHalf = {16, 10, 0x47800000, 113 << 23, 112 << 23, 0x7c00};

inline I bits_of(F x) { return (I)x; }
inline F float_of(I x) { return (F)x; }
template <typename V, typename T>
inline V load(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
template <typename V>
inline void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}
inline I min_of(I a, I b) { return a < b ? a : b; }
inline I max_of(I a, I b) { return a > b ? a : b; }
// Scalar operands are broadcast, and subtracting 0 changes nothing.
inline F splat(float x) { return x - F{}; }
inline I splat(int32_t x) { return x - I{}; }

// --- floating codes -------------------------------------------------------------------------------------------

// The magnitude's code: rounded to nearest even, saturated. t + C with C = 1.5 * 2^(e + 23 - Y) leaves t in units of
// the code's last place, 2^(e - Y), in the low bits of the sum, where e is t's exponent or the smallest one.
inline I floating_code(I magnitude, const Floating& f) {
  const I t = min_of(magnitude, splat(f.max_bits));
  const I e = max_of(t & kInfBits, splat(f.min_exponent));
  const I c = e + (((23 - f.mantissa_bits) << 23) + 0x400000);
  const I steps = bits_of(float_of(t) + float_of(c)) - c;
  return steps + ((e - f.min_exponent) >> (23 - f.mantissa_bits));
}

inline F floating_value(I code, const Floating& f) {
  const I magnitude = code & ((1 << (f.bits - 1)) - 1);
  const I field = magnitude << (23 - f.mantissa_bits);
  // A subnormal code is read as one with an exponent of 1 and an implied bit, which is then subtracted: no
  // arithmetic on subnormal floats, which is slow.
  const I subnormal = field < (1 << 23);
  const I implied = subnormal & (1 << 23);
  const F value = float_of(field + implied + f.rebias) - float_of(subnormal & (f.rebias + (1 << 23)));
  const I special = (magnitude >= f.special) & kInfBits;
  const I sign = (code << (32 - f.bits)) & ~kMagnitude;
  return float_of(bits_of(value) | special | sign);
}

// --- plain floats ---------------------------------------------------------------------------------------------

constexpr int64_t size_of(Source type) { return type == Source::f32 ? 4 : 2; }

template <Source kType>
inline F load_floats(const uint8_t* from) {
  if constexpr (kType == Source::f32) {
    return load<F>(from);
  } else if constexpr (kType == Source::bf16) {
    return (F)(widen_halves(from) << 16);
  } else {
    return floating_value(widen_halves(from), kHalf);
  }
}

template <Source kType>
inline void store_floats(uint8_t* to, F value) {
  if constexpr (kType == Source::f32) {
    store(to, value);
  } else {
    const I bits = bits_of(value);
    const I magnitude = bits & kMagnitude;
    I narrow;
    if constexpr (kType == Source::bf16) {
      const U u = (U)bits;
      const U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
      narrow = magnitude > kInfBits ? (I)((u >> 16) | 0x40) : (I)rounded;
    } else {
      // Saturating at 2^16 gives the code of infinity.
      const I sign = (I)((U)bits >> 16) & 0x8000;
      const I rounded = floating_code(magnitude, kHalf);
      narrow = sign | (magnitude > kInfBits ? splat(0x7e00) : rounded);
    }
    narrow_halves(to, narrow);
  }
}

// --- elements -------------------------------------------------------------------------------------------------

template <bool kFastDivide>
inline F divide(F x, F s, F y) {
  if constexpr (kFastDivide) {
    return divide_fast(x, s, y);
  } else {
    return x / s;
  }
}

constexpr float kToInteger = 12582912.0f;     // 1.5 * 2^23: the sum's low bits are x rounded to nearest even
constexpr int32_t kIntegerZero = 0x4b400000;  // its bits; larger and smaller sums keep their order as integers

template <Kind kKind, bool kFastDivide>
inline I code_of(F x, F s, F y, I zero, const Element& e) {
  if constexpr (kKind == Kind::fp) {
    const I magnitude = bits_of(divide<kFastDivide>(float_of(bits_of(x) & kMagnitude), s, y));
    const I sign = (I)((U)bits_of(x) >> (32 - e.bits)) & (1 << (e.bits - 1));
    return floating_code(magnitude, e.fp) | sign;
  } else if constexpr (kKind == Kind::signed_int) {
    const I sum = bits_of(divide<kFastDivide>(x, s, y) + kToInteger);
    const I code = min_of(max_of(sum, splat(kIntegerZero + e.low)), splat(kIntegerZero + e.high));
    return code & ((1 << e.bits) - 1);
  } else if constexpr (kKind == Kind::unsigned_int) {
    const I sum = bits_of(divide<kFastDivide>(x, s, y) + kToInteger);
    const I near = min_of(max_of(sum, splat(kIntegerZero - 512)), splat(kIntegerZero + 512)) - kIntegerZero;
    return min_of(max_of(near + zero, splat(0)), splat(e.high));
  } else {
    const F q = divide<kFastDivide>(x, s, y);
    I code = splat(0);
    for (int i = 0; i < 15; ++i) code -= (I)(q >= e.thresholds[i]);
    return code;
  }
}

template <Kind kKind>
inline F value_of(I code, I zero, const Element& e) {
  if constexpr (kKind == Kind::fp) {
    return floating_value(code, e.fp);
  } else if constexpr (kKind == Kind::signed_int) {
    return __builtin_convertvector((code << (32 - e.bits)) >> (32 - e.bits), F);
  } else if constexpr (kKind == Kind::unsigned_int) {
    return __builtin_convertvector(code - zero, F);
  } else {
    if constexpr (kLanes == 16) {
      return __builtin_shuffle(load<F>(e.values), code);
    } else {
      F value;
      for (int i = 0; i < kLanes; ++i) value[i] = e.values[code[i] & 15];
      return value;
    }
  }
}

template <Source kType, Kind kKind, bool kFastDivide>
void encode_run(const uint8_t* run, int64_t n, const Element& element, const float* scale, const float* inverse,
                const int32_t* zero, uint8_t* codes, const uint8_t* next) {
  constexpr int64_t kSize = size_of(kType);
  const Element e = element;  // a copy, so that stores of codes cannot change it
  uint8_t padded[kBlock * kSize];
  for (int64_t i = 0; i < n; i += kBlock) {
    const uint8_t* from = run + i * kSize;
    if (n - i < kBlock) {
      __builtin_memset(padded, 0, sizeof padded);
      __builtin_memcpy(padded, from, (size_t)((n - i) * kSize));
      from = padded;
    }
    if (next != nullptr) {
      for (int64_t line = 0; line < kBlock * kSize; line += 64) __builtin_prefetch(next + i * kSize + line);
    }
    I block[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t at = (i + v * kLanes) / kSpread;
      const I z = kKind == Kind::unsigned_int ? splat(zero[at]) : splat(0);
      const F x = load_floats<kType>(from + v * kLanes * kSize);
      block[v] = code_of<kKind, kFastDivide>(x, splat(scale[at]), splat(inverse[at]), z, e);
    }
    narrow_codes(codes + i, block);
  }
  for (int64_t i = n; i % kBlock != 0; ++i) codes[i] = 0;
}

template <Source kType, Kind kKind>
void decode_run(const uint8_t* codes, int64_t n, const Element& element, const float* scale, const int32_t* zero,
                uint8_t* out) {
  constexpr int64_t kSize = size_of(kType);
  const Element e = element;
  uint8_t padded[kBlock * kSize];
  for (int64_t i = 0; i < n; i += kBlock) {
    const bool tail = n - i < kBlock;
    uint8_t* to = tail ? padded : out + i * kSize;
    I block[kVectors];
    widen_codes(codes + i, block);
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t at = (i + v * kLanes) / kSpread;
      const I z = kKind == Kind::unsigned_int ? splat(zero[at]) : splat(0);
      store_floats<kType>(to + v * kLanes * kSize, value_of<kKind>(block[v], z, e) * splat(scale[at]));
    }
    if (tail) __builtin_memcpy(out + i * kSize, padded, (size_t)((n - i) * kSize));
  }
}

template <Source kType, Kind kKind>
double error_of(const uint8_t* run, int64_t n, const Element& element, float s, float inverse, int32_t zero) {
  constexpr int64_t kSize = size_of(kType);
  const Element e = element;
  const F divisor = splat(s == 0 ? 1.0f : s);
  uint8_t padded[kBlock * kSize];
  double sums[kSpread] = {};  // element i adds to sum i % 16 on every instruction set
  for (int64_t i = 0; i < n; i += kBlock) {
    const uint8_t* from = run + i * kSize;
    if (n - i < kBlock) {
      __builtin_memset(padded, 0, sizeof padded);
      __builtin_memcpy(padded, from, (size_t)((n - i) * kSize));
      from = padded;
    }
    for (int64_t k = 0; k < kBlock; k += kSpread) {
      float errors[kSpread];
      for (int64_t j = 0; j < kSpread; j += kLanes) {
        const F x = load_floats<kType>(from + (k + j) * kSize);
        const I code = code_of<kKind, false>(x, divisor, splat(inverse), splat(zero), e);
        store(errors + j, x - value_of<kKind>(code, splat(zero), e) * splat(s));
      }
      for (int64_t j = 0; j < kSpread; ++j) sums[j] += (double)errors[j] * (double)errors[j];
    }
  }
  double sum = 0;
  for (int64_t j = 0; j < kSpread; ++j) sum += sums[j];
  return sum;
}

// --- ranges ---------------------------------------------------------------------------------------------------

float half_to_float(int32_t bits) {
  const F v = floating_value(splat(bits), kHalf);
  return v[0];
}

template <Source kType>
void absmax_run(const uint8_t* run, int64_t n, int64_t group, float* out) {
  for (int64_t g = 0; g * group < n; ++g) {
    const int64_t end = (g + 1) * group < n ? (g + 1) * group : n;
    int64_t i = g * group;
    int32_t most = 0;  // magnitudes order like their bits
    if constexpr (kType == Source::f32) {
      I lanes = splat(0);
      for (; i + kLanes <= end; i += kLanes) lanes = max_of(lanes, load<I>(run + i * 4) & kMagnitude);
      most = largest(lanes);
      for (; i < end; ++i) {
        int32_t bits;
        __builtin_memcpy(&bits, run + i * 4, 4);
        bits &= kMagnitude;
        most = bits > most ? bits : most;
      }
    } else {
      H lanes = {};
      for (; i + kLanes <= end; i += kLanes) {
        const H bits = load<H>(run + i * 2) & 0x7fff;
        lanes = bits > lanes ? bits : lanes;
      }
      most = largest(lanes);
      for (; i < end; ++i) {
        uint16_t bits;
        __builtin_memcpy(&bits, run + i * 2, 2);
        bits &= 0x7fff;
        most = bits > most ? bits : most;
      }
    }
    out[g] = kType == Source::f32    ? __builtin_bit_cast(float, most)
             : kType == Source::bf16 ? __builtin_bit_cast(float, most << 16)
                                     : half_to_float(most);
  }
}

template <Source kType>
void range_run(const uint8_t* run, int64_t n, int64_t group, float* low, float* high) {
  constexpr int64_t kSize = size_of(kType);
  for (int64_t g = 0; g * group < n; ++g) {
    const int64_t end = (g + 1) * group < n ? (g + 1) * group : n;
    F lows = splat(0.0f), highs = splat(0.0f);
    for (int64_t i = g * group; i < end; i += kLanes) {
      uint8_t padded[kLanes * kSize];
      const uint8_t* from = run + i * kSize;
      if (end - i < kLanes) {
        __builtin_memset(padded, 0, sizeof padded);
        __builtin_memcpy(padded, from, (size_t)((end - i) * kSize));
        from = padded;
      }
      const F x = load_floats<kType>(from);
      lows = x < lows ? x : lows;
      highs = x > highs ? x : highs;
    }
    low[g] = high[g] = 0;
    for (int j = 0; j < kLanes; ++j) {
      low[g] = lows[j] < low[g] ? lows[j] : low[g];
      high[g] = highs[j] > high[g] ? highs[j] : high[g];
    }
  }
}

// --- scales ---------------------------------------------------------------------------------------------------
// Plain loops without branches, which compilers vectorise. All numbers are finite and not negative.

// d as a float whose last bit tells that d lies beside it, so that rounding it again rounds d itself.
inline float round_to_odd(double d) {
  const float f = (float)d;
  const int32_t bits = __builtin_bit_cast(int32_t, f);
  const int32_t step = (double)f < d ? 1 : -1;
  return __builtin_bit_cast(float, bits + ((double)f != d && (bits & 1) == 0 ? step : 0));
}

template <Scale kType>
inline int32_t stored_scale(double d, bool ceil) {
  if constexpr (kType == Scale::e8m0) {
    const int64_t bits = __builtin_bit_cast(int64_t, d);
    const int64_t exponent = (bits >> 52) - (1023 - 127) + (ceil && (bits & 0xfffffffffffff) != 0 ? 1 : 0);
    return (int32_t)(exponent < 0 ? 0 : exponent > 254 ? 254 : exponent);
  } else if constexpr (kType == Scale::fp32) {
    const int32_t bits = __builtin_bit_cast(int32_t, (float)d);
    return bits < kInfBits ? bits : kInfBits - 1;
  } else {
    const int32_t bits = __builtin_bit_cast(int32_t, round_to_odd(d));
    if constexpr (kType == Scale::bf16) {
      const int32_t code = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      return code < 0x7f7f ? code : 0x7f7f;
    } else {
      constexpr int kMantissa = kType == Scale::fp16 ? 10 : 3;
      constexpr int32_t kLeast = kType == Scale::fp16 ? 113 << 23 : 121 << 23;
      constexpr int32_t kMost = kType == Scale::fp16 ? 0x477fe000 : 0x43e00000;
      const int32_t t = bits < kMost ? bits : kMost;
      const int32_t e = (t & kInfBits) > kLeast ? t & kInfBits : kLeast;
      const int32_t c = e + ((23 - kMantissa) << 23) + 0x400000;
      const float sum = __builtin_bit_cast(float, t) + __builtin_bit_cast(float, c);
      return __builtin_bit_cast(int32_t, sum) - c + ((e - kLeast) >> (23 - kMantissa));
    }
  }
}

template <Scale kType>
inline float scale_value(int32_t bits) {
  if constexpr (kType == Scale::fp32) return __builtin_bit_cast(float, bits);
  if constexpr (kType == Scale::bf16) return __builtin_bit_cast(float, bits << 16);
  if constexpr (kType == Scale::e8m0) return __builtin_bit_cast(float, bits == 0 ? 0x400000 : bits << 23);
  constexpr int kMantissa = kType == Scale::fp16 ? 10 : 3;
  constexpr int32_t kRebias = kType == Scale::fp16 ? 112 << 23 : 120 << 23;
  const int32_t field = bits << (23 - kMantissa);
  const int32_t implied = field < (1 << 23) ? 1 << 23 : 0;
  const float removed = __builtin_bit_cast(float, field < (1 << 23) ? kRebias + (1 << 23) : 0);
  return __builtin_bit_cast(float, field + implied + kRebias) - removed;
}

template <Scale kType>
void scales_run(const double* ranges, int64_t count, const ScaleRule& rule, uint32_t* stored, float* scale,
                float* inverse) {
  const double divisor = rule.divisor == 0 ? 1 : rule.divisor;  // 0: the global scale is 0, and so is every range
  const float global = rule.global;
  const bool ceil = rule.ceil;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = stored_scale<kType>(ranges[i] / divisor, ceil);
    const float value = scale_value<kType>(bits) * global;
    stored[i] = value == 0 ? 0 : (uint32_t)bits;
    scale[i] = value;
    inverse[i] = value == 0 || ranges[i] == 0 ? 0 : 1 / value;
  }
}

// --- the table ------------------------------------------------------------------------------------------------

void absmax(const void* run, Source type, int64_t n, int64_t group, float* out) {
  const auto* bytes = (const uint8_t*)run;
  switch (type) {
    case Source::f32:
      return absmax_run<Source::f32>(bytes, n, group, out);
    case Source::f16:
      return absmax_run<Source::f16>(bytes, n, group, out);
    case Source::bf16:
      return absmax_run<Source::bf16>(bytes, n, group, out);
  }
}

void range(const void* run, Source type, int64_t n, int64_t group, float* low, float* high) {
  const auto* bytes = (const uint8_t*)run;
  switch (type) {
    case Source::f32:
      return range_run<Source::f32>(bytes, n, group, low, high);
    case Source::f16:
      return range_run<Source::f16>(bytes, n, group, low, high);
    case Source::bf16:
      return range_run<Source::bf16>(bytes, n, group, low, high);
  }
}

void scales(const double* ranges, int64_t count, const ScaleRule& rule, uint32_t* stored, float* scale,
            float* inverse) {
  switch (rule.type) {
    case Scale::fp32:
      return scales_run<Scale::fp32>(ranges, count, rule, stored, scale, inverse);
    case Scale::fp16:
      return scales_run<Scale::fp16>(ranges, count, rule, stored, scale, inverse);
    case Scale::bf16:
      return scales_run<Scale::bf16>(ranges, count, rule, stored, scale, inverse);
    case Scale::e8m0:
      return scales_run<Scale::e8m0>(ranges, count, rule, stored, scale, inverse);
    case Scale::e4m3:
      return scales_run<Scale::e4m3>(ranges, count, rule, stored, scale, inverse);
  }
}

// Calls f with the source type and the kind as compile-time constants.
template <Source kType>
struct SourceTag {
  static constexpr Source value = kType;
};
template <Kind kKind>
struct KindTag {
  static constexpr Kind value = kKind;
};
template <typename T, typename Function>
inline void with_kind(Kind kind, T type, Function f) {
  switch (kind) {
    case Kind::fp:
      return f(type, KindTag<Kind::fp>{});
    case Kind::signed_int:
      return f(type, KindTag<Kind::signed_int>{});
    case Kind::unsigned_int:
      return f(type, KindTag<Kind::unsigned_int>{});
    case Kind::nf4:
      return f(type, KindTag<Kind::nf4>{});
  }
}
template <typename Function>
inline void with_types(Source source, Kind kind, Function f) {
  switch (source) {
    case Source::f32:
      return with_kind(kind, SourceTag<Source::f32>{}, f);
    case Source::f16:
      return with_kind(kind, SourceTag<Source::f16>{}, f);
    case Source::bf16:
      return with_kind(kind, SourceTag<Source::bf16>{}, f);
  }
}

// Between these scales no step of divide_fast() underflows or overflows for any quotient that is not coded as 0 or
// as the largest code of every element type.
constexpr float kFastLow = 0x1p-36f;
constexpr float kFastHigh = 0x1p60f;

void encode(const void* run, Source type, int64_t n, const Element& element, const float* scale, const float* inverse,
            const int32_t* zero, uint8_t* codes, const void* next) {
  int outside = 0;
  for (int64_t i = 0; i * kSpread < n; ++i) {
    outside |= (scale[i] != 0) & ((scale[i] < kFastLow) | (scale[i] > kFastHigh));
  }
  with_types(type, element.kind, [&](auto t, auto k) {
    const auto f = outside == 0 ? encode_run<decltype(t)::value, decltype(k)::value, true>
                                : encode_run<decltype(t)::value, decltype(k)::value, false>;
    f((const uint8_t*)run, n, element, scale, inverse, zero, codes, (const uint8_t*)next);
  });
}

void decode(const uint8_t* codes, int64_t n, const Element& element, const float* scale, const int32_t* zero,
            Source type, void* out) {
  with_types(type, element.kind, [&](auto t, auto k) {
    decode_run<decltype(t)::value, decltype(k)::value>(codes, n, element, scale, zero, (uint8_t*)out);
  });
}

void errors(const void* run, Source type, int64_t n, const Element& element, int64_t count, const float* scale,
            const float* inverse, const int32_t* zero, double* out) {
  with_types(type, element.kind, [&](auto t, auto k) {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = error_of<decltype(t)::value, decltype(k)::value>((const uint8_t*)run, n, element, scale[i], inverse[i],
                                                                zero[i]);
    }
  });
}

template <int kBits>
void pack_run(const uint8_t* codes, int64_t n, uint8_t* out) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) pack_block<kBits>(codes + i, out + i / 8 * kBits);
  if (i < n) {
    uint8_t block[8 * kBits];
    pack_block<kBits>(codes + i, block);
    __builtin_memcpy(out + i / 8 * kBits, block, (size_t)((n - i) * kBits + 7) / 8);
  }
}

template <int kBits>
void unpack_run(const uint8_t* packed, int64_t n, uint8_t* codes) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) unpack_block<kBits>(packed + i / 8 * kBits, codes + i);
  if (i < n) {
    uint8_t block[8 * kBits] = {};
    __builtin_memcpy(block, packed + i / 8 * kBits, (size_t)((n - i) * kBits + 7) / 8);
    unpack_block<kBits>(block, codes + i);
  }
}

// pre: 2 <= bits <= 8.
template <typename Function>
inline void with_bits(int bits, Function f) {
  switch (bits) {
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    case 5:
      return f.template operator()<5>();
    case 6:
      return f.template operator()<6>();
    case 7:
      return f.template operator()<7>();
    default:
      return f.template operator()<8>();
  }
}

void pack(const uint8_t* codes, int64_t n, int bits, uint8_t* out) {
  with_bits(bits, [&]<int kBits>() { pack_run<kBits>(codes, n, out); });
}

void unpack(const uint8_t* packed, int64_t n, int bits, uint8_t* codes) {
  with_bits(bits, [&]<int kBits>() { unpack_run<kBits>(packed, n, codes); });
}
