// Products with weights in blocks by AVX2's products of 16-bit words (blocks.inl has those of other processors, and what the types
// are): codes as they lie, with the input in whole numbers of 15 bits and a sign.
//
// The inputs of a strip are divided by a power of two, so that of bfloat16 and float16 none is lost but of numbers that are 2^7 or 2^4
// times smaller than the largest one beside them, and of those no more than 2^-15 of that one, which itself is rounded at 2^-9 or
// 2^-12. The sums of a strip are exact up to the scales. A strip in which some number is not finite makes the row's products NaN.

namespace moacompress {
namespace {

inline __m256i words_of(const uint8_t* p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)); }
inline __m256i low_nibbles(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi16(15)); }
inline __m256i sixteen_where(__m256i bits, __m256i wanted) {
  return _mm256_and_si256(_mm256_cmpeq_epi16(_mm256_and_si256(bits, wanted), wanted), _mm256_set1_epi16(16));
}

// The codes of a strip as words, 16 and 16.
template <int KIND> struct WordBlocks;
template <> struct WordBlocks<Q8_0> {
  static inline void codes(const uint8_t* block, int, __m256i* to) {
    for (int v = 0; v < 2; v++) to[v] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(block + 2 + v * 16)));
  }
};
template <int AT> struct WordNibbles {
  static inline void codes(const uint8_t* block, int, __m256i* to) {
    const __m256i bytes = words_of(block + AT);
    to[0] = low_nibbles(bytes);
    to[1] = _mm256_srli_epi16(bytes, 4);
  }
};
template <> struct WordBlocks<Q4_0> : WordNibbles<2> {};
template <> struct WordBlocks<Q4_1> : WordNibbles<4> {};
template <> struct WordBlocks<Q5_0> {
  static inline void codes(const uint8_t* block, int strip, __m256i* to) {
    WordNibbles<6>::codes(block, strip, to);
    const __m256i wanted = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, short(32768));
    for (int v = 0; v < 2; v++) {
      int16_t fifth;
      memcpy(&fifth, block + 2 + v * 2, 2);
      to[v] = _mm256_add_epi16(to[v], sixteen_where(_mm256_set1_epi16(fifth), wanted));
    }
  }
};
template <int AT> struct WordPairs {  // two strips in the nibbles of 32 bytes
  static inline void codes(const uint8_t* block, int strip, __m256i* to) {
    for (int v = 0; v < 2; v++) {
      const __m256i bytes = words_of(block + AT + strip / 2 * 32 + v * 16);
      to[v] = strip % 2 ? _mm256_srli_epi16(bytes, 4) : low_nibbles(bytes);
    }
  }
};
template <> struct WordBlocks<Q4_K> : WordPairs<16> {};
template <> struct WordBlocks<Q5_K> {
  static inline void codes(const uint8_t* block, int strip, __m256i* to) {
    WordPairs<48>::codes(block, strip, to);
    for (int v = 0; v < 2; v++)
      to[v] = _mm256_add_epi16(to[v], sixteen_where(words_of(block + 16 + v * 16), _mm256_set1_epi16(short(1 << strip))));
  }
};
template <> struct WordBlocks<Q6_K> {
  static inline void codes(const uint8_t* block, int strip, __m256i* to) {
    const uint8_t *from = block + strip / 4 * 64 + strip % 2 * 32, *high = block + 128 + strip / 4 * 32;
    for (int v = 0; v < 2; v++) {
      const __m256i bytes = words_of(from + v * 16), bits = _mm256_srli_epi16(words_of(high + v * 16), strip % 4 * 2);
      const __m256i above = _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(3)), 4);
      to[v] = _mm256_or_si256(strip / 2 % 2 ? _mm256_srli_epi16(bytes, 4) : low_nibbles(bytes), above);
    }
  }
};

// Codes times x in words.
template <int KIND> struct WordStrips {
  typedef Blocks<KIND> B;
  static constexpr int ZERO = B::ZERO;
  // Puts a row of x as words, with what 1 of each strip stands for.
  template <class T> static inline void put(const T* from, int64_t inputs, const BlockScratch& s, int row) {
    int16_t* to = (int16_t*)s.x + row * inputs;
    float* units = s.units + row * s.parts;
    for (int64_t first = 0; first < inputs; first += STRIP, units++) {
      V numbers[STRIP_VECTORS], tops = zero(), plain = zero();
      for (int v = 0; v < STRIP_VECTORS; v++) {
        numbers[v] = load(from + first + v * W);
        tops = max(max(numbers[v], zero() - numbers[v]), tops);
        plain = fma(numbers[v], zero(), plain);
      }
      const bool finite = sum(plain) == 0;
      const float top = finite ? largest(tops) : 0.f;
      uint32_t bits;
      memcpy(&bits, &top, 4);
      const uint32_t power = uint32_t(smaller(268 - int64_t(bits >> 23), 253));  // numbers become smaller than 2^15
      const uint32_t up = power << 23, down = (254 - power) << 23;
      float inverse, unit;
      memcpy(&inverse, &up, 4);
      memcpy(&unit, &down, 4);
      *units = finite ? unit : __builtin_nanf("");
      for (int v = 0; v < STRIP_VECTORS; v += 2) {
        __m256i whole[2];
        for (int i = 0; i < 2; i++) whole[i] = _mm256_cvtps_epi32(finite ? numbers[v + i] * set1(inverse) : zero());
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole[0], whole[1]), 0xd8);
        _mm256_storeu_si256((__m256i*)(to + first + v * W), words);
      }
    }
  }
  template <int ROWS, int OUTPUTS>
  static inline void products(const uint8_t* const* weight, int64_t inputs, int64_t ahead, const BlockScratch& s, V (*sums)[OUTPUTS]) {
    for (int r = 0; r < ROWS; r++)
      for (int o = 0; o < OUTPUTS; o++) sums[r][o] = zero();
    const float *scale = s.scale, *units = s.units;
    const int16_t* at = (const int16_t*)s.x;
    for (int64_t byte = 0, block = 0; block < inputs / (B::STRIPS * STRIP); block++, byte += B::BYTES) {
#pragma GCC unroll 8
      for (int strip = 0; strip < B::STRIPS; strip++) {
        for (int o = 0; o < OUTPUTS; o++) {
          prefetch(weight[o] + byte + strip * B::BYTES / B::STRIPS + ahead);
          __m256i codes[2];
          WordBlocks<KIND>::codes(weight[o] + byte, strip, codes);
          for (int r = 0; r < ROWS; r++) {
            const __m256i* x = (const __m256i*)(at + r * inputs);
            __m256i found[2];
            for (int v = 0; v < 2; v++) found[v] = _mm256_madd_epi16(codes[v], _mm256_loadu_si256(x + v));
            if (B::PARTS == 1) found[0] = _mm256_add_epi32(found[0], found[1]);
            for (int part = 0; part < B::PARTS; part++)
              sums[r][o] = fma(_mm256_cvtepi32_ps(found[part]) * set1(units[r * s.parts]), set1(scale[o * s.parts + part]), sums[r][o]);
          }
        }
        at += STRIP;
        scale += B::PARTS;
        units++;
      }
    }
  }
};

}  // namespace
}  // namespace moacompress
