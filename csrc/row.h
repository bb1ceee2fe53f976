// The state of one row between the phases: normalisers of both sides and the cross sum, merged block by block.
//
// Each block is summed in the working precision relative to its own maximum and merged here in double, so that the
// precision doesn't depend on where the maximum stands in the row, and a row is read once.
#pragma once

namespace {

// One softmax: the reference that its exponents are relative to (about their maximum; 0 where nothing is finite), and
// their sum.
struct Side {
  double ref, sum;
};

struct RowState {
  Side z, v;     // student and teacher at temperature T
  Side one;      // the student at T = 1, where the hard term needs its own
  double cross;  // sum e^a (A a + B b) of a Cross divergence
  double sum_g;  // sum of g of a Pair divergence
  double top_z, top_v;  // the raw logits that the references at T are of
};

// What two sums are multiplied by to share a reference, and how far their exponents move.
struct Shift {
  double row, block, exp_row, exp_block;
};

KD_FN double exp_of_shift(double x) { return x == 0 ? 1.0 : kd_exp(x); }

// Adds a block's side to the row's. A side with no mass takes the other's reference: it has nothing that a shift would
// change.
KD_FN Shift merge(Side& row, Side block) {
  if (row.sum == 0) row.ref = block.ref;
  if (block.sum == 0) block.ref = row.ref;
  double ref = block.ref > row.ref ? block.ref : row.ref;
  Shift s{row.ref - ref, block.ref - ref, 0, 0};
  s.exp_row = exp_of_shift(s.row);
  s.exp_block = exp_of_shift(s.block);
  row = {ref, s.exp_row * row.sum + s.exp_block * block.sum};
  return s;
}

// Adds a block to the row. A and B are the coefficients of the cross sum, whose weights are the teacher's or the
// student's.
KD_FN void merge(RowState& row, const RowState& block, bool teacher_weighs, double A, double B) {
  double mass_row = teacher_weighs ? row.v.sum : row.z.sum, mass_block = teacher_weighs ? block.v.sum : block.z.sum;
  Shift z = merge(row.z, block.z), v = merge(row.v, block.v);
  merge(row.one, block.one);
  const Shift &a = teacher_weighs ? v : z, &b = teacher_weighs ? z : v;
  double cross = 0;
  if (mass_row != 0) cross += a.exp_row * (row.cross + mass_row * (A * a.row + B * b.row));
  if (mass_block != 0) cross += a.exp_block * (block.cross + mass_block * (A * a.block + B * b.block));
  row.cross = cross;
}

}  // namespace
