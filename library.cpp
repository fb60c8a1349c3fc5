#include "babygpt.h"
