// A row whose tokens are selected: its counts and scratch, its choices, and the ordered sweep that
// writes mask and ids.
#pragma once
#include "kth_largest.h"

namespace sma {
namespace SMA_ISA {

inline void ordered_keys(const float* values, const int32_t* index, Range range, float sign,
                         int32_t* keys) {
  int64_t i = range.begin;
  if (index == nullptr)
    for (; i + kLanes <= range.end; i += kLanes)
      store(keys + i, ordered(load<Vf>(values + i) * sign));
  for (; i < range.end; ++i) keys[i] = ordered(values[index == nullptr ? i : index[i]] * sign);
}

inline int64_t round_half_even(double x) { return static_cast<int64_t>(__builtin_rint(x)); }

// A row in work: which tokens count, how many of them are masked. Of a long row also between which
// keys the threshold is looked for, and what it is: key 0 of 0 wanted until it is found.
struct SelectRow {
  int64_t valid, masked;
  const int32_t* index;  // of the valid tokens, or null: the first ones
  Bounds near;
  Threshold threshold;
};

// Scratch for rows of `tokens`: the row, keys, work, indices, two rows of flags.
struct SelectScratch {
  SelectRow* row;
  int32_t *keys, *work, *index, *rest;
  uint8_t *flags, *more;

  static_assert(sizeof(SelectRow) <= 16 * sizeof(int32_t), "the row must fit before the keys");
  static int64_t size(int64_t tokens) { return 16 + 5 * (tokens + 2 * kLanes); }
  SelectScratch(int32_t* base, int64_t tokens) {
    const int64_t step = tokens + 2 * kLanes;
    row = reinterpret_cast<SelectRow*>(base);
    keys = base + 16;
    work = keys + step;
    index = work + step;
    rest = index + step;
    flags = reinterpret_cast<uint8_t*>(rest + step);
    more = flags + step;
  }
};

// Second choice: among the tokens whose flag is `from`, the `count` of lowest noise become masked;
// a token keeps flag 1 if it had it and `from` is 0. index: as in select_row.
inline void flag_drawn(const float* noise, const int32_t* index, int64_t valid, uint8_t from,
                       int64_t count, const SelectScratch& s) {
  int64_t eligible = 0;
  for (int64_t i = 0; i < valid; ++i) {
    s.rest[eligible] = static_cast<int32_t>(i);
    s.keys[eligible] = ordered(-noise[index == nullptr ? i : index[i]]);
    eligible += s.flags[i] == from;
  }
  flag_largest(s.keys, eligible, count, s.work, s.more);
  for (int64_t i = 0; i < eligible; ++i) s.flags[s.rest[i]] = s.more[i];
}

#if defined(__AVX512F__)
// Sixteen tokens of the ordered sweep: the ids of each kind go behind those before, in order.
inline void sweep_16(const uint8_t* flags, int64_t first, uint8_t* mask, int64_t* restore,
                     int64_t** to, int64_t* place) {
  const __m128i flag = _mm_loadu_si128(reinterpret_cast<const __m128i*>(flags));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(mask), flag);
  const unsigned masked = _mm_test_epi8_mask(flag, flag);
  const __m512i step = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (int half = 0; half < 2; ++half) {
    const __mmask8 is_masked = static_cast<__mmask8>(masked >> (8 * half));
    const __mmask8 kind[2] = {static_cast<__mmask8>(~is_masked), is_masked};
    const __m512i token = _mm512_add_epi64(_mm512_set1_epi64(first + 8 * half), step);
    __m512i where = _mm512_setzero_si512();
    for (int i = 0; i < 2; ++i) {
      const int count = __builtin_popcount(kind[i]);
      const __mmask8 front = static_cast<__mmask8>((1u << count) - 1);
      _mm512_mask_storeu_epi64(to[i], front, _mm512_maskz_compress_epi64(kind[i], token));
      const __m512i places = _mm512_add_epi64(_mm512_set1_epi64(place[i]), step);
      where = _mm512_mask_expand_epi64(where, kind[i], places);
      to[i] += count;
      place[i] += count;
    }
    _mm512_storeu_si512(restore + 8 * half, where);
  }
}
#endif

inline void prepare_row(const SelectTokensArgs& a, int64_t b, const SelectScratch& s) {
  const ValidTokens tokens(a.padding == nullptr ? nullptr : a.padding + b * a.tokens, a.tokens,
                           s.index);
  int64_t k = a.num_masked;
  if (a.mask_ratio >= 0)  // a ratio just below 1 could leave a short row more visible than V
    k = larger(round_half_even(a.mask_ratio * static_cast<double>(tokens.count)),
               tokens.count - a.width_visible);
  else if (a.num_masked_rows != nullptr) k = smaller(a.num_masked_rows[b], a.width_masked);
  *s.row = {tokens.count, smaller(k, tokens.count), tokens.index, {}, {}};
  for (int64_t n = tokens.index == nullptr ? tokens.count : 0; n < a.tokens; ++n) {  // padding
    a.mask[b * a.tokens + n] = 0;
    a.ids_restore[b * a.tokens + n] = -1;
  }
}

// Sets the row's flags from its keys.
inline void choose_row(const SelectTokensArgs& a, int64_t b, const SelectScratch& s) {
  const float* noise = a.noise == nullptr ? nullptr : a.noise + b * a.tokens;
  const int64_t valid = s.row->valid, k = s.row->masked;
  const int32_t* index = s.row->index;
  if (a.drawn != nullptr) {
    // masked before all others: their keys become that of +inf
    uint8_t* first = s.flags;  // over all tokens
    memset(first, 0, a.tokens);
    const int64_t* drawn = a.drawn + b * a.drawn_stride;
    for (int64_t r = 0; r < a.drawn_width; ++r)
      if (drawn[r] >= 0) first[drawn[r]] = 1;
    const int32_t top = ordered(kInfinity);
    for (int64_t i = 0; i < valid; ++i)
      if (first[index == nullptr ? i : index[i]]) s.keys[i] = top;
  }
  if (a.pool_ratio >= 0) {
    const int64_t pool = larger(k, round_half_even(a.pool_ratio * static_cast<double>(valid)));
    flag_largest(s.keys, valid, pool, s.work, s.flags);
    flag_drawn(noise, index, valid, 1, k, s);
  } else if (a.random_fraction > 0) {
    const int64_t top = round_half_even((1.0 - a.random_fraction) * static_cast<double>(k));
    flag_largest(s.keys, valid, top, s.work, s.flags);
    flag_drawn(noise, index, valid, 0, k - top, s);
  } else {
    flag_largest(s.keys, valid, k, s.work, s.flags);
  }
}

// The ordered sweep: writes mask and ids of tokens in order, of which `first` valid ones and
// `masked` of those come before.
class Sweep {
 public:
  Sweep(const SelectTokensArgs& a, int64_t b, int64_t first, int64_t masked)
      : a(a),
        b(b),
        to{a.ids_visible + b * a.width_visible + (first - masked),
           a.ids_masked + b * a.width_masked + masked},
        place{first - masked, a.width_visible + masked} {}

  // Valid tokens of the range; `flags` begins with the first of them. index: as in SelectRow.
  void write(const uint8_t* flags, const int32_t* index, Range range) {
    uint8_t* mask = a.mask + b * a.tokens;
    int64_t* restore = a.ids_restore + b * a.tokens;
    int64_t i = range.begin;
#if defined(__AVX512F__)
    if (index == nullptr)
      for (; i + 16 <= range.end; i += 16)
        sweep_16(flags + (i - range.begin), i, mask + i, restore + i, to, place);
#endif
    for (; i < range.end; ++i) {
      const int64_t n = index == nullptr ? i : index[i];
      const int flag = flags[i - range.begin];
      mask[n] = static_cast<uint8_t>(flag);
      restore[n] = place[flag]++;
      *to[flag]++ = n;
    }
  }

  // After the row's last token: its numbers, and -1 behind its ids.
  void finish() {
    int64_t* const visible = a.ids_visible + b * a.width_visible;
    int64_t* const masked = a.ids_masked + b * a.width_masked;
    a.out_num_visible[b] = static_cast<int32_t>(to[0] - visible);
    a.out_num_masked[b] = static_cast<int32_t>(to[1] - masked);
    for (; to[0] < visible + a.width_visible; ++to[0]) *to[0] = -1;
    for (; to[1] < masked + a.width_masked; ++to[1]) *to[1] = -1;
  }

 private:
  const SelectTokensArgs& a;
  const int64_t b;
  int64_t* to[2];    // the next visible and the next masked id
  int64_t place[2];  // their places in cat([visible, masked])
};

}  // namespace SMA_ISA
}  // namespace sma
