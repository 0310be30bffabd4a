// Every rule of rules.def.
#pragma once

#include "math/adagrad.h"
#include "math/adam.h"
#include "math/adan.h"
#include "math/ascend.h"
#include "math/lamb.h"
#include "math/lars.h"
#include "math/lion.h"
#include "math/nadam.h"
#include "math/radam.h"
#include "math/rmsprop.h"
#include "math/sgd.h"
