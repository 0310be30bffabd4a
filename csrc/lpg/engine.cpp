#include "lpg/engine.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/isa.h"
#include "cpu/threads.h"

namespace gradfused::lpg {
namespace {

// Logits that a thread takes at a time, in whole rows: two visits of one class's rows find them in a cache.
constexpr int64_t kElements = 65536;
// Bounds of the rows in a piece. Each piece of a class that has several needs memory for its sums, as much as a row of logits.
constexpr int64_t kFewestRows = 16, kMostRows = 512;
constexpr int64_t kColumns = 4096;

int64_t rows_at_a_time(const Problem& p) { return std::max<int64_t>(1, kElements / std::max<int64_t>(1, p.classes)); }

size_t wide_size(const Problem& p) { return p.dtype == DType::float64 ? sizeof(double) : sizeof(float); }

double wide_at(const Problem& p, const void* values, int64_t i) {
  return p.dtype == DType::float64 ? static_cast<const double*>(values)[i] : double(static_cast<const float*>(values)[i]);
}

void put_wide(const Problem& p, void* values, int64_t i, double value) {
  if (p.dtype == DType::float64) {
    static_cast<double*>(values)[i] = value;
  } else {
    static_cast<float*>(values)[i] = float(value);
  }
}

// to[i] <- the sum of parts[k * stride + i] over k < count, for begin <= i < end. `to` may be the first part.
void combine(const Problem& p, const void* parts, int64_t stride, int64_t count, void* to, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    double sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += wide_at(p, parts, k * stride + i);
    put_wide(p, to, i, sum);
  }
}

// T[count][classes], not initialised.
class WideRows {
 public:
  WideRows(const Problem& p, int64_t count) : row_(size_t(p.classes) * wide_size(p)), bytes_(new char[row_ * size_t(count)]) {}
  char* row(int64_t i) const { return bytes_.get() + row_ * size_t(i); }

 private:
  size_t row_;
  std::unique_ptr<char[]> bytes_;
};

// Calls work(index, worker) for each index below count. Results do not depend on which thread takes which.
template <class F> void for_each(int64_t count, int threads, F work) {
  std::atomic<int64_t> next{0};
  cpu::parallel(int(std::min<int64_t>(threads, count)), [&](int worker) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i, worker);
  });
}

// Calls work(begin, end, index) for each `step` rows.
template <class F> void for_rows(const Problem& p, int64_t step, int threads, F work) {
  for_each((p.rows + step - 1) / step, threads, [&](int64_t i, int) { work(i * step, std::min(p.rows, (i + 1) * step), i); });
}

// Some rows of class c; c == classes stands for the ignored ones.
struct Piece {
  int64_t c;
  const int64_t* rows;
  int64_t count;
  int64_t large;  // index of its LargeClass, or -1
  int64_t slot;   // of its sums, if it is of a large class
};

// A class of several pieces. The sums of the class end up in the slot of its first piece.
struct LargeClass {
  int64_t c, count, slot, pieces;
  double own_sum = 0;  // the sum of its gradients at the class itself
  Delta delta;
};

// The rows sorted by class, those that are ignored last, and cut into pieces.
class ByClass {
 public:
  explicit ByClass(const Problem& p) : rows_(size_t(p.rows)) {
    const auto place = [&](int64_t row) { return size_t(p.counts(row) ? p.target[row] : p.classes); };
    std::vector<int64_t> next(size_t(p.classes) + 2, 0);
    for (int64_t i = 0; i < p.rows; ++i) ++next[place(i) + 1];
    for (size_t c = 1; c < next.size(); ++c) next[c] += next[c - 1];
    for (int64_t i = 0; i < p.rows; ++i) rows_[size_t(next[place(i)]++)] = i;
    // next[c] has become the end of class c.
    for (int64_t c = 0, begin = 0; c <= p.classes; begin = next[size_t(c++)]) cut(p, c, begin, next[size_t(c)] - begin);
  }

  std::vector<Piece> pieces;
  std::vector<LargeClass> larges;
  int64_t slots = 0;

 private:
  void cut(const Problem& p, int64_t c, int64_t begin, int64_t count) {
    const int64_t most = std::clamp(rows_at_a_time(p), kFewestRows, kMostRows);
    int64_t large = -1;
    if (count > most && c < p.classes) {
      large = int64_t(larges.size());
      larges.push_back({c, count, slots, (count + most - 1) / most, 0, {}});
    }
    for (int64_t i = 0; i < count; i += most) {
      pieces.push_back({c, rows_.data() + begin + i, std::min(most, count - i), large, slots});
      slots += large >= 0;
    }
  }

  std::vector<int64_t> rows_;
};

class ByRow {
 public:
  explicit ByRow(const Problem& p) : p_(p), k_(cpu::kernels().lpg_rows()), threads_(useful_threads(p)), scratch_(p, threads_) {}

  void write_by_sample(const GradientOut& to, const Perturbation& how) {
    for_rows(p_, rows_at_a_time(p_), threads_, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t row = begin; row < end; ++row) {
        const double bound = p_.counts(row) ? how.bound[p_.target[row]] : 0;
        k_.write(p_, to, bound == 0 ? Delta{} : along_row(row, bound), row);
      }
    });
  }

  void write_by_class(const GradientOut& to, const Perturbation& how) {
    ByClass rows(p_);
    if (!how.means) {
      sum_large(rows, [&](int64_t c) { return how.bound[c] != 0; });
      for_each(int64_t(rows.larges.size()), threads_, [&](int64_t i, int) {
        LargeClass& large = rows.larges[size_t(i)];
        const double bound = how.bound[large.c];
        if (bound != 0) large.delta = along_sums(large.c, large.count, sums_->row(large.slot), large.own_sum, bound);
      });
    }
    for_each(int64_t(rows.pieces.size()), threads_, [&](int64_t i, int worker) {
      const Piece& piece = rows.pieces[size_t(i)];
      const Delta delta = delta_of(piece, rows, how, worker);
      for (int64_t k = 0; k < piece.count; ++k) k_.write(p_, to, delta, piece.rows[k]);
    });
  }

  void class_sums(char* to) {
    ByClass rows(p_);
    sum_large(rows, [](int64_t) { return true; });
    const int64_t row = p_.classes * int64_t(wide_size(p_));
    memset(to, 0, size_t(row * p_.classes));
    const auto put = [&](int64_t c, const void* sums, double own_sum) {
      memcpy(to + row * c, sums, size_t(row));
      put_wide(p_, to + row * c, c, own_sum);
    };
    for_each(int64_t(rows.larges.size()), threads_, [&](int64_t i, int) {
      const LargeClass& large = rows.larges[size_t(i)];
      put(large.c, sums_->row(large.slot), large.own_sum);
    });
    for_each(int64_t(rows.pieces.size()), threads_, [&](int64_t i, int worker) {
      const Piece& piece = rows.pieces[size_t(i)];
      if (piece.c == p_.classes || piece.large >= 0) return;
      void* const sums = scratch_.row(worker);
      const double own_sum = k_.accumulate(p_, piece.rows, piece.count, sums);
      put(piece.c, sums, own_sum);
    });
  }

 private:
  static int useful_threads(const Problem& p) {
    return int(std::clamp<int64_t>(p.rows * p.classes / (kElements / 2), 1, std::max(1, p.threads)));
  }

  // Sums the gradients of the large classes that are wanted: each piece into its slot, then the slots of a class in order into the first one.
  template <class F> void sum_large(ByClass& rows, F wanted) {
    sums_.reset(new WideRows(p_, rows.slots));
    std::vector<double> own_sums(size_t(rows.slots));
    for_each(int64_t(rows.pieces.size()), threads_, [&](int64_t i, int) {
      const Piece& piece = rows.pieces[size_t(i)];
      if (piece.large < 0 || !wanted(piece.c)) return;
      own_sums[size_t(piece.slot)] = k_.accumulate(p_, piece.rows, piece.count, sums_->row(piece.slot));
    });
    const int64_t blocks = (p_.classes + kColumns - 1) / kColumns;
    for_each(int64_t(rows.larges.size()) * blocks, threads_, [&](int64_t i, int) {
      LargeClass& large = rows.larges[size_t(i / blocks)];
      if (!wanted(large.c)) return;
      char* const sums = sums_->row(large.slot);
      const int64_t begin = i % blocks * kColumns;
      combine(p_, sums, p_.classes, large.pieces, sums, begin, std::min(p_.classes, begin + kColumns));
      for (int64_t k = 0; begin == 0 && k < large.pieces; ++k) large.own_sum += own_sums[size_t(large.slot + k)];
    });
  }

  Delta delta_of(const Piece& piece, const ByClass& rows, const Perturbation& how, int worker) const {
    const int64_t c = piece.c;
    if (c == p_.classes || how.bound[c] == 0) return {};
    if (how.means) {
      const void* mean = static_cast<const char*>(how.means) + size_t(c * p_.classes) * wide_size(p_);
      return along_mean(c, {0, mean, 1, wide_at(p_, mean, c)}, how.bound[c]);
    }
    if (piece.large >= 0) return rows.larges[size_t(piece.large)].delta;
    if (piece.count == 1) return along_row(piece.rows[0], how.bound[c]);
    void* const sums = scratch_.row(worker);
    const double own_sum = k_.accumulate(p_, piece.rows, piece.count, sums);
    return along_sums(c, piece.count, sums, own_sum, how.bound[c]);
  }

  Delta along_row(int64_t row, double bound) const { return {along(bound, k_.norm(p_, row)), nullptr, 1, 0}; }

  Delta along_sums(int64_t c, int64_t count, const void* sums, double own_sum, double bound) const {
    return along_mean(c, {0, sums, 1 / double(count), own_sum / double(count)}, bound);
  }

  Delta along_mean(int64_t c, Delta delta, double bound) const {
    const double squares = k_.squares(p_, delta.mean, delta.scale, c) + delta.own_mean * delta.own_mean;
    delta.along = along(bound, std::sqrt(squares));
    return delta.along == 0 ? Delta{} : delta;
  }

  const Problem& p_;
  const RowKernels& k_;
  const int threads_;
  const WideRows scratch_;          // a row for each thread
  std::unique_ptr<WideRows> sums_;  // a row for each slot
};

class ByColumn {
 public:
  explicit ByColumn(const Problem& p) : p_(p), k_(cpu::kernels().lpg_columns()) {}

  void write(const GradientOut& to, const Perturbation& how) {
    std::unique_ptr<WideRows> deltas;
    if (!how.by_sample && std::any_of(how.bound, how.bound + p_.classes, [](double b) { return b != 0; })) deltas = learn(how);
    const ColumnDeltas columns = {how.by_sample ? how.bound : nullptr, deltas ? deltas->row(0) : nullptr};
    for_rows(p_, rows_in_piece(), p_.threads, [&](int64_t begin, int64_t end, int64_t) { k_.write(p_, to, columns, begin, end); });
  }

  void class_sums(void* to) {
    const int64_t n = p_.classes, pieces = (p_.rows + rows_in_piece() - 1) / rows_in_piece();
    const WideRows parts(p_, pieces * n);
    for_rows(p_, rows_in_piece(), p_.threads, [&](int64_t begin, int64_t end, int64_t i) { k_.add(p_, begin, end, parts.row(i * n)); });
    combine(p_, parts.row(0), n * n, pieces, to, 0, n * n);
  }

 private:
  // Each piece has (classes, classes) sums, so it has several times as many rows.
  int64_t rows_in_piece() const { return std::max<int64_t>(4096, 8 * p_.classes); }

  // The delta of class c in column c.
  std::unique_ptr<WideRows> learn(const Perturbation& how) {
    const int64_t n = p_.classes;
    std::vector<int64_t> counts(size_t(n), how.means ? 1 : 0);
    const WideRows sums(p_, how.means ? 0 : n);
    if (!how.means) {
      class_sums(sums.row(0));
      for (int64_t i = 0; i < p_.rows; ++i) {
        if (p_.counts(i)) ++counts[size_t(p_.target[i])];
      }
    }
    const void* from = how.means ? how.means : sums.row(0);
    std::unique_ptr<WideRows> deltas(new WideRows(p_, n));
    for (int64_t c = 0; c < n; ++c) {
      const double scale = counts[size_t(c)] ? 1 / double(counts[size_t(c)]) : 0;
      double squares = 0;
      for (int64_t j = 0; j < n; ++j) squares += std::pow(scale * wide_at(p_, from, c * n + j), 2);
      const double a = how.bound[c] == 0 ? 0 : along(how.bound[c], std::sqrt(squares));
      for (int64_t j = 0; j < n; ++j) put_wide(p_, deltas->row(0), j * n + c, a == 0 ? 0 : a * scale * wide_at(p_, from, c * n + j));
    }
    return deltas;
  }

  const Problem& p_;
  const ColumnKernels& k_;
};

}  // namespace

int64_t find_stray(const Problem& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    if (p.counts(i) && (p.target[i] < 0 || p.target[i] >= p.classes)) return i;
  }
  return -1;
}

void forward(const Problem& p, void* loss, const Totals& to) {
  const size_t bytes = to.tally ? size_t(p.rows) * wide_size(p) : 0;
  const std::unique_ptr<char[]> found(new char[2 * bytes]);
  const RowResults rows = {loss, bytes ? found.get() : nullptr, bytes ? found.get() + bytes : nullptr};
  const auto forward = p.by_column ? cpu::kernels().lpg_columns().forward : cpu::kernels().lpg_rows().forward;
  for_rows(p, rows_at_a_time(p), p.threads, [&](int64_t begin, int64_t end, int64_t) { forward(p, rows, begin, end); });
  to.total[0] = to.total[1] = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (!p.counts(i)) continue;
    to.total[0] += wide_at(p, loss, i);
    to.total[1] += p.weight ? wide_at(p, p.weight, p.target[i]) : 1;
    if (!to.tally) continue;
    double* const of_class = to.tally + p.target[i];
    of_class[0] += 1;
    of_class[p.classes] += wide_at(p, rows.confidence, i);
    of_class[2 * p.classes] += wide_at(p, rows.norm, i);
  }
}

void backward(const Problem& p, const GradientOut& to, const Perturbation& how) {
  if (p.by_column) {
    ByColumn(p).write(to, how);
  } else if (how.by_sample) {
    ByRow(p).write_by_sample(to, how);
  } else {
    ByRow(p).write_by_class(to, how);
  }
}

void class_sums(const Problem& p, void* to) { p.by_column ? ByColumn(p).class_sums(to) : ByRow(p).class_sums(static_cast<char*>(to)); }

}  // namespace gradfused::lpg
