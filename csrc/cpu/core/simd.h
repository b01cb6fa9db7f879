// Vectors of `width` numbers, on the compiler's vector extensions. The flags of the file that includes this header
// decide whether they become AVX-512, AVX2 or portable code.
//
// Everything here has internal linkage, and no std function template is used. The linker keeps one copy of functions
// with equal names, so a function compiled for AVX-512 could otherwise end up in the portable path.

#pragma once

#include <cstdint>
#include <utility>

namespace stamp::cpu {
namespace {

template <typename scalar>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};

template <typename scalar_t, int kLanes>
struct Simd {
  using scalar = scalar_t;
  using integer = typename IntegerOf<scalar>::type;
  static constexpr int width = kLanes;
  typedef scalar vector __attribute__((vector_size(kLanes * sizeof(scalar))));
  typedef integer integers __attribute__((vector_size(kLanes * sizeof(scalar))));
  using lanes = std::make_integer_sequence<int, kLanes>;

  static vector load(const scalar* from) {
    vector v;
    __builtin_memcpy(&v, from, sizeof(v));
    return v;
  }

  static void store(scalar* to, vector v) {
    __builtin_memcpy(to, &v, sizeof(v));
  }

  static vector broadcast(scalar s) {
    return s - vector{};
  }

  // Returns b where b is NaN.
  static vector max(vector a, vector b) {
    return a > b ? a : b;
  }

  static vector min(vector a, vector b) {
    return a < b ? a : b;
  }

  static vector exp(vector x);
  static scalar sum(vector v);
  static scalar max(vector v);
};

// Lane i of the result is lane (i + shift) mod width of v.
template <typename V, int shift, int... i>
typename V::vector rotate(typename V::vector v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, ((i + shift) % V::width)...);
}

// Combines all lanes, half with half, always in the same order. Every lane of the result holds the same value.
template <typename V, int shift, typename Combine>
typename V::vector combine_lanes(typename V::vector v, Combine combine) {
  if constexpr (shift == 0) {
    return v;
  } else {
    return combine_lanes<V, shift / 2>(combine(v, rotate<V, shift>(v, typename V::lanes())), combine);
  }
}

template <typename scalar, int kLanes>
scalar Simd<scalar, kLanes>::sum(vector v) {
  return combine_lanes<Simd, kLanes / 2>(v, [](vector a, vector b) { return a + b; })[0];
}

template <typename scalar, int kLanes>
scalar Simd<scalar, kLanes>::max(vector v) {
  return combine_lanes<Simd, kLanes / 2>(v, [](vector a, vector b) { return max(a, b); })[0];
}

// e^x = 2^n e^r with n = round(x / ln 2): e^r by a polynomial, 2^n by the bits of the exponent. The error is at most
// 2 ulp from -87 to 88. Below -87, where the result would be subnormal, it is 0. NaN gives NaN.
template <int kLanes>
__attribute__((always_inline)) inline typename Simd<float, kLanes>::vector exp_of_floats(
    typename Simd<float, kLanes>::vector x) {
  using V = Simd<float, kLanes>;
  using vector = typename V::vector;
  using integers = typename V::integers;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  constexpr float kMinExponent = -87.0f, kMaxExponent = 88.0f;
  const vector bounded = V::min(V::broadcast(kMaxExponent), x);
  const vector n = (bounded * 1.44269504088896341f + kRound) - kRound;
  const vector r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const integers bits = (__builtin_convertvector(n, integers) + 127) << 23;
  vector power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return x < kMinExponent ? vector{} : p * power;
}

template <typename scalar, int kLanes>
__attribute__((always_inline)) inline typename Simd<scalar, kLanes>::vector Simd<scalar, kLanes>::exp(vector x) {
  if constexpr (sizeof(scalar) == sizeof(float)) {
    return exp_of_floats<kLanes>(x);
  } else {
    for (int i = 0; i < kLanes; ++i) {
      x[i] = __builtin_exp(x[i]);
    }
    return x;
  }
}

// The first or second half of the perfect shuffle of two vectors: a0 b0 a1 b1 ...
template <typename V, int first, int... i>
typename V::vector interleave(typename V::vector a, typename V::vector b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (first + i / 2 + (i % 2) * V::width)...);
}

// Transposes a matrix [width, width] in registers: log2(width) perfect shuffles of the first half of its rows with the
// second half.
template <typename V>
void transpose(typename V::vector (&rows)[V::width]) {
  constexpr int half = V::width / 2;
#pragma GCC unroll 8
  for (int stage = 1; stage < V::width; stage *= 2) {
    typename V::vector shuffled[V::width];
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) {
      shuffled[2 * i] = interleave<V, 0>(rows[i], rows[i + half], typename V::lanes());
      shuffled[2 * i + 1] = interleave<V, half>(rows[i], rows[i + half], typename V::lanes());
    }
#pragma GCC unroll 16
    for (int i = 0; i < V::width; ++i) {
      rows[i] = shuffled[i];
    }
  }
}

}  // namespace
}  // namespace stamp::cpu
