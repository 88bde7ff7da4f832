// The codec's kernels, written once over GCC vectors of kLanes floats. portable.cpp, avx2.cpp and avx512.cpp include
// this file inside an unnamed namespace after they define
//
//   kLanes                            floats in a vector
//   kFused, F fused(F a, F b, F c)    whether there is RN(a b + c) in one instruction
//   pair_of(a, b)                     kLanes entries for every other one of 2 kLanes elements: the first 16 have a, the
//                                     others, if there are any, b
//   shift_left, shift_right(I, int)   of all lanes, the latter arithmetic
//   largest(I), largest(H)            the largest lane; lanes are not negative
//   widen_codes, narrow_codes         64 codes, one a byte, to and from vectors of 32-bit lanes
//   widen_halves, narrow_halves       16 16-bit numbers to and from vectors of 32-bit lanes
//   Lookup, kLookup                   whether there is a faster way from fp codes to bf16 pairs: see avx512.cpp
//   pack_block<N>, unpack_block<N>    64 codes of N bits, one a byte, to and from 8 N bytes
//   exchanged<D>(F)                   lane i has what lane i ^ D had
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
  // Unsigned, since the bits of a NaN (in groups that are reported or coded as zeros) may wrap.
  const U c = (U)e + (uint32_t)(((23 - f.mantissa_bits) << 23) + 0x400000);
  const U steps = (U)(float_of(t) + (F)c) - c;
  return (I)(steps + (U)shift_right(e - f.min_exponent, 23 - f.mantissa_bits));
}

inline F floating_value(I code, const Floating& f) {
  const I magnitude = code & ((1 << (f.bits - 1)) - 1);
  const I field = shift_left(magnitude, 23 - f.mantissa_bits);
  // A subnormal code is read as one with an exponent of 1 and an implied bit, which is then subtracted: no
  // arithmetic on subnormal floats, which is slow.
  const I subnormal = field < (1 << 23);
  const I implied = subnormal & (1 << 23);
  const F value = float_of(field + implied + f.rebias) - float_of(subnormal & (f.rebias + (1 << 23)));
  const I special = (magnitude >= f.special) & kInfBits;
  const I sign = shift_left(code, 32 - f.bits) & ~kMagnitude;
  return float_of(bits_of(value) | special | sign);
}

// --- plain floats ---------------------------------------------------------------------------------------------

constexpr int64_t size_of(Source type) { return type == Source::f32 ? 4 : 2; }

// The even and the odd elements of a vector of pairs, and back.
template <Source kType>
inline void split_pairs(U pairs, F* even, F* odd) {
  if constexpr (kType == Source::bf16) {
    *even = (F)(pairs << 16);
    *odd = (F)(pairs & 0xffff0000u);
  } else {
    *even = floating_value((I)(pairs & 0xffffu), kHalf);
    *odd = floating_value((I)(pairs >> 16), kHalf);
  }
}

// 16-bit floats in 32-bit lanes.
template <Source kType>
inline U narrowed(F x) {
  const U bits = (U)x;
  const I magnitude = (I)(bits & (uint32_t)kMagnitude);
  if constexpr (kType == Source::bf16) {
    const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return magnitude > kInfBits ? bits >> 16 | 0x40 : rounded;
  } else {
    const I rounded = floating_code(magnitude, kHalf);  // saturating at 2^16 gives the code of infinity
    return (bits >> 16 & 0x8000) | (U)(magnitude > kInfBits ? splat(0x7e00) : rounded);
  }
}

template <Source kType>
inline U join_pairs(F even, F odd) {
  if constexpr (kType == Source::bf16) {
    // NaNs here have no low bits set, so rounding leaves them alone.
    const U e = (U)even, o = (U)odd;
    const U low = e + 0x7fff + ((e >> 16) & 1), high = o + 0x7fff + ((o >> 16) & 1);
    return (low >> 16) | (high & 0xffff0000u);
  } else {
    return narrowed<kType>(even) | narrowed<kType>(odd) << 16;
  }
}

// --- elements -------------------------------------------------------------------------------------------------

// RN(x / s) with 1 / s = y + z to about 48 bits. fused(x, y, x z) is x / s rounded from an error below 2^-46 of it.
//   few_bits: no quotient by a scale of at most 16 bits comes closer to the middle of two floats than 2^-42 of it, so
//     this is RN(x / s).
//   corrected: it is within one unit of the last place, so by Markstein's theorem RN(q + (x - s q) y) is RN(x / s).
// Both hold while no step underflows or overflows: see kFastLow.
template <Division kDivision>
inline F divide(F x, F s, F y, F z) {
  if constexpr (kDivision == Division::plain) {
    return x / s;
  } else {
    const F q = fused(x, y, x * z);
    return kDivision == Division::few_bits ? q : fused(fused(-s, q, x), y, q);
  }
}

constexpr float kToInteger = 12582912.0f;     // 1.5 * 2^23: the sum's low bits are x rounded to nearest even
constexpr int32_t kIntegerZero = 0x4b400000;  // its bits; larger and smaller sums keep their order as integers

template <Kind kKind, Division kDivision>
inline I code_of(F x, F s, F y, F z, I zero, const Element& e) {
  if constexpr (kKind == Kind::fp) {
    const I magnitude = bits_of(divide<kDivision>(float_of(bits_of(x) & kMagnitude), s, y, z));
    const I sign = shift_right(bits_of(x), 32 - e.bits) & (1 << (e.bits - 1));
    return floating_code(magnitude, e.fp) | sign;
  } else if constexpr (kKind == Kind::signed_int) {
    const I sum = bits_of(divide<kDivision>(x, s, y, z) + kToInteger);
    const I code = min_of(max_of(sum, splat(kIntegerZero + e.low)), splat(kIntegerZero + e.high));
    return code & ((1 << e.bits) - 1);
  } else if constexpr (kKind == Kind::unsigned_int) {
    const I sum = bits_of(divide<kDivision>(x, s, y, z) + kToInteger);
    const I near = min_of(max_of(sum, splat(kIntegerZero - 512)), splat(kIntegerZero + 512)) - kIntegerZero;
    return min_of(max_of(near + zero, splat(0)), splat(e.high));
  } else {
    const F q = divide<kDivision>(x, s, y, z);
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
    return __builtin_convertvector(shift_right(shift_left(code, 32 - e.bits), 32 - e.bits), F);
  } else if constexpr (kKind == Kind::unsigned_int) {
    return __builtin_convertvector(code - zero, F);
  } else {
#if !defined(__clang__)  // which has no shuffle by a vector
    if constexpr (kLanes == 16) return __builtin_shuffle(load<F>(e.values), code);
#endif
    F value;
    for (int i = 0; i < kLanes; ++i) value[i] = e.values[code[i] & 15];
    return value;
  }
}

template <Source kType, Kind kKind, Division kDivision>
void encode_run(const uint8_t* run, int64_t n, const Element& element, const Spread& scales, uint8_t* codes,
                const uint8_t* next) {
  constexpr int64_t kSize = size_of(kType);
  const Element e = element;  // copies, so that stores of codes cannot change them
  const Spread s = scales;
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
    if constexpr (kType == Source::f32) {
      I block[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t at = (i + v * kLanes) >> s.shift;
        const I zero = kKind == Kind::unsigned_int ? splat(s.zero[at]) : splat(0);
        block[v] = code_of<kKind, kDivision>(load<F>(from + v * kLanes * kSize), splat(s.scale[at]),
                                             splat(s.inverse[at]), splat(s.inverse_low[at]), zero, e);
      }
      narrow_codes(codes + i, block);
    } else {
      U block[kVectors / 2];
      for (int64_t v = 0; v < kVectors / 2; ++v) {
        const int64_t at = (i + v * 2 * kLanes) >> s.shift, end = (i + v * 2 * kLanes + kSpread) >> s.shift;
        const I zero = kKind == Kind::unsigned_int ? pair_of(s.zero[at], s.zero[end]) : splat(0);
        const F scale = pair_of(s.scale[at], s.scale[end]), y = pair_of(s.inverse[at], s.inverse[end]);
        const F z = pair_of(s.inverse_low[at], s.inverse_low[end]);
        F even, odd;
        split_pairs<kType>(load<U>(from + v * 2 * kLanes * kSize), &even, &odd);
        block[v] = (U)code_of<kKind, kDivision>(even, scale, y, z, zero, e) |
                   (U)code_of<kKind, kDivision>(odd, scale, y, z, zero, e) << 8;
      }
      narrow_halves(codes + i, block);
      narrow_halves(codes + i + 32, block + kVectors / 4);
    }
  }
  for (int64_t i = n; i % kBlock != 0; ++i) codes[i] = 0;
}

// Codes of up to 6 bits are all in the look-up table; of the others, the subnormal ones are.
enum class Path { computed, looked_up, partly_looked_up };

template <Path kPath, typename Table = Lookup>
inline auto make_lookup(const Element& e) {
  if constexpr (kPath == Path::computed) {
    return 0;
  } else {
    int32_t code[32];
    I value[32 / kLanes];
    for (int i = 0; i < 32; ++i) code[i] = i;
    for (int i = 0; i < 32 / kLanes; ++i) value[i] = bits_of(floating_value(load<I>(code + i * kLanes), e.fp));
    return Table(value, e);
  }
}

template <Source kType, Kind kKind, Path kPath>
void decode_run(const uint8_t* codes, int64_t n, const Element& element, const Spread& scales, uint8_t* out) {
  constexpr int64_t kSize = size_of(kType);
  const Element e = element;
  const Spread s = scales;
  const auto lookup = make_lookup<kPath>(e);
  uint8_t padded[kBlock * kSize];
  for (int64_t i = 0; i < n; i += kBlock) {
    const bool tail = n - i < kBlock;
    uint8_t* to = tail ? padded : out + i * kSize;
    if constexpr (kType == Source::f32) {
      I block[kVectors];
      widen_codes(codes + i, block);
      for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t at = (i + v * kLanes) >> s.shift;
        const I zero = kKind == Kind::unsigned_int ? splat(s.zero[at]) : splat(0);
        store(to + v * kLanes * kSize, value_of<kKind>(block[v], zero, e) * splat(s.scale[at]));
      }
    } else if constexpr (kPath != Path::computed) {
      for (int64_t v = 0; v < kVectors / 2; ++v) {
        const int64_t at = (i + v * 2 * kLanes) >> s.shift, end = (i + v * 2 * kLanes + kSpread) >> s.shift;
        const F scale = pair_of(s.scale[at], s.scale[end]);
        F even, odd;
        const U pairs = lookup.template pairs<kPath == Path::looked_up>(codes + i + v * 2 * kLanes);
        split_pairs<Source::bf16>(pairs, &even, &odd);
        store(to + v * 2 * kLanes * kSize, join_pairs<kType>(even * scale, odd * scale));
      }
    } else {
      U block[kVectors / 2];
      widen_halves(codes + i, block);
      widen_halves(codes + i + 32, block + kVectors / 4);
      for (int64_t v = 0; v < kVectors / 2; ++v) {
        const int64_t at = (i + v * 2 * kLanes) >> s.shift, end = (i + v * 2 * kLanes + kSpread) >> s.shift;
        const I zero = kKind == Kind::unsigned_int ? pair_of(s.zero[at], s.zero[end]) : splat(0);
        const F scale = pair_of(s.scale[at], s.scale[end]);
        const F even = value_of<kKind>((I)(block[v] & 0xff), zero, e) * scale;
        const F odd = value_of<kKind>((I)(block[v] >> 8), zero, e) * scale;
        store(to + v * 2 * kLanes * kSize, join_pairs<kType>(even, odd));
      }
    }
    if (tail) __builtin_memcpy(out + i * kSize, padded, (size_t)((n - i) * kSize));
  }
}

template <Kind kKind>
double error_of(const float* run, int64_t n, const Element& element, float s, int32_t zero) {
  const Element e = element;
  const F divisor = splat(s == 0 ? 1.0f : s);
  double sums[kSpread] = {};  // element i adds to sum i % 16 on every instruction set
  for (int64_t i = 0; i < n; i += kSpread) {
    float x[kSpread] = {}, errors[kSpread];
    __builtin_memcpy(x, run + i, (size_t)(n - i < kSpread ? n - i : kSpread) * sizeof(float));
    for (int64_t j = 0; j < kSpread; j += kLanes) {
      const F value = load<F>(x + j);
      const I code = code_of<kKind, Division::plain>(value, divisor, F{}, F{}, splat(zero), e);
      store(errors + j, value - value_of<kKind>(code, splat(zero), e) * splat(s));
    }
    for (int64_t j = 0; j < kSpread; ++j) sums[j] += (double)errors[j] * (double)errors[j];
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

// Magnitudes order like their bits.
template <Source kType, typename V, typename Lane>
float absmax_run(const uint8_t* run, int64_t n, int64_t group, float* out) {
  constexpr Lane kMask = (Lane)(kType == Source::f32 ? kMagnitude : 0x7fff);
  constexpr auto to_float = [](int32_t bits) {
    return kType == Source::f16 ? half_to_float(bits)
                                : __builtin_bit_cast(float, kType == Source::f32 ? bits : bits << 16);
  };
  const Lane* from = (const Lane*)run;
  int32_t all = 0;
  for (int64_t g = 0; g * group < n; ++g) {
    const int64_t end = (g + 1) * group < n ? (g + 1) * group : n;
    int64_t i = g * group;
    V lanes = {};
    for (; i + kLanes <= end; i += kLanes) {
      const V bits = load<V>(from + i) & kMask;
      lanes = bits > lanes ? bits : lanes;
    }
    int32_t most = largest(lanes);
    for (; i < end; ++i) {
      Lane bits;
      __builtin_memcpy(&bits, from + i, sizeof bits);
      bits &= kMask;
      most = bits > most ? bits : most;
    }
    out[g] = to_float(most);
    all = most > all ? most : all;
  }
  return to_float(all);
}

void range(const float* run, int64_t n, int64_t group, float* low, float* high) {
  for (int64_t g = 0; g * group < n; ++g) {
    const int64_t end = (g + 1) * group < n ? (g + 1) * group : n;
    int64_t i = g * group;
    F lows = {}, highs = {};
    for (; i + kLanes <= end; i += kLanes) {
      const F x = load<F>(run + i);
      lows = x < lows ? x : lows;
      highs = x > highs ? x : highs;
    }
    float least[kLanes], most[kLanes];
    store(least, lows);
    store(most, highs);
    for (int j = 1; j < kLanes; ++j) {
      least[0] = least[j] < least[0] ? least[j] : least[0];
      most[0] = most[j] > most[0] ? most[j] : most[0];
    }
    for (; i < end; ++i) {
      least[0] = run[i] < least[0] ? run[i] : least[0];
      most[0] = run[i] > most[0] ? run[i] : most[0];
    }
    low[g] = least[0];
    high[g] = most[0];
  }
}

// --- scales ---------------------------------------------------------------------------------------------------

typedef double D __attribute__((vector_size(kLanes * 4)));
typedef int64_t L __attribute__((vector_size(kLanes * 4)));
typedef float HalfF __attribute__((vector_size(kLanes * 2)));
constexpr int64_t kDoubles = kLanes / 2;

// Between these scales no step of divide() underflows or overflows for any quotient that is not coded as 0 or as the
// largest code of every element type.
constexpr double kFastLow = 0x1p-36f;
constexpr double kFastHigh = 0x1p60f;

constexpr int64_t double_power(int exponent) { return (int64_t)(exponent + 1023) << 52; }

// Mantissa bits, smallest exponent and largest value of a scale type.
template <Scale kType>
constexpr int kScaleMantissa = kType == Scale::fp32   ? 23
                               : kType == Scale::fp16 ? 10
                               : kType == Scale::bf16 ? 7
                                                      : 3;
template <Scale kType>
constexpr int kScaleLeast = kType == Scale::fp16   ? -14
                            : kType == Scale::e4m3 ? -6
                                                   : -126;
template <Scale kType>
constexpr double kScaleMost = kType == Scale::fp32   ? 0x1.fffffep127
                              : kType == Scale::fp16 ? 65504.0
                              : kType == Scale::bf16 ? 0x1.fep127
                                                     : 448.0;

// range / divisor is rounded twice, to double and to the type, which cannot differ from once: with divisors of few
// bits no quotient of floats is that close to the middle of two scales without being there.
template <Scale kType, typename Stored>
inline L scales_step(D range, const ScaleRule& rule, Stored* stored, float* scale, float* inverse, float* inverse_low) {
  const double divisor = rule.divisor == 0 ? 1 : rule.divisor;  // 0: the global scale is 0, and so is every range
  const D quotient = range / divisor;
  L code;
  D value;
  if constexpr (kType == Scale::e8m0) {
    const L bits = (L)quotient;
    const L up = (bits & ((int64_t{1} << 52) - 1)) != 0;
    L exponent = (bits >> 52) - (1023 - 127) - (up & (rule.ceil ? -1 : 0));
    exponent = exponent < 0 ? L{} : exponent > 254 ? 254 - L{} : exponent;
    code = exponent;
    value = (D)((exponent + (1023 - 127)) << 52);
  } else {
    constexpr int kShift = 52 - kScaleMantissa<kType>;
    constexpr int64_t kLeast = double_power(kScaleLeast<kType>);
    const D most = kScaleMost<kType> - D{};
    const D t = quotient < most ? quotient : most;
    const D power = (D)((L)t & double_power(1024));
    const D least = (D)(kLeast - L{});
    const L e = (L)(power > least ? power : least);
    const L c = e + (((int64_t)kShift << 52) + (int64_t{1} << 51));
    const D sum = t + (D)c;
    code = (L)sum - c + ((e - kLeast) >> kShift);
    value = sum - (D)c;
  }
  const L infinite = range > __DBL_MAX__;
  const HalfF s = __builtin_convertvector(infinite ? D{} : value * (double)rule.global, HalfF);
  const D exact = __builtin_convertvector(s, D);
  const L empty = (exact == 0) | (range == 0);
  const D reciprocal = 1 / exact;
  const HalfF y = __builtin_convertvector(empty ? D{} : reciprocal, HalfF);
  const HalfF z = __builtin_convertvector(empty ? D{} : reciprocal - __builtin_convertvector(y, D), HalfF);
  code = infinite ? (int64_t)rule.nan - L{} : exact == 0 ? L{} : code;
  for (int64_t i = 0; i < kDoubles; ++i) stored[i] = (Stored)code[i];
  store(scale, s);
  store(inverse, y);
  store(inverse_low, z);
  return ~empty & ((exact < kFastLow) | (exact > kFastHigh));
}

template <Scale kType, typename Stored>
bool scales_run(const double* ranges, int64_t count, const ScaleRule& rule, Stored* stored, const ScaleArrays& out) {
  L outside = {};
  int64_t i = 0;
  for (; i + kDoubles <= count; i += kDoubles) {
    outside |=
        scales_step<kType>(load<D>(ranges + i), rule, stored + i, out.scale + i, out.inverse + i, out.inverse_low + i);
  }
  if (i < count) {
    const auto rest = (size_t)(count - i);
    double range[kDoubles] = {};
    Stored bits[kDoubles];
    float scale[kDoubles], inverse[kDoubles], inverse_low[kDoubles];
    __builtin_memcpy(range, ranges + i, rest * sizeof(double));
    outside |= scales_step<kType>(load<D>(range), rule, bits, scale, inverse, inverse_low);
    __builtin_memcpy(stored + i, bits, rest * sizeof(Stored));
    __builtin_memcpy(out.scale + i, scale, rest * sizeof(float));
    __builtin_memcpy(out.inverse + i, inverse, rest * sizeof(float));
    __builtin_memcpy(out.inverse_low + i, inverse_low, rest * sizeof(float));
  }
  int64_t any = 0;
  for (int64_t j = 0; j < kDoubles; ++j) any |= outside[j];
  return any == 0;
}

// A plain loop without branches, which compilers vectorise.
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

template <Scale kType, typename Stored>
void scale_values_run(const uint8_t* from, int64_t count, float global, float* out) {
  constexpr int32_t kInf = kType == Scale::fp16 ? 0x7c00 : kType == Scale::bf16 ? 0x7f80 : kInfBits;
  for (int64_t i = 0; i < count; ++i) {
    Stored stored;
    __builtin_memcpy(&stored, from + i * (int64_t)sizeof stored, sizeof stored);
    const int32_t bits = (int32_t)stored;
    float value;
    bool nan;
    if constexpr (kType == Scale::e8m0) {
      value = scale_value<kType>(bits);
      nan = bits == 255;
    } else {
      // Stored scales may come from anywhere, so signs and special codes count too.
      constexpr int kBits = (int)sizeof(Stored) * 8;
      const int32_t magnitude = bits & (int32_t)(0xffffffffu >> (33 - kBits));
      const float positive = scale_value<kType>(magnitude);
      value = __builtin_bit_cast(float, __builtin_bit_cast(int32_t, positive) | (magnitude >= kInf ? kInfBits : 0) |
                                            (int32_t)((uint32_t)(bits ^ magnitude) << (32 - kBits)));
      nan = kType == Scale::e4m3 ? magnitude == 0x7f : magnitude > kInf;
    }
    value *= global;
    out[i] = nan || value != value ? __builtin_nanf("") : value;
  }
}

void spread(const float* from, int64_t count, int64_t step, float* out) {
  for (int64_t g = 0; g < count; ++g) {
    const F value = splat(from[g]);
    for (int64_t i = 0; i < step; i += kLanes) store(out + g * step + i, value);
  }
}

// --- floats of other types ------------------------------------------------------------------------------------

constexpr int64_t kHalves = kSpread / kLanes;  // vectors of 16 elements

template <Source kType>
void widen_run(const uint8_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += kSpread) {
    const int64_t rest = n - i < kSpread ? n - i : kSpread;
    uint8_t padded[2 * kSpread] = {};
    float widened[kSpread];
    if (rest < kSpread) __builtin_memcpy(padded, from + 2 * i, (size_t)(2 * rest));
    float* const out = rest < kSpread ? widened : to + i;
    U block[kHalves];
    widen_halves(rest < kSpread ? padded : from + 2 * i, block);
    for (int64_t v = 0; v < kHalves; ++v) {
      F even, odd;
      split_pairs<kType>(block[v], &even, &odd);
      store(out + v * kLanes, even);
    }
    if (rest < kSpread) __builtin_memcpy(to + i, widened, (size_t)rest * sizeof(float));
  }
}

template <Source kType>
void narrow_run(const float* from, int64_t n, float divisor, uint8_t* to) {
  constexpr int64_t kSize = size_of(kType);
  for (int64_t i = 0; i < n; i += kSpread) {
    const int64_t rest = n - i < kSpread ? n - i : kSpread;
    float padded[kSpread] = {};
    uint8_t short_[kSpread * kSize];
    if (rest < kSpread) __builtin_memcpy(padded, from + i, (size_t)rest * sizeof(float));
    const float* const in = rest < kSpread ? padded : from + i;
    uint8_t* const out = rest < kSpread ? short_ : to + i * kSize;
    U block[kHalves];
    for (int64_t v = 0; v < kHalves; ++v) {
      const F quotient = load<F>(in + v * kLanes) / divisor;
      if constexpr (kType == Source::f32) {
        store(out + v * kLanes * kSize, quotient);
      } else {
        block[v] = narrowed<kType>(quotient);
      }
    }
    if constexpr (kType != Source::f32) narrow_halves(out, block);
    if (rest < kSpread) __builtin_memcpy(to + i * kSize, short_, (size_t)(rest * kSize));
  }
}

void widen(const void* from, Source type, int64_t n, float* to) {
  const auto* bytes = (const uint8_t*)from;
  switch (type) {
    case Source::f32: __builtin_memcpy(to, from, (size_t)n * sizeof(float)); return;
    case Source::f16: return widen_run<Source::f16>(bytes, n, to);
    case Source::bf16: return widen_run<Source::bf16>(bytes, n, to);
  }
}

void add(const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load<F>(to + i) + load<F>(from + i));
  for (; i < n; ++i) to[i] += from[i];
}

void narrow(const float* from, int64_t n, float divisor, Source type, void* to) {
  auto* bytes = (uint8_t*)to;
  switch (type) {
    case Source::f32: return narrow_run<Source::f32>(from, n, divisor, bytes);
    case Source::f16: return narrow_run<Source::f16>(from, n, divisor, bytes);
    case Source::bf16: return narrow_run<Source::bf16>(from, n, divisor, bytes);
  }
}

// --- Hadamard blocks ------------------------------------------------------------------------------------------

// The step in which elements D apart are added and subtracted, within a vector and between vectors.
template <int kDistance>
inline void butterflies(F* x) {
  if constexpr (kDistance < kLanes) {
    int32_t high[kLanes];
    for (int i = 0; i < kLanes; ++i) high[i] = (i & kDistance) != 0 ? ~kMagnitude : 0;
    const I sign = load<I>(high);
    for (int64_t v = 0; v < kVectors; ++v) x[v] = exchanged<kDistance>(x[v]) + float_of(bits_of(x[v]) ^ sign);
  } else {
    constexpr int kApart = kDistance / kLanes;
    for (int64_t v = 0; v < kVectors; ++v) {
      if ((v & kApart) != 0) continue;
      const F sum = x[v] + x[v + kApart];
      x[v + kApart] = x[v] - x[v + kApart];
      x[v] = sum;
    }
  }
}

void hadamard(float* x, int64_t blocks) {
  for (; blocks > 0; --blocks, x += kBlock) {
    F block[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) block[v] = load<F>(x + v * kLanes);
    butterflies<1>(block);
    butterflies<2>(block);
    butterflies<4>(block);
    butterflies<8>(block);
    butterflies<16>(block);
    butterflies<32>(block);
    for (int64_t v = 0; v < kVectors; ++v) store(x + v * kLanes, block[v] * 0.125f);
  }
}

// --- the table ------------------------------------------------------------------------------------------------

float absmax(const void* run, Source type, int64_t n, int64_t group, float* out) {
  const auto* bytes = (const uint8_t*)run;
  switch (type) {
    case Source::f32: return absmax_run<Source::f32, I, int32_t>(bytes, n, group, out);
    case Source::f16: return absmax_run<Source::f16, H, uint16_t>(bytes, n, group, out);
    case Source::bf16: break;
  }
  return absmax_run<Source::bf16, H, uint16_t>(bytes, n, group, out);
}

bool scales(const double* ranges, int64_t count, const ScaleRule& rule, void* stored, const ScaleArrays& out) {
  switch (rule.type) {
    case Scale::fp32: return scales_run<Scale::fp32>(ranges, count, rule, (uint32_t*)stored, out);
    case Scale::fp16: return scales_run<Scale::fp16>(ranges, count, rule, (uint16_t*)stored, out);
    case Scale::bf16: return scales_run<Scale::bf16>(ranges, count, rule, (uint16_t*)stored, out);
    case Scale::e8m0: return scales_run<Scale::e8m0>(ranges, count, rule, (uint8_t*)stored, out);
    case Scale::e4m3: break;
  }
  return scales_run<Scale::e4m3>(ranges, count, rule, (uint8_t*)stored, out);
}

void scale_values(const void* stored, Scale type, int64_t count, float global, float* out) {
  const auto* bytes = (const uint8_t*)stored;
  switch (type) {
    case Scale::fp32: return scale_values_run<Scale::fp32, uint32_t>(bytes, count, global, out);
    case Scale::fp16: return scale_values_run<Scale::fp16, uint16_t>(bytes, count, global, out);
    case Scale::bf16: return scale_values_run<Scale::bf16, uint16_t>(bytes, count, global, out);
    case Scale::e8m0: return scale_values_run<Scale::e8m0, uint8_t>(bytes, count, global, out);
    case Scale::e4m3: return scale_values_run<Scale::e4m3, uint8_t>(bytes, count, global, out);
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
    case Kind::fp: return f(type, KindTag<Kind::fp>{});
    case Kind::signed_int: return f(type, KindTag<Kind::signed_int>{});
    case Kind::unsigned_int: return f(type, KindTag<Kind::unsigned_int>{});
    case Kind::nf4: return f(type, KindTag<Kind::nf4>{});
  }
}
template <typename Function>
inline void with_types(Source source, Kind kind, Function f) {
  switch (source) {
    case Source::f32: return with_kind(kind, SourceTag<Source::f32>{}, f);
    case Source::f16: return with_kind(kind, SourceTag<Source::f16>{}, f);
    case Source::bf16: return with_kind(kind, SourceTag<Source::bf16>{}, f);
  }
}

void encode(const void* run, Source type, int64_t n, const Element& element, const Spread& scales, uint8_t* codes,
            const void* next) {
  with_types(type, element.kind, [&](auto t, auto k) {
    constexpr Source kType = decltype(t)::value;
    constexpr Kind kKind = decltype(k)::value;
    auto f = encode_run<kType, kKind, Division::plain>;
    if constexpr (kFused) {
      if (scales.division == Division::few_bits) f = encode_run<kType, kKind, Division::few_bits>;
      if (scales.division == Division::corrected) f = encode_run<kType, kKind, Division::corrected>;
    }
    f((const uint8_t*)run, n, element, scales, codes, (const uint8_t*)next);
  });
}

void decode(const uint8_t* codes, int64_t n, const Element& element, const Spread& scales, Source type, void* out) {
  with_types(type, element.kind, [&](auto t, auto k) {
    constexpr Source kType = decltype(t)::value;
    constexpr Kind kKind = decltype(k)::value;
    auto f = decode_run<kType, kKind, Path::computed>;
    if constexpr (kLookup && kType != Source::f32 && kKind == Kind::fp) {
      // More mantissa bits would make more subnormal codes than the table holds.
      if (element.bits <= 6) f = decode_run<kType, kKind, Path::looked_up>;
      if (element.bits > 6 && element.fp.mantissa_bits <= 5) f = decode_run<kType, kKind, Path::partly_looked_up>;
    }
    f(codes, n, element, scales, (uint8_t*)out);
  });
}

void errors(const float* run, int64_t n, const Element& element, int64_t count, const float* scale, const int32_t* zero,
            double* out) {
  with_kind(element.kind, SourceTag<Source::f32>{}, [&](auto, auto k) {
    for (int64_t i = 0; i < count; ++i) out[i] = error_of<decltype(k)::value>(run, n, element, scale[i], zero[i]);
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
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    case 6: return f.template operator()<6>();
    case 7: return f.template operator()<7>();
    default: return f.template operator()<8>();
  }
}

void pack(const uint8_t* codes, int64_t n, int bits, uint8_t* out) {
  with_bits(bits, [&]<int kBits>() { pack_run<kBits>(codes, n, out); });
}

void unpack(const uint8_t* packed, int64_t n, int bits, uint8_t* codes) {
  with_bits(bits, [&]<int kBits>() { unpack_run<kBits>(packed, n, codes); });
}
