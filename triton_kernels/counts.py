"""What a row's numbers depend on besides its group's options: steps taken, the learning rate on the device, trust in the step."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .access import read, rows_of, settings_of
from .chunk import sum_chunks, write
from .rules import warmed_momentum


@triton.jit
def scalar_at(address, dtype, otherwise):
    """The float32 or float64 scalar at an address; ``otherwise``, a float64, if that is 0."""
    value = otherwise
    if address != 0:
        if dtype == at.DType_float64:
            value = read(address, tl.float64)
        else:
            value = read(address, tl.float32).to(tl.float64)
    return value


@triton.jit
def put_scalar(address, dtype, value):
    if dtype == at.DType_float64:
        write(address, value, tl.float64)
    else:
        write(address, value, tl.float32)


@triton.jit
def steps_taken(row):
    zero = tl.full([], 0.0, tl.float64)
    return scalar_at(read(row + at.row_step, tl.int64), read(row + at.row_step_dtype, tl.int8), zero)


@triton.jit
def lr_of(settings):
    lr = read(settings + at.settings_lr, tl.float64)
    return scalar_at(read(settings + at.settings_lr_at, tl.int64), read(settings + at.settings_lr_dtype, tl.int8), lr)


@triton.jit
def next_mu_product(row, settings, step):
    """What the product of NAdam's momenta becomes at ``step``, as the scalar that keeps it holds it."""
    dtype = read(row + at.row_mu_product_dtype, tl.int8)
    old = scalar_at(read(row + at.row_mu_product, tl.int64), dtype, tl.full([], 1.0, tl.float64))
    product = old * warmed_momentum(settings, step)
    return tl.where(dtype == at.DType_float64, product, product.to(tl.float32).to(tl.float64))


# ---- a step is counted


@triton.jit
def count_step(row, settings, PRODUCT: tl.constexpr):
    tl.store((row + at.row_first).to(tl.pointer_type(tl.int8)), 0)
    if PRODUCT:
        at_product = read(row + at.row_mu_product, tl.int64)
        if at_product != 0:
            product = next_mu_product(row, settings, steps_taken(row) + 1.0)
            put_scalar(at_product, read(row + at.row_mu_product_dtype, tl.int8), product)
    at_step = read(row + at.row_step, tl.int64)
    if at_step != 0:
        put_scalar(at_step, read(row + at.row_step_dtype, tl.int8), steps_taken(row) + 1.0)


@triton.jit
def count_empty_rows(job, PRODUCT: tl.constexpr):
    """Rows without elements have no last chunk, but take the step."""
    for number in range(read(job + at.job_row_count, tl.int32)):
        row = rows_of(job) + number * at.DeviceRow
        if read(row + at.row_chunk0, tl.int32) == read(row + at.row_chunk1, tl.int32):
            count_step(row, settings_of(job, row), PRODUCT)


# ---- trust ratios (You et al. 2017, 2020)


@triton.jit
def trust_of(RULE: tl.constexpr, row, settings, weighed):
    """The ratio by which a rule's step is scaled; 1 where either norm says nothing, or where the row was not weighed."""
    ratio = tl.full([], 1.0, tl.float64)
    weight_norm = read(row + at.row_weight_norm, tl.float64)
    norm = read(row + at.row_norm, tl.float64)
    over = norm
    if (at.rules_trust_gradient >> RULE) & 1:
        decay = read(settings + at.settings_weight_decay, tl.float64) * weight_norm
        over = norm + decay + read(settings + at.settings_eps, tl.float64)
        weight_norm = read(settings + at.settings_trust_coefficient, tl.float64) * weight_norm
    if weighed & (weight_norm > 0.0) & (norm > 0.0):
        ratio = weight_norm / over
    return ratio


@triton.jit
def finish_weighing(job, row):
    """The norms of a row whose chunks are all weighed."""
    chunk0 = read(row + at.row_chunk0, tl.int32)
    chunk1 = read(row + at.row_chunk1, tl.int32)
    write(row + at.row_norm, tl.sqrt(sum_chunks(job, chunk0, chunk1, at.sums_sum)), tl.float64)
    write(row + at.row_weight_norm, tl.sqrt(sum_chunks(job, chunk0, chunk1, at.sums_weight_squares)), tl.float64)
