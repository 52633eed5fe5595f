"""Bytes that kernels move, read from a text written by hand."""

from lmscale.plan.moved import kernels, moved_bytes

TEXT = """
HloModule step

%fused_row (p.0: f32[100,8], p.1: s32[]) -> f32[1,8] {
  %p.0 = f32[100,8]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,8]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,8}
}

%fused_update (p.0: bf16[100,8], p.1: f32[1,8], p.2: s32[]) -> (bf16[100,8], f32[1,8]) {
  %p.0 = bf16[100,8]{1,0} parameter(0)
  %p.1 = f32[1,8]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %narrow = bf16[1,8]{1,0} convert(%p.1)
  %updated = bf16[100,8]{1,0} dynamic-update-slice(%p.0, %narrow, %p.2, %zero)
  %double = f32[1,8]{1,0} add(%p.1, %p.1)
  ROOT %both = (bf16[100,8]{1,0}, f32[1,8]{1,0}) tuple(%updated, %double)
}

%body (state: (s32[], f32[100,8])) -> (s32[], f32[100,8]) {
  %state = (s32[], f32[100,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %table = f32[100,8]{1,0} get-tuple-element(%state), index=1
  %row.1 = f32[1,8]{1,0} fusion(%table, %i), kind=kLoop, calls=%fused_row
  ROOT %next = (s32[], f32[100,8]{1,0}) tuple(%i, %table)
}

%condition (state: (s32[], f32[100,8])) -> pred[] {
  %state = (s32[], f32[100,8]{1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (table: f32[100,8], cache: bf16[100,8], i: s32[]) -> f32[100,8] {
  %table = f32[100,8]{1,0} parameter(0)
  %cache = bf16[100,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %seen = f32[1,8]{1,0} fusion(%table, %i), kind=kLoop, calls=%fused_row, metadata={op_name="gather"}
  %written = (bf16[100,8]{1,0}, f32[1,8]{1,0}) fusion(%cache, %seen, %i), kind=kLoop, calls=%fused_update
  %flat = f32[800]{0} bitcast(%table)
  %other = f32[100,8]{1,0:T(8)} copy(%table)
  %init = (s32[], f32[100,8]{1,0}) tuple(%i, %other)
  %loop = (s32[], f32[100,8]{1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %out = f32[100,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_slice_an_update_in_place_a_copy_and_a_loop():
  row = 8 * 4
  assert {name: (times, size) for name, times, size in kernels(TEXT)} == {
    'seen': (1, row + 4 + row), 'written': (1, row + 4 + 8 * 2 + row), 'other': (1, 2 * 800 * 4), 'row.1': (5, row + 4 + row),
  }  # fmt: skip
  assert moved_bytes(TEXT) == 6 * (2 * row + 4) + (2 * row + 4 + 16) + 6400
