#pragma once

#include <sstream>
#include <stdexcept>

namespace fused_resnet {

// Raises RuntimeError in Python. Unlike torch's macro it puts no file name of the build machine before the sentence.
template <typename... Words>
void check(bool holds, const Words&... words) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << words);
  throw std::runtime_error(message.str());
}

}  // namespace fused_resnet
