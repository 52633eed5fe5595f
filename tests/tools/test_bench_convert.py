"""An import and an export stay within the memory that the docs promise."""

import re

import bench_convert
import pytest


@pytest.mark.slow
def test_memory_is_within_the_bound(tmp_path, capsys):
  assert bench_convert.main([f'--folder={tmp_path / "made"}']) == 0
  found = re.findall(r'(import|export): \d+ MB, ([0-9.]+) of the bound', capsys.readouterr().out)
  assert [what for what, _ in found] == ['import', 'export']
  assert all(float(share) <= 1 for _, share in found), found
  assert not (tmp_path / 'made').exists()
