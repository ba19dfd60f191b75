// The kernels, compiled once for each instruction set: NMJAX_ISA is its name.
#include "blocks.h"
#include "groups.h"
#include "integers.h"

namespace nmjax {

#define NMJAX_JOIN_(a, b) a##b
#define NMJAX_JOIN(a, b) NMJAX_JOIN_(a, b)
#define NMJAX_TEXT_(a) #a
#define NMJAX_TEXT(a) NMJAX_TEXT_(a)

const Kernels* NMJAX_JOIN(NMJAX_ISA, _kernels)() {
  static const Kernels kernels = {
      NMJAX_TEXT(NMJAX_ISA),
      NMJAX_ISA::kLanes,
      NMJAX_ISA::kTile,
      NMJAX_ISA::kGroupVectors * NMJAX_ISA::kLanes,
#if defined(__AVX512BF16__)
      true,
#else
      false,
#endif
      NMJAX_ISA::pack,
      NMJAX_ISA::blocks_times_panels,
      NMJAX_ISA::blocks_times_vectors,
      NMJAX_ISA::groups_times_panels,
      NMJAX_ISA::groups_times_vectors,
      NMJAX_ISA::kRows,
      NMJAX_ISA::kQuads * NMJAX_ISA::kWoven * NMJAX_ISA::kLanes * 4,
      NMJAX_ISA::pack_integers,
      NMJAX_ISA::integers_times_panels,
      NMJAX_ISA::integers_times_vectors,
  };
  return &kernels;
}

}  // namespace nmjax
