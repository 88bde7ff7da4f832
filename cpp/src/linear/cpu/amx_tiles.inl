// The instructions of AMX with plain names, included by amx.inl. The compiler knows nothing of tiles; what memory they
// read and write it is told by the operands. tests/emulated has the same in C++.

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
