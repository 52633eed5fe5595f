"""Accounting without allocation: parameters, FLOPs and bytes per device of any config on any mesh."""
