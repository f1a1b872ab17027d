// sparse_gru: 3 gates (reset, update, new).
#include "../persistent.h"

PERSISTENT_OP(sparse_gru, 3)
