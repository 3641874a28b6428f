// Fibers never interrupt each other: an atomic operation is a plain one. The types are those that
// CUDA has it for. Included by emulated_cuda.h.
#pragma once

namespace emulated {

template <class T>
constexpr bool is_atomic_integer = is_one_of<T, int, unsigned, unsigned long long>;

template <class T, class Change>
T change(T* at, Change to) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) fail("an atomic at a misaligned address");
  const T before = *at;
  *static_cast<volatile T*>(at) = to(before);
  return before;
}

}  // namespace emulated

template <class T>
T atomicAdd(T* at, typename emulated::Same<T>::Type value) {
  static_assert(emulated::is_atomic_integer<T> || emulated::is_one_of<T, float, double>);
  return emulated::change(at, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicSub(T* at, typename emulated::Same<T>::Type value) {
  static_assert(emulated::is_one_of<T, int, unsigned>);
  return emulated::change(at, [=](T old) { return static_cast<T>(old - value); });
}
template <class T>
T atomicMax(T* at, typename emulated::Same<T>::Type value) {
  static_assert(emulated::is_atomic_integer<T> || emulated::is_one_of<T, long long>);
  return emulated::change(at, [=](T old) { return old > value ? old : value; });
}
template <class T>
T atomicMin(T* at, typename emulated::Same<T>::Type value) {
  static_assert(emulated::is_atomic_integer<T> || emulated::is_one_of<T, long long>);
  return emulated::change(at, [=](T old) { return old < value ? old : value; });
}
template <class T>
T atomicOr(T* at, typename emulated::Same<T>::Type value) {
  static_assert(emulated::is_atomic_integer<T>);
  return emulated::change(at, [=](T old) { return old | value; });
}
template <class T>
T atomicAnd(T* at, typename emulated::Same<T>::Type value) {
  static_assert(emulated::is_atomic_integer<T>);
  return emulated::change(at, [=](T old) { return old & value; });
}
template <class T>
T atomicXor(T* at, typename emulated::Same<T>::Type value) {
  static_assert(emulated::is_atomic_integer<T>);
  return emulated::change(at, [=](T old) { return old ^ value; });
}
template <class T>
T atomicExch(T* at, typename emulated::Same<T>::Type value) {
  static_assert(emulated::is_atomic_integer<T> || emulated::is_one_of<T, float>);
  return emulated::change(at, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* at, typename emulated::Same<T>::Type expected,
            typename emulated::Same<T>::Type value) {
  static_assert(emulated::is_atomic_integer<T>);
  return emulated::change(at, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* at, unsigned limit) {
  return emulated::change(at, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}

inline void __threadfence_block() { asm volatile("" ::: "memory"); }
inline void __threadfence() { __threadfence_block(); }
inline void __threadfence_system() { __threadfence_block(); }

template <class T>
T __ldg(const T* at) {
  return *at;
}
