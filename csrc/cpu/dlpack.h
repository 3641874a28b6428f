// The part of the DLPack exchange format (version 0, "dltensor") that an output needs: a contiguous
// tensor on the CPU whose memory goes back to the cache when its last owner lets go.
#pragma once
#include <cstdint>

namespace sma {

struct DLDevice {
  int32_t type, id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor* self);
};
constexpr int32_t kDLCPU = 1;

}  // namespace sma
