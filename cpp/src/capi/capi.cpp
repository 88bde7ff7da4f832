// The C interface, over the C++ one.
#include "narrowgauge/narrowgauge.h"

extern "C" const char* ng_version(void) { return NARROWGAUGE_VERSION; }
