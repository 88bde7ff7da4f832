// Stands for cpp/src/linear/cpu/amx_tiles.inl: the same names in C++, from Intel's manual (volume 2, and volume 1
// chapter "Programming with Intel AMX"). What a CPU would refuse aborts: tiles that no configuration of this thread
// has, shapes that do not fit. Products of bf16 take subnormals for zero, round to nearest even, and make no
// subnormals.

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

thread_local TileConfig t_config;
thread_local Tile t_tiles[8];

inline void demand(bool condition) {
  if (!condition) abort();
}

inline void load_tile_config(const TileConfig& config) {
  demand(config.palette == 1 && config.start_row == 0);
  for (int t = 0; t < 8; ++t) demand(config.row_bytes[t] <= 64 && config.rows[t] <= 16);
  t_config = config;
  memset(t_tiles, 0, sizeof t_tiles);
}
inline void release_tiles() { t_config.palette = 0; }

template <int T>
void check_tile() {
  demand(t_config.palette == 1 && t_config.rows[T] > 0 && t_config.row_bytes[T] == 64);
}
template <int T>
void zero_tile() {
  check_tile<T>();
  memset(&t_tiles[T], 0, sizeof(Tile));
}
template <int T>
void load_tile(const void* rows) {
  zero_tile<T>();
  memcpy(&t_tiles[T], rows, size_t{64} * t_config.rows[T]);
}
template <int T>
void store_tile(Tile* tile) {
  check_tile<T>();
  memcpy(tile, &t_tiles[T], size_t{64} * t_config.rows[T]);
}

inline float flush(float value) {
  uint32_t bits = 0;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  memcpy(&value, &bits, sizeof bits);
  return value;
}
inline float bf16_at(const uint8_t* row, int i) {
  uint32_t bits = (uint32_t{row[2 * i]} | uint32_t{row[2 * i + 1]} << 8) << 16;
  float value = 0;
  memcpy(&value, &bits, sizeof bits);
  return flush(value);
}

// One row of C, 16 sums.
inline void multiply_row_of_bf16(uint8_t* c, const uint8_t* a, const Tile& b) {
  for (int n = 0; n < 16; ++n) {
    float chains[2] = {};
    for (int k = 0; k < 16; ++k) {
      for (int i = 0; i < 2; ++i) {
        chains[i] = flush(__builtin_fmaf(bf16_at(a, 2 * k + i), bf16_at(b.bytes + 64 * k, 2 * n + i), chains[i]));
      }
    }
    float sum = 0;
    memcpy(&sum, c + 4 * n, sizeof sum);
    sum = flush(flush(sum) + flush(chains[0] + chains[1]));
    memcpy(c + 4 * n, &sum, sizeof sum);
  }
}
inline void multiply_row_of_bytes(uint8_t* c, const uint8_t* a, const Tile& b) {
  for (int n = 0; n < 16; ++n) {
    uint32_t sum = 0;
    memcpy(&sum, c + 4 * n, sizeof sum);
    for (int k = 0; k < 64; ++k) {
      const int product = static_cast<int8_t>(a[k]) * static_cast<int8_t>(b.bytes[64 * (k / 4) + 4 * n + k % 4]);
      sum += static_cast<uint32_t>(product);
    }
    memcpy(c + 4 * n, &sum, sizeof sum);
  }
}

template <bool kBf16, int C, int A, int B>
[[gnu::noinline]] void multiply_tiles() {
  static_assert(A != B && A != C && B != C);
  check_tile<A>();
  check_tile<B>();
  check_tile<C>();
  demand(t_config.rows[A] == t_config.rows[C] && t_config.rows[B] == 16);
  for (int m = 0; m < t_config.rows[C]; ++m) {
    const auto multiply = kBf16 ? multiply_row_of_bf16 : multiply_row_of_bytes;
    multiply(t_tiles[C].bytes + 64 * m, t_tiles[A].bytes + 64 * m, t_tiles[B]);
  }
}
