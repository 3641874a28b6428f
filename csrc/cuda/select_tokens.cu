// select_tokens on a GPU.
#include "select_launch.h"

namespace sma {
namespace cuda {

int select_tokens(const SelectTokensArgs& a, const Place& place) {
  return launch_select<MaskHighest>(a, place);
}

}  // namespace cuda
}  // namespace sma
