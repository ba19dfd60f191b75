// N:M groups.
#pragma once

#include "panels.h"

namespace nmjax::NMJAX_ISA {
inline bool groups_times_panels(const GroupPanelTask&) { return true; }
inline bool groups_times_vectors(const GroupVectorTask&) { return true; }
}
