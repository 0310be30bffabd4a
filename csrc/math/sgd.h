// SGD with and without momentum (Sutskever et al. 2013), as torch.optim.SGD computes it.
#pragma once

#include "math/device.h"
#include "table.h"

namespace gradfused::math {
namespace {

struct SGD {
  static constexpr int states = 0;
  template <class T> struct Coef {
    T shrink, step;
  };
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Hyper& h, double, bool) { return {T(1), T(h.lr)}; }
  template <class T> GRADFUSED_MATH static T direction(T g, T*, const Coef<T>&) { return g; }
};

struct SGDMomentum {
  static constexpr int states = 1;
  template <class T> struct Coef {
    T shrink, step, momentum, fresh;
    bool nesterov;
  };
  // The first gradient fills the buffer undamped.
  template <class T> GRADFUSED_MATH static Coef<T> coef(const Hyper& h, double, bool first) {
    return {T(1), T(h.lr), T(h.momentum), T(first ? 1.0 : 1.0 - h.dampening), h.nesterov};
  }
  template <class T> GRADFUSED_MATH static T direction(T g, T* s, const Coef<T>& c) {
    s[0] = s[0] * c.momentum + g * c.fresh;
    return c.nesterov ? g + s[0] * c.momentum : s[0];
  }
};

}  // namespace
}  // namespace gradfused::math
