// All of the attention kernels, for one instruction set; each part builds on those before it. No include guard, see
// attention_vec.h.

#include "attention_vec.h"
//
#include "attention_rows.h"
//
#include "attention_units.h"
//
#include "attention_forward.h"
//
#include "attention_backward.h"

#undef LEAF
#undef LEAF_METHOD
#undef TILE
