// One LoFT step over all factors, split where functional.py splits it: measure, decide, write.
#pragma once

#include <vector>

#include "side.h"

namespace loft {

// Fill the basis of every side with a gradient and return the squared norms of their g.
std::vector<double> prepare(const std::vector<Side>& sides);

// Advance the state of every side with a gradient, and move those that are to move.
void apply(std::vector<Side>& sides);

}  // namespace loft
