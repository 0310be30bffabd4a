#include "lpg/engine.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/isa.h"
#include "cpu/threads.h"

namespace gradfused::cpu {
namespace {

// Elements that a thread takes at a time, in whole rows: what two visits of one class's rows can share of a cache.
constexpr int64_t kElements = 65536;
// Rows of a class in one piece, whatever their length: a piece of a larger class has sums of its own, a row's worth of memory.
constexpr int64_t kFewestRows = 16, kMostRows = 512;
constexpr int64_t kColumns = 4096;

int64_t piece_rows(const LpgProblem& p) { return std::clamp(kElements / std::max<int64_t>(1, p.classes), kFewestRows, kMostRows); }

size_t wide_size(const LpgProblem& p) { return p.dtype == DType::float64 ? sizeof(double) : sizeof(float); }

double wide_at(const LpgProblem& p, const void* values, int64_t i) {
  return p.dtype == DType::float64 ? static_cast<const double*>(values)[i] : double(static_cast<const float*>(values)[i]);
}

void put_wide(const LpgProblem& p, void* values, int64_t i, double value) {
  if (p.dtype == DType::float64) {
    static_cast<double*>(values)[i] = value;
  } else {
    static_cast<float*>(values)[i] = float(value);
  }
}

// Calls work(index, worker) for each index below count. Which thread takes which changes no result.
void for_each(int64_t count, int threads, const std::function<void(int64_t, int)>& work) {
  std::atomic<int64_t> next{0};
  parallel(int(std::min<int64_t>(threads, count)), [&](int worker) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i, worker);
  });
}

// Rows of one class, or of none: those that do not count.
struct Piece {
  int64_t c;
  const int64_t* rows;
  int64_t count;
  int64_t large = -1;  // its place among the large classes, if the class has other pieces
};

// A class of several pieces.
struct Large {
  int64_t c, count, first_piece, pieces;
  double of_own = 0;  // the summed gradients of its rows for the class itself
  LpgDelta delta;
};

// The rows that count by class, each class's in their order, then those that do not; cut into pieces.
class ByClass {
 public:
  explicit ByClass(const LpgProblem& p) : rows_(size_t(p.rows)) {
    std::vector<int64_t> next(size_t(p.classes) + 2, 0);
    for (int64_t i = 0; i < p.rows; ++i) ++next[size_t(place(p, i)) + 1];
    for (size_t c = 1; c < next.size(); ++c) next[c] += next[c - 1];
    for (int64_t i = 0; i < p.rows; ++i) rows_[size_t(next[size_t(place(p, i))]++)] = i;
    // next[c] has become the end of class c.
    for (int64_t c = 0, begin = 0; c <= p.classes; begin = next[size_t(c++)]) cut(p, c, begin, next[size_t(c)] - begin);
  }

  std::vector<Piece> pieces;
  std::vector<Large> larges;

 private:
  static int64_t place(const LpgProblem& p, int64_t row) { return p.counts(row) ? p.target[row] : p.classes; }

  void cut(const LpgProblem& p, int64_t c, int64_t begin, int64_t count) {
    const int64_t most = piece_rows(p);
    int64_t large = -1;
    if (count > most && c < p.classes) {
      large = int64_t(larges.size());
      larges.push_back({c, count, int64_t(pieces.size()), (count + most - 1) / most, 0, {}});
    }
    for (int64_t at = 0; at < count; at += most) {
      pieces.push_back({c, rows_.data() + begin + at, std::min(most, count - at), large});
    }
  }

  std::vector<int64_t> rows_;
};

// A row of T for each thread, or for each piece.
class Sums {
 public:
  Sums(const LpgProblem& p, int64_t count) : row_(size_t(p.classes) * wide_size(p)), bytes_(new char[row_ * size_t(count)]) {}
  void* at(int64_t i) const { return bytes_.get() + row_ * size_t(i); }

 private:
  size_t row_;
  std::unique_ptr<char[]> bytes_;
};

class Backward {
 public:
  Backward(const LpgProblem& p, int threads) : p_(p), k_(kernels().lpg()), threads_(worth(p, threads)), scratch_(p, threads_) {}

  void write_by_row(const LpgGradient& gradient, const LpgHow& how) {
    const int64_t step = std::max<int64_t>(1, kElements / std::max<int64_t>(1, p_.classes));
    for_each((p_.rows + step - 1) / step, threads_, [&](int64_t i, int) {
      for (int64_t row = i * step; row < std::min(p_.rows, (i + 1) * step); ++row) {
        const double bound = p_.counts(row) ? how.bound[p_.target[row]] : 0;
        k_.write(p_, gradient, bound == 0 ? LpgDelta{} : own_delta(row, bound), row);
      }
    });
  }

  void write_by_class(const LpgGradient& gradient, const LpgHow& how) {
    ByClass rows(p_);
    const bool measures = !how.means;
    if (measures) sum_large(rows, [&](const Piece& piece) { return how.bound[piece.c] != 0; });
    for_each(int64_t(rows.larges.size()), threads_, [&](int64_t i, int) {
      Large& large = rows.larges[size_t(i)];
      if (measures && how.bound[large.c] != 0)
        large.delta = delta_of(large.c, large.count, large.of_own, totals_of(large), how.bound[large.c]);
    });
    for_each(int64_t(rows.pieces.size()), threads_, [&](int64_t i, int worker) {
      const Piece& piece = rows.pieces[size_t(i)];
      const LpgDelta delta = delta_for(piece, rows, how, worker);
      for (int64_t k = 0; k < piece.count; ++k) k_.write(p_, gradient, delta, piece.rows[k]);
    });
  }

  void class_sums(char* to) {
    ByClass rows(p_);
    sum_large(rows, [](const Piece&) { return true; });
    const size_t row = size_t(p_.classes) * wide_size(p_);
    memset(to, 0, row * size_t(p_.classes));
    for_each(int64_t(rows.pieces.size()), threads_, [&](int64_t i, int worker) {
      const Piece& piece = rows.pieces[size_t(i)];
      if (piece.c == p_.classes || (piece.large >= 0 && rows.larges[size_t(piece.large)].first_piece != i)) return;
      const Large* large = piece.large >= 0 ? &rows.larges[size_t(piece.large)] : nullptr;
      void* sums = large ? totals_of(*large) : scratch_.at(worker);
      const double of_own = large ? large->of_own : k_.accumulate(p_, piece.rows, piece.count, sums);
      k_.combine(p_, sums, 1, to + row * size_t(piece.c), 0, p_.classes);
      put_wide(p_, to + row * size_t(piece.c), piece.c, of_own);
    });
  }

 private:
  static int worth(const LpgProblem& p, int threads) {
    return int(std::clamp<int64_t>(p.rows * p.classes / (kElements / 2), 1, std::max(1, threads)));
  }

  void* totals_of(const Large& large) const { return large_sums_->at(first_sums_[size_t(large.first_piece)]); }

  // Sums the gradients of large classes: each piece into its own place, then the pieces in order into the first one's.
  template <class F> void sum_large(ByClass& rows, F wanted) {
    std::vector<int64_t> due;
    first_sums_.assign(rows.pieces.size(), -1);
    for (size_t i = 0; i < rows.pieces.size(); ++i) {
      if (rows.pieces[i].large < 0 || !wanted(rows.pieces[i])) continue;
      first_sums_[i] = int64_t(due.size());
      due.push_back(int64_t(i));
    }
    if (due.empty()) return;
    large_sums_.reset(new Sums(p_, int64_t(due.size())));
    std::vector<double> of_own(due.size());
    for_each(int64_t(due.size()), threads_, [&](int64_t i, int) {
      const Piece& piece = rows.pieces[size_t(due[size_t(i)])];
      of_own[size_t(i)] = k_.accumulate(p_, piece.rows, piece.count, large_sums_->at(i));
    });
    const int64_t blocks = (p_.classes + kColumns - 1) / kColumns;
    for_each(int64_t(rows.larges.size()) * blocks, threads_, [&](int64_t i, int) {
      Large& large = rows.larges[size_t(i / blocks)];
      const int64_t at = first_sums_[size_t(large.first_piece)], begin = i % blocks * kColumns;
      if (at < 0) return;
      k_.combine(p_, large_sums_->at(at), large.pieces, large_sums_->at(at), begin, std::min(p_.classes, begin + kColumns));
      if (begin == 0) {
        for (int64_t k = 0; k < large.pieces; ++k) large.of_own += of_own[size_t(at + k)];
      }
    });
  }

  LpgDelta delta_for(const Piece& piece, const ByClass& rows, const LpgHow& how, int worker) const {
    if (piece.c == p_.classes || how.bound[piece.c] == 0) return {};
    const double bound = how.bound[piece.c];
    if (how.means) {
      const void* mean = static_cast<const char*>(how.means) + size_t(piece.c) * size_t(p_.classes) * wide_size(p_);
      return towards(piece.c, {0, mean, 1, wide_at(p_, mean, piece.c)}, bound);
    }
    if (piece.large >= 0) return rows.larges[size_t(piece.large)].delta;
    if (piece.count == 1) return own_delta(piece.rows[0], bound);
    const double of_own = k_.accumulate(p_, piece.rows, piece.count, scratch_.at(worker));
    return delta_of(piece.c, piece.count, of_own, scratch_.at(worker), bound);
  }

  // Of a class whose rows' gradients were summed up.
  LpgDelta delta_of(int64_t c, int64_t count, double of_own, const void* sums, double bound) const {
    return towards(c, {0, sums, 1 / double(count), of_own / double(count)}, bound);
  }

  LpgDelta towards(int64_t c, LpgDelta delta, double bound) const {
    const double squares = k_.squares(p_, delta.mean, delta.scale, c) + delta.own_mean * delta.own_mean;
    delta.along = along(bound, std::sqrt(squares));
    return delta.along == 0 ? LpgDelta{} : delta;
  }

  LpgDelta own_delta(int64_t row, double bound) const {
    LpgDelta delta;
    delta.along = along(bound, k_.norm(p_, row));
    return delta;
  }

  const LpgProblem& p_;
  const LpgKernels& k_;
  const int threads_;
  const Sums scratch_;
  std::unique_ptr<Sums> large_sums_;
  std::vector<int64_t> first_sums_;  // a piece's place in large_sums_
};

// With a lane a row: for few classes, whose means have a matrix.
class ByColumn {
 public:
  ByColumn(const LpgProblem& p, int threads) : p_(p), k_(kernels().lpg_columns()), threads_(threads) {}

  void write(const LpgGradient& gradient, const LpgHow& how) {
    std::unique_ptr<char[]> deltas;
    if (!how.by_sample && std::any_of(how.bound, how.bound + p_.classes, [](double b) { return b != 0; })) deltas = learn(how);
    const LpgColumns columns = {how.by_sample ? how.bound : nullptr, deltas.get()};
    for_pieces([&](int64_t begin, int64_t end, int64_t) { k_.write(p_, gradient, columns, begin, end); });
  }

  // The sums of each class's gradients, and how many rows it has.
  std::vector<int64_t> sums(void* to) {
    const size_t size = size_t(p_.classes * p_.classes) * wide_size(p_);
    const int64_t pieces = (p_.rows + rows_in_piece() - 1) / rows_in_piece();
    const std::unique_ptr<char[]> parts(new char[size * size_t(pieces)]);
    for_pieces([&](int64_t begin, int64_t end, int64_t i) { k_.add(p_, begin, end, parts.get() + size * size_t(i)); });
    std::vector<int64_t> counts(size_t(p_.classes), 0);
    for (int64_t i = 0; i < p_.rows; ++i) {
      if (p_.counts(i)) ++counts[size_t(p_.target[i])];
    }
    for (int64_t at = 0; at < p_.classes * p_.classes; ++at) {
      double sum = 0;
      for (int64_t k = 0; k < pieces; ++k) sum += wide_at(p_, parts.get() + size * size_t(k), at);
      put_wide(p_, to, at, sum);
    }
    return counts;
  }

 private:
  // A piece has sums of its own, so it has several times as many rows.
  int64_t rows_in_piece() const { return std::max<int64_t>(4096, 8 * p_.classes); }

  template <class F> void for_pieces(F work) {
    const int64_t step = rows_in_piece();
    for_each((p_.rows + step - 1) / step, threads_, [&](int64_t i, int) { work(i * step, std::min(p_.rows, (i + 1) * step), i); });
  }

  // Class c's delta in column c.
  std::unique_ptr<char[]> learn(const LpgHow& how) {
    const int64_t n = p_.classes;
    std::unique_ptr<char[]> own(how.means ? nullptr : new char[size_t(n * n) * wide_size(p_)]);
    std::vector<int64_t> counts(size_t(n), 1);
    if (own) counts = sums(own.get());
    const void* from = own ? own.get() : how.means;
    std::unique_ptr<char[]> deltas(new char[size_t(n * n) * wide_size(p_)]);
    for (int64_t c = 0; c < n; ++c) {
      const double scale = counts[size_t(c)] ? 1 / double(counts[size_t(c)]) : 0;
      double squares = 0;
      for (int64_t j = 0; j < n; ++j) squares += std::pow(scale * wide_at(p_, from, c * n + j), 2);
      const double a = how.bound[c] == 0 ? 0 : along(how.bound[c], std::sqrt(squares));
      for (int64_t j = 0; j < n; ++j) put_wide(p_, deltas.get(), j * n + c, a == 0 ? 0 : a * scale * wide_at(p_, from, c * n + j));
    }
    return deltas;
  }

  const LpgProblem& p_;
  const LpgColumnKernels& k_;
  const int threads_;
};

}  // namespace

int64_t lpg_stray(const LpgProblem& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    if (p.counts(i) && (p.target[i] < 0 || p.target[i] >= p.classes)) return i;
  }
  return -1;
}

void lpg_forward(const LpgProblem& p, void* loss, const LpgTotals& to, int threads) {
  const size_t bytes = to.tally ? size_t(p.rows) * wide_size(p) : 0;
  const std::unique_ptr<char[]> found(new char[2 * bytes]);
  const LpgRows rows = {loss, bytes ? found.get() : nullptr, bytes ? found.get() + bytes : nullptr};
  const int64_t step = std::max<int64_t>(1, kElements / std::max<int64_t>(1, p.classes));
  const auto forward = p.columns ? kernels().lpg_columns().forward : kernels().lpg().forward;
  for_each((p.rows + step - 1) / step, threads, [&](int64_t i, int) { forward(p, rows, i * step, std::min(p.rows, (i + 1) * step)); });
  to.total[0] = to.total[1] = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (!p.counts(i)) continue;
    to.total[0] += wide_at(p, loss, i);
    to.total[1] += p.weight ? wide_at(p, p.weight, p.target[i]) : 1;
    if (!to.tally) continue;
    double* of_class = to.tally + p.target[i];
    of_class[0] += 1;
    of_class[p.classes] += wide_at(p, rows.confidence, i);
    of_class[2 * p.classes] += wide_at(p, rows.norm, i);
  }
}

void lpg_backward(const LpgProblem& p, const LpgGradient& gradient, const LpgHow& how, int threads) {
  if (p.columns) return ByColumn(p, threads).write(gradient, how);
  Backward backward(p, threads);
  how.by_sample ? backward.write_by_row(gradient, how) : backward.write_by_class(gradient, how);
}

void lpg_class_sums(const LpgProblem& p, void* to, int threads) {
  if (p.columns) {
    ByColumn(p, threads).sums(to);
    return;
  }
  Backward(p, threads).class_sums(static_cast<char*>(to));
}

}  // namespace gradfused::cpu
