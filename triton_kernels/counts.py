"""What a row's numbers depend on besides its group's options: steps taken, the learning rate on the device, trust in the step."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .access import read, rows_of, settings_of
from .chunk import sum_chunks, write
from .rules import next_mu_product, ratio_of


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
def mu_product_of(row, settings, step):
    """The product of the momenta up to ``step``; what the row keeps is that of the step before."""
    dtype = read(row + at.row_mu_product_dtype, tl.int8)
    before = scalar_at(read(row + at.row_mu_product, tl.int64), dtype, tl.full([], 1.0, tl.float64))
    return next_mu_product(settings, step, before, dtype)


# ---- a step is counted


@triton.jit
def count_step(row, settings, NEEDS: tl.constexpr):
    tl.store((row + at.row_first).to(tl.pointer_type(tl.int8)), 0)
    if at.Need_mu_product & NEEDS:
        address = read(row + at.row_mu_product, tl.int64)
        if address != 0:
            mu_product = mu_product_of(row, settings, steps_taken(row) + 1.0)
            put_scalar(address, read(row + at.row_mu_product_dtype, tl.int8), mu_product)
    at_step = read(row + at.row_step, tl.int64)
    if at_step != 0:
        put_scalar(at_step, read(row + at.row_step_dtype, tl.int8), steps_taken(row) + 1.0)


@triton.jit
def count_empty_rows(job, NEEDS: tl.constexpr):
    """Rows without elements have no last chunk, but take the step."""
    for number in range(read(job + at.job_row_count, tl.int32)):
        row = rows_of(job) + number * at.DeviceRow
        if read(row + at.row_chunk0, tl.int32) == read(row + at.row_chunk1, tl.int32):
            count_step(row, settings_of(job, row), NEEDS)


# ---- trust ratios


@triton.jit
def trust_of(RULE: tl.constexpr, row, settings, known):
    """The ratio by which a rule scales its step; 1 unless the norms of the row's trust ratio are ``known``."""
    ratio = tl.full([], 1.0, tl.float64)
    if known:
        weight_norm = read(row + at.row_weight_norm, tl.float64)
        ratio = ratio_of(RULE, settings, weight_norm, read(row + at.row_norm, tl.float64))
    return ratio


@triton.jit
def finish_trust(job, row):
    """Put the norms of a row's trust ratio together from its chunks."""
    chunk0 = read(row + at.row_chunk0, tl.int32)
    chunk1 = read(row + at.row_chunk1, tl.int32)
    write(row + at.row_norm, tl.sqrt(sum_chunks(job, chunk0, chunk1, at.sums_sum)), tl.float64)
    write(row + at.row_weight_norm, tl.sqrt(sum_chunks(job, chunk0, chunk1, at.sums_weight_squares)), tl.float64)
