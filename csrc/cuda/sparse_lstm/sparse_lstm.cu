// sparse_lstm: 4 gates (input, forget, cell, output).
#include "../persistent.h"

PERSISTENT_OP(sparse_lstm, 4)
