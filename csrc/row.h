// The state of one row between the phases: normalisers of both sides and the cross sum, merged block by block.
//
// Each block is summed in the working precision relative to its own maximum and merged here in double, so that the
// precision doesn't depend on where the maximum stands in the row, and a row is read once.
#pragma once

namespace {

// One side: the reference that its exponents are relative to (a maximum, or 0 where nothing is finite), and their sum.
struct Side {
  double ref, sum;
};

struct RowState {
  Side z, v;       // student and teacher at temperature T
  double cross;    // sum e^a (A a + B b) of a Cross divergence
  double sum_one;  // the student's sum at T = 1, where the hard term needs its own
  double sum_g;    // sum of g of a Pair divergence
};
constexpr int kStateDoubles = 7;
static_assert(sizeof(RowState) == kStateDoubles * 8, "the state is saved as an array of doubles");

// What two sums must be multiplied by to share a reference, and how far their exponents move.
struct Shift {
  double row, block, exp_row, exp_block;
};

KD_FN double exp_of_shift(double x) { return x == 0 ? 1.0 : kd_exp(x); }

// Moves a row's side and a block's to a common reference. A side with no mass takes the other's: it has nothing that a
// shift would change.
KD_FN Shift common_reference(Side& row, Side& block, double scale) {
  if (row.sum == 0) row.ref = block.ref;
  if (block.sum == 0) block.ref = row.ref;
  double ref = block.ref > row.ref ? block.ref : row.ref;
  double r = (row.ref - ref) * scale, b = (block.ref - ref) * scale;
  row.ref = block.ref = ref;
  return {r, b, exp_of_shift(r), exp_of_shift(b)};
}

// Adds a block's sums to the row's. `scale_*` turn raw logits into exponents; A and B are the cross sum's coefficients.
KD_FN void merge(RowState& row, RowState block, double scale_z, double scale_v, double scale_one, bool teacher_weighs,
                 double A, double B) {
  double raw_row = row.z.ref, raw_block = block.z.ref;
  Shift z = common_reference(row.z, block.z, scale_z), v = common_reference(row.v, block.v, scale_v);
  const Shift &a = teacher_weighs ? v : z, &b = teacher_weighs ? z : v;
  double mass_row = teacher_weighs ? row.v.sum : row.z.sum, mass_block = teacher_weighs ? block.v.sum : block.z.sum;
  double cross = 0;
  if (mass_row != 0) cross += a.exp_row * (row.cross + mass_row * (A * a.row + B * b.row));
  if (mass_block != 0) cross += a.exp_block * (block.cross + mass_block * (A * a.block + B * b.block));
  row.cross = cross;
  if (row.sum_one != 0) row.sum_one *= exp_of_shift((raw_row - row.z.ref) * scale_one);
  if (block.sum_one != 0) row.sum_one += block.sum_one * exp_of_shift((raw_block - row.z.ref) * scale_one);
  row.z.sum = z.exp_row * row.z.sum + z.exp_block * block.z.sum;
  row.v.sum = v.exp_row * row.v.sum + v.exp_block * block.v.sum;
}

}  // namespace
