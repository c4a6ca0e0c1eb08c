// The pybind11 module fused_resnet._C: what was built, with what, for which architectures. It includes no torch header,
// so that it costs seconds to build; the ops live in libfused_resnet_ops.so, which has no Python symbol.

#include <pybind11/pybind11.h>

#include "build_facts.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of fused_resnet.";
  m.def(
      "build_facts", [] { return pybind11::module_::import("json").attr("loads")(kBuildFacts); },
      "dict: versions of the package, torch, the compilers; CUDA architectures and kernels; why what is missing is "
      "missing.");
}
